"""Two distilled experts sampled, and exported, as one student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import demo
from configs.experts import expert_of
from generation.card import scheduler_sigmas
from generation.command import inference_args, open_generator
from generation.generator import Generator
from generation.sampling import Sampling, StudentChoice
from generation.two_experts import joined, refuse_half
from model.types import Conditioning
from serving.command import demo_args
from tests.generation.test_export import exported, make_run, network
from tests.small import DIFFUSION, DISTILLATION, config
from utils.errors import UserError
from utils.random import Noise

CPU = torch.device("cpu")
HIGH: dict[str, Any] = {
    "rollout": {"kind": "backward_simulation"},
    "schedule": {"denoising_step_list": [1000, 750], "timestep_shift": 5.0, "min_score_timestep": 875},
}
LOW: dict[str, Any] = {
    "rollout": {"kind": "noised_data"},
    "schedule": {"denoising_step_list": [500, 250], "timestep_shift": 5.0, "max_score_timestep": 875},
}
SEEDS = {"high": 2, "low": 3}  # of make_run's averaged student, and of its critic


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {
        name: make_run(root / name, config(DISTILLATION, **settings))
        for name, settings in (("high", HIGH), ("low", LOW))
    }


def test_each_expert_makes_the_steps_on_its_side(runs: dict[str, Path]) -> None:
    high, low = Generator.load(runs["high"], CPU), Generator.load(runs["low"], CPU, student=StudentChoice("raw"))
    both = high.with_low(low)
    prompts, ids = high.task.validation_prompts(2), [0, 1]
    sigmas = both.step_list(None)
    assert [round(s, 4) for s in sigmas] == [1.0, 0.9375, 0.8333, 0.625]
    made = both(prompts, Sampling(seed=4), ids)
    source = Noise(4, 0, ids, CPU)
    x, condition = (
        source.normal("noise", high.task.latent_shape),
        Conditioning(high.task.conditioning(prompts).prompt["text"]),
    )
    with torch.no_grad():
        for step, sigma in enumerate(sigmas):
            net = (high if sigma >= 0.875 else low).score
            x0 = net.x0(x, torch.full((2,), sigma), condition)
            if step + 1 < len(sigmas):
                eps = source.normal(f"renoise.b0.s{step}", tuple(x.shape[1:]))
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * eps
    torch.testing.assert_close(made, x0, rtol=1e-4, atol=1e-5)


def test_a_low_noise_expert_alone_is_refused_not_fed_noise(runs: dict[str, Path], tmp_path: Path) -> None:
    low = Generator.load(runs["low"], CPU)
    with pytest.raises(UserError, match=r"first step is at noise level 0.833.*--low_run"):
        low(low.task.validation_prompts(1), Sampling(), [0])
    clip = low.task.decode(torch.randn(1, *low.task.latent_shape))[0, :, :1]
    made = low(low.task.validation_prompts(1), Sampling(strength=1.0), [0], clip=clip)
    assert bool(made.isfinite().all())
    with pytest.raises(UserError, match="a low-noise expert makes no pipeline alone"):
        exported(runs["low"], tmp_path / "no")


def test_a_high_noise_expert_alone_is_refused_by_every_program(tmp_path: Path) -> None:
    half = {**HIGH, "student": {"expert": "high"}, "teacher": {"expert": "high"}, "critic": {"expert": "high"}}
    run = make_run(tmp_path / "high", config(DISTILLATION, **half))
    with pytest.raises(UserError, match="the high-noise expert of two.*--low_run"):
        open_generator(inference_args(["--run", str(run), "--prompt", "x", "--out", str(tmp_path / "x.mp4")]), CPU)
    with pytest.raises(UserError, match="the high-noise expert of two.*--low_run"):
        demo.open_generator(demo_args(["--run", str(run)]), CPU)
    with pytest.raises(UserError, match="a high-noise expert makes no pipeline alone: give the low one's run as --low"):
        exported(run, tmp_path / "no")
    page = (exported(run, tmp_path / "native", format="native") / "README.md").read_text()
    assert "This is the high-noise expert of two" in page


def test_half_a_model_is_known_without_its_name_too() -> None:
    phased = config(DISTILLATION, **HIGH, objective={"kind": "phased_dmd"})
    assert expert_of(phased) == "high"
    for half in (phased, config(DIFFUSION, student={"expert": "low"})):
        with pytest.raises(UserError, match="makes no video alone"):
            refuse_half(half)
    refuse_half(config(DISTILLATION, **LOW))  # it may make a clip anew
    assert expert_of(config(DISTILLATION)) is None


def test_an_expert_of_phased_dmd_is_joined_too() -> None:
    both, boundary = joined(config(DISTILLATION, **HIGH, objective={"kind": "phased_dmd"}), config(DISTILLATION, **LOW))
    assert boundary == 0.875
    assert len(both.schedule.sigmas()) == 4


def test_both_are_exported_into_one_pipeline(runs: dict[str, Path], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("accelerate")
    out = exported(runs["high"], tmp_path / "out", "--low_run", str(runs["low"]))
    pipe = diffusers.WanPipeline.from_pretrained(out, vae=None, text_encoder=None, tokenizer=None)
    assert pipe.config.boundary_ratio == 0.875
    both, _ = joined(config(DISTILLATION, **HIGH), config(DISTILLATION, **LOW))
    pipe.scheduler.set_timesteps(sigmas=scheduler_sigmas(both))
    torch.testing.assert_close(pipe.scheduler.sigmas[:-1], torch.tensor(both.schedule.sigmas()), rtol=1e-5, atol=0)
    expected = network(config(DISTILLATION), 2).state_dict()["blocks.0.ffn.0.weight"]
    for net in (pipe.transformer, pipe.transformer_2):
        assert torch.equal(net.state_dict()["blocks.0.ffn.net.0.proj.weight"], expected)


REFUSED = [
    ({"rollout": {"kind": "self_forcing"}}, "share no cache"),
    ({"schedule": {**LOW["schedule"], "max_score_timestep": 1000}}, "trained at all noise levels"),
    ({"schedule": {**LOW["schedule"], "denoising_step_list": [900, 250]}}, "are not those above and below 0.875"),
    ({"schedule": {**LOW["schedule"], "timestep_shift": 3.0}}, "are not those above and below 0.875"),
    ({"data": {"toy": {"frames": 6}}}, "of another geometry or length"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_is_no_pair_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        joined(config(DISTILLATION, **HIGH), config(DISTILLATION, **{**LOW, **changes}))


def test_experts_that_scale_their_shifts_differently_are_no_pair() -> None:
    sized = {**LOW, "training": {"sizes": [{}]}}
    with pytest.raises(UserError, match="scale their shifts by the size of a video differently"):
        joined(config(DISTILLATION, **HIGH), config(DISTILLATION, **sized))
    both = config(DISTILLATION, **HIGH, training={"sizes": [{}]})
    assert joined(both, config(DISTILLATION, **sized))[1] == 0.875
