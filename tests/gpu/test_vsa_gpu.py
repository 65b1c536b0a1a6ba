"""Video sparse attention on CUDA: Triton's kernels and FlexAttention against dense masked attention in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.attention.vsa.attention import SparseBackend, video_sparse_attention
from model.attention.vsa.reference import select_tiles
from model.attention.vsa.tiles import Grids, Shape, choose_cube
from tests.model.attention.sparse import Inputs, dense_masked, inputs_of, with_gradients
from tests.nets import relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# batch, heads, head dim, grid, key grid, cube, sparsity
CASES: dict[str, tuple[int, int, int, Shape, Shape, Shape, float]] = {
    "cube_4": (2, 3, 128, (5, 6, 9), (5, 6, 9), (4, 4, 4), 0.7),
    "flat_cube": (1, 5, 64, (3, 11, 13), (3, 11, 13), (1, 8, 8), 0.8),
    "long_cube": (2, 2, 128, (5, 9, 17), (5, 9, 17), (2, 4, 8), 0.5),
    "cached": (1, 4, 128, (3, 10, 12), (9, 10, 12), (1, 8, 8), 0.6),
    "everything": (1, 2, 64, (3, 7, 9), (3, 7, 9), (4, 4, 4), 0.0),
}
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 5e-2)}
BACKENDS = [SparseBackend.REFERENCE, SparseBackend.TRITON, SparseBackend.FLEX]


def run(inputs: Inputs, name: str, backend: SparseBackend) -> list[Tensor]:
    *_, grid, key_grid, cube, sparsity = CASES[name]
    out = video_sparse_attention(*inputs, Grids(grid, key_grid, cube), sparsity, backend=backend)
    assert out.dtype is inputs[0].dtype
    assert out.is_cuda
    return with_gradients(out, inputs)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.value)
@pytest.mark.parametrize("name", CASES)
def test_agrees_forward_and_backward(name: str, backend: SparseBackend, dtype: torch.dtype) -> None:
    inputs = inputs_of(*CASES[name][:5], dtype=dtype, device="cuda")
    forward, backward = TOLERANCES[dtype]
    expected = dense_masked(inputs, *CASES[name][3:])
    for i, (a, e) in enumerate(zip(run(inputs, name, backend), expected, strict=True)):
        assert relative(a, e) < (backward if i else forward), ("out", "dq", "dk", "dv", "dgate")[i]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_two_runs_are_the_same_bits(dtype: torch.dtype) -> None:
    inputs = inputs_of(*CASES["cube_4"][:5], dtype=dtype, device="cuda")
    first = run(inputs, "cube_4", SparseBackend.TRITON)
    for _ in range(3):
        assert all(map(torch.equal, run(inputs, "cube_4", SparseBackend.TRITON), first))


def test_triton_keeps_the_tiles_that_sorting_keeps() -> None:
    from model.attention.vsa.fused import select_tiles as fused_select

    generator = torch.Generator().manual_seed(0)
    for tiles in (7, 64, 1260, 5000):
        scores = torch.randn(2, 3, 70, tiles, generator=generator).mul(20).round().div(20).cuda()  # with ties
        for kept in {1, max(tiles // 10, 1), tiles}:
            assert torch.equal(fused_select(scores, kept).long(), select_tiles(scores, kept))


def test_true_size() -> None:
    """480x832x81 at 1.3B's heads: a few queries are checked by hand."""
    grid = (21, 30, 52)
    cube = choose_cube(grid)
    q, k, v, gate = (t.detach() for t in inputs_of(1, 12, 128, grid, grid, dtype=torch.bfloat16, device="cuda"))
    out = video_sparse_attention(
        q, k, v, torch.zeros_like(gate), Grids(grid, cube=cube), 0.0, backend=SparseBackend.TRITON
    )
    picked = torch.tensor([0, 1559, 1560, 17000, 32759], device="cuda")
    scores = torch.einsum("blnd,bmnd->bnlm", q[:, picked].float(), k.float()) / 128**0.5
    expected = torch.einsum("bnlm,bmnd->blnd", scores.softmax(-1), v.float())
    assert relative(out[:, picked], expected) < 2e-2
