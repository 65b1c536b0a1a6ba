"""Everything in this folder needs CUDA."""

from __future__ import annotations

import pytest
import torch


# of session scope, so that it skips before any other fixture touches the device
@pytest.fixture(scope="session", autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
