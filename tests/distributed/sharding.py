"""What the processes of tests/distributed/test_fsdp.py run: short trainings under several splits, and what they saw.

`torchrun -m tests.distributed.sharding FOLDER core|more` writes one file of tensors for each case of this world.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.wan.transformer import WanTransformer
from tests.small import DISTILLATION, NETWORKS, merged, trainer, with_weights
from trainer.base import Trainer
from trainer.ode import ODETrainer
from utils import distributed

BATCH = 8

Case = dict[str, Any]
# unguided: sharded networks run both halves of the guidance in one call, and bf16 kernels round by the batch
BF16: Case = {"training": {"micro_batch_size": 2, "precision": "bf16"}, "objective": {"real_guidance_scale": 1.0}}
ADAPTED = {"lora": {"rank": 4, "targets": ["q", "v", "ffn.0"]}}
# other losses: each is compared with its own run on one rank
OTHERS: dict[str, Case] = {
    "ode": {"trainer": "ode", "critic": None, "ode": {"pairs": 5, "steps": 4, "shift": 3.0, "guidance": 2.0}},
    "sid": {"objective": {"kind": "sid"}, "rollout": {"kind": "backward_simulation", "reuse_rollout": True}},
    # one sharded copy in three roles; the adapters' values do not depend on the ranks, nor do the random weights
    "lora": dict.fromkeys(("student", "critic"), ADAPTED),
    "gan": {"objective": {"gan": {"features": "critic", "weight": 0.5, "depths": [0.5], "discriminator_weight": 0.5}}},
    "sparse": {"student": {"sparse": {"sparsity": 0.6, "cube": [1, 2, 2], "backend": "reference"}}},
    "muon": {"generator_training": {"optimizer": {"kind": "muon", "muon_lr": 1e-3, "muon_weight_decay": 0.1}}},
}
CASES: dict[int, dict[str, Case]] = {
    1: {
        "whole": {},
        "accumulated": {"training": {"micro_batch_size": 2}},
        "bf16": BF16,
        **OTHERS,
    },
    2: {
        "sharded": {"training": {"micro_batch_size": 4}},
        "accumulated": {"training": {"micro_batch_size": 2}},
        "synced": {"training": {"micro_batch_size": 2}, "parallel": {"sync_each_micro_batch": True}},
        "replicated": {"training": {"micro_batch_size": 4}, "parallel": {"replicate": 2}},
        "kept": {"training": {"micro_batch_size": 4}, "parallel": {"keep_gathered_in_rollout": True}},
        "replayed": {
            **dict.fromkeys(("student", "critic"), {"checkpointing": "full"}),
            "parallel": {"sequence": 2, "keep_gathered_in_rollout": True},
        },
        "gathered": {
            "training": {"micro_batch_size": 4},
            "parallel": {"reshard_after_forward": dict.fromkeys(NETWORKS, False)},
        },
        "bf16": BF16,
        "offloaded": {
            "training": {"micro_batch_size": 4},
            "parallel": {"offload_optimizer": True, "offload_teacher": True},
        },
        **{name: merged(OTHERS[name], {"training": {"micro_batch_size": 2}}) for name in ("ode", "sid", "muon")},
    },
    4: {
        "sharded": {"training": {"micro_batch_size": 2}},
        "hybrid": {"training": {"micro_batch_size": 2}, "parallel": {"replicate": 2}},
        "hybrid_synced": {
            "training": {"micro_batch_size": 1},
            "parallel": {"replicate": 2, "sync_each_micro_batch": True},
        },
        "ode": merged(OTHERS["ode"], {"training": {"micro_batch_size": 2}, "parallel": {"sequence": 2}}),
        "lora": {
            **{name: {**ADAPTED, "checkpointing": "full"} for name in ("student", "critic")},
            "training": {"micro_batch_size": 2},
            "parallel": {"sequence": 2, "keep_gathered_in_rollout": True},
        },
        "gan": merged(OTHERS["gan"], {"training": {"micro_batch_size": 2}, "parallel": {"sequence": 2}}),
        "sparse": merged(
            OTHERS["sparse"],
            {
                "student": {"checkpointing": "full"},
                "training": {"micro_batch_size": 4},
                "parallel": {"sequence": 2, "replicate": 2},
            },
        ),
    },
}


# run apart, when the first of them is asked for: `make test` asks for none
MORE = {*OTHERS, "replayed"}
# whose collectives a test looks at: to see them each operation passes through Python, a third of a case's time
COUNTED = {2: {"sharded", "accumulated", "synced", "kept", "gathered"}, 4: {"hybrid", "hybrid_synced"}}


class Calls(TorchDispatchMode):
    """The collectives issued inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def make(folder: Path, name: str, case: Case) -> Trainer:
    optimizer = {"optimizer": {"lr": 1e-3, "eps": 1e-3, "betas": [0.0, 0.99], "clip_norm": 0.5}}
    base = merged(
        with_weights(DISTILLATION, folder),
        {
            "training": {
                "global_batch_size": BATCH, "micro_batch_size": BATCH, "critic_warmup_steps": 0,
                "generator_update_interval": 1,
            },
            "data": {"toy": {"frames": 6}},
            "schedule": {"denoising_step_list": [1000, 500]},
            "generator_training": optimizer,
            "critic_training": optimizer,
        },
    )  # fmt: skip
    for network in NETWORKS:
        if "lora" in (case.get(network) or {}):  # the shared copy is the teacher's
            base = merged(base, {network: {"init": base["teacher"]["init"]}})
    return trainer(folder / f"run_{distributed.world_size()}_{name}", base, **case)


def run(folder: Path, name: str, case: Case) -> dict[str, Tensor]:
    """Two iterations: losses, gradients before clipping, weights and averages after, and how often ranks talked."""
    made = make(folder, name, case)
    seen: dict[str, Tensor] = {}
    for trained in made.networks.values():
        clip = trained.engine.clip

        def recorded(trained: Any = trained, clip: Any = clip) -> Tensor:
            for key, p in trained.optimizer.named.items():
                seen[f"grad/{made.step}/{trained.name}/{key}"] = distributed.full(p.grad).clone()
            return clip()

        trained.engine.clip = recorded  # type: ignore[method-assign]
    counted = name in COUNTED.get(distributed.world_size(), ())
    for made.step in range(2):
        with Calls() if counted else nullcontext() as calls:
            metrics = made.training_step()
        for kind in ("gather", "reduce_scatter", "allreduce"):
            if calls is not None:
                seen[f"calls/{made.step}/{kind}"] = torch.tensor(sum(kind in call for call in calls.names))
        seen |= {f"metric/{made.step}/{key}": torch.tensor(value) for key, value in metrics.items()}
    for trained in made.networks.values():
        seen |= {f"weight/{trained.name}/{k}": distributed.full(v) for k, v in trained.optimizer.named.items()}
        if trained.ema is not None:
            seen |= {f"ema/{trained.name}/{k}": distributed.full(v) for k, v in trained.ema.shadow.items()}
    if distributed.world_size() > 1:
        seen |= held(made)
    if isinstance(made, ODETrainer):
        seen["pairs"] = made.trajectories
    seen["evaluations"] = torch.tensor(made.summed_evaluations()["frames"]["teacher"])
    return {key: value.detach().contiguous().clone() for key, value in seen.items()}


def held(made: Trainer) -> dict[str, Tensor]:
    """Bytes of weights that this rank keeps between steps, by network."""
    nets: dict[str, nn.Module] = {name: trained.net for name, trained in made.networks.items()}
    nets["teacher"] = made.teacher.net  # type: ignore[attr-defined]
    out = {}
    for name, net in nets.items():
        for module in net.modules():
            reshard = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()
        assert isinstance(net, WanTransformer)
        assert all(isinstance(p, DTensor) for p in net.parameters())
        out[f"held/{name}"] = torch.tensor(sum(distributed.local(p).nbytes for p in net.parameters()))
    return out


def main(folder: Path, more: bool) -> None:
    """Runs the cases of this world: those of MORE, or the others."""
    distributed.init()
    world = distributed.world_size()
    for name, case in ((name, case) for name, case in CASES[world].items() if (name in MORE) is more):
        seen = run(folder, name, case)
        if distributed.is_main():
            save_file(seen, folder / f"{world}_{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "more")
    distributed.leave(0)
