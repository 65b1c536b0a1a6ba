"""Activation checkpointing of a block: what a pass with gradient keeps, and what backward computes again."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


class Checkpointing(Enum):
    """What a pass with gradient keeps of each block. Members are lower case as YAML is."""

    none = "none"  # all activations
    full = "full"  # the block's input; the rest is computed again in backward
    selective = "selective"  # also what dense attention put out: in backward all but that is computed again


def recomputed(block: Callable[..., Any], kind: Checkpointing) -> Callable[..., Any]:
    """`block`, keeping for backward only what `kind` says. Without gradient it is the block itself."""
    if kind is Checkpointing.none or not torch.is_grad_enabled():
        return block
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # a block draws nothing
    if kind is Checkpointing.selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    return partial(checkpoint, block, **options)


def _keep_attention(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Attention's cost grows with the square of the tokens, its output only with the tokens: keep what the fused
    kernels of sdpa, flash-attn and FlexAttention put out. `plain` attention is matrix products like any other: all of
    it is computed again, as with `full`."""
    name = str(operation)
    fused = "scaled_dot_product" in name or "flash_attn" in name or "flex_attention" in name
    return CheckpointPolicy.MUST_SAVE if fused else CheckpointPolicy.PREFER_RECOMPUTE
