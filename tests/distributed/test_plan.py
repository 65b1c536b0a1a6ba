"""The planned peak of a sharded run against what the allocator of a real rank reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import forked
from tests.distributed import measured_peak


@pytest.mark.slow
def test_peak_of_two_ranks_is_that_of_a_real_run(tmp_path: Path) -> None:
    """FSDP2 over two gloo ranks, bf16: one micro-batch a rank, and two of two samples, whose gradients wait unsharded."""
    done = forked.run(2, "tests.distributed.measured_peak", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("bf16", "wide"):
        real = json.loads((tmp_path / f"{name}.json").read_text())
        plan = measured_peak.planned(measured_peak.config(**measured_peak.CASES[name]), 2)
        assert plan == pytest.approx(real, rel=0.05), name
