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


def test_peak_is_what_the_allocator_counts(tmp_path: Path) -> None:
    """Within 10 %: what kernels take within themselves is estimated."""
    config = measured_peak.config(
        student=WIDE, teacher=WIDE, critic=WIDE, training={"precision": "bf16"},
        data={"synthetic": {"frames": 6, "height": 32, "width": 32}},
    )  # fmt: skip
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
