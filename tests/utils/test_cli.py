"""Help that tells what a command does where it is told nothing."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable

import pytest

import import_recipe
import scripts.methods
import scripts.report
from evaluation.command import evaluation_parser
from generation.command import inference_args
from generation.export import export_args
from model.family import presets
from preprocess import COMMANDS
from serving.command import demo_args
from trainer.command import train_args
from utils.cli import LONGEST, one_line
from utils.errors import UserError

BENCHMARKS = ["streaming", "gpu_check", "attention", "train_step"]
HELP = ["--help"]
PROGRAMS: dict[str, Callable[[], object]] = {
    "train": lambda: train_args(HELP),
    "inference": lambda: inference_args(HELP),
    "demo": lambda: demo_args(HELP),
    "export": lambda: export_args(HELP),
    "evaluate": lambda: evaluation_parser().parse_args(HELP),
    "import_recipe": import_recipe.main,
    "report": scripts.report.main,
    "methods": scripts.methods.main,
    **{f"preprocess {name}": (lambda run=run: run(HELP)) for name, run in COMMANDS.items()},
    **{name: (lambda name=name: importlib.import_module(f"benchmarks.{name}").parse(HELP)) for name in BENCHMARKS},
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_what_each_option_is_by_default(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self, file=None: seen.append(self))
    monkeypatch.setattr(sys, "argv", [program, *HELP])
    with pytest.raises(SystemExit):
        PROGRAMS[program]()
    (parser,) = seen
    valued = [a for a in parser._actions if a.option_strings and a.nargs != 0 and a.help != argparse.SUPPRESS]
    assert valued
    needed = {a for group in parser._mutually_exclusive_groups if group.required for a in group._group_actions}
    for action in valued:
        formatter = parser._get_formatter()
        formatter.add_argument(action)
        said = " ".join(formatter.format_help().split())
        assert ("required" if action.required or action in needed else "default") in said, said
        assert action not in needed or "default: none" not in said, said
        assert not isinstance(action.default, (int, float)) or f"{action.default:g}" in said, said


@pytest.mark.parametrize("program", ["train", "preprocess text", "preprocess ode"])
def test_help_names_the_presets_where_one_can_be_given(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        PROGRAMS[program]()
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in presets())
    assert ", ".join(presets()) in said


def test_an_error_that_quotes_a_long_text_keeps_both_its_ends() -> None:
    assert one_line(UserError("a\n  b")) == "a b"
    said = one_line(UserError(f"--out {'x' * 200_000}: give another place"))
    assert said.startswith("--out xxx") and said.endswith("xxx: give another place") and len(said) < LONGEST + 10
