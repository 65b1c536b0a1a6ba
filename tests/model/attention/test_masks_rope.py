"""RoPE and attention masks by their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from model.attention.masks import FrameMask, block_causal_mask, frame_blocks, teacher_forcing_mask
from model.attention.rope import apply_rope, axis_dims, rope_table
from pipeline.causal import CausalConfig
from tests.nets import MICRO

CPU = torch.device("cpu")

# RoPE


def rotated(seed: int, position: int, row: int, column: int, head_dim: int) -> Tensor:
    """One random vector [D], rotated to a place: the grid is made as large as the place needs."""
    vector = torch.randn(head_dim, generator=torch.Generator().manual_seed(seed))
    table = rope_table([position], row + 1, column + 1, head_dim, CPU)[:, -1:]
    return apply_rope(vector[None, None, None], table)[0, 0, 0]


@pytest.mark.parametrize("head_dim", [128, 20, 24, 6])
def test_rope_scores_depend_on_differences_only(head_dim: int) -> None:
    def score(q: tuple[int, int, int], k: tuple[int, int, int]) -> float:
        return float(rotated(1, *q, head_dim).double() @ rotated(2, *k, head_dim).double())

    base = score((2, 1, 3), (0, 4, 1))
    for df, dh, dw in ((5, 0, 0), (0, 7, 0), (0, 0, 9), (40, 3, 2)):
        assert score((2 + df, 1 + dh, 3 + dw), (df, 4 + dh, 1 + dw)) == pytest.approx(base, abs=2e-5)
    for k in ((1, 4, 1), (0, 3, 1), (0, 4, 2)):  # and each axis does matter
        assert abs(score((2, 1, 3), k) - base) > 1e-3


def test_rope_closed_form() -> None:
    """Channels (2i, 2i + 1) of axis a turn by position_a * 10000^(-2i / dim_a)."""
    head_dim, place = 128, (7, 3, 5)
    assert axis_dims(head_dim) == (44, 42, 42)  # Wan's split
    table = rope_table(range(8), 4, 6, head_dim, CPU)[:, -1]
    pair = 0
    for position, dim in zip(place, axis_dims(head_dim), strict=True):
        for i in range(dim // 2):
            angle = position * 10000 ** (-2 * i / dim)
            assert float(table[0, pair]) == pytest.approx(math.cos(angle), abs=1e-7)
            assert float(table[1, pair]) == pytest.approx(math.sin(angle), abs=1e-7)
            pair += 1
    turned = apply_rope(torch.tensor([1.0, 0.0] * 64)[None, None, None], table[:, None])[0, 0, 0]
    assert torch.allclose(turned[0::2], table[0])
    assert torch.allclose(turned[1::2], table[1])


def test_rope_keeps_precision_at_long_positions() -> None:
    """An hour of video: scores of two nearby frames are what they are at the start."""
    far = 60_000
    early = rotated(1, 2, 0, 0, 128).double() @ rotated(2, 0, 0, 0, 128).double()
    late = rotated(1, far + 2, 0, 0, 128).double() @ rotated(2, far, 0, 0, 128).double()
    assert abs(float(early - late)) < 2e-5


def test_rope_order_of_tokens_is_frame_row_column() -> None:
    table = rope_table([4, 9], 2, 3, 24, CPU).reshape(2, 2, 2, 3, 12)
    frame, spatial = 4, 4  # channel pairs: 8 / 2 of each axis
    assert torch.equal(table[:, 1, 0, 0, :frame], rope_table([9], 1, 1, 24, CPU)[:, 0, :frame])
    assert torch.equal(table[:, 0, 1, 2, frame : frame + spatial], table[:, 1, 1, 0, frame : frame + spatial])
    assert torch.equal(table[:, 0, 0, 2, frame + spatial :], table[:, 1, 1, 2, frame + spatial :])


# masks, by definitions written without looking at the tables' code


def visible(q: int, k: int, blocks: tuple[int, ...], window: int | None, sinks: int) -> bool:
    """k is in q's block or an earlier one; and a sink, or among the window's last frames that are left beside the sinks."""
    ends = list(itertools.accumulate(blocks))
    end = next(e for e in ends if q < e)
    if k >= end:
        return False
    if window is None or end <= window:
        return True
    return k < sinks or k + (window - sinks) >= end


MASKS = [
    ((2, 2, 2), None, 0), ((1, 2, 2, 2), 4, 0), ((3, 3, 3, 3), 7, 1), ((2,) * 6, 5, 2), ((1, 1, 1, 1, 1), 2, 1), ((4,), None, 0),
]  # fmt: skip


@pytest.mark.parametrize(("blocks", "window", "sinks"), MASKS)
def test_block_causal_mask_by_definition(blocks: tuple[int, ...], window: int | None, sinks: int) -> None:
    mask, total = block_causal_mask(blocks, window, sinks), sum(blocks)
    assert mask.allowed == tuple(
        tuple(visible(q, k, blocks, window, sinks) for k in range(total)) for q in range(total)
    )
    if window is not None:
        assert max(sum(row) for row in mask.allowed) <= window


@pytest.mark.parametrize(("blocks", "window", "sinks"), MASKS)
def test_teacher_forcing_mask_by_definition(blocks: tuple[int, ...], window: int | None, sinks: int) -> None:
    mask, total = teacher_forcing_mask(blocks, window, sinks), sum(blocks)
    block = [b for b, size in enumerate(blocks) for _ in range(size)]
    for q, k in itertools.product(range(2 * total), repeat=2):
        q_noisy, k_noisy, i, j = q >= total, k >= total, q % total, k % total
        if k_noisy:
            expected = q_noisy and block[i] == block[j]
        elif q_noisy:
            expected = block[j] < block[i] and visible(i, j, blocks, window, sinks)
        else:
            expected = visible(i, j, blocks, window, sinks)
        assert mask.allowed[q][k] == expected


@pytest.mark.parametrize("seed", range(5))
def test_segments_and_tokens_are_the_same_mask(seed: int) -> None:
    table = torch.rand(6, 7, generator=torch.Generator().manual_seed(seed)) > 0.5
    table[3] = table[2]  # two queries in one segment
    table[:, 0] = True  # no query without a key
    mask = FrameMask(tuple(map(tuple, table.tolist())))
    from_segments = torch.zeros(6, 7, dtype=torch.bool)
    covered: list[int] = []
    for queries, runs in mask.segments:
        covered += range(queries.start, queries.stop)
        for keys in runs:
            from_segments[queries, keys] = True
    assert covered == list(range(6))
    assert len(mask.segments) < 6
    assert torch.equal(from_segments, table)
    tokens = mask.tokens(3, CPU)
    assert all(tokens[q, k] == table[q // 3, k // 3] for q in range(18) for k in range(21))


@pytest.mark.parametrize(
    ("frames", "size", "first", "expected"),
    [(6, 2, False, (2, 2, 2)), (7, 2, True, (1, 2, 2, 2)), (1, 3, True, (1,)), (21, 3, False, (3,) * 7)],
)
def test_frame_blocks(frames: int, size: int, first: bool, expected: tuple[int, ...]) -> None:
    assert frame_blocks(frames, size, first) == expected


@pytest.mark.parametrize(
    ("frames", "size", "first", "legal"),
    [(31, 3, False, "30 or 33"), (2, 3, False, "use 3"), (8, 2, True, "7 or 9"), (0, 2, True, "1 or 3")],
)
def test_defect_09_frames_that_are_not_whole_blocks(frames: int, size: int, first: bool, legal: str) -> None:
    """121 frames are 31 latents, not divisible by 3: said at once, with the nearest legal counts."""
    with pytest.raises(ValueError, match=legal):
        frame_blocks(frames, size, first)


def test_windows_that_hold_no_block_are_refused() -> None:
    with pytest.raises(ValueError, match="window of 3 frames cannot hold 2 sink frames and a block of 2"):
        CausalConfig(num_frame_per_block=2, window_frames=3, sink_frames=2)
    with pytest.raises(ValueError, match="sink"):
        block_causal_mask((2, 2), 1, 0)


def test_micro_geometry_exercises_every_axis() -> None:
    assert all(dim >= 2 for dim in axis_dims(MICRO.head_dim))
