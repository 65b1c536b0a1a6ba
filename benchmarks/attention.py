"""What self-attention costs, dense and sparse: `python -m benchmarks.attention [--size cpu|480p|720p] [--heads 12] ...`

Dense attention by every backend that runs here, video sparse attention (arXiv 2505.13389) by every backend of ours, on
random queries, keys, values and gates: forward without gradient, and forward with backward. TFLOP/s count the products
of what is attended to, without padding: 4 L M D a head forward, 3.5 times that with backward, times the share of key
tiles kept. The roofline is those products at the rate of one large matrix product, measured here in the same dtype.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import Clock, machine, seconds, table, write_json
from model.attention.backends import Backend, attend
from model.attention.vsa.attention import SparseBackend, available, video_sparse_attention
from model.attention.vsa.tiles import Grids, Shape, Tiling, choose_cube, kept_tiles
from utils.cli import ShowDefaults

Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WITH_BACKWARD = 3.5  # of the forward's products: scores again, then dV, dP, dQ, dK


@dataclass(frozen=True)
class Size:
    """Tokens of a video after patching, and the heads that read them."""

    grid: Shape
    heads: int
    width: int
    device: str
    dtype: torch.dtype


SIZES = {
    "cpu": Size((5, 15, 26), 2, 64, "cpu", torch.float32),
    "480p": Size((21, 30, 52), 12, 128, "cuda", torch.bfloat16),  # 81 frames of 480x832: 32,760 tokens
    "720p": Size((21, 45, 80), 12, 128, "cuda", torch.bfloat16),  # 81 frames of 720x1280: 75,600 tokens
    "smoke": Size((1, 6, 7), 1, 16, "cpu", torch.float32),  # for the tests
}
FUSED = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def dense_runs(device: torch.device) -> dict[str, Run]:
    """Dense attention by name; some cannot run for this device or dtype and say so when called."""

    def by(backend: Backend) -> Run:
        return lambda q, k, v, gate: attend(q, k, v, backend=backend)

    def only(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            out = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    if device.type != "cuda":
        return {backend.value: by(backend) for backend in (Backend.SDPA, Backend.PLAIN, Backend.FLEX)}
    runs: dict[str, Run] = {name: partial(only, kernel) for name, kernel in FUSED.items()}
    return runs | {backend.value: by(backend) for backend in (Backend.FLASH, Backend.FLEX)}


def sparse_runs(size: Size, sparsity: float, cube: Shape) -> dict[str, Run]:
    """Video sparse attention by name; on a CPU without Triton, whose interpreter is no measure."""
    chosen = list(SparseBackend)
    chosen.remove(SparseBackend.REFERENCE if size.device == "cuda" else SparseBackend.TRITON)

    def by(backend: SparseBackend) -> Run:
        return lambda q, k, v, gate: video_sparse_attention(
            q, k, v, gate, Grids(size.grid, cube=cube), sparsity, backend=backend
        )

    return {f"vsa {sparsity:g} {backend.value}": by(backend) for backend in chosen if available(backend) is None}


def measure(run: Run, inputs: tuple[Tensor, ...], repeats: int) -> dict[str, Any]:
    """Seconds forward and with backward; a refusal instead, in one line, where the backend cannot run."""
    device = inputs[0].device
    out: dict[str, Any] = {}
    for name, gradient in (("forward", False), ("forward_backward", True)):
        leaves = [t.detach().requires_grad_(gradient) for t in inputs]
        upstream = torch.ones_like(inputs[0])

        def once(leaves: list[Tensor] = leaves, gradient: bool = gradient, upstream: Tensor = upstream) -> None:
            with torch.set_grad_enabled(gradient):
                result = run(*leaves)  # type: ignore[call-arg]
                if gradient:
                    torch.autograd.grad(result, leaves, upstream, allow_unused=True)  # dense attention has no gate

        try:
            seconds(once, device, 2)  # first calls compile and choose kernels
            out[name] = seconds(once, device, repeats)
        except refusals() as error:  # a kernel that does not fit stops no other
            out[f"{name}_refused"] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return out


def refusals() -> tuple[type[Exception], ...]:
    """The errors of backends that cannot run, and Triton's for kernels that do not compile or do not fit."""
    if available(SparseBackend.TRITON) is not None:
        return RuntimeError, ValueError
    from triton.errors import TritonError

    return RuntimeError, ValueError, TritonError


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of one large square matrix product."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds(lambda: a @ b, device, 3)
    return 2 * side**3 / seconds(lambda: a @ b, device, max(repeats, 5))


def products(size: Size, share: float) -> float:
    """FLOPs of a forward's two products, over the share of keys that a query reads."""
    tokens = Tiling(size.grid, size.grid).tokens
    return 4.0 * tokens * tokens * size.width * size.heads * share


def benchmark(
    size: Size,
    sparsities: list[float],
    cube: Shape,
    repeats: int,
    only: list[str],
    clock: Clock | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Dense attention and sparse attention by each backend, forward and with backward.

    size: grid of tokens, heads, device and dtype.
    sparsities: shares of key tiles left out, in [0, 1].
    cube: a tile's frames, height and width in tokens.
    repeats: calls whose median counts.
    only: backends with one of these words in their name; empty for all.
    clock: the time it may take; backends that have not begun when it is over have no numbers. None: as long as needed.
    save: gets what is returned, with the results so far, after each backend.

    Returns what main writes: seconds, TFLOP/s, share of the roofline, and speedup over the fastest dense backend.
    """
    clock = clock or Clock(None)
    device = torch.device(size.device)
    tiling = Tiling(size.grid, cube)
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, tiling.tokens, size.heads, size.width)
    inputs = tuple(torch.randn(shape, generator=generator, device=device, dtype=size.dtype) for _ in range(4))
    rate = matmul_rate(device, size.dtype, repeats)
    about = {"grid": size.grid, "tokens": tiling.tokens, "heads": size.heads, "head_dim": size.width, "cube": cube}
    about |= {"tiles": tiling.tiles, "padding": tiling.padding, "dtype": str(size.dtype).removeprefix("torch.")}
    about |= {"matmul_tflops": rate / 1e12, "machine": machine(device)}
    results: list[dict[str, Any]] = []
    content = about | {"results": results}
    for sparsity in [None, *sparsities]:
        runs = dense_runs(device) if sparsity is None else sparse_runs(size, sparsity, cube)
        share = 1.0 if sparsity is None else kept_tiles(sparsity, tiling.tiles) / tiling.tiles
        for name, run in runs.items():
            if only and not any(word in name for word in only):
                continue
            found = {"forward_refused": clock.refusal} if clock.is_over else measure(run, inputs, repeats)
            results.append({"name": name, "sparsity": sparsity, "share": share, **found})
            _compare(results, size, rate)
            if save is not None:
                save(content)
    return content


def _compare(results: list[dict[str, Any]], size: Size, rate: float) -> None:
    """Adds to each result what its seconds mean: against the fastest dense one, and against `rate` in FLOP/s."""
    for which, factor in (("forward", 1.0), ("forward_backward", WITH_BACKWARD)):
        best = min((r[which] for r in results if r["sparsity"] is None and which in r), default=None)
        for r in results:
            if which in r:
                flops = factor * products(size, r["share"])
                r[f"{which}_tflops"] = flops / r[which] / 1e12
                r[f"{which}_of_roofline"] = flops / rate / r[which]
                r[f"{which}_speedup"] = None if best is None else best / r[which]


def report(content: dict[str, Any]) -> str:
    """The table, and below it why a backend has no numbers."""
    columns = ("ms", "TFLOP/s", "x dense", "of roofline")
    header = ["attention", "keys", *(f"fwd {c}" for c in columns), *(f"fwd+bwd {c}" for c in columns)]
    rows, refused = [], []
    for r in content["results"]:
        cells = [r["name"], f"{r['share']:.1%}"]
        for which in ("forward", "forward_backward"):
            cells += _cells(r, which)
            if f"{which}_refused" in r:
                refused.append(f"{r['name']}, {which.replace('_', ' + ')}: {r[f'{which}_refused']}")
        rows.append(cells)
    return "\n".join([table(header, rows), *refused])


def _cells(result: dict[str, Any], which: str) -> list[str]:
    if which not in result:
        return ["-"] * 4
    speedup = result[f"{which}_speedup"]
    return [
        f"{result[which] * 1000:.2f}",
        f"{result[f'{which}_tflops']:.3g}",
        "-" if speedup is None else f"{speedup:.2f}",
        f"{result[f'{which}_of_roofline']:.1%}",
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.attention", description=__doc__.splitlines()[0], formatter_class=ShowDefaults
    )
    parser.add_argument("--size", choices=list(SIZES), default="cpu", help="what is measured")
    parser.add_argument("--heads", type=int, help="default: 12 (1.3B) on a GPU; 14B has 40")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9], help="default: 0.8 0.9")
    parser.add_argument("--cube", type=int, nargs=3, help="a tile's frames, height, width; default: what pads least")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="backends with one of these in their name"
    )
    parser.add_argument("--repeats", type=int, help="default: 10, on a CPU 3")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; default: 1")
    parser.add_argument("--seconds", type=float, help="in all; backends that have not begun by then have no numbers")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/attention_SIZE.json")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    size = SIZES[options.size]
    if size.device == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks.attention: --size {options.size} needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    if options.heads:
        size = Size(size.grid, options.heads, size.width, size.device, size.dtype)
    cube = tuple(options.cube) if options.cube else choose_cube(size.grid)
    repeats = options.repeats or (10 if size.device == "cuda" else 3)
    clock = Clock(options.seconds)
    out = options.out or Path("benchmarks/results") / f"attention_{options.size}.json"

    def save(content: dict[str, Any]) -> None:
        write_json(out, {"size": options.size} | content)

    content = benchmark(size, options.sparsity, cube, repeats, options.only, clock=clock, save=save)
    print(report(content))
    print(
        f"{content['tokens']} tokens, cube {cube}, {content['padding']:.1%} padding; {size.heads} heads of {size.width}"
    )
    print(f"{content['dtype']}; a matrix product runs at {content['matmul_tflops']:.3g} TFLOP/s")
    save(content)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
