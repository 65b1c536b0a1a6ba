"""`python import_recipe.py self_forcing|simpletuner|fastvideo FILE [--out YAML]`: a recipe of another project as ours.

The importers know nothing of the schema. What they make is checked here as train.py will check it, and where it would
be refused the YAML says so.
"""

from __future__ import annotations

import os
from pathlib import Path

from planning.packages import before_torch

# Before anything imports torch, which may not be installed.
os.environ.update(before_torch())

from configs.load import run_from_plain
from importers.tables import DIALECTS
from importers.translate import read_options, to_text, translate
from utils.cli import Parser, run_cli
from utils.errors import ConfigError
from utils.writing import write_text, writing


def main() -> int:
    parser = Parser(prog="import_recipe.py", description="Translate another project's recipe into one of ours.")
    parser.add_argument("dialect", choices=tuple(DIALECTS))
    parser.add_argument("file", type=Path, help="its YAML, JSON or shell recipe")
    parser.add_argument("--out", type=Path, help="write the YAML here instead of printing it; never over a file")
    args = parser.parse_args()
    recipe = translate(DIALECTS[args.dialect], read_options(args.file))
    try:
        run_from_plain(recipe.values)
    except ConfigError as problem:
        recipe.fill("before train.py takes it", str(problem))
    text = to_text(recipe, f"{args.dialect}'s {args.file.name}")
    if args.out is None:
        print(text, end="")
        return 0
    with writing("--out", args.out):
        is_there = args.out.exists()
    if is_there:
        raise ConfigError(f"--out {args.out}: is there already: give another name")
    write_text(args.out, text, "--out")
    return 0


if __name__ == "__main__":
    run_cli(main)
