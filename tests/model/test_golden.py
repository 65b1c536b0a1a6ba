"""The reference cases, by attention backend and checkpointing, and what the replay command says of bad folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.attention.backends import Backend
from tests import ROOT
from tests.replay import TOLERANCE, Folder, digest, main

GOLDEN = ROOT / "tests" / "golden"
CASES = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
TRAINED = [name for name, case in CASES.items() if case["kind"] in ("dmd", "critic", "sid")]


@pytest.fixture(scope="module", params=[Backend.SDPA, Backend.PLAIN], ids=lambda backend: backend.value)
def folder(request: pytest.FixtureRequest) -> Folder:
    return Folder.read(GOLDEN, request.param)


@pytest.mark.parametrize("name", CASES)
def test_case(folder: Folder, name: str) -> None:
    assert folder.worst_error(name) <= TOLERANCE


@pytest.mark.parametrize("name", TRAINED)
def test_defect_02_case_with_checkpointing(folder: Folder, name: str) -> None:
    assert folder.worst_error(name, checkpointing=True) <= TOLERANCE


def test_all_kinds_of_training_are_among_the_cases() -> None:
    assert {CASES[name]["kind"] for name in TRAINED} == {"dmd", "critic", "sid"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the first case only."""
    for name in ("student", "teacher", "critic"):
        shutil.copy(GOLDEN / f"weights_{name}.safetensors", tmp_path)
    shutil.copy(GOLDEN / "cases.safetensors", tmp_path)
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    manifest["cases"] = {"causal_f6": manifest["cases"]["causal_f6"]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    """Replaces fields of the folder's only case."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["cases"]["causal_f6"].update(changes)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_replay_passes_and_prints_a_line_a_case(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(copy)]) == 0
    first, last = capsys.readouterr().out.strip().splitlines()
    assert first.split()[0] == "causal_f6"
    assert first.split()[-1] == "ok"
    assert last == "1 of 1 cases ok"


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "bidirectional"},
        {"settings": {"batch": 2, "frames": 6, "frames_per_block": 2, "speed": 1}},
        {"settings": {"batch": 2, "frames": 6, "frames_per_block": 2, "guidance": 3.0}},  # known, but to other kinds
        {"settings": {"batch": 2, "frames": 6, "frames_per_block": 4}},
        {"settings": {"batch": 2, "frames": 6}},
        {"settings": {"batch": 2, "frames": 6, "frames_per_block": 3}},
    ],
    ids=["kind", "setting", "foreign_setting", "illegal_block", "missing_setting", "other_block"],
)
def test_replay_fails_on_what_it_does_not_know(
    copy: Path, changes: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy, **changes)
    assert main([str(copy)]) != 0
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["value", "shape", "nan", "unknown_output", "no_outputs"])
def test_replay_fails_on_a_wrong_output(copy: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "cases.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if key.startswith("causal_f6/")}
    x0 = tensors["causal_f6/out.x0"].clone()
    match how:
        case "value":
            tensors["causal_f6/out.x0"] = x0 * 1.001
        case "shape":
            tensors["causal_f6/out.x0"] = x0[:, :5].contiguous()
        case "nan":
            tensors["causal_f6/in.x"] = torch.full_like(tensors["causal_f6/in.x"], float("nan"))
        case "unknown_output":
            tensors["causal_f6/out.score"] = x0
        case "no_outputs":
            tensors = {key: value for key, value in tensors.items() if "/out." not in key}
    save_file(tensors, file)
    assert main([str(copy)]) != 0
    assert "FAIL" in capsys.readouterr().out


def test_replay_fails_without_cases_and_without_a_folder(copy: Path, tmp_path: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text()) | {"cases": {}}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(copy)]) != 0
    assert main([str(tmp_path / "nowhere")]) != 0
    assert main([]) != 0


def test_digests_are_equal_for_equal_bits_only(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = torch.arange(6.0)
    flipped = values.clone()
    flipped.view(torch.int32)[3] ^= 1
    others = [flipped, values.view(2, 3), values.double(), -values]
    assert digest(values) == digest(values.clone())
    assert len({digest(t) for t in [values, *others]}) == 5
    assert main([str(copy), "--digest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main([str(copy), "--digest"]) == 0
    assert lines == capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["causal_f6", "velocity"], ["causal_f6", "x0"]]
