"""Builds the sparse attention kernels for a GPU that need not be there: `python -m tests.model.attention.triton_build 90 bf16 128`.

Prints, as JSON, each kernel's shared memory in bytes and whether it multiplies on tensor cores.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.attention.vsa import fused, kernels

DTYPES = {"fp32": (torch.float32, tl.float32), "bf16": (torch.bfloat16, tl.bfloat16)}
STAGES = {"attend_kernel": fused.FORWARD_STAGES}
COUNTS = {"heads", "length", "rows", "m", "n", "K"}
INDICES = {"tokens", "counts", "chosen", "readers", "offsets"}
FP32 = {"means", "d_means", "scores", "coarse", "d_coarse", "logsum", "delta"}


def build(name: str, capability: int, precision: str, width: int) -> Any:
    """One kernel, as fused.py launches it on tiles of 64 slots."""
    dtype, kernel_dtype = DTYPES[precision]
    fixed = {"D": width, "T": 64, "DOT": kernel_dtype, "ROWS": 2, "BLOCK": 2048}
    kernel = getattr(kernels, name)

    def kind(argument: str) -> str:
        if argument in fixed:
            return "constexpr"
        if argument == "scale":
            return "fp32"
        if argument in COUNTS or argument[-2:] in {"_b", "_l", "_n"}:
            return "i32"
        return "*i32" if argument in INDICES else "*fp32" if argument in FP32 else f"*{precision}"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    constants = {argument: fixed[argument] for argument in kernel.arg_names if argument in fixed}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if "*" in signature[a]}
    options = fused.launch_options(dtype, STAGES.get(name, fused.BACKWARD_STAGES)) if "DOT" in constants else {}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capability: str, precision: str, width: str) -> None:
    found = {}
    for name in sorted(n for n in vars(kernels) if n.endswith("_kernel")):
        made = build(name, int(capability), precision, int(width))
        found[name] = {"shared": made.metadata.shared, "tensor_cores": "mma" in made.asm["ptx"]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
