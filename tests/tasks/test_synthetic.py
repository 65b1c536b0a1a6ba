"""Synthetic data: any geometry behind the interface of a task, and a run that trains on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import load_run
from evaluation.command import main as evaluate
from model.network import NetworkConfig
from tasks.kinds.synthetic import SyntheticData, SyntheticTask
from tasks.task import TaskContext
from tests import ROOT
from tests.small import BRIEF, DIFFUSION, NETWORK, ODE, merged, trainer
from tests.trainer.test_trainer import curve
from trainer.network_factory import NetworkSpec, build_network
from utils.errors import UserError
from utils.random import keyed_seed
from worlds.synthetic import SyntheticConfig

CPU = torch.device("cpu")


def task(student: NetworkConfig | None = None, **sizes: int) -> SyntheticTask:
    data = SyntheticData(synthetic=SyntheticConfig(**{"frames": 3, "height": 4, "width": 6, **sizes}))
    return SyntheticTask(data, TaskContext(student or NetworkConfig("tiny"), 0, CPU))


def test_a_prompt_has_one_embedding_whatever_is_beside_it() -> None:
    synthetic = task()
    both = synthetic.conditioning(["a", "b"]).prompt["text"]
    assert both.shape == (2, 24, 48)
    assert torch.equal(both[1:], task().conditioning(["b"]).prompt["text"])
    assert not torch.equal(both[0], both[1])
    assert abs(float(both.std()) - 1) < 0.05
    assert synthetic.negative(3)["text"].shape == (3, 24, 48)
    assert torch.equal(synthetic.negative(2)["text"][1:], synthetic.conditioning([""]).prompt["text"])


def test_videos_and_prompts_go_by_position() -> None:
    synthetic = task(prompts=5)
    some, again = synthetic.real(range(2, 6)), synthetic.real(range(4, 6))
    assert some.latents.shape == (4, 3, 4, 4, 6)
    assert torch.equal(some.latents[2:], again.latents)
    assert some.captions[2:] == again.captions
    assert sorted(synthetic.prompts(range(5, 10))) == [f"sample {i}" for i in range(5)]


@pytest.mark.parametrize("channels", [1, 2, 16])
def test_decode_shows_three_channels_and_encode_undoes_it(channels: int) -> None:
    synthetic = task(NetworkConfig("tiny", overrides={"in_dim": channels, "out_dim": channels}))
    latents = torch.rand(2, 3, channels, 4, 6) * 3 - 1.5
    pixels = synthetic.decode(latents)
    assert pixels.shape == (2, 3, 3, 4, 6)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    torch.testing.assert_close(synthetic.encode(pixels)[:, :, :3], latents[:, :, :3])
    torch.testing.assert_close(synthetic.reencode(latents)[:, :, :3], latents[:, -1:, :3])
    with pytest.raises(ValueError, match=r"4, 6\].*got \[1, 1, 3, 8, 8\]"):
        synthetic.encode(torch.zeros(1, 1, 3, 8, 8))


@pytest.mark.parametrize(
    ("recipe", "latents", "tokens", "steps"),
    [
        ("wan2.1_1.3b/self_forcing_dmd", (21, 16, 60, 104), 32760, [1, 0.9375, 0.8333, 0.625]),
        ("wan2.1_14b/self_forcing_dmd", (21, 16, 60, 104), 32760, [1, 0.9375, 0.8333, 0.625]),
        ("wan2.1_1.3b/dmd_3step", (21, 16, 60, 104), 32760, [1, 0.757, 0.522]),
        ("wan2.1_14b/dmd_3step", (21, 16, 60, 104), 32760, [1, 0.757, 0.522]),
        ("wan2.1_1.3b/ode_init", (21, 16, 60, 104), 32760, [1, 0.9375, 0.8333, 0.625]),
        ("wan2.2_5b/dmd_3step", (31, 48, 44, 80), 27280, [1, 0.757, 0.522]),
    ],
)
def test_the_recipes_have_wans_sizes(recipe: str, latents: tuple[int, ...], tokens: int, steps: list[float]) -> None:
    config = load_run(
        ROOT / f"configs/{recipe}.yaml", ["data.kind=synthetic", "data.prompts=null", "validation.every=null"]
    )
    shape = config.student.geometry()
    synthetic = SyntheticTask(config.data, TaskContext(config.student, 0, CPU))
    assert synthetic.latent_shape == latents
    assert synthetic.prompt_shapes == {"text": (512, 4096)}
    assert shape.tokens_per_frame(*latents[2:]) * latents[0] == tokens
    assert config.schedule.sigmas() == pytest.approx(steps, abs=1e-4)
    published = config.training.generator_updates(200)
    assert "self_forcing" not in recipe or (published == 40 == config.ema.start)


def test_a_run_trains_on_it_and_resumes(tmp_path: Path) -> None:
    network = {
        **NETWORK,
        "preset": "tiny",
        "overrides": {"dim": 24, "num_heads": 2, "ffn_dim": 32, "in_dim": 16, "out_dim": 16},
    }
    data = {"kind": "synthetic", "synthetic": {"frames": 3, "height": 4, "width": 6}}
    changes = {
        "student": network, "teacher": network, "critic": network, "data": data,
        "training": {"max_steps": 4}, "checkpoint": {"every": 2}, "validation": {"every": 4, "count": 2},
    }  # fmt: skip
    assert trainer(tmp_path / "whole", **changes).train() == 0
    assert trainer(tmp_path / "parts", max_steps=2, **changes).train() == 0
    assert trainer(tmp_path / "parts", **changes).train() == 0
    whole, parts = ([e for e in curve(tmp_path / name) if "critic/loss" in e] for name in ("whole", "parts"))
    assert whole == parts
    assert len(whole) == 4


@pytest.mark.parametrize("base", [BRIEF, DIFFUSION, ODE], ids=["distillation", "diffusion", "ode"])
@pytest.mark.parametrize("lora", [None, {"rank": 2, "targets": ["q", "ffn.0"]}], ids=["weights", "adapter"])
def test_a_smoke_test_has_losses_and_gradients(
    base: dict[str, Any], lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Zero heads would make teacher and student agree, and a broken gradient would look the same."""
    data = {"kind": "synthetic", "synthetic": {"frames": 3, "height": 4, "width": 4}, "toy": {}}
    changes = {"data": data, "student": {"lora": lora}, "training": {"max_steps": 1}, "ode": {"pairs": 2}}
    trainer(tmp_path, merged(base, changes)).train()
    (first,) = curve(tmp_path)
    seen = {name for name, value in first.items() if name.endswith(("/loss", "/grad_norm")) and value > 1e-5}
    names = {"student", "critic"} if base is BRIEF else {"student"}
    assert seen == {f"{name}/{what}" for name in names for what in ("loss", "grad_norm")}


@pytest.mark.parametrize("preset", ["toy", "edm-digits"])
def test_only_the_heads_of_smoke_tests_are_random(preset: str) -> None:
    network = NetworkConfig(preset)
    spec = NetworkSpec(network, "student", 3)
    usual, smoke = (dict(build_network(s, CPU).named_parameters()) for s in (spec, replace(spec, random_head=True)))
    with torch.random.fork_rng():
        torch.manual_seed(keyed_seed(3, "weights", "student"))
        drawn = dict(network.family.random_weights(network.geometry(), None))
    head = network.family.head
    assert not usual[head].any()
    assert 0.01 < smoke[head].std() < 0.03
    assert all(torch.equal(usual[name], drawn[name]) for name in drawn)
    assert all(torch.equal(usual[name], smoke[name]) for name in drawn if name != head)


def test_only_the_toy_world_has_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"kind": "synthetic", "synthetic": {"frames": 3, "height": 4, "width": 6}}
    trainer(tmp_path, data=data, training={"max_steps": 2}).train()
    monkeypatch.setattr("sys.argv", ["evaluate", "--run", str(tmp_path), "--cache", str(tmp_path)])
    with pytest.raises(UserError, match="data is synthetic: only the toy worlds have a judge"):
        evaluate()
