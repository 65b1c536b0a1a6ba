"""A video longer than training's: one line where nothing keeps what a block sees at the trained length."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

from generation.generator import Generator
from generation.refusals import beyond_training, warn_once
from generation.sampling import Sampling
from pipeline.causal import CausalConfig
from tests.small import BRIEF, trainer
from utils.logging import console


def windowed(frames: int | None) -> CausalConfig:
    return CausalConfig(3, window_frames=frames)


@pytest.mark.parametrize(
    ("made", "causal", "says"),
    [
        (6, windowed(None), ""),
        (9, windowed(None), "a video of 9 latent frames: .* trained on 6 at the most.*: give --window 6"),
        (9, windowed(6), ""),
        (12, windowed(9), "a window of 9 latent frames: .*: give --window 6"),
        (None, windowed(6), ""),
        (None, windowed(9), "a window of 9 latent frames"),
        (9, None, "a video of 9 latent frames: .*: give --frames 6"),
        (6, None, ""),
    ],
)
def test_what_is_seen_at_once_is_held_against_training(
    made: int | None, causal: CausalConfig | None, says: str
) -> None:
    line = beyond_training(made, causal, 6)
    assert "\n" not in line
    assert bool(line) == bool(says)
    assert re.match(says, line)


def test_a_long_video_without_a_window_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "propagate", True)
    caplog.set_level(logging.WARNING, "fewstep")
    warn_once.cache_clear()
    run = trainer(tmp_path, BRIEF)
    generator = Generator(run.config, run.networks["student"].score, torch.device("cpu"), task=run.task)
    prompt = run.validation_prompts[:1]
    for sampling in (Sampling(), Sampling(frames=9, window=6), Sampling(frames=9), Sampling(frames=9)):
        generator(prompt, sampling, [0])
    assert len(set(caplog.messages)) == 1
    assert "a video of 9 latent frames" in caplog.messages[0]
    generator.endless(prompt, Sampling(), [0])  # which has a window
    assert len(set(caplog.messages)) == 1
