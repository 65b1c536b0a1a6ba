"""Caption dropout: who loses the prompt is a function of the sample alone, and all networks agree. A diffusion teacher
learns the empty text in its place, but for runs that were begun when it was the negative prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.load import load_run
from model.types import Conditioning, VisualConditioning
from tests.small import BRIEF, DIFFUSION, SHORT, config, merged, trainer
from trainer import base
from trainer.caption_dropout import with_dropout
from trainer.distillation import ScoreDistillationTrainer
from trainer.micro_batch import MicroBatch
from utils.config import to_plain, to_yaml
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


NEGATIVE = "the digit three moving left"
TEACHER = merged(
    merged(DIFFUSION, SHORT),
    {
        "data": {"negative_prompt": NEGATIVE},
        "diffusion": {"caption_dropout": 0.5},
        "training": {"global_batch_size": 8, "micro_batch_size": 8, "max_steps": 2},
    },
)


def as_saved_before(run: Any) -> dict[str, Any]:
    """What a version without the key saved of a config."""
    values: dict[str, Any] = to_plain(run)
    values["diffusion"].pop("dropped_caption", None)
    return values


def trained_with(run: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that its next iteration trains with."""
    seen: list[str] = []
    conditioning = run.task.conditioning
    monkeypatch.setattr(
        run.task, "conditioning", lambda prompts, *rest: seen.extend(prompts) or conditioning(prompts, *rest)
    )
    run.training_step()
    return seen


def test_a_diffusion_teacher_learns_the_empty_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples lose their captions, whatever they are trained with instead."""
    runs = {
        text: trainer(tmp_path / str(text), TEACHER, diffusion={"dropped_caption": text})
        for text in (None, "empty", "negative")
    }
    new, empty, negative = (trained_with(run, monkeypatch) for run in runs.values())
    captions = runs[None].task.real(range(8)).captions
    assert new == empty
    assert 0 < empty.count("") < 8
    assert [text or NEGATIVE for text in empty] == negative
    assert all(text in ("", caption) for text, caption in zip(empty, captions, strict=True))


def test_a_run_of_an_earlier_version_goes_on_with_the_negative_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its recipe, which does not say the key, and later on too; a key that is said holds."""
    with monkeypatch.context() as before:
        before.setattr(base, "to_plain", as_saved_before)
        trainer(tmp_path, TEACHER, max_steps=1, diffusion={"dropped_caption": "negative"}).train()
    assert trainer(tmp_path, TEACHER).train() == 0
    longer = {"training": {"max_steps": 3}}
    for said, text in ((None, NEGATIVE), ("empty", "")):
        again = trainer(tmp_path, merged(TEACHER, longer), diffusion={"dropped_caption": said})
        assert again.step == 2
        assert again.config.dropped_text == text
    assert load_run(tmp_path / "config.yaml").dropped_text == NEGATIVE


def test_what_an_earlier_version_saved_is_told_from_a_recipe(tmp_path: Path) -> None:
    file, run = tmp_path / "config.yaml", config(TEACHER, diffusion={"dropped_caption": "negative"})
    file.write_text(json.dumps(as_saved_before(run)))  # which is YAML too
    assert load_run(file) == run
    assert load_run(file, ["diffusion.dropped_caption=empty"]).dropped_text == ""
    (tmp_path / "recipe.yaml").write_text(f"trainer: diffusion\ndata: {{negative_prompt: {NEGATIVE}}}\n")
    assert load_run(tmp_path / "recipe.yaml").dropped_text == ""
    (tmp_path / "over.yaml").write_text("base: config.yaml\nseed: 3\n")
    assert load_run(tmp_path / "over.yaml").dropped_text == NEGATIVE
    file.write_text(to_yaml(config(TEACHER)))
    assert load_run(file).dropped_text == ""
    assert config(TEACHER, diffusion={"caption_dropout": 0.0}).dropped_text is None
    assert config(BRIEF).dropped_text is None
