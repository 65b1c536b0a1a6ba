"""`[torchrun] preprocess.py text --config_path X --prompts FILE --out DIR`: text embeddings, made once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.load import load_run
from configs.schema import RunConfig
from model.family import presets
from tasks.task import TaskContext
from tasks.text_cache import Shard, Source, check, write_shard
from trainer.command import OVERRIDES
from utils import distributed
from utils.cli import Parser, text_encoding
from utils.data.prompts import load_prompts
from utils.errors import UserError
from utils.reading import UTF8

SHARD_PROMPTS = 1024  # what a killed process loses at most


def preprocess_text(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    known = f"presets of networks, as in student.preset=1.3b: {', '.join(presets())}"
    parser = Parser(prog="preprocess.py text", description="Encode prompts, shard by shard.", epilog=known)
    parser.add_argument("--config_path", "--config-path", type=Path, required=True, help="the run that will use it")
    parser.add_argument("overrides", nargs="*", metavar="key=value|YAML", help=OVERRIDES)
    parser.add_argument(
        "--prompts",
        type=Path,
        action="append",
        required=True,
        help="file of prompts, or folder of .parquet; may be given again. The run's validation prompts and negative "
        "prompt are added, and what it trains with in the place of dropped captions",
    )
    parser.add_argument(
        "--encoding", type=text_encoding, default=UTF8, help="of --prompts (default: UTF-8, which training reads)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--shard", metavar="i/n", help="only part i of n, from 0 (default: all parts, of 1024 prompts)")
    parser.add_argument("--check", action="store_true", help="only prove that each prompt is there exactly once")
    args = parser.parse_intermixed_args(argv)
    config = load_run(args.config_path, args.overrides)
    text = config.data.text_source(TaskContext(config.student, config.seed, distributed.device()))
    source = Source.of(_prompts(config, args.prompts, args.encoding), text.identity, text.shapes, text.made_with)
    if args.check:
        check(args.out, source)
        print(f"{args.out}: each of {len(source.prompts)} prompts is there exactly once")
        return 0
    for shard in _shards(args.shard, len(source.prompts)):
        made = write_shard(args.out, shard, source, text.encode)
        here = len(shard.part(len(source.prompts)))
        print(f"{args.out / shard.name}: {here} prompts{'' if made else ', there already'}")
    return 0


def _shards(shard: str | None, prompts: int) -> list[Shard]:
    """The shard that --shard names, which several processes cut into as many; without it, this process's of all."""
    rank, ranks = distributed.rank(), distributed.world_size()
    if shard is not None:
        part = Shard.parse(shard)
        return [Shard(part.index * ranks + rank, part.count * ranks)]
    count = -(-prompts // SHARD_PROMPTS)
    return [Shard(i, count) for i in range(rank, count, ranks)]


def _prompts(config: RunConfig, files: Sequence[Path], encoding: str) -> list[str]:
    """What training will ask for: the files' prompts, and the run's own."""
    prompts = []
    validation_file = config.validation.prompts
    for file in [*files, *([Path(validation_file)] if validation_file else [])]:
        try:
            prompts += load_prompts(file, encoding if file in files else UTF8)
        except (ValueError, OSError) as problem:
            raise UserError(f"{'--prompts' if file in files else 'validation.prompts'}: {problem}") from None
    dropped = [] if config.dropped_text is None else [config.dropped_text]
    return [*prompts, config.data.negative_prompt, *dropped]
