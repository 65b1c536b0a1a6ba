"""GPUs as their vendor's data sheets have them, and the least time that work takes on them."""

from __future__ import annotations

from dataclasses import dataclass

from planning.meter import FLOPS, Cost, Traffic
from utils.errors import UserError

GB = 1e9
EXPOSED = "all-to-all"  # attention waits for it: nothing runs beside it


@dataclass(frozen=True)
class GPU:
    """memory: GB. tflops: bf16 tensor cores, dense (without sparsity), fp32 sums. links: GB/s in one direction to the
    GPUs of a node. network: GB/s in one direction and GPU to other nodes. host: GB/s in one direction to the CPU."""

    memory: float
    tflops: float
    links: float
    network: float
    host: float


# NVIDIA's data sheets of A100, H100 (SXM), H200, L40S, HGX B200 and the Ada architecture white paper (RTX 4090); NVLink
# and PCIe are sold as the sum of both directions, halved here. Network: one adapter a GPU, as in DGX A100 (HDR, 200
# Gb/s), DGX H100, H200 and B200 (NDR, 400 Gb/s); for cards in PCIe slots 100 Gb/s, which no data sheet says.
GPUS: dict[str, GPU] = {
    "a100-40": GPU(40, 312, 300, 25, 32),
    "a100-80": GPU(80, 312, 300, 25, 32),
    "h100": GPU(80, 989, 450, 50, 64),
    "h200": GPU(141, 989, 450, 50, 64),
    "b200": GPU(180, 2250, 900, 50, 64),
    "l40s": GPU(48, 362, 32, 12.5, 32),
    "rtx4090": GPU(24, 165, 32, 12.5, 32),
}

# Assumed, not measured: what CUDA, cuBLAS and NCCL take for themselves, and what the allocator loses to fragments.
CONTEXT_GB, FRAGMENTS = 2.0, 0.05


def find_gpu(name: str) -> GPU:
    """Raises UserError naming those known."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name} is unknown: choose one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def needed_gb(peak: float) -> float:
    """GB that a GPU must have for `peak` bytes of tensors, with the assumed margin."""
    return peak / GB * (1 + FRAGMENTS) + CONTEXT_GB


@dataclass(frozen=True)
class Bound:
    """Least seconds of one iteration, each at the data sheet's full speed. host: between GPU and CPU memory."""

    compute: float
    overlapped: float
    exposed: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Gathers, reductions and transfers wholly behind the arithmetic, or the arithmetic behind them."""
        return max(self.compute, self.overlapped, self.host) + self.exposed

    @property
    def communication(self) -> float:
        return self.overlapped + self.exposed

    @property
    def share(self) -> float:
        """Part of the time that is not arithmetic."""
        return 1 - self.compute / self.total if self.total else 0.0


def bound(cost: Cost, gpu: GPU, host_bytes: float = 0.0) -> Bound:
    """Links and network work at the same time; the slower one counts."""

    def seconds(exposed: bool) -> float:
        ways = [0.0, 0.0]
        for key, size in cost.items():
            if isinstance(key, Traffic) and (key.collective == EXPOSED) == exposed:
                ways[key.inter_node] += size
        return max(ways[0] / gpu.links, ways[1] / gpu.network) / GB

    return Bound(cost.get(FLOPS, 0.0) / gpu.tflops / 1e12, seconds(False), seconds(True), host_bytes / gpu.host / GB)
