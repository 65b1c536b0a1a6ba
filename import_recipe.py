"""`python import_recipe.py DIALECT FILE [--check] [--out YAML]`: another project's recipe as ours.

The importers know nothing of the schema. What they make is checked here as train.py will check it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from planning.packages import before_torch

# Before anything imports torch, which may not be installed.
os.environ.update(before_torch())

from configs.load import run_from_plain
from importers.dialects import DIALECTS
from importers.read import read_options
from importers.recipe import Recipe
from importers.report import table, to_text
from importers.translate import refusals, translate
from utils.cli import Parser, run_cli
from utils.errors import ConfigError
from utils.writing import write_text, writing


def parser() -> Parser:
    parser = Parser(prog="import_recipe.py", description="Translate another project's recipe into one of ours.")
    parser.add_argument("dialect", choices=tuple(DIALECTS), help="whose recipe it is")
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE",
        help="its YAML, JSON, shell or Python recipe; options of a later file take the place of an earlier one's",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="print a table, an option a line, and write no YAML")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="KEY",
        help="leave this option out where it would be refused; may be given several times",
    )  # fmt: skip
    parser.add_argument("--preset", help="geometry of models whose name does not tell their size, such as 1.3b")
    parser.add_argument("--out", type=Path, help="write the YAML here instead of printing it; never over a file")
    return parser


def main() -> int:
    args = parser().parse_args()
    recipe = translate(DIALECTS[args.dialect], read_options(*args.files), args.allow, args.preset)
    source = f"{args.dialect}'s {', '.join(file.name for file in args.files)}"
    problems = refusals(recipe) or schema_problems(recipe)
    if args.check:
        print(table(recipe), end="")
    if problems:
        print(f"import_recipe.py: error: {refusal(source, problems)}", file=sys.stderr, flush=True)
        return 2
    if not args.check:
        put_out(to_text(recipe, source), args.out)
    return 0


def schema_problems(recipe: Recipe) -> list[str]:
    """Why train.py would refuse the recipe: nothing, or one line."""
    try:
        run_from_plain(recipe.values)
    except ConfigError as problem:
        return [f"train.py would refuse it: {problem}"]
    return []


def refusal(source: str, problems: list[str]) -> str:
    """One message for all that was not understood."""
    count = "one thing is" if len(problems) == 1 else f"{len(problems)} things are"
    lines = "".join(f"\n  {problem}" for problem in problems)
    return f"{source}: {count} not understood, and no recipe was made (--allow KEY leaves an option out):{lines}"


def put_out(text: str, out: Path | None) -> None:
    """Prints the YAML, or writes it where no file is yet. Raises UserError."""
    if out is None:
        print(text, end="")
        return
    with writing("--out", out):
        is_there = out.exists()
    if is_there:
        raise ConfigError(f"--out {out}: is there already: give another name")
    write_text(out, text, "--out")


if __name__ == "__main__":
    run_cli(main)
