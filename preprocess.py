"""`python preprocess.py --config_path X --prompts FILE --out DIR [--shard i/n]`: text embeddings, made once."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch loads OpenMP: threads that spin while they wait starve another process on the same few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from configs.schema import RunConfig
from trainer.build import build_task
from trainer.text_cache import Shard, Source, check, write_shard
from utils import distributed
from utils.cli import Parser, refuse_several_ranks, run_cli
from utils.config import UserError, config_hash, load
from utils.data.prompts import load_prompts


def main() -> int:
    parser = Parser(prog="preprocess.py", description="Encode a prompt file, shard by shard.")
    parser.add_argument("--config_path", "--config-path", type=Path, required=True, help="the run that will use it")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--prompts", type=Path, required=True, help="file of prompts (.txt, .csv, .jsonl)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--shard", default="0/1", metavar="i/n", help="part i of n, from 0; skipped where it is there")
    parser.add_argument("--check", action="store_true", help="only prove that each prompt is there exactly once")
    args = parser.parse_intermixed_args()
    refuse_several_ranks("preprocess.py")
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


if __name__ == "__main__":
    run_cli(main)
