"""The sections `rollout` and `optimizer`: their kind decides which keys they have. Modes are refused in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from configs.load import load_run, run_from_state
from configs.rollout import RolloutConfig, SelfForcingConfig
from configs.schema import RunConfig
from configs.sections import DiffusionConfig, Precision, TrainingConfig, ValidationConfig
from model.attention.sparse import SparseConfig
from model.codec import VAEConfig
from model.gan_config import GANConfig
from model.network import NetworkConfig
from model.objectives.dmd import DMDConfig
from model.objectives.f_distill import FDistillConfig
from model.text_encoder import TextConfig
from tests import ROOT
from utils.config import to_plain
from utils.errors import ConfigError
from utils.optim import OptimizerConfig, TrainedConfig, optimizers
from utils.optimizers.adamw import AdamWConfig
from utils.optimizers.muon import MuonConfig
from utils.parallel.deepspeed import DeepSpeedConfig
from utils.parallel.mesh import ParallelConfig

TOY, TEACHER = ROOT / "configs/toy/self_forcing_dmd.yaml", ROOT / "configs/toy/teacher.yaml"  # by Muon
OPTIMIZER = "generator_training.optimizer"


def test_every_optimizer_has_one_file_and_the_default_is_the_first() -> None:
    files = {path.stem for path in (ROOT / "utils/optimizers").glob("*.py")} - {"__init__"}
    assert set(optimizers()) == files
    assert next(iter(optimizers())) == OptimizerConfig.kind == TrainedConfig().optimizer.kind
    for section in (OptimizerConfig, RolloutConfig):
        assert all(config().kind == kind for kind, config in section.variants().items())


@pytest.mark.parametrize("kind", optimizers())
def test_an_optimizers_options_are_of_all_that_it_makes(kind: str) -> None:
    config, weight, bias = (
        optimizers()[kind](),
        nn.Parameter(nn.Linear(2, 3).weight.data),
        nn.Parameter(nn.Linear(2, 3).bias.data),
    )
    made = config.make([bias], [weight] if config.takes_matrices else [], weight.dtype)
    assert made.keys() == config.options().keys()
    for name, optimizer in made.items():
        options = config.options()[name]
        assert {key: optimizer.param_groups[0][key] for key in options} == options


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rollout.kind=backward_simulation", "rollout.self_gradient=true"],
            "rollout.self_gradient=True: self_gradient is not for kind backward_simulation: leave it out, or choose "
            "self_forcing",
        ),
        (
            ["rollout={kind: noised_data, num_training_frames: 9}"],
            "rollout.num_training_frames=9: num_training_frames is not for kind noised_data: leave it out, or choose",
        ),
        (
            ["rollout={kind: teacher_forcing, last_step_only: true}"],
            "rollout.last_step_only=True: last_step_only is not for kind teacher_forcing: leave it out, or choose "
            "self_forcing, backward_simulation, noised_data",
        ),
        (
            ["objective='${rollout}'"],
            "objective: '${rollout}': Invalid type assigned: SelfForcingConfig is not a subclass of",
        ),
        (["rollout=noised_data"], "rollout: 'noised_data' is a kind of this section: write rollout.kind=noised_data"),
        (["rollout.num_training_frames=9"], "rollout.num_training_frames 9 must be 6 plus a multiple of the block of"),
        (["data.kind=digits"], "data.kind digits and causal.num_frame_per_block disagree: 1 latent frames"),
        (["rollout.kind=self_forced"], "rollout.kind: 'self_forced' is not allowed: did you mean 'self_forcing'?"),
        ([f"{OPTIMIZER}.muon_lr=1"], f"{OPTIMIZER}.muon_lr=1: muon_lr is not for kind adamw: leave it out, or choose"),
        ([f"{OPTIMIZER}.kind=moun"], f"{OPTIMIZER}.kind: 'moun' is not allowed: did you mean 'muon'?"),
        ([f"{OPTIMIZER}.kind=muon", f"{OPTIMIZER}.muon_lr=0"], f"{OPTIMIZER}.muon_lr must be positive, got 0"),
        ([f"{OPTIMIZER}.betas=[0.9]"], f"{OPTIMIZER}.betas must be two numbers in [0, 1), got [0.9]"),
        (["parallel.engine=deep"], "parallel.engine: 'deep' is not allowed: did you mean 'deepspeed'?"),
        (["data.kind=wan", "data.vae.dtype=fp16"], "data.vae.dtype: 'fp16' is not allowed: "),
        (["data.kind=wan", "data.text.quantization=int4"], "data.text.quantization: 'int4' is not allowed: "),
        (["student.init_weights=mean"], "student.init_weights: 'mean' is not allowed: give one of ema, raw, critic"),
        (["teacher.expert=middle"], "teacher.expert: 'middle' is not allowed: give one of high, low or null"),
        (["student.sparse={backend: cuda}"], "student.sparse.backend: 'cuda' is not allowed: give one of reference, "),
    ],
)
def test_what_cannot_be_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_run(TOY, overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_kind_takes_over_what_it_has() -> None:
    """The recipes say last_step_only of Self-Forcing, and a Muon rate: neither stands in the way of another kind."""
    rollout = load_run(TOY, ["rollout.kind=diffusion_forcing", "data.real=true"]).rollout
    assert to_plain(rollout) == {"kind": "diffusion_forcing", "caption_dropout": 0.0, "reuse_rollout": False}
    kept = load_run(TOY, ["rollout.kind=backward_simulation"]).rollout
    assert to_plain(kept) == {
        "kind": "backward_simulation", "caption_dropout": 0.0, "reuse_rollout": False, "last_step_only": True,
    }  # fmt: skip
    muon = load_run(TEACHER).generator_training.optimizer
    adamw = load_run(TEACHER, [f"{OPTIMIZER}.kind=adamw"]).generator_training.optimizer
    assert isinstance(muon, MuonConfig)
    assert adamw == AdamWConfig(lr=muon.lr, betas=muon.betas, clip_norm=muon.clip_norm)


def test_runs_saved_with_keys_that_did_nothing_are_read() -> None:
    values = to_plain(load_run(TOY, ["rollout.kind=backward_simulation"]))
    values["rollout"] |= {"same_step_across_blocks": False, "num_training_frames": None, "self_gradient": False}
    values["generator_training"]["optimizer"] |= {"muon_lr": 0.5, "momentum": 0.9, "muon_weight_decay": 0.1}
    assert run_from_state(values) == load_run(TOY, ["rollout.kind=backward_simulation"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfForcingConfig(kind="noised_data"), "a SelfForcingConfig is no config of kind noised_data: choose"),
        (lambda: RolloutConfig("backward"), "kind 'backward' is unknown: choose self_forcing, backward_simulation, "),
        (lambda: DMDConfig(critic_loss="x1"), "critic_loss 'x1' is unknown: choose flow or x0"),
        (lambda: RunConfig(trainer="distil"), "trainer 'distil' is unknown: choose score_distillation, diffusion, "),
        (lambda: TrainingConfig(precision="fp8"), "precision 'fp8' is unknown: choose fp32 or bf16"),
        (lambda: DiffusionConfig(mode="causal"), "mode 'causal' is unknown: choose bidirectional, diffusion_forcing, "),
        (lambda: ValidationConfig(weights="mean"), "weights 'mean' is unknown: choose ema, raw, both"),
        (lambda: GANConfig(features="student"), "features 'student' is unknown: choose teacher or critic"),
        (lambda: FDistillConfig(divergence="tv"), "divergence 'tv' is unknown: choose "),
        (lambda: OptimizerConfig(), "an OptimizerConfig is no config of kind adamw: choose AdamWConfig"),
        (lambda: ParallelConfig(engine="deep"), "engine 'deep' is unknown: choose fsdp2 or deepspeed"),
        (lambda: DeepSpeedConfig(offload_optimizer="disk"), "offload_optimizer 'disk' is unknown: choose none, cpu, "),
        (lambda: VAEConfig(dtype="fp16"), "dtype 'fp16' is unknown: choose bf16 or fp32"),
        (lambda: TextConfig(dtype="fp16"), "dtype 'fp16' is unknown: choose bf16 or fp32"),
        (lambda: NetworkConfig(attention="fast"), "attention 'fast' is unknown: choose sdpa, plain, flex, flash"),
        (lambda: NetworkConfig(init_weights="mean"), "init_weights 'mean' is unknown: choose ema, raw, critic"),
        (lambda: NetworkConfig(expert="middle"), "expert 'middle' is unknown: choose high or low, or null"),
        (lambda: SparseConfig(backend="cuda"), "backend 'cuda' is unknown: choose reference, triton, flex, or null"),
    ],
)
def test_configs_made_in_python_are_checked_too(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        make()
    assert str(refused.value).startswith(message)


def test_a_mode_may_be_named_in_python() -> None:
    """A text that were kept would be none of the members that the trainers compare it with: fp32 in place of bf16."""
    assert TrainingConfig(precision="bf16").precision is Precision.bf16  # type: ignore[arg-type]
