"""Attention backends agree with each other and with softmax written out, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from model.attention.backends import Backend, attend, available
from model.attention.masks import FrameMask, block_causal_mask, teacher_forcing_mask
from tests.nets import relative

CPU = torch.device("cpu")
HEADS, WIDTH = 2, 16

QKV = tuple[Tensor, Tensor, Tensor]

# tokens a frame, mask: ragged counts, a multiple of 128 in all, rows with several runs of keys
CASES: dict[str, tuple[int, FrameMask]] = {
    "block_causal": (7, block_causal_mask((2, 2, 2))),
    "window_sinks": (5, block_causal_mask((1,) + (2,) * 5, 5, 1)),
    "teacher_forcing": (3, teacher_forcing_mask((2, 2, 2), 4, 1)),
    "whole_128": (64, block_causal_mask((2, 2))),  # 256 tokens: nothing ragged is left to pad
    "over_128": (43, block_causal_mask((1, 1, 1))),
    "rectangle": (6, FrameMask(((True, False, True, True), (True, True, False, True)))),
}
SHAPES = {"square": (9, 9), "few_queries": (3, 130), "one_key": (5, 1), "ragged": (129, 257)}


def qkv(queries: int, keys: int, seed: int = 0, batch: int = 2) -> QKV:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, queries, HEADS, WIDTH), (batch, keys, HEADS, WIDTH), (batch, keys, HEADS, WIDTH))
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return q, k, v


def written_out(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    scores = torch.einsum("blnd,bmnd->bnlm", q.double(), k.double()) / q.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bnlm,bmnd->blnd", scores.softmax(-1), v.double()).to(q.dtype)


def with_gradients(out: Tensor, inputs: QKV) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


def assert_alike(actual: list[Tensor], expected: list[Tensor]) -> None:
    for what, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.shape == e.shape
        if float(e.norm()) < 1e-6:  # one key: softmax is constant
            assert float(a.norm()) < 1e-5, what
        else:
            assert relative(a, e) < 2e-6, what


EAGER = [Backend.SDPA, Backend.PLAIN]


@pytest.mark.parametrize("backend", EAGER, ids=lambda b: b.value)
@pytest.mark.parametrize("name", CASES)
def test_masked(backend: Backend, name: str) -> None:
    tokens, mask = CASES[name]
    inputs = qkv(mask.query_frames * tokens, mask.key_frames * tokens)
    expected = with_gradients(written_out(*inputs, allowed=mask.tokens(tokens, CPU)), inputs)
    assert_alike(with_gradients(attend(*inputs, mask=mask, backend=backend), inputs), expected)


@pytest.mark.parametrize("backend", EAGER, ids=lambda b: b.value)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_dense(backend: Backend, shape: tuple[int, int]) -> None:
    inputs = qkv(*shape)
    assert_alike(with_gradients(attend(*inputs, backend=backend), inputs), with_gradients(written_out(*inputs), inputs))


def test_defect_05_shapes_one_after_the_other() -> None:
    """Nothing is kept from one shape to the next: A, B and A again, at the same count of tokens too."""
    masks = [
        (4, block_causal_mask((2, 2))), (8, block_causal_mask((1, 1))), (4, block_causal_mask((2, 2))),
        (4, block_causal_mask((1, 3))), (16, FrameMask(((True,),))),
    ]  # fmt: skip
    for backend, (tokens, mask) in itertools.product(EAGER, masks):
        inputs = qkv(16, 16)
        expected = with_gradients(written_out(*inputs, allowed=mask.tokens(tokens, CPU)), inputs)
        assert_alike(with_gradients(attend(*inputs, mask=mask, backend=backend), inputs), expected)


def flex_forward(mask: FrameMask | None, queries: int, keys: int, seed: int) -> None:
    """FlexAttention has no backward on a CPU; tests/gpu compares its gradients."""
    q, k, v = (t.detach() for t in qkv(queries, keys, seed))
    tokens = 1 if mask is None else queries // mask.query_frames
    expected = written_out(q, k, v, None if mask is None else mask.tokens(tokens, CPU))
    assert relative(attend(q, k, v, mask=mask, backend=Backend.FLEX), expected) < 2e-6


@pytest.mark.slow
def test_defect_05_flex_agrees_over_shapes_one_after_the_other() -> None:
    order = ("block_causal", "teacher_forcing", "whole_128", "block_causal")
    for seed, (tokens, mask) in enumerate([*(CASES[name] for name in order), (14, block_causal_mask((1, 1, 1)))]):
        flex_forward(mask, mask.query_frames * tokens, mask.key_frames * tokens, seed)
    for seed, name in enumerate(("ragged", "few_queries")):
        flex_forward(None, *SHAPES[name], seed)


@pytest.mark.parametrize("backend", EAGER, ids=lambda b: b.value)
def test_bf16_is_close_and_stays_bf16(backend: Backend) -> None:
    tokens, mask = CASES["window_sinks"]
    inputs = [t.detach().bfloat16() for t in qkv(mask.query_frames * tokens, mask.key_frames * tokens)]
    out = attend(*inputs, mask=mask, backend=backend)
    assert out.dtype is torch.bfloat16
    q, k, v = (t.float() for t in inputs)
    assert relative(out, written_out(q, k, v, mask.tokens(tokens, CPU))) < 1e-2


def test_mask_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="mask of 2 x 2 frames does not fit 5 queries and 5 keys"):
        attend(*qkv(5, 5), mask=block_causal_mask((1, 1)))
    with pytest.raises(ValueError, match="does not fit 4 queries and 6 keys"):
        attend(*qkv(4, 6), mask=block_causal_mask((1, 1)))


@pytest.mark.skipif(available(Backend.FLASH) is None, reason="flash-attn is installed here")
def test_flash_that_is_not_installed_says_so() -> None:
    with pytest.raises(ValueError, match="needs the flash_attn package") as error:
        attend(*qkv(4, 4), backend=Backend.FLASH)
    assert "\n" not in str(error.value)
    assert "sdpa" in str(error.value)
    with pytest.raises(ValueError, match="flash_attn"):
        attend(*qkv(4, 4), mask=block_causal_mask((1, 1)), backend=Backend.FLASH)


def test_flex_in_training_on_a_cpu_says_what_to_use() -> None:
    with pytest.raises(ValueError, match="no backward on a CPU: train with 'sdpa'"):
        attend(*qkv(4, 4), backend=Backend.FLEX)


def test_backends_that_always_run_are_available() -> None:
    assert all(available(backend) is None for backend in (Backend.SDPA, Backend.PLAIN, Backend.FLEX))
