"""A run small enough to train in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from configs.load import run_from_plain
from configs.schema import RunConfig
from tests.nets import random_net
from trainer.base import RunOptions, Trainer
from trainer.build import build_trainer
from utils.variants import laid

NETWORKS = ("student", "critic", "teacher")
NETWORK = {"preset": "toy", "overrides": {"dim": 32, "ffn_dim": 64, "num_layers": 2}, "attention": "plain"}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, as one YAML over another."""
    return laid(RunConfig, base, changes)


DISTILLATION: dict[str, Any] = {
    "name": "small",
    "student": NETWORK,
    "teacher": NETWORK,
    "critic": NETWORK,
    "schedule": {"denoising_step_list": [1000, 750, 500], "timestep_shift": 3.0, "score_timestep_shift": 1.0},
    "objective": {"real_guidance_scale": 2.0},
    "generator_training": {"optimizer": {"lr": 1e-3}, "lr_schedule": {"kind": "cosine", "warmup_steps": 2, "floor": 0.1}},
    "critic_training": {"optimizer": {"lr": 1e-3}},
    "ema": {"decay": 0.9, "start": 1},
    "training": {
        "max_steps": 10, "critic_warmup_steps": 1, "generator_update_interval": 2, "global_batch_size": 4,
        "micro_batch_size": 4, "precision": "fp32", "threads": 1,
    },
    "checkpoint": {"every": 5, "keep_last": 3},
    "validation": {"every": None, "count": 2},
    "logging": {"tensorboard": False},
}  # fmt: skip

DIFFUSION: dict[str, Any] = merged(
    DISTILLATION,
    {"trainer": "diffusion", "teacher": None, "critic": None, "training": {"critic_warmup_steps": 0}},
)
ODE: dict[str, Any] = merged(
    DISTILLATION,
    {
        "trainer": "ode",
        "critic": None,
        "ode": {"pairs": 6, "steps": 6, "shift": 3.0, "guidance": 2.0},
        "training": {"critic_warmup_steps": 0},
    },
)

BRIEF: dict[str, Any] = merged(  # both networks in every one of four iterations, two blocks and two steps
    DISTILLATION,
    {
        "data": {"toy": {"frames": 6}},
        "schedule": {"denoising_step_list": [1000, 500]},
        "training": {
            "max_steps": 4, "critic_warmup_steps": 0, "generator_update_interval": 1, "global_batch_size": 2,
            "micro_batch_size": 2,
        },
    },
)  # fmt: skip
SHORT: dict[str, Any] = {"data": {"toy": {"frames": 6}}}  # two blocks, for tests to which their number is the same


def config(base: dict[str, Any] = DISTILLATION, **changes: Any) -> RunConfig:
    return run_from_plain(merged(base, changes))


def save_networks(folder: Path) -> None:
    """Weights for the three networks, none of them zero, so that every loss and gradient is something."""
    folder.mkdir(parents=True, exist_ok=True)
    geometry = config().student.geometry()
    for seed, name in enumerate(NETWORKS):
        weights = random_net(seed, geometry).state_dict()
        save_file({key: value.detach() for key, value in weights.items()}, folder / f"{name}.safetensors")


def with_weights(base: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`base` with networks that begin from the files of `save_networks`; fresh heads are zero, and losses may be, too."""
    present = [name for name in NETWORKS if base[name] is not None]
    return merged(base, {name: {"init": str(folder / f"{name}.safetensors")} for name in present})


def trainer(
    path: Path,
    base: dict[str, Any] = DISTILLATION,
    *,
    resume: str = "auto",
    max_steps: int | None = None,
    **changes: Any,
) -> Trainer:
    return build_trainer(config(base, **changes), RunOptions(path, resume, max_steps, wandb=False))
