"""What ranks that disagree are told: names and values of three ranks, and the first item of a list that differs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests import forked

pytestmark = pytest.mark.slow
START = "the ranks do not run the same: "


def test_what_differs_is_named_with_its_values_and_ranks(tmp_path: Path) -> None:
    draw = random.Random(0)
    prompts = [f"prompt {i}" for i in range(1000)]
    places = [0, 999, *(draw.randrange(1000) for _ in range(6))]
    long = "x" * 500
    cases: list[tuple[list[dict[str, Any]], str]] = [
        ([{"a": "1", "items": prompts}] * 3, ""),
        ([{"a": "1"}, {"a": "2"}, {"a": "1"}], "a differs: ranks 0, 2: 1, rank 1: 2"),
        ([{"a": "1"}, {}, {"a": "1"}], "a differs: ranks 0, 2: 1, rank 1: absent"),
        ([{"a": "1", "b": "x"}, {"a": "2", "b": "y"}, {"a": "1", "b": "x"}], "a differs: ranks 0, 2: 1, rank 1: 2; b differs: ranks 0, 2: x, rank 1: y"),
        ([{"items": prompts}, {"items": prompts[:-1]}, {"items": prompts}], "items, number 1000 differs: ranks 0, 2: prompt 999, rank 1: nothing"),
        ([{"items": []}, {"items": ["a"]}, {"items": []}], "items, number 1 differs: ranks 0, 2: nothing, rank 1: a"),
        ([{"code": ["a.py\0aa", "b.py\0bb"]}, {"code": ["a.py\0aa", "b.py\0cc"]}, {"code": ["a.py\0aa", "b.py\0bb"]}], "code, number 2 (b.py) is not the same: ranks 0, 2: one, rank 1: another"),
        ([{"a.py": "a file\0aa"}, {"a.py": "a file\0cc", "b.py": "a file\0bb"}, {"a.py": "a file\0aa"}], "a.py (a file) is not the same: ranks 0, 2: one, rank 1: another; b.py differs: ranks 0, 2: absent, rank 1: a file"),
        ([{"a": long + "1"}, {"a": long + "2"}, {"a": long + "1"}], f"a differs: ranks 0, 2: ...{'x' * 20}1, rank 1: ...{'x' * 20}2"),
        ([{str(i): "1" for i in range(7)}, {str(i): "2" for i in range(7)}, {}], "; and 2 more: mend it"),
    ]  # fmt: skip
    for place in places:
        other = [*prompts[:place], "another", *prompts[place + 1 :]]
        expected = f"items, number {place + 1} differs: ranks 0-1: prompt {place}, rank 2: another"
        cases.append(([{"items": prompts}, {"items": prompts}, {"items": other}], expected))
    (tmp_path / "cases.json").write_text(json.dumps([of_ranks for of_ranks, _ in cases]))
    done = forked.run(3, "tests.distributed.disagreeing", str(tmp_path / "cases.json"))
    assert done.codes == [0, 0, 0], done.stderr
    for said, (_, expected) in zip(json.loads(done.stdout), cases, strict=True):
        assert said.startswith(START) if expected else said == ""
        assert expected in said
