"""The planned peak of a sharded run against what the allocator of a real rank reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import measured_peak
from tests.distributed.test_data_parallel import ROOT, environment


@pytest.mark.slow
def test_peak_of_two_ranks_is_that_of_a_real_run(tmp_path: Path) -> None:
    """FSDP2 over two gloo ranks, bf16: one micro-batch a rank, and two of two samples, whose gradients wait unsharded."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.distributed.measured_peak", str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("bf16", "wide"):
        real = json.loads((tmp_path / f"{name}.json").read_text())
        plan = measured_peak.planned(measured_peak.config(**measured_peak.CASES[name]), 2)
        assert plan == pytest.approx(real, rel=0.05), name
