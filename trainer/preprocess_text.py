"""`python preprocess.py text --config_path X --prompts FILE --out DIR [--shard i/n]`: text embeddings, made once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.schema import RunConfig
from trainer.build import build_task
from trainer.text_cache import Shard, Source, check, write_shard
from utils import distributed
from utils.cli import Parser
from utils.config import UserError, config_hash, load
from utils.data.prompts import load_prompts


def preprocess_text(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    parser = Parser(prog="preprocess.py text", description="Encode a prompt file, shard by shard.")
    parser.add_argument("--config_path", "--config-path", type=Path, required=True, help="the run that will use it")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--prompts", type=Path, required=True, help="file of prompts (.txt, .csv, .jsonl)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--shard", default="0/1", metavar="i/n", help="part i of n, from 0; skipped where it is there")
    parser.add_argument("--check", action="store_true", help="only prove that each prompt is there exactly once")
    args = parser.parse_intermixed_args(argv)
    config = load(RunConfig, args.config_path, args.overrides)
    try:
        prompts = load_prompts(args.prompts)
    except (ValueError, OSError) as problem:
        raise UserError(f"--prompts: {problem}") from None
    geometry = config.student.geometry()
    encoder = [config.data.kind, config.data.text_seed, geometry.text_len, geometry.text_dim, config.data.toy]
    source = Source(prompts, config_hash(encoder))
    if args.check:
        check(args.out, source)
        print(f"{args.out}: each of {len(prompts)} prompts is there exactly once")
        return 0
    shard = Shard.parse(args.shard)
    made = write_shard(args.out, shard, source, build_task(config, distributed.device()))
    here = len(shard.part(len(prompts)))
    print(f"{args.out / shard.name}: {here} prompts{'' if made else ', there already'}")
    return 0
