"""The scripts of examples/, run as their users run them, on runs of a few seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.forked import run
from tests.small import BRIEF, NETWORK, config, save_networks, trainer, with_weights
from utils.config import to_yaml
from utils.logging import read_jsonl
from utils.video import read_video, write_video

PROMPT = "the digit three moving left"
FAST = {
    "training.max_steps": "2", "training.global_batch_size": "2", "training.micro_batch_size": "2",
    "training.precision": "fp32", "validation.every": "2", "validation.count": "1", "validation.steps": "2",
}  # fmt: skip
OVERRIDES = [f"{key}={value}" for key, value in FAST.items()]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal student's run folder, of two blocks of frames; weights/ has its networks."""
    folder = tmp_path_factory.mktemp("student")
    save_networks(folder / "weights")
    trainer(folder / "run", with_weights(BRIEF, folder / "weights"), max_steps=1).train()
    return folder / "run"


def example(name: str, *arguments: object) -> str:
    """What it prints."""
    done = run(1, f"examples.{name}", *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_student_is_streamed(student: Path) -> None:
    lines = example("stream", student, PROMPT).splitlines()
    assert [re.sub(r"after [\d.]+ s", "", line) for line in lines] == [
        f"block {number} : 3 frames of 16 x 16" for number in (1, 2)
    ]
    code = (ROOT / "examples/stream.py").read_text().split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_prompts_become_mp4_files(student: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\nthe digit one moving up\n")
    example("prompts_to_mp4", student, tmp_path / "prompts.txt", "--out", tmp_path / "mine", "--seed", 3)
    index = [json.loads(line) for line in (tmp_path / "mine/videos.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in index] == [PROMPT, "the digit one moving up"]
    first, second = (read_video(tmp_path / "mine" / row["video"]) for row in index)
    assert first.shape[0] == second.shape[0] == 6
    assert not torch.equal(first, second)


def test_a_loss_of_ones_own_trains_a_student(student: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text(to_yaml(config(with_weights(BRIEF, student.parent / "weights"))))
    example(
        "own_loss", "--config_path", yaml, "--logdir", tmp_path / "logs", "objective.size=0.5", "training.max_steps=2"
    )
    for entry in read_jsonl(tmp_path / "logs/metrics.jsonl"):
        assert entry["student/loss"] == pytest.approx(0.5 * 0.5**2, rel=1e-4)  # half the mean square of that gradient
        assert entry["student/dmd_rms"] > 0
        assert entry["student/grad_norm"] > 0
    assert "kind: even_dmd" in (tmp_path / "logs/config.yaml").read_text()


def test_clips_of_ones_own_train_a_teacher(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    captions = ["a bright ball", "a dark ball"]
    for caption, level in zip(captions, (0.9, 0.1), strict=True):
        write_video(tmp_path / "clips" / f"{caption}.mp4", torch.full((8, 3, 32, 48), level), 8)
    yaml = tmp_path / "run.yaml"
    yaml.write_text(f"trainer: diffusion\nstudent: {json.dumps(NETWORK)}\nlogging: {{tensorboard: false}}\n")
    example("own_data", "--clips", tmp_path / "clips", "--config_path", yaml, "--logdir", tmp_path / "logs", *OVERRIDES)
    assert all(
        entry["student/loss"] > 0 for entry in read_jsonl(tmp_path / "logs/metrics.jsonl") if "student/loss" in entry
    )
    assert read_video(next((tmp_path / "logs/validation").glob("*.mp4"))).shape[0] == 6
    assert list((tmp_path / "logs/checkpoints").glob("step_*/state.json"))


def test_a_network_of_ones_own_is_trained_and_sampled(tmp_path: Path) -> None:
    said = example("own_family", "--logdir", tmp_path / "logs", *OVERRIDES, "student.overrides.dim=8")
    assert "sampled [6, 3, 16, 16]" in said
    losses = [entry["student/loss"] for entry in read_jsonl(tmp_path / "logs/metrics.jsonl") if "student/loss" in entry]
    assert len(losses) == 2 and min(losses) > 0


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_each_says_how_it_is_run(path: Path) -> None:
    said = path.read_text().split('"""')[1]
    assert said.startswith("Shows how ")
    assert f"python -m examples.{path.stem} " in said
    assert f"examples/{path.name}" in (ROOT / "docs/python.md").read_text()
