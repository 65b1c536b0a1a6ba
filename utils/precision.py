"""The precisions that frozen networks are stored and computed in."""

from __future__ import annotations

from enum import StrEnum

import torch


class Dtype(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"

    @property
    def torch(self) -> torch.dtype:
        return torch.bfloat16 if self is Dtype.bf16 else torch.float32
