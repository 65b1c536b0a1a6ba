"""What the processes of tests/distributed/test_deepspeed.py run: short trainings under FSDP2 and ZeRO, and what they saw.

`torchrun -m tests.distributed.zero FOLDER` writes one file of tensors for each case.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.types import LossOutput
from tests.small import DISTILLATION, NETWORKS, config, merged
from trainer.base import RunOptions, Trainer
from trainer.build import build_trainer
from trainer.update import Update
from trainer.zero import portable
from utils import distributed
from utils.parallel.deepspeed import is_partitioned
from utils.parallel.parallelize import reshard
from utils.random import Noise

STEPS, SKIPPED, SAVED = 5, 2, 3
CLIP = 4.0  # between the norms of the steps
Case = dict[str, Any]


def zero(stage: int, **more: Any) -> Case:
    return {"parallel": {"engine": "deepspeed", "deepspeed": {"zero_stage": stage, **more}}}


FSDP2: Case = {}
CHECKPOINTING: Case = {"student": {"checkpointing": "full"}, "critic": {"checkpointing": "selective"}}
RUNS: dict[str, tuple[Case, Case | None]] = {  # the case until the checkpoint, and that of the resumed rest, if any
    "fsdp2": (FSDP2, None),
    "zero2": (zero(2), CHECKPOINTING | zero(2)),
    "zero3": (zero(3), CHECKPOINTING | zero(3)),
    "zero2_offload": (zero(2, offload_optimizer="cpu"), FSDP2),
    "zero3_offload": (FSDP2, zero(3, offload_optimizer="cpu")),
}


def base(folder: Path) -> dict[str, Any]:
    """Both networks learn in every step, two micro-batches an update, gradients are clipped, one network of each kind of AdamW."""
    shared = {"lr": 1e-3, "eps": 1e-3, "clip_norm": CLIP}
    return merged(
        DISTILLATION,
        {
            **{name: {"init": str(folder / f"{name}.safetensors")} for name in NETWORKS},
            "generator_training": {"optimizer": {**shared, "betas": [0.0, 0.99]}},
            "critic_training": {"optimizer": {**shared, "betas": [0.5, 0.99], "weight_decay": 0.1}},
            "training": {
                "max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "critic_warmup_steps": 0,
                "generator_update_interval": 1,
            },
            "checkpoint": {"every": 100},
            "data": {"toy": {"frames": 6}},
            "schedule": {"denoising_step_list": [1000, 500]},
        },
    )  # fmt: skip


def make(folder: Path, name: str, case: Case, resume: str = "never") -> Trainer:
    return build_trainer(config(base(folder), **case), RunOptions(folder / name, resume, wandb=False))


def weights(made: Trainer) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for trained in portable(made.networks).values():
        held: dict[str, dict[str, Tensor]] = {"weight": dict(trained.net.named_parameters())}
        if trained.ema is not None:
            held["ema"] = trained.ema.shadow
        held["square"] = {
            key: trained.optimizer.optimizers["adamw"].state[p]["exp_avg_sq"]
            for key, p in trained.optimizer.named.items()
        }
        for kind, tensors in held.items():
            seen |= {
                f"{kind}/{trained.name}/{k}": distributed.full(v).detach().clone().contiguous()
                for k, v in tensors.items()
            }
    return seen


def skipped_step(made: Trainer) -> None:
    """A step that reports a number that is not finite, though its gradients are: no weight moves, nothing is left over."""
    healthy, before = Update.backward, made.skips.total

    def spoiled(self: Update, output: LossOutput) -> None:
        output.metrics["spoiled"] = torch.tensor(torch.nan)
        healthy(self, output)

    Update.backward = spoiled  # type: ignore[method-assign]
    made.training_step()
    Update.backward = healthy  # type: ignore[method-assign]
    assert made.skips.total == before + 2


def video(made: Trainer) -> Tensor:
    """From the average of the student's weights."""
    prompts, student = made.validation_prompts, made.networks["student"]
    noise = Noise(0, 0, range(len(prompts)), made.device)
    assert student.ema is not None
    with torch.no_grad(), student.ema.applied():
        return made.sample(made.task.conditioning(prompts), made.task.negative(len(prompts)), noise)


def run(folder: Path, name: str, first: Case, rest: Case | None) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    made = make(folder, name, first)
    for made.step in range(STEPS):
        if made.step == SKIPPED:
            skipped_step(made)
        if made.step == SAVED and rest is not None:
            made.save_checkpoint()
            made.saver.wait()
            made = make(folder, name, rest, resume="auto")
            assert made.step == SAVED
        if made.step == SAVED:
            seen["video"] = video(made)
        seen |= {f"metric/{made.step}/{key}": torch.tensor(value) for key, value in made.training_step().items()}
    if is_partitioned(made.networks["student"].net):
        for trained in made.networks.values():
            reshard(trained.net)
            assert all(p.numel() == 0 for p in trained.net.parameters())
    return seen | weights(made)


def main(folder: Path) -> None:
    distributed.init()
    chosen = sys.argv[2:] or list(RUNS)
    for name in chosen:
        seen = run(folder, name, *RUNS[name])
        if distributed.is_main():
            save_file(seen, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    distributed.leave(0)
