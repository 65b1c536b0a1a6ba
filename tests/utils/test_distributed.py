"""What a process says of its device."""

from __future__ import annotations

import shutil

import pytest
import torch

from utils import distributed


def test_gpus_that_torch_cannot_use_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the environment was made on a node without a GPU; who hides the GPUs is not told."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert distributed.unused_gpus() is None
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    assert "finds no GPU: this runs on the processor" in str(distributed.unused_gpus())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed.unused_gpus() is None
