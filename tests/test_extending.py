"""docs/extending.md, carried out: its blocks change a copy of the code, and its commands run there."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from model.query import Guidance, ScoreQuery
from model.types import Conditioning, Rollout
from tests import ROOT
from tests.forked import CONTEXT, environment, run_program, serve

PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
ROOMS = [path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py"))]
SECONDS = 400


@dataclass(frozen=True)
class Walk:
    """A section of the page. blocks: (language, title or empty, text), in order."""

    name: str
    blocks: tuple[tuple[str, str, str], ...]

    @property
    def commands(self) -> list[str]:
        text = "".join(body for language, title, body in self.blocks if language == "bash" and not title)
        return text.splitlines()


def walks() -> list[Walk]:
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    return [Walk(text.splitlines()[0], tuple(BLOCK.findall(text))) for text in sections]


def changed(source: str, diff: str) -> str:
    """`source` with each hunk of a diff (they are parted by @@) applied where its lines stand, which must be one place."""
    for hunk in re.split(r"^@@\n", diff, flags=re.M):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert source.count(before) == 1, f"{source.count(before)} places for:\n{before}"
        source = source.replace(before, after)
    return source


def carry_out(walk: Walk, tree: Path) -> None:
    """Makes the walk's files and changes in a tree of the code."""
    for language, title, body in walk.blocks:
        path = tree / title
        if language == "diff":
            path.write_text(changed(path.read_text(encoding="utf-8"), body), encoding="utf-8")
        elif title:
            assert not path.exists(), f"{title} is there already"
            path.write_text(body, encoding="utf-8")


def copied(tree: Path) -> Path:
    for path in ROOT.iterdir():
        if path.name in ROOMS and path.name != "benchmarks":
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__", "golden", "fixtures"))
        elif path.suffix in (".py", ".toml"):
            shutil.copy(path, tree)
    return tree


def in_tree(program: str, arguments: tuple[str, ...], tree: Path, env: dict[str, str], files: list[Path]) -> None:
    """In the forked process: forget the rooms that it has imported, and become a program of the tree."""
    for name in list(sys.modules):
        if name.split(".")[0] in ROOMS:
            del sys.modules[name]
    sys.path.insert(0, str(tree))
    run_program(program, arguments, tree, env, files)


def run(command: str, tree: Path) -> tuple[int, str]:
    """(exit code, what it said) of a `python ...` line."""
    python, *arguments = shlex.split(command)
    assert python == "python"
    if arguments[0] == "-m":
        arguments = arguments[1:]
    said = tree / "said.txt"
    serve()
    work = (arguments[0], tuple(arguments[1:]), tree, environment() | {"PYTHONDONTWRITEBYTECODE": "1"}, [said, said])
    process = CONTEXT.Process(target=in_tree, args=work)
    process.start()
    process.join(SECONDS)
    process.kill()
    code = process.exitcode
    return (os.EX_SOFTWARE if code is None else code), said.read_text()


def test_the_page_has_the_walks() -> None:
    assert [walk.name for walk in walks()] == [
        "An objective", "A data set", "An attention backend", "An optimizer",
    ]  # fmt: skip
    for walk in walks():
        assert walk.commands and any(title for _, title, _ in walk.blocks), walk.name


@pytest.mark.parametrize("walk", walks(), ids=lambda walk: walk.name.replace(" ", "_"))
def test_the_changes_fit_the_code(walk: Walk, tmp_path: Path) -> None:
    for _, title, _ in walk.blocks:
        if title and (ROOT / title).exists():
            (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / title, tmp_path / title)
        elif title:
            (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
    carry_out(walk, tmp_path)


def test_a_change_that_does_not_fit_is_found() -> None:
    assert changed("a\nb\n", " a\n+x\n@@\n-b\n") == "a\nx\n"
    for source in ("b\n", "a\na\n"):
        with pytest.raises(AssertionError, match="places for"):
            changed(source, "-a\n+b\n")


@pytest.mark.slow
@pytest.mark.parametrize("walk", walks(), ids=lambda walk: walk.name.replace(" ", "_"))
def test_a_walk_runs(walk: Walk, tmp_path: Path) -> None:
    tree = copied(tmp_path)
    carry_out(walk, tree)
    for command in walk.commands:
        code, said = run(command, tree)
        assert code == 0, f"{command}\n{said}"
    if folder := re.search(r"--logdir (\S+)", walk.commands[-1]):
        assert list((tree / folder[1] / "checkpoints").glob("step_*/state.json"))
    assert str(ROOT / "model") not in said


@pytest.mark.slow
def test_a_walk_needs_its_changes(tmp_path: Path) -> None:
    """Without them its command is refused: what ran was the changed code."""
    optimizer = next(walk for walk in walks() if walk.name == "An optimizer")
    code, said = run(optimizer.commands[0], copied(tmp_path))
    assert code == 2
    assert "lion" in said


def test_the_loss_of_the_walk_is_right(tmp_path: Path) -> None:
    """Its gradient in x is g / sqrt(1 + (g / c)^2) over the number of elements."""
    source = next(body for _, title, body in walks()[0].blocks if title == "model/objectives/huber_dmd.py")
    (tmp_path / "huber_dmd.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("huber_dmd", tmp_path / "huber_dmd.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Score:
        def __init__(self, shift: float) -> None:
            self.shift = shift

        def guided_x0(self, x, *_):  # type: ignore[no-untyped-def]
            return torch.sin(3 * x) + self.shift

    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, 1, 2, 2, generator=generator) for _ in range(2))
    x0.requires_grad_()
    text, sigma = torch.zeros(2, 1, 1), torch.full((2,), 0.5)
    real, fake = Score(0.2), Score(3.0)
    query = ScoreQuery(Rollout(x0), real, fake, Conditioning(text), Guidance(text, 1.0), sigma, noise)  # type: ignore[arg-type]
    out = module.huber_dmd_loss(query, c=0.7)
    out.loss.backward()
    g = out.kl_gradient
    assert g.abs().min() > 0.1
    torch.testing.assert_close(x0.grad, g / (1 + (g / 0.7).square()).sqrt() / x0.numel())
