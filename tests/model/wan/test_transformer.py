"""The DiT in its modes: masked, cached, rolling, checkpointed, batched, in bf16."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.attention.kv_cache import KVCache
from model.attention.replay import Trace
from model.score import ScoreNet
from model.wan.transformer import WanTransformer
from pipeline.causal import CausalConfig, VideoShape
from pipeline.diffusion_forcing import CleanContext, teacher_forced_velocity
from pipeline.self_forcing_training import RolloutPlan, self_forcing_rollout
from tests.nets import KeyedNoise, conditioning, gradients, latents, random_net, relative, texts

CPU = torch.device("cpu")


def new_cache(net: WanTransformer, causal: CausalConfig, x: Tensor, dtype: torch.dtype = torch.float32) -> KVCache:
    return causal.new_cache(net, VideoShape.of(x), dtype, x.device)


@torch.no_grad()
def block_by_block(
    net: WanTransformer,
    x: Tensor,
    sigma: Tensor,
    clean: Tensor,
    clean_sigma: Tensor,
    text: Tensor,
    causal: CausalConfig,
) -> Tensor:
    """Velocity of each noisy block over a cache of the clean ones before it."""
    cache, out, start = new_cache(net, causal, x), [], 0
    for size in causal.blocks(x.shape[1]):
        part = slice(start, start + size)
        out.append(net(x[:, part], sigma[:, part], text, cache=cache))
        if start + size < x.shape[1]:
            net(clean[:, part], clean_sigma[:, part], text, cache=cache, write_cache=True)
        start += size
    return torch.cat(out, 1)


CAUSAL = [
    (CausalConfig(num_frame_per_block=3), 9),
    (CausalConfig(num_frame_per_block=1), 5),
    (CausalConfig(num_frame_per_block=2, independent_first_frame=True), 7),
    (CausalConfig(num_frame_per_block=2, window_frames=4), 10),
    (CausalConfig(num_frame_per_block=2, window_frames=5), 12),  # not a multiple of the block
    (CausalConfig(num_frame_per_block=2, window_frames=6, sink_frames=2), 12),
    (CausalConfig(num_frame_per_block=3, window_frames=7, sink_frames=2), 12),
    (CausalConfig(num_frame_per_block=2, window_frames=4, sink_frames=1, independent_first_frame=True), 13),
    (CausalConfig(num_frame_per_block=2, window_frames=5, independent_first_frame=True), 11),
    (CausalConfig(num_frame_per_block=2, window_frames=4, sink_frames=2), 8),  # sinks and the own block only
    (CausalConfig(num_frame_per_block=2, window_frames=2), 6),  # the own block only
    (CausalConfig(num_frame_per_block=2, window_frames=40, sink_frames=3), 6),  # a window longer than the video
]
IDS = [
    f"{c.num_frame_per_block}x{f}_w{c.window_frames}_s{c.sink_frames}{'_i' * c.independent_first_frame}"
    for c, f in CAUSAL
]


@pytest.mark.parametrize(("causal", "frames"), CAUSAL, ids=IDS)
def test_cached_equals_masked(causal: CausalConfig, frames: int) -> None:
    """Clean frames through the cache, block by block = one pass under the mask; so a rolling cache = the windowed mask."""
    net, x, text = random_net(1), latents(2, 2, frames), texts(3, 2)
    sigma = torch.rand(2, frames, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        masked = net(x, sigma, text, mask=causal.mask(frames))
    assert relative(block_by_block(net, x, sigma, x, sigma, text, causal), masked) < 2e-6


@pytest.mark.parametrize(("causal", "frames"), CAUSAL, ids=IDS)
def test_teacher_forcing_equals_cached_clean_context(causal: CausalConfig, frames: int) -> None:
    net, x, clean, text = random_net(1), latents(2, 2, frames), latents(9, 2, frames), texts(3, 2)
    generator = torch.Generator().manual_seed(4)
    sigma, clean_sigma = torch.rand(2, frames, generator=generator), 0.1 * torch.rand(2, frames, generator=generator)
    with torch.no_grad():
        forced = teacher_forced_velocity(
            ScoreNet(net, "student"), x, sigma, CleanContext(clean, clean_sigma), text, causal
        )
    assert relative(block_by_block(net, x, sigma, clean, clean_sigma, text, causal), forced) < 2e-6


def test_the_mask_matters() -> None:
    """The comparisons above could not fail if attention across frames changed nothing."""
    net, x, text = random_net(1), latents(2, 2, 8), texts(3, 2)
    sigma = torch.full((2, 8), 0.5)
    with torch.no_grad():
        outs = [
            net(x, sigma, text, mask=None if c is None else c.mask(8))
            for c in (
                None,
                CausalConfig(2),
                CausalConfig(2, window_frames=4),
                CausalConfig(2, window_frames=4, sink_frames=1),
            )
        ]
    for a, b in itertools.combinations(outs, 2):
        assert relative(a, b) > 1e-3


def test_rolling_cache_over_a_long_sequence() -> None:
    causal, frames = CausalConfig(num_frame_per_block=2, window_frames=7, sink_frames=1), 60
    net, x, text = random_net(1), latents(2, 1, frames), texts(3, 1)
    sigma = torch.full((1, frames), 0.4)
    with torch.no_grad():
        masked = net(x, sigma, text, mask=causal.mask(frames))
    assert new_cache(net, causal, x).shape.context_frames == 5
    assert relative(block_by_block(net, x, sigma, x, sigma, text, causal), masked) < 2e-6


@pytest.mark.parametrize(("window", "sinks"), [(7, 2), (6, 0), (4, 2), (5, 2)])
def test_cache_positions_are_the_sinks_and_the_last_frames(window: int, sinks: int) -> None:
    causal = CausalConfig(num_frame_per_block=2, window_frames=window, sink_frames=sinks)
    net, x = random_net(1), latents(2, 1, 20)
    cache, held = new_cache(net, causal, x), window - 2
    assert cache.positions == []
    for start in range(0, 20, 2):
        with torch.no_grad():
            net(x[:, start : start + 2], torch.zeros(1), texts(3, 1), cache=cache, write_cache=True)
        end = start + 2
        expected = set(range(end)) if end <= held else set(range(sinks)) | set(range(end - (held - sinks), end))
        assert sorted(cache.positions) == sorted(expected)


def test_defect_04_cache_overflow_is_an_error_and_no_length_is_typed_in() -> None:
    net, x, text = random_net(1), latents(2, 1, 26), texts(3, 1)  # beyond the 21 frames of the public code
    causal = CausalConfig(num_frame_per_block=2)
    cache = new_cache(net, causal, x)
    with torch.no_grad():
        for start in range(0, 24, 2):
            net(x[:, start : start + 2], torch.zeros(1), text, cache=cache, write_cache=True)
        with pytest.raises(ValueError, match="KV cache holds 24 frames, frame 26 does not fit"):
            net(x[:, 24:], torch.zeros(1), text, cache=cache, write_cache=True)


def test_defect_04_reset_cache_gives_the_same_numbers_in_the_same_memory() -> None:
    causal, source = CausalConfig(num_frame_per_block=2, window_frames=4, sink_frames=1), KeyedNoise(5, 2)
    net, noise = random_net(1), latents(2, 2, 10)
    student, plan = ScoreNet(net, "student"), RolloutPlan(causal, (1.0, 0.6), (1, 0, 1, 1, 0), 10)
    cache = new_cache(net, causal, noise)

    def rollout(text_seed: int, cache: KVCache) -> Tensor:
        return self_forcing_rollout(
            student, noise, conditioning(text_seed, 2), plan, source, cache, with_gradient=False
        ).x0

    def address() -> int:
        with torch.no_grad():
            memory = cache.context(0)
        assert memory is not None
        return memory[0].data_ptr()

    first = rollout(3, cache)
    before = address()
    cache.reset()
    other = rollout(4, cache)  # another prompt: cached text must not survive a reset
    assert torch.equal(other, rollout(4, new_cache(net, causal, noise)))
    assert relative(other, first) > 1e-3
    cache.reset()
    assert torch.equal(rollout(3, cache), first)
    assert address() == before


@pytest.mark.parametrize(
    "causal",
    [
        CausalConfig(2),
        CausalConfig(2, window_frames=5),
        CausalConfig(2, window_frames=4, sink_frames=1),
        CausalConfig(2, context_noise=100),
    ],
    ids=["full", "rolling", "rolling_sinks", "context_noise"],
)
@pytest.mark.parametrize("backend", [Backend.PLAIN, Backend.SDPA], ids=lambda b: b.value)
def test_defect_03_checkpointing_changes_no_gradient(causal: CausalConfig, backend: Backend) -> None:
    """Recomputing in backward, when the cache has moved on, gives the gradients of the passes as they were made.

    With checkpointing the exit passes are replayed together, so the sums over blocks run in another order: that, and no
    more, may differ.
    """
    noise, text = latents(2, 2, 8), conditioning(3, 2)
    weight = latents(6, 2, 8)
    results = []
    for checkpointing in Checkpointing:
        net = random_net(1, backend=backend, checkpointing=checkpointing)
        out = self_forcing_rollout(
            ScoreNet(net, "student"), noise, text, RolloutPlan(causal, (1.0, 0.8, 0.5), (0, 2, 1, 1), 8), KeyedNoise(5, 2),
            new_cache(net, causal, noise), with_gradient=True,
        )  # fmt: skip
        (out.x0 * weight).sum().backward()
        results.append((out.x0.detach(), gradients(net)))
    (plain_x0, plain), *others = results
    assert len(others) == 2
    for again_x0, again in others:
        assert torch.equal(plain_x0, again_x0)
        assert len(plain) == len(again) == len(dict(random_net(1).named_parameters()))
        for name in plain:
            assert relative(again[name], plain[name]) < 3e-6, name


@pytest.mark.parametrize("backend", [Backend.PLAIN, Backend.SDPA], ids=lambda b: b.value)
def test_defect_03_checkpointed_cached_passes_and_replayed_ones_are_exact(backend: Backend) -> None:
    """One cached pass, whose cache has moved on before backward: kept, checkpointed or replayed, bit for bit the same.

    Only the gradient of what all layers share may differ: a replay adds up each layer's part of it first.
    """
    frames, text = latents(2, 2, 6), texts(3, 2)
    sigma = torch.tensor([0.4, 0.7])
    found = []
    for way in (*Checkpointing, "replayed"):
        kept_as = way if isinstance(way, Checkpointing) else Checkpointing.none
        net = random_net(1, backend=backend, checkpointing=kept_as)
        cache = new_cache(net, CausalConfig(2), frames)
        trace = Trace()
        with torch.no_grad():
            net(frames[:, :2], sigma, text, cache=cache, write_cache=True)
            net(frames[:, 2:4], sigma, text, cache=cache, trace=trace)
        x = frames[:, 2:4]
        out = net(x, sigma, text, replay=trace) if way == "replayed" else net(x, sigma, text, cache=cache)
        with torch.no_grad():
            net(x, sigma, text, cache=cache, write_cache=True)
            net(frames[:, 4:], sigma, text, cache=cache)
        out.square().sum().backward()
        found.append({"": out.detach()} | gradients(net))
    kept, *checkpointed, replayed = found
    assert len(checkpointed) == 2
    assert all(kept.keys() == other.keys() for other in found)
    for name, value in kept.items():
        assert all(torch.equal(value, other[name]) for other in checkpointed), name
        if name.startswith(("text_embedding", "time_")):
            assert relative(replayed[name], value) < 1e-6, name
        else:
            assert torch.equal(value, replayed[name]), name


def test_a_replay_sees_its_weights_once() -> None:
    """However many blocks the rollout has: each weight's gradient is made once, and no block's forward runs again
    before backward."""
    net = random_net(1, checkpointing=Checkpointing.full)
    causal, noise = CausalConfig(2), latents(2, 2, 8)
    calls: list[int] = []
    weight = dict(net.named_parameters())["blocks.0.ffn.0.weight"]
    weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    out = self_forcing_rollout(
        ScoreNet(net, "student"), noise, conditioning(3, 2), RolloutPlan(causal, (1.0, 0.5), (1,) * 4, 8), KeyedNoise(5, 2),
        new_cache(net, causal, noise), with_gradient=True,
    )  # fmt: skip
    out.x0.sum().backward()
    assert len(calls) == 1


class Operations(TorchDispatchMode):
    """Names of the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_recomputes_all_but_attention() -> None:
    counts = {}
    for checkpointing in Checkpointing:
        net = random_net(1, backend=Backend.SDPA, checkpointing=checkpointing)
        loss = net(latents(2, 2, 3), torch.rand(2), texts(3, 2)).square().mean()
        with Operations() as seen:
            loss.backward()
        forward = [name for name in seen.names if "backward" not in name]
        counts[checkpointing] = [sum(kind in name for name in forward) for kind in ("dot_product", "gelu")]
    layers = len(net.blocks)
    # early stop: nothing in a block reads what its last layer puts out
    assert counts == {
        Checkpointing.none: [0, 0],
        Checkpointing.full: [2 * layers, layers],
        Checkpointing.selective: [0, layers],
    }


def test_equal_times_per_frame_are_one_shared_time() -> None:
    net, x, text = random_net(1), latents(2, 2, 3), texts(3, 2)
    sigma = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        shared = net(x, sigma, text)
        assert relative(net(x, sigma[:, None].expand(2, 3), text), shared) < 1e-6
        other = torch.tensor([[0.3, 0.3, 0.5], [0.9, 0.9, 0.9]])
        assert relative(net(x, other, text)[0], shared[0]) > 1e-3


def test_defect_05_batch_equals_one_by_one() -> None:
    net, x, text = random_net(1), latents(2, 3, 4), texts(3, 3)
    sigma, mask = torch.tensor([0.1, 0.5, 1.0]), CausalConfig(2).mask(4)
    with torch.no_grad():
        batched = net(x, sigma, text, mask=mask)
        for i in range(3):
            single = net(x[i : i + 1], sigma[i : i + 1], text[i : i + 1], mask=mask)
            assert relative(batched[i : i + 1], single) < 2e-6


def test_defect_05_batched_training_rollout_equals_one_by_one() -> None:
    causal, noise, text = CausalConfig(2, window_frames=4, sink_frames=1), latents(2, 2, 8), conditioning(3, 2)
    net, source = random_net(1), KeyedNoise(5, 2)

    class Row(KeyedNoise):
        def normal(self, role: str, shape: tuple[int, ...]) -> Tensor:
            return source.normal(role, shape)[1:]

    def rollout(noise: Tensor, text: Tensor, source: KeyedNoise) -> tuple[Tensor, dict[str, Tensor]]:
        net.zero_grad(set_to_none=True)
        condition = type(conditioning(3, 2))(text)
        plan = RolloutPlan(causal, (1.0, 0.8, 0.5), (1, 0, 2, 1), 8)
        cache = new_cache(net, causal, noise)
        out = self_forcing_rollout(ScoreNet(net, "s"), noise, condition, plan, source, cache, with_gradient=True)
        out.x0[-1].square().sum().backward()  # the last sample only
        return out.x0.detach()[-1], gradients(net)

    both_x0, both = rollout(noise, text.prompt["text"], source)
    single_x0, single = rollout(noise[1:], text.prompt["text"][1:], Row(5, 1))
    assert relative(both_x0, single_x0) < 2e-6
    for name in single:
        assert relative(both[name], single[name]) < 1e-4, name


def test_bf16_autocast_is_close_to_fp32() -> None:
    net, x, text, sigma = random_net(1), latents(2, 2, 4), texts(3, 2), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        exact = ScoreNet(net, "n").velocity(x, sigma, text)
        rough = ScoreNet(net, "n", compute_dtype=torch.bfloat16).velocity(x, sigma, text)
    assert rough.dtype is torch.float32
    assert 1e-4 < relative(rough, exact) < 3e-2


def test_bad_input_is_one_line() -> None:
    net, x, text = random_net(1), latents(2, 2, 4), texts(3, 2)
    half = torch.full((2,), 0.5)
    for bad, message in (
        ((x.transpose(1, 2), half, text), r"latents must be \[B, F, 3, H, W\]"),
        ((x[..., :3], half, text), "not a multiple of the patch"),
        ((x, half[:1], text), "sigma must be"),
        ((x, half[:, None].expand(2, 3), text), "sigma must be"),
        ((x, half, text[:, :2]), "text must be"),
        ((x, half, text[:1]), "text must be"),
    ):
        with pytest.raises(ValueError, match=message):
            net(*bad)


def test_defect_05_a_mask_of_other_frames_is_refused() -> None:
    """Also where its token counts would happen to divide: 4 frames of 6 tokens under a mask of 2 or of 3 frames."""
    net, x, text, half = random_net(1), latents(2, 2, 4), texts(3, 2), torch.full((2,), 0.5)
    for frames in (2, 3, 8):
        with pytest.raises(ValueError, match=f"mask of {frames} x {frames} frames does not fit 4 frames"):
            net(x, half, text, mask=CausalConfig(1).mask(frames))
