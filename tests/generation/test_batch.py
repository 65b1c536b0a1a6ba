"""How many videos are made at once, what that changes (nothing), and how fast they play."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from configs.load import load_run
from generation.batch import MOST, bytes_per_video, fitting
from generation.command import inference_args
from generation.generator import Generator
from generation.sampling import Sampling
from generation.videos import generate_videos
from tests import ROOT
from tests.generation.test_inference import PROMPTS, latents_of
from tests.small import BRIEF, config, trainer
from utils.random import Noise

CPU = torch.device("cpu")
GIB = 2**30


def pretended(recipe: str) -> Generator:
    """What the estimate looks at, of a recipe of true size."""
    run = load_run(ROOT / f"configs/{recipe}.yaml")
    clip = run.data.wan
    task = SimpleNamespace(latent_shape=(clip.frames, run.student.geometry().out_dim, clip.height, clip.width))
    score = SimpleNamespace(compute_dtype=torch.bfloat16)
    return cast(Generator, SimpleNamespace(config=run, causal=run.is_causal, task=task, score=score))


def test_large_networks_make_few_videos_at_once_and_small_ones_many() -> None:
    """A causal student of 21 latent frames at 480p holds 32760 tokens x layers x (key, value) x width x 2 bytes."""
    small, large = (
        bytes_per_video(pretended(f"wan2.1_{size}/self_forcing_dmd"), Sampling()) for size in ("1.3b", "14b")
    )
    assert 32760 * 30 * 2 * 1536 * 2 < small < 7 * GIB
    assert 32760 * 40 * 2 * 5120 * 2 < large < 30 * GIB
    assert fitting(small, 140 * GIB, 100) == MOST
    assert 1 < fitting(small, 40 * GIB, 100) < MOST
    assert fitting(large, 50 * GIB, 100) == 1 == fitting(large, 0, 100)
    assert fitting(1e6, 10 * GIB, 3) == 3
    windowed = bytes_per_video(pretended("wan2.1_1.3b/self_forcing_dmd"), Sampling(frames=210, window=21))
    assert windowed == pytest.approx(small)


def test_the_batch_is_chosen_said_and_kept_and_changes_no_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    trainer(run, BRIEF, max_steps=1).train()
    prompts.write_text("\n".join(PROMPTS))
    generator = Generator.load(run, CPU)

    def made(name: str, *options: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        out = ["--out", str(tmp_path / name), "--format", "safetensors"]
        generate_videos(generator, inference_args(["--run", str(run), "--prompts", str(prompts), *out, *options]))
        return latents_of(tmp_path / name), json.loads((tmp_path / name / "settings.json").read_text())

    chosen, settings = made("chosen")
    assert "2 videos at once: about " in capsys.readouterr().out
    alone, other = made("alone", "--batch", "1")
    assert "at once" not in capsys.readouterr().out
    assert (settings.pop("batch"), other.pop("batch")) == (2, 1)
    assert settings == other
    assert "None" not in settings.values()
    for name, latents in chosen.items():
        torch.testing.assert_close(latents, alone[name], rtol=1e-4, atol=1e-5)
    drawn = Noise(5, 0, [3, 7], CPU).normal("noise", (2, 4))
    assert torch.equal(drawn[1:], Noise(5, 0, [7], CPU).normal("noise", (2, 4)))  # the noise itself, bit for bit
    made("alone", "--batch", "2")  # another batch goes on in the same folder


@pytest.mark.parametrize(
    ("recipe", "fps"),
    [("wan2.1_1.3b/dmd_3step", 16), ("wan2.2_5b/dmd_3step", 24), ("wan2.2_a14b/dmd_high", 16), ("toy/teacher", 8)],
)
def test_videos_play_as_fast_as_the_model_makes_them(recipe: str, fps: int) -> None:
    path = ROOT / f"configs/{recipe}.yaml"
    assert load_run(path, ["validation.fps=null"]).fps == fps == load_run(path).fps
    assert load_run(path, ["validation.fps=12"]).fps == 12
    assert config().fps == 8
    assert inference_args(["--run", "x", "--prompt", "y"]).fps is None
