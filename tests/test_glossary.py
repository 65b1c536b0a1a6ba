"""What the programs print has an entry in docs/glossary.md: the words are collected from the code that prints them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

import pytest
import torch

from evaluation.fid_suite import VideoSet, compare
from evaluation.toy_suite import COLUMNS
from generation.command import FORMATS
from model.family import families
from planning import meter, report
from tests import ROOT

PAGE = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
FINDING = ("Finding", "tried")  # what makes a line of doctor.py; its first argument is the line's name


def entries() -> set[str]:
    """The words of the first column of each table, several to an entry with commas between."""
    cells = re.findall(r"^\| ([^|]+) \|", PAGE, re.M)
    return {word.strip("` ") for cell in cells for word in cell.split(",")}


def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def texts(nodes: object) -> Iterator[str]:
    for node in nodes:  # type: ignore[attr-defined]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def logged() -> set[str]:
    """Names of numbers in metrics.jsonl, without the network's before them."""
    losses = [*(ROOT / "model").glob("*.py"), *(ROOT / "model/objectives").glob("*.py")]
    found = {name for path in losses for name in _of_losses(path.relative_to(ROOT).as_posix())}
    for path in (ROOT / "trainer").glob("*.py"):
        for node in ast.walk(parsed(f"trainer/{path.name}")):
            if isinstance(node, ast.Dict):
                names = set(texts(node.keys))
                found |= names if names & {"step_seconds", "luma"} else set()
            if isinstance(node, ast.JoinedStr):
                found |= {text[1:] for text in texts(node.values[-1:]) if re.fullmatch(r"/[a-z_]+", text)}
    return found


def _of_losses(path: str) -> set[str]:
    """Keys of the mappings in functions that give a LossOutput."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef) and "LossOutput(" in ast.unparse(node):
            found |= {key for inner in ast.walk(node) if isinstance(inner, ast.Dict) for key in texts(inner.keys)}
    return found


def block_labels() -> set[str]:
    """First words of the lines before and after a run."""
    return set(re.findall(r'f?"(\w+) {2,}', (ROOT / "trainer/progress.py").read_text(encoding="utf-8")))


def plan_words() -> set[str]:
    """Columns of its tables, and the kinds of traffic."""
    (time,) = [
        node for node in parsed("planning/report.py").body if isinstance(node, ast.FunctionDef) and node.name == "time"
    ]
    heads = next(node for node in ast.walk(time) if isinstance(node, ast.List) and len(node.elts) > 4)
    kinds = {kind for kind, *_ in meter._COLLECTIVES.values()}
    legend = set(re.findall(r'"([^"]+)"', report.LEGEND))
    return {*report.COLUMNS, *texts(heads.elts[1:]), "replicate", "shard", "sequence"} | kinds | legend


def doctor_words() -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "planning").glob("*.py"):
        for node in ast.walk(parsed(f"planning/{path.name}")):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in FINDING:
                found |= set(texts(node.args[:1]))
    return found


def measures() -> set[str]:
    """What both suites that judge by themselves print."""
    sets = []
    for seed in (0, 1):
        one = VideoSet()
        pixels = torch.rand(3, 4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        one.add(pixels, lambda video: video.flatten(2))
        sets.append(one)
    rows = compare(*sets)
    heads = {head for head, _, _ in COLUMNS} | {
        name.removesuffix("_right") for name in _shares() if name != "prompt_right"
    }
    return heads | {name for row in rows.values() for name in row if not name.endswith("_se")}


def _shares() -> set[str]:
    """Shares of what is right, of the judges."""
    files = (ROOT / "worlds").glob("*_judge.py")
    return {name for path in files for name in re.findall(r'"(\w+_right)"', path.read_text(encoding="utf-8"))}


def export_formats() -> set[str]:
    return {*FORMATS, *(name for family in families().values() for name in family.exporter.formats)}


@pytest.mark.parametrize(
    ("collected", "least"),
    [(logged, 20), (block_labels, 9), (plan_words, 18), (doctor_words, 17), (measures, 20), (export_formats, 7)],
)
def test_each_word_has_an_entry(collected: Callable[[], set[str]], least: int) -> None:
    words = collected()
    assert len(words) >= least
    assert sorted(words - entries()) == []
