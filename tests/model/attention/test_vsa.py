"""Video sparse attention: three backends against a dense masked attention written out in fp64, forward and backward.

Triton's kernels run in its interpreter here; tests/gpu runs them, and FlexAttention's backward, on CUDA.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.attention.vsa.attention import SparseBackend, video_sparse_attention
from model.attention.vsa.flex import kept_block_mask, kernel_options, tiles_of_a_block
from model.attention.vsa.reference import select_tiles
from model.attention.vsa.tiles import (
    CUBES,
    Grids,
    Shape,
    Tiling,
    choose_cube,
    kept_tiles,
    tile_maps,
    to_tiles,
    to_tokens,
)
from tests import ROOT
from tests.model.attention.sparse import Inputs, dense_masked, inputs_of, with_gradients
from tests.nets import relative

HOPPER_SHARED = 227 * 1024  # bytes that one block may have
CPU = torch.device("cpu")
NAMES = ("out", "dq", "dk", "dv", "dgate")
WHY_NOT = "needs triton, and no CUDA: its interpreter is off there, and tests/gpu runs the kernels themselves"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason=WHY_NOT
)

# batch, heads, head dim, grid, key grid, cube, sparsity
CASES: dict[str, tuple[int, int, int, Shape, Shape, Shape, float]] = {
    "ragged": (2, 2, 64, (1, 6, 7), (1, 6, 7), (1, 4, 4), 0.5),
    "wide_heads": (1, 3, 128, (3, 3, 5), (3, 3, 5), (2, 2, 4), 0.7),
    "whole_64": (2, 1, 64, (4, 4, 8), (4, 4, 8), (4, 4, 4), 0.5),
    "cached": (1, 2, 64, (1, 5, 4), (3, 5, 4), (1, 4, 4), 0.6),  # a block of one frame, two frames in the cache
}


def run(inputs: Inputs, case: tuple[int, int, int, Shape, Shape, Shape, float], backend: SparseBackend) -> list[Tensor]:
    *_, grid, key_grid, cube, sparsity = case
    out = video_sparse_attention(*inputs, Grids(grid, key_grid, cube), sparsity, backend=backend)
    assert out.dtype is inputs[0].dtype
    return with_gradients(out, inputs)


def check(actual: list[Tensor], expected: list[Tensor], forward: float, backward: float) -> None:
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.shape == e.shape
        assert relative(a, e) < (forward if name == "out" else backward), name


def agree(name: str, backend: SparseBackend, dtype: torch.dtype, forward: float, backward: float) -> None:
    case = CASES[name]
    inputs = inputs_of(*case[:5], dtype=dtype)
    check(run(inputs, case, backend), dense_masked(inputs, *case[3:]), forward, backward)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_dense_masked_attention(name: str) -> None:
    agree(name, SparseBackend.REFERENCE, torch.float64, 1e-12, 1e-11)
    agree(name, SparseBackend.REFERENCE, torch.float32, 1e-6, 2e-6)
    agree(name, SparseBackend.REFERENCE, torch.bfloat16, 1e-2, 2e-2)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_triton_agrees_in_fp32(name: str) -> None:
    agree(name, SparseBackend.TRITON, torch.float32, 1e-5, 1e-4)


@needs_triton
@pytest.mark.parametrize("name", ["ragged", "wide_heads"])
def test_triton_agrees_in_bf16(name: str) -> None:
    agree(name, SparseBackend.TRITON, torch.bfloat16, 2e-2, 5e-2)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_agrees_eagerly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward; without its compiler FlexAttention is slow and ignores the blocks, but computes the same mask."""
    from torch.nn.attention import flex_attention as module

    monkeypatch.setattr("model.attention.vsa.flex._compiled_flex", lambda _: module.flex_attention)
    flex_forward(name, torch.float32, 1e-5)


@pytest.mark.slow
def test_flex_agrees_compiled() -> None:
    flex_forward("cached", torch.float32, 1e-5)


def flex_forward(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = CASES[name]
    inputs = inputs_of(*case[:5], dtype=dtype)
    *_, grid, key_grid, cube, sparsity = case
    with torch.no_grad():
        out = video_sparse_attention(*inputs, Grids(grid, key_grid, cube), sparsity, backend=SparseBackend.FLEX)
    assert relative(out, dense_masked(inputs, *case[3:])[0]) < tolerance


def test_flex_blocks_are_the_kept_tiles() -> None:
    """Ragged key tiles are masked inside, whole ones are not."""
    tiling = Tiling((1, 6, 7), (1, 4, 4))
    chosen = torch.tensor([[0, 3], [1, 2], [0, 2], [1, 3]])[None, None]
    mask = kept_block_mask(chosen, tiling, tiling)
    dense = torch.zeros(4, 4, dtype=torch.int32).scatter_(1, chosen[0, 0], 1)
    assert torch.equal(mask.to_dense()[0, 0].int(), dense)
    assert mask.full_kv_num_blocks.tolist() == [[[1, 0, 1, 0]]] and mask.kv_num_blocks.tolist() == [[[1, 2, 1, 2]]]


def test_flex_blocks_of_several_tiles_hold_the_same_mask() -> None:
    """A block is computed if one of its tiles is kept, and unmasked if all are: 3 x 3 tiles in blocks of 2 x 2."""
    tiling = Tiling((1, 4, 10), (1, 4, 4))  # tiles of 16, 16 and 8 tokens
    chosen = torch.tensor([[0, 1], [0, 1], [0, 2]])[None, None]
    mask = kept_block_mask(chosen, tiling, tiling, 2)
    assert mask.BLOCK_SIZE == (32, 32) and mask.seq_lengths == (48, 48)
    assert mask.full_kv_num_blocks.tolist() == [[[1, 0]]] and mask.kv_num_blocks.tolist() == [[[0, 2]]]
    place = torch.arange(48)
    single = kept_block_mask(chosen, tiling, tiling)
    for other in (mask, single):
        assert torch.equal(
            other.mask_mod(torch.tensor(0), torch.tensor(0), place[:, None], place[None]),
            torch.zeros(3, 3, dtype=torch.bool).scatter_(1, chosen[0, 0], True).repeat_interleave(16, 0).repeat_interleave(16, 1)
            & (place < 40),
        )  # fmt: skip


@pytest.mark.slow
def test_flex_with_blocks_of_several_tiles_agrees_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd numbers of tiles, ragged ones among them: what lies in a block beside the kept tiles takes no part."""
    monkeypatch.setattr(
        "model.attention.vsa.flex.kept_block_mask",
        lambda chosen, queries, keys, _: kept_block_mask(chosen, queries, keys, 2),
    )
    flex_forward("cached", torch.float32, 1e-5)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_inductor_has_a_backward_for_flex_blocks(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It drops configurations whose blocks do not divide the mask's, and fails where none is left."""
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for dtype, width, slots in itertools.product((torch.float32, torch.bfloat16), (16, 64, 128), (16, 64, 128)):
        block = slots * tiles_of_a_block(dtype, slots)
        (config,) = CUDAConfigHeuristic().get_flex_attn_bwd_configs(width, dtype)
        assert all(block % size == 0 for size in (config.block_m1, config.block_n1, config.block_m2, config.block_n2))
        assert all(block % size == 0 for name, size in kernel_options(dtype, slots).items() if "BLOCK" in name)


BACKENDS = [SparseBackend.REFERENCE, pytest.param(SparseBackend.TRITON, marks=needs_triton)]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.value)
def test_nothing_kept_out_is_dense_attention_plus_the_gated_coarse_branch(backend: SparseBackend) -> None:
    grid = (1, 5, 6)
    q, k, v, gate = (t.detach() for t in inputs_of(1, 2, 16, grid, grid))
    out = video_sparse_attention(q, k, v, torch.zeros_like(gate), Grids(grid, cube=(1, 4, 4)), 0.0, backend=backend)
    dense = functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    assert relative(out, dense) < 1e-6
    gated = video_sparse_attention(q, k, v, gate, Grids(grid, cube=(1, 4, 4)), 0.0, backend=backend)
    opened = video_sparse_attention(q, k, v, torch.ones_like(gate), Grids(grid, cube=(1, 4, 4)), 0.0, backend=backend)
    assert relative(gated - out, gate * (opened - out)) < 1e-5
    coarse = (opened - out)[:, [0, 4, 24, 28]]  # one token of each tile: two rows of two tiles
    assert float((opened - out)[:, [7, 11, 25, 29]].sub(coarse).abs().max()) < 1e-5  # another of each


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.value)
def test_padding_never_leaks(backend: SparseBackend) -> None:
    """Every true score is far below the 0 that a padded key would have: counted once, padding would take all weight."""
    grid = (1, 3, 5)
    q, k, v, gate = inputs_of(1, 1, 16, grid, grid)
    with torch.no_grad():
        q.copy_(q * 0.1 + 6)
        k.copy_(k * 0.1 - 6)
        v.copy_(v + 3)
    case = (1, 1, 16, grid, grid, (1, 4, 4), 0.5)
    check(run((q, k, v, gate), case, backend), dense_masked((q, k, v, gate), *case[3:]), 1e-5, 1e-4)


def strided(x: Tensor) -> Tensor:
    """The same numbers, laid out with heads before tokens, as attention backends leave them."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.value)
def test_autocast_changes_nothing(backend: SparseBackend) -> None:
    """Tiles are compared in fp32: in bf16 many would tie."""
    case = (1, 1, 16, (1, 5, 9), (1, 5, 9), (1, 4, 4), 0.5)
    inputs = inputs_of(*case[:5])
    with torch.autocast("cpu", torch.bfloat16):
        out = video_sparse_attention(*inputs, Grids(case[3], cube=case[5]), 0.5, backend=backend)
    assert all(map(torch.equal, with_gradients(out, inputs), run(inputs, case, backend)))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.value)
def test_in_a_compiled_and_in_a_checkpointed_block(backend: SparseBackend) -> None:
    grid = (1, 3, 5)
    inputs = inputs_of(1, 1, 16, grid, grid)

    def block(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return 3 * video_sparse_attention(q * 2, k, v, gate, Grids(grid, cube=(1, 4, 4)), 0.5, backend=backend)

    plain = with_gradients(block(*inputs), inputs)
    compiled = with_gradients(torch.compile(block, backend="aot_eager")(*inputs), inputs)
    again = with_gradients(checkpoint(block, *inputs, use_reentrant=False), inputs)
    assert all(map(torch.equal, compiled, plain)) and all(map(torch.equal, again, plain))


@needs_triton
def test_triton_takes_any_strides() -> None:
    case = (2, 2, 16, (1, 3, 5), (1, 3, 5), (1, 4, 4), 0.5)
    inputs = inputs_of(*case[:5])
    alike = run(inputs, case, SparseBackend.TRITON)
    q, k, v, gate = (strided(t) for t in inputs)
    out = video_sparse_attention(q, k, v, gate, Grids(case[3], cube=case[5]), 0.5, backend=SparseBackend.TRITON)
    turned = with_gradients(strided_identity(out), (q, k, v, gate))
    assert all(map(torch.equal, turned, alike))


def strided_identity(x: Tensor) -> Tensor:
    return x.transpose(1, 3).contiguous().transpose(1, 3)  # its gradient has no contiguous last dimension


SCORES = {
    "random": torch.randn(2, 3, 5, 37, generator=torch.Generator().manual_seed(1)),
    "equal": torch.zeros(1, 1, 2, 9),
    "ties": torch.tensor([[1.0, 3, 2, 3, 3, -1, 2], [-2.0, -3, -2, -2, -3, -4, -3]])[None, None],
    "signs_of_zero": torch.tensor([-0.0, 0.0, -1.0, 0.0, -0.0])[None, None, None],
    "extremes": torch.tensor([float("-inf"), 1e38, -1e38, float("inf"), 1e-45, -1e-45])[None, None, None],
}


def by_hand(scores: Tensor, kept: int) -> Tensor:
    """Sorted by falling score, then by index; kept and put in order."""
    rows = scores.flatten(0, 2).tolist()
    picked = [sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:kept]) for row in rows]
    return torch.tensor(picked).view(*scores.shape[:3], kept)


@pytest.mark.parametrize("name", SCORES)
def test_the_highest_scores_are_kept_and_ties_go_to_the_lower_index(name: str) -> None:
    scores = SCORES[name].clone().requires_grad_()
    for kept in {1, 2, scores.shape[-1] - 1, scores.shape[-1]}:
        chosen = select_tiles(scores, kept)
        assert torch.equal(chosen, by_hand(scores, kept)) and not chosen.requires_grad


@needs_triton
@pytest.mark.parametrize("name", SCORES)
def test_triton_keeps_the_same_tiles(name: str) -> None:
    from model.attention.vsa.fused import select_tiles as fused_select

    scores = SCORES[name]
    for kept in {2, scores.shape[-1]}:
        chosen = fused_select(scores, kept)
        assert chosen.dtype is torch.int32 and torch.equal(chosen.long(), by_hand(scores, kept))


@needs_triton
def test_scores_that_are_no_numbers_still_keep_tiles_that_exist() -> None:
    """An index out of range would read foreign memory. That scores are NaN is noticed later, at the loss."""
    from model.attention.vsa.fused import select_tiles as fused_select

    nan = torch.full((4,), float("nan"))
    scores = torch.stack([nan, -nan, torch.tensor([1.0, float("nan"), 2.0, 0.0])])[None, None]
    chosen = fused_select(scores, 3)
    assert int(chosen.min()) >= 0 and int(chosen.max()) < 4 and bool((chosen.diff() > 0).all())


@needs_triton
def test_inverted_map() -> None:
    from model.attention.vsa.fused import invert

    chosen = select_tiles(SCORES["random"], 4)
    readers, offsets = invert(chosen.int(), 37)
    for row, (kept, query, edge) in enumerate(zip(chosen.flatten(0, 1), readers, offsets, strict=True)):
        for tile in range(37):
            expected = [i for i in range(5) if tile in kept[i].tolist()]
            assert query[edge[tile] : edge[tile + 1]].tolist() == expected, (row, tile)


GRIDS: list[tuple[Shape, Shape]] = [
    *[
        ((5, 6, 7), (4, 4, 4)),
        ((3, 5, 9), (1, 4, 4)),
        ((2, 3, 4), (2, 3, 4)),
        ((7, 2, 5), (2, 4, 2)),
        ((1, 1, 1), (4, 4, 4)),
    ],
]


@pytest.mark.parametrize(("grid", "cube"), GRIDS)
def test_tiles_hold_their_valid_tokens_first_in_raster_order(grid: Shape, cube: Shape) -> None:
    tiling = Tiling(grid, cube)
    expected: dict[tuple[int, ...], list[int]] = {}
    for token, place in enumerate(itertools.product(*map(range, grid))):
        expected.setdefault(tuple(p // c for p, c in zip(place, cube, strict=True)), []).append(token)
    tiles = [expected[key] for key in sorted(expected)]
    maps = tile_maps(tiling, CPU)
    slots = [tile + [-1] * (math.prod(cube) - len(tile)) for tile in tiles]
    assert maps.token_of_slot.view(tiling.tiles, -1).tolist() == slots
    assert maps.counts.tolist() == [len(tile) for tile in tiles]
    assert torch.equal(maps.valid, torch.tensor(slots) >= 0)
    x = torch.randn(2, tiling.tokens, 3, 4)
    tiled = to_tiles(x, tiling)
    assert torch.equal(to_tokens(tiled, tiling), x)
    assert not tiled.permute(2, 3, 0, 1, 4)[~maps.valid].any()


def test_the_cube_that_pads_least() -> None:
    """480x832 and 720x1280 of 81 frames: 22 % with the usual cube of four."""
    assert round(Tiling((21, 30, 52), (4, 4, 4)).padding, 3) == 0.219
    assert round(Tiling((21, 45, 80), (4, 4, 4)).padding, 3) == 0.219
    for grid in ((21, 30, 52), (21, 45, 80), (31, 22, 40), (1, 3, 3)):
        chosen = Tiling(grid, choose_cube(grid))
        assert chosen.padding == min(Tiling(grid, cube).padding for cube in CUBES)
    assert choose_cube((16, 16, 16)) == (4, 4, 4)  # all pad nothing: the most compact
    assert choose_cube((3, 8, 8), (9, 8, 8)) == (1, 8, 8)
    assert {math.prod(cube) for cube in CUBES} == {64}


def test_how_many_tiles_are_kept() -> None:
    cases = {(0.9, 10): 1, (0.7, 10): 3, (0.8, 10): 2, (0.8, 11): 3, (0.0, 7): 7, (1.0, 7): 1, (0.99, 5): 1}
    assert {case: kept_tiles(*case) for case in cases} == cases
    for sparsity in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0"):
            kept_tiles(sparsity, 4)


def test_maps_made_in_inference_serve_training() -> None:
    case = (1, 1, 16, (1, 9, 11), (1, 9, 11), (1, 4, 4), 0.5)  # a grid of no other test
    inputs = inputs_of(*case[:5])
    with torch.inference_mode():
        video_sparse_attention(*(t.detach() for t in inputs), Grids(case[3], cube=case[5]), 0.5)
    run(inputs, case, SparseBackend.REFERENCE)


def test_bad_input_is_one_line() -> None:
    grid = (1, 3, 4)
    q, k, v, gate = (t.detach() for t in inputs_of(1, 2, 16, grid, grid))
    bad = {
        "12 queries do not fill a grid of \\(1, 3, 5\\)": lambda: video_sparse_attention(
            q, k, v, gate, Grids((1, 3, 5)), 0.5
        ),
        "12 keys do not fill": lambda: video_sparse_attention(q, k, v, gate, Grids(grid, (2, 3, 4)), 0.5),
        "takes \\[batch, tokens": lambda: video_sparse_attention(q, k, v, gate[:, :3], Grids(grid), 0.5),
        "sparsity 2": lambda: video_sparse_attention(q, k, v, gate, Grids(grid), 2),
        "at least 1 token": lambda: video_sparse_attention(q, k, v, gate, Grids((0, 3, 4)), 0.5),
    }
    for match, call in bad.items():
        with pytest.raises(ValueError, match=match) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no backward on a CPU: train with 'reference'"):
        video_sparse_attention(q.requires_grad_(), k, v, gate, Grids(grid), 0.5, backend=SparseBackend.FLEX)


@needs_triton
def test_what_triton_cannot_run_is_one_line() -> None:
    grid = (1, 3, 4)
    for match, cube, width in (("heads of", (1, 4, 4), 24), ("heads of", (1, 3, 4), 16)):
        q, k, v, gate = (t.detach() for t in inputs_of(1, 1, width, grid, grid))
        with pytest.raises(ValueError, match=match) as error:
            video_sparse_attention(q, k, v, gate, Grids(grid, cube=cube), 0.5, backend=SparseBackend.TRITON)
        assert "\n" not in str(error.value)
    q, k, v, gate = (t.detach() for t in inputs_of(1, 1, 16, grid, grid))
    with pytest.raises(ValueError, match="one of fp32, fp16, bf16 for all"):
        video_sparse_attention(q, k.bfloat16(), v, gate, Grids(grid), 0.5, backend=SparseBackend.TRITON)


def test_triton_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    q, k, v, gate = (t.detach() for t in inputs_of(1, 1, 16, (1, 3, 4), (1, 3, 4)))
    with pytest.raises(ValueError, match="needs the triton package"):
        video_sparse_attention(q, k, v, gate, Grids((1, 3, 4)), 0.5, backend=SparseBackend.TRITON)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_kernels_build_for_hopper(precision: str, tmp_path: Path) -> None:
    """No GPU needed: Triton compiles them ahead of time. The interpreter would not notice what a GPU cannot hold."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.model.attention.triton_build", "90", precision, "128"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    built = json.loads(done.stdout.splitlines()[-1])
    assert len(built) == 7 and all(kernel["shared"] <= HOPPER_SHARED for kernel in built.values())
    products = {name for name, kernel in built.items() if kernel["tensor_cores"]}
    assert products == {"attend_kernel", "d_query_kernel", "d_key_value_kernel"}
