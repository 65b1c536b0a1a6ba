"""What makes a student's passes faster without another student: recorded passes, compiled blocks, fp8 linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model.family import Network
from utils.errors import UserError

FP8_CAPABILITY = (8, 9)  # compute capability of the first NVIDIA GPUs that multiply fp8
SHAPES = 64  # of passes that torch.compile may make code for: one for each number of frames on the way to a full window


@dataclass(frozen=True)
class Acceleration:
    """graphs: passes of a stream are recorded as CUDA graphs and replayed; None: where there is CUDA.

    compile: blocks go through torch.compile, which makes one kernel of a norm and its modulation, of a rotation, and
    takes minutes at first. fp8: the blocks' linear layers multiply in fp8, row by row (torchao), on GPUs that can.
    """

    graphs: bool | None = None
    compile: bool = False
    fp8: bool = False

    def records(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.graphs is None else self.graphs

    def apply(self, nets: Sequence[nn.Module], device: torch.device) -> None:
        """Changes networks for inference in place. Raises UserError for what this machine cannot do."""
        if self.graphs and device.type != "cuda":
            raise UserError("recorded passes need CUDA: leave them out here")
        if self.fp8 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY):
            raise UserError("--fp8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper): leave it out")
        for net in nets:
            assert isinstance(net, Network)
            if self.fp8:
                if (stored := next(net.parameters()).dtype) is not torch.bfloat16:
                    raise UserError(f"--fp8 is for a run in bf16, and this one computes in {stored}: leave it out")
                fp8_linears(net)
            if self.compile:
                compile_blocks(net)


UNCHANGED = Acceleration()


def compile_blocks(net: Network, backend: str = "inductor") -> None:
    """Compiles each block, once for each shape: dynamic shapes do not compile where a context grows."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    for block in net.fsdp_units():
        block.compile(dynamic=False, backend=backend)


def fp8_linears(net: Network, config: Any = None) -> None:
    """The blocks' linear layers in fp8, weights and inputs scaled row by row; embeddings, gates and head stay as they
    are. config: torchao's, in place of that. Raises UserError without torchao."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as problem:
        raise UserError(
            f"--fp8 needs torchao ({problem}): pip install -r requirements-gpu.txt, or leave it out"
        ) from None
    multiplied = set(net.low_bit_layers())
    quantize_(
        net,
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()) if config is None else config,
        filter_fn=lambda module, _name: module in multiplied,
    )
