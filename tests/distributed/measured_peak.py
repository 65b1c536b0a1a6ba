"""`torchrun -m tests.distributed.measured_peak FOLDER`: trains for two iterations and notes the most bytes of tensors held.

The bytes are the CPU allocator's own report, through torch.profiler: the planner's accounting has no part in it.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from configs.schema import RunConfig
from planning.meter import Meter
from planning.plan import worst_moment
from planning.pretend_run import Iteration, pretended_world, run, stripped
from tests import small
from trainer.base import RunOptions
from trainer.build import build_trainer
from utils import distributed

NETWORK = {"preset": "toy", "overrides": {"dim": 128, "ffn_dim": 512, "num_layers": 2}, "attention": "sdpa"}
LAST = 1


def config(**changes: Any) -> RunConfig:
    """Activations, weights and cache of about equal size, two micro-batches on each of at most two ranks."""
    base: dict[str, Any] = {
        "student": NETWORK,
        "teacher": NETWORK,
        "critic": NETWORK,
        "data": {"kind": "synthetic", "real": False, "synthetic": {"frames": 6, "height": 16, "width": 16}},
        "schedule": {"denoising_step_list": [1000, 500]},
        "rollout": {"last_step_only": True},
        "training": {
            "critic_warmup_steps": 0, "generator_update_interval": 1, "micro_batch_size": 1, "global_batch_size": 2,
        },
    }  # fmt: skip
    return small.config(small.merged(small.DISTILLATION, base), **changes)


def measured(config: RunConfig, folder: Path) -> int:
    """Most bytes that rank 0's tensors held, from before they were made to the end of the second iteration."""
    watch = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if distributed.is_main() else nullcontext()
    with watch as profiler:
        trainer = build_trainer(config, RunOptions(folder, "never", wandb=False, save=False, visualize=False))
        for trainer.step in range(2):
            trainer.training_step()
    peak = torch.tensor(peak_of(profiler) if profiler is not None else 0)
    if distributed.world_size() > 1:
        torch.distributed.broadcast(peak, 0)
    return int(peak)


def peak_of(profiler: profile) -> int:
    """Most bytes allocated at a time. A new block at an old block's address replaces it: frees of gloo's thread are not
    reported."""
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    events = []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    held = peak = 0
    blocks: dict[int, int] = {}
    for _, address, size in sorted(events, key=lambda event: event[0]):
        held -= blocks.pop(address, 0)
        if size > 0:
            blocks[address] = size
            held += size
            peak = max(peak, held)
    return peak


def planned(config: RunConfig, world: int) -> float:
    meter = Meter()
    with pretended_world(world):
        record = run(stripped(config), meter, [Iteration(0, [LAST] * 2)])
    return worst_moment(record, frozenset())[1].peak


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"training": {"precision": "bf16"}},
    "checkpointed": {"student": {"checkpointing": "full"}, "critic": {"checkpointing": "full"}},
    "wide": {"training": {"global_batch_size": 8, "micro_batch_size": 2}},
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init()
    for name in ("bf16", "wide"):
        # what gloo's threads freed late still counts: by chance it adds to a peak, so the smallest is nearest to the truth
        peaks = [measured(config(**CASES[name]), folder / f"{name}{again}") for again in range(2)]
        if max(peaks) > 1.005 * min(peaks):  # chance had a part in it
            peaks.append(measured(config(**CASES[name]), folder / f"{name}2"))
        peak = min(peaks)
        if distributed.is_main():
            (folder / f"{name}.json").write_text(json.dumps(peak))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    distributed.leave(0)
