"""The cache on its own: which frames lie where, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.attention.checkpointing import Checkpointing
from model.attention.kv_cache import CacheShape, KVCache
from pipeline.causal import CausalConfig, VideoShape
from tests.nets import latents, random_net, texts

SHAPE = CacheShape(layers=1, batch=1, context_frames=5, tokens_per_frame=2, heads=1, head_dim=1)


def filled(sinks: int, blocks: list[int], *, in_order: bool = False) -> KVCache:
    """A cache whose keys are the positions of their frames, and whose values are minus that."""
    shape = replace(SHAPE, block_frames=2)
    cache = KVCache(shape, sinks=sinks, rolling=True, in_order=in_order, dtype=torch.float32, device="cpu")
    for size in blocks:
        frames = torch.arange(cache.frames, cache.frames + size, dtype=torch.float32)
        k = frames.repeat_interleave(2).reshape(1, -1, 1, 1)
        cache.write(size, [(k, -k)])
    return cache


@pytest.mark.parametrize("sinks", [0, 1, 3, 5])
@pytest.mark.parametrize("blocks", [[2], [3, 2], [2] * 4, [1] + [2] * 5, [4, 4, 4]])
def test_sinks_stay_and_the_rest_is_the_most_recent(sinks: int, blocks: list[int]) -> None:
    cache, total = filled(sinks, blocks), sum(blocks)
    recent = range(max(total - (5 - sinks), min(sinks, total)), total)
    expected = sorted({*range(min(sinks, total)), *recent})
    assert sorted(cache.positions) == expected
    context = cache.context(0)
    assert context is not None
    assert context[0].flatten()[::2].tolist() == cache.positions  # what lies in a slot is what `positions` says
    assert torch.equal(context[0], -context[1])
    assert torch.equal(context[0][:, ::2], context[0][:, 1::2])


@pytest.mark.parametrize("sinks", [0, 1, 3, 5])
@pytest.mark.parametrize("blocks", [[2], [3, 2], [2] * 4, [1] + [2] * 5, [4, 4, 4]])
def test_in_order_of_time_a_block_is_joined_to_what_it_follows(sinks: int, blocks: list[int]) -> None:
    cache = filled(sinks, blocks, in_order=True)
    block = torch.full((1, 4, 1, 1), 99.0)
    expected = [*sorted(cache.positions), 99, 99]
    contexts = []
    for with_gradient in (True, False):
        with torch.set_grad_enabled(with_gradient):
            k, v = cache.join(0)(block, -block)
            contexts.append(cache.context(0))
        assert k.flatten()[::2].tolist() == expected
        assert torch.equal(k, -v)
        assert torch.equal(k[:, ::2], k[:, 1::2])
    assert all(context is not None and context[0].flatten()[::2].tolist() == expected[:-2] for context in contexts)


def test_defect_03_reset_before_backward_is_refused() -> None:
    """A checkpointed block reads the cache again in backward: another rollout's keys would be a silent wrong gradient."""
    net = random_net(0)
    net.checkpointing = Checkpointing.full
    cache = CausalConfig(2).new_cache(net, VideoShape(1, 4, 4, 6), torch.float32, torch.device("cpu"))
    text, sigma = texts(1, 1), torch.tensor([0.5])
    with torch.no_grad():
        net(latents(1, 1, 2), sigma, text, cache=cache, write_cache=True)
    loss = net(latents(2, 1, 2), sigma, text, cache=cache).sum()
    cache.reset()
    with pytest.raises(RuntimeError, match="reset before the backward"):
        loss.backward()
