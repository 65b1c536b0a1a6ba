"""Caption dropout in distillation: who loses the prompt is a function of the sample alone, and all networks agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.types import Conditioning, VisualConditioning
from tests.small import BRIEF, config, merged, trainer
from trainer.caption_dropout import with_dropout
from trainer.distillation import ScoreDistillationTrainer
from trainer.micro_batch import MicroBatch
from utils.errors import ConfigError
from utils.random import Noise, keyed_seed

GAN: dict[str, Any] = {"objective": {"kind": "dmd", "gan": {"weight": 0.1}}}


class Negative:
    """A task with one negative prompt, -1 everywhere."""

    def negative(self, batch: int) -> dict[str, Tensor]:
        return {"text": -torch.ones(batch, 3, 2), "label": -torch.ones(batch, 5)}


def conditioning(samples: range) -> Conditioning:
    rows = torch.arange(samples.start, samples.stop).float()
    image = VisualConditioning(torch.ones(len(samples), 1, 1, 1, 1))
    return image.with_prompt({"text": rows.view(-1, 1, 1).expand(-1, 3, 2), "label": rows.view(-1, 1).expand(-1, 5)})


def gone(samples: range, share: float, *, seed: int = 0, step: int = 0, phase: str = "generator") -> list[bool]:
    noise = Noise(keyed_seed(seed, phase), step, samples)
    made = with_dropout(conditioning(samples), Negative(), noise, share)  # type: ignore[arg-type]
    assert made.initial is not None
    lost = (made.prompt["text"] == -1).all(dim=(1, 2))
    assert torch.equal(lost, (made.prompt["label"] == -1).all(dim=1))
    assert torch.equal(made.prompt["text"][~lost], conditioning(samples).prompt["text"][~lost])
    return lost.tolist()


def test_the_share_is_met_and_any_split_of_a_batch_drops_the_same() -> None:
    whole = gone(range(2000), 0.3)
    assert abs(sum(whole) / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert [*gone(range(700), 0.3), *gone(range(700, 2000), 0.3)] == whole
    for other in ({"seed": 1}, {"step": 1}, {"phase": "critic"}):
        assert gone(range(2000), 0.3, **other) != whole  # type: ignore[arg-type]
    more = gone(range(2000), 0.6)
    assert all(b for a, b in zip(whole, more, strict=True) if a)


def test_none_dropped_is_the_conditioning_itself() -> None:
    given = conditioning(range(3))
    assert with_dropout(given, Negative(), Noise(0, 0, range(3)), 0.0) is given  # type: ignore[arg-type]


def test_real_samples_lose_their_prompts_with_the_students(tmp_path: Path) -> None:
    """Else the discriminator could tell the student's by the missing prompt."""
    run = trainer(tmp_path, merged(BRIEF, GAN), rollout={"caption_dropout": 0.5})
    assert isinstance(run, ScoreDistillationTrainer)
    positions = range(8)
    noise = Noise(0, 0, positions)
    batch = MicroBatch(positions, noise, 1.0, run.task.latent_shape)
    with torch.no_grad():
        student = run.sample_of(batch, with_gradient=False).conditioning
    assert run.losses.adversary is not None
    real = run.losses.adversary.real(positions, noise, "gan", run.task.latent_shape).conditioning
    negative = run.task.negative(8)["text"]
    lost = [(one.prompt["text"] == negative).flatten(1).all(dim=1) for one in (student, real)]
    assert torch.equal(*lost)
    assert 0 < lost[0].sum() < 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trainer": "ode"}, r"rollout\.caption_dropout 0\.5 is for trainer score_distillation, not ode: set it to 0"),
        ({"objective": {"reward": {"name": "prompt_adherence"}}}, r"objective\.reward judges them by: set it to 0"),
        ({"rollout": {"caption_dropout": 1.0}}, r"rollout\.caption_dropout must be in \[0, 1\), got 1\.0"),
    ],
)
def test_it_is_refused_where_it_makes_no_sense(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(merged(BRIEF, {"rollout": {"caption_dropout": 0.5}}), **changes)
