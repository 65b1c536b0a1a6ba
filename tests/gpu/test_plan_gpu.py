"""The planned peak against torch.cuda's own count, on a real GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from planning.meter import Meter
from planning.plan import worst_moment
from planning.pretend_run import ALLOCATION, Iteration, run, stripped
from tests.distributed import measured_peak
from trainer.base import RunOptions
from trainer.build import build_trainer

WIDE = {"preset": "bench", "overrides": {"num_layers": 4}, "attention": "sdpa", "checkpointing": "full"}


def warm_up() -> None:
    """cuBLAS takes its workspace (32 MiB on Hopper, as much again for backward's thread) at the first product that needs
    it, and keeps it: it is the process's, and no part of the plan, whose peak here is 61 MB."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(256, 256, device="cuda", dtype=dtype)
        x = torch.randn(4, 64, 256, device="cuda", dtype=dtype, requires_grad=True)
        (layer(x) @ x.transpose(1, 2)).sum().backward()
    torch.cuda.synchronize()


def test_peak_is_what_the_allocator_counts(tmp_path: Path) -> None:
    """Within 10 %: the memory that kernels take for their own work is estimated."""
    config = measured_peak.config(
        student=WIDE, teacher=WIDE, critic=WIDE, training={"precision": "bf16"},
        data={"synthetic": {"frames": 6, "height": 32, "width": 32}},
    )  # fmt: skip
    warm_up()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer = build_trainer(config, RunOptions(tmp_path, "never", wandb=False, save=False, visualize=False))
    for trainer.step in range(2):
        trainer.training_step()
    real = torch.cuda.max_memory_allocated() - before
    meter = Meter(granularity=ALLOCATION, cuda=True)
    record = run(stripped(config), meter, [Iteration(0, [measured_peak.LAST] * 2)])
    assert worst_moment(record, frozenset())[1].peak == pytest.approx(real, rel=0.1)
