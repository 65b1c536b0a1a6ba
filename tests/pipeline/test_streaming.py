"""Streams without end: what each block sees, whatever came before, in constant memory and without waiting."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention.captured import Captured
from model.attention.kv_cache import CacheShape, KVCache
from model.attention.rope import apply_rope, rope_table
from model.score import ScoreNet
from model.types import Conditioning, Evaluations
from model.wan.transformer import WanTransformer
from pipeline.causal import CausalConfig, VideoShape
from pipeline.causal_inference import CausalStream, StreamConfig, block_noise, stream
from pipeline.denoise import ExitPass, denoise_block, per_sample
from tests.nets import MICRO, KeyedNoise, conditioning, random_net, relative, texts

SIGMAS = (1.0, 0.9375, 0.625)
WINDOW = CausalConfig(2, window_frames=7, sink_frames=2)
FRAME = (3, 4, 6)


def opened(
    net: WanTransformer,
    condition: Conditioning,
    causal: CausalConfig = WINDOW,
    config: StreamConfig | None = None,
    *,
    frames: int | None = None,
    trained: int | None = 9,
    evaluations: Evaluations | None = None,
) -> CausalStream:
    cache = causal.new_cache(
        net, VideoShape(condition.batch, frames, 4, 6), torch.float32, condition.prompt["text"].device, trained_frames=trained
    )  # fmt: skip
    source = KeyedNoise(5, condition.batch)
    config = StreamConfig([SIGMAS]) if config is None else config
    return CausalStream(ScoreNet(net, "student", evaluations), condition, config, causal, source, cache)


def made(video: CausalStream, blocks: int) -> list[Tensor]:
    return [video.make(video.noise(FRAME)) for _ in range(blocks)]


def test_a_longer_video_begins_as_a_shorter_one() -> None:
    """Through an independent first frame and a rolling window; an endless one as those with an end."""
    net, condition = random_net(1), conditioning(3, 2)
    causal = replace(WINDOW, independent_first_frame=True)
    endless = torch.cat(made(opened(net, condition, causal), 6), 1)
    for blocks in ((1, 2), (1, 2, 2, 2, 2, 2)):
        frames = sum(blocks)
        source = KeyedNoise(5, 2)
        cache = causal.new_cache(net, VideoShape(2, frames, 4, 6), torch.float32, "cpu", trained_frames=9)
        noise = block_noise(source, blocks, FRAME)
        ended = torch.cat(list(stream(ScoreNet(net, "student"), noise, condition, SIGMAS, causal, source, cache)), 1)
        assert torch.equal(ended, endless[:, :frames])


def test_a_video_without_end_needs_a_window() -> None:
    with pytest.raises(ValueError, match="a video without end needs a window: set window_frames"):
        opened(random_net(1), conditioning(3, 1), CausalConfig(2))


def test_keys_of_sinks_follow_the_video_and_rounding_does_not_add_up() -> None:
    """In the cache lies what the rotation of the untouched keys to their new positions gives, after 300 turns too."""
    shape = CacheShape(layers=2, batch=1, context_frames=5, tokens_per_frame=6, heads=1, head_dim=24, block_frames=2)
    cache = KVCache(shape, sinks=2, rolling=True, reach=9, dtype=torch.float32, device="cpu")
    bare = [torch.randn(1, 12, 1, 24, generator=torch.Generator().manual_seed(i)) for i in range(300)]
    for i, k in enumerate(bare):
        rotated = apply_rope(k, rope_table(range(2 * i, 2 * i + 2), 2, 3, 24, torch.device("cpu")))
        cache.write(2, [(rotated, k)] * 2)
        end = 2 * i + 2
        first = max(end + 2 - 9, 0)  # no further than 9 frames from the end of the block to come
        assert cache.position == end
        assert cache.in_time[: min(2, end)] == [first, first + 1]
        assert cache.in_time[2:] == list(range(max(end - 3, 2), end))
        context = cache.context(1)
        assert context is not None
        turned = apply_rope(bare[0], rope_table(range(first, first + 2), 2, 3, 24, torch.device("cpu")))
        assert relative(context[0][:, :12], turned) < 1e-6
        assert torch.equal(context[1][:, :12], bare[0])


@pytest.mark.parametrize(("window", "sinks", "trained"), [(7, 2, 9), (6, 0, 9), (6, 3, 6), (7, 1, 60)])
def test_a_late_block_is_one_pass_over_what_it_sees(window: int, sinks: int, trained: int) -> None:
    """In a network of one layer keys depend on nothing but their own frames, so a cached block of a long video is the
    last part of a plain pass over sinks, window and block, sinks no further off than in training."""
    net, condition = random_net(1, replace(MICRO, num_layers=1)), conditioning(3, 2)
    causal = CausalConfig(2, window_frames=window, sink_frames=sinks)
    video = opened(net, condition, causal, StreamConfig([(0.7,)]), trained=trained)
    done = torch.cat(made(video, 20), 1)
    x, held = video.noise(FRAME), window - 2
    start = max(42 - max(trained, window), 0)
    positions = [start + i for i in range(sinks)] + list(range(40 - (held - sinks), 42))
    seen = torch.cat([done[:, :sinks], done[:, 40 - (held - sinks) :], x], 1)
    sigma = torch.cat([torch.zeros(2, held), torch.full((2, 2), 0.7)], 1)
    with torch.no_grad():
        expected = (x - 0.7 * net(seen, sigma, condition.prompt["text"], positions=positions)[:, held:]).float()
    assert relative(video.make(x), expected) < 2e-6


def test_positions_may_be_as_large_as_one_likes() -> None:
    """A day at 60 frames a second is 1.3 million latent frames: only differences of positions count."""
    net, condition = random_net(1), conditioning(3, 1)
    early, late = opened(net, condition), opened(net, condition)
    late.cache._offset = late.cache._first = 1_300_000
    for a, b in zip(made(early, 8), made(late, 8), strict=True):
        assert relative(b, a) < 1e-5


def test_noisy_context_is_the_last_pass_seen_again() -> None:
    """Keys and values of the last denoising pass are those of its input, at its noise level; no pass is spent on them."""
    net, condition = random_net(1), conditioning(3, 2)
    count = Evaluations()
    video = opened(net, condition, config=StreamConfig([SIGMAS], noisy_context=True), evaluations=count)
    student, source = ScoreNet(net, "student"), KeyedNoise(5, 2)
    cache = WINDOW.new_cache(net, VideoShape(2, None, 4, 6), torch.float32, "cpu", trained_frames=9)
    for index in range(7):
        noise, seen = video.noise(FRAME), list[Tensor]()
        x0 = denoise_block(
            student, noise, condition, SIGMAS, ExitPass(2, seen=seen), block=index, source=source, cache=cache
        )
        assert torch.equal(video.make(noise), x0)
        with torch.no_grad():
            student.velocity(seen[0], per_sample(SIGMAS[-1], x0), condition, cache=cache, write_cache=True)
    assert count.frames["student"] == 7 * 3 * 2 * 2
    cleaner = opened(net, condition, evaluations=(clean := Evaluations()))
    assert relative(made(cleaner, 7)[-1], x0) > 1e-3
    assert clean.frames["student"] == (7 * 4 - 1) * 2 * 2  # one more a block, but for the last


def test_blocks_have_the_steps_of_their_own() -> None:
    net, condition, count = random_net(1), conditioning(3, 1), Evaluations()
    video = opened(net, condition, config=StreamConfig([SIGMAS, SIGMAS[:2], (1.0,)]), evaluations=count)
    spent = []
    for _ in range(4):
        before = count.frames.get("student", 0)
        made(video, 1)
        spent.append((count.frames["student"] - before) // 2)
    assert spent == [3, 1 + 2, 1 + 1, 1 + 1]  # the context of the block before, then its own steps
    alike = opened(net, condition)
    assert torch.equal(made(alike, 1)[0], made(opened(net, condition, config=video.config), 1)[0])


def test_another_prompt_holds_from_the_next_block_on() -> None:
    """The blocks equal those of passes with gradient, which keep no memory of the text that could be the old prompt's."""
    net, first, second = random_net(1), conditioning(3, 2), texts(9, 2)
    video = opened(net, first)
    streamed = made(video, 5)
    video.switch(second)
    streamed += made(video, 2)

    student, source = ScoreNet(net.requires_grad_(True), "student"), KeyedNoise(5, 2)
    cache = WINDOW.new_cache(net, VideoShape(2, None, 4, 6), torch.float32, "cpu", trained_frames=9)
    for index, expected in enumerate(streamed):
        text = first.prompt["text"] if index < 5 else second
        x = source.normal(f"noise.b{index}", (2, *FRAME))
        for step, sigma in enumerate(SIGMAS):
            x0 = student.x0(x, per_sample(sigma, x), text, cache=cache).detach()
            if step < 2:
                fresh = source.normal(f"renoise.b{index}.s{step}", (2, *FRAME))
                x = (1 - SIGMAS[step + 1]) * x0 + SIGMAS[step + 1] * fresh
        assert relative(x0, expected) < 1e-6
        student.velocity(x0, per_sample(0.0, x0), text, cache=cache, write_cache=True)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("blocks", [2, 8])
def test_recache_shows_the_held_frames_under_the_new_prompt(blocks: int, noisy: bool) -> None:
    """After it, a block is that of a video which begins with these frames and has known no other prompt."""
    net, first, second = random_net(1), conditioning(3, 2), texts(9, 2)
    causal = CausalConfig(2, window_frames=8)
    config = StreamConfig([(0.7,)], noisy_context=noisy)
    video = opened(net, first, causal, config, trained=None)
    frames, inputs = [], []
    for _ in range(blocks):
        inputs.append(video.noise(FRAME))
        frames.append(video.make(inputs[-1]))
    video.switch(second, recache=True)
    assert video.cache.position == 2 * blocks

    held = torch.cat((inputs if noisy else frames)[-3:], 1)
    cache = causal.new_cache(net, VideoShape(2, None, 4, 6), torch.float32, "cpu")
    student = ScoreNet(net, "student")
    with torch.no_grad():
        for part in held.split(2, 1):
            sigma = per_sample(0.7 if noisy else 0.0, part)
            student.velocity(part, sigma, second, cache=cache, write_cache=True)
    for _ in range(3):
        x = video.noise(FRAME)
        with torch.no_grad():
            expected = student.x0(x, per_sample(0.7, x), second, cache=cache)
            assert relative(video.make(x), expected) < 2e-6
            shown = x if noisy else expected
            student.velocity(shown, per_sample(0.7 if noisy else 0.0, x), second, cache=cache, write_cache=True)


def test_recache_keeps_sinks_at_their_distance() -> None:
    """A recache under the same prompt of a one-layer network changes nothing: sinks, ring, positions are as before."""
    net, condition = random_net(1, replace(MICRO, num_layers=1)), conditioning(3, 2)
    still, shown = opened(net, condition), opened(net, condition)
    for blocks in (3, 5, 9):
        made(still, blocks)
        made(shown, blocks)
        shown.switch(condition.prompt["text"], recache=True)
        still.switch(condition.prompt["text"])
        assert shown.cache.in_time == still.cache.in_time
        assert relative(made(shown, 1)[0], made(still, 1)[0]) < 2e-6


def test_channels_cannot_be_shown_again() -> None:
    condition = replace(conditioning(3, 1), channels=torch.zeros(1, 4, 1, 4, 6))
    net = random_net(1, replace(MICRO, in_dim=4, model_type="i2v"))
    video = opened(net, condition, frames=4)
    with pytest.raises(ValueError, match="recache: frames with channels beside the latents cannot be shown again"):
        video.switch(condition.prompt["text"], recache=True)


@pytest.fixture
def born() -> Iterator[Callable[[], tuple[int, int]]]:
    """Bytes of the tensors, and number of the objects, that were made since and are alive; what other tests left is frozen."""

    def count() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return sum(thing.nbytes for thing in objects if issubclass(type(thing), Tensor)), len(objects)

    gc.collect()
    gc.freeze()
    yield count
    gc.unfreeze()


@pytest.mark.parametrize("noisy", [False, True])
def test_memory_is_flat_over_200_blocks(noisy: bool, born: Callable[[], tuple[int, int]]) -> None:
    video = opened(random_net(1), conditioning(3, 1), config=StreamConfig([SIGMAS[:1]], noisy_context=noisy))
    video.switch(texts(9, 1), recache=bool(made(video, 20)))
    made(video, 20)
    held, objects = born()
    made(video, 160)
    after, objects_after = born()
    assert video.frames == 400
    assert held > 0
    assert after == held
    assert objects_after < objects + 200


@pytest.mark.parametrize("noisy", [False, True])
def test_an_ended_stream_frees_its_memory_at_once(noisy: bool) -> None:
    """By counting references: a collector that comes later would find two caches where there is room for one."""
    video = opened(random_net(1), conditioning(3, 1), config=StreamConfig([SIGMAS], noisy_context=noisy))
    made(video, 3)
    cache = weakref.ref(video.cache)
    gc.disable()
    try:
        del video
        assert cache() is None
    finally:
        gc.enable()


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device: values read back, and copies between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        reads = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
        before, after = devices([args, kwargs]), devices([out])
        mixed = len(before | after) > 1
        if func.overloadpacket.__name__ in reads or mixed:
            self.found.append(str(func))
        return out


def devices(values: Iterable[Any]) -> set[str]:
    found: set[str] = set()
    for value in values:
        if isinstance(value, Tensor):
            found.add(value.device.type)
        elif isinstance(value, (list, tuple)):
            found |= devices(value)
        elif isinstance(value, dict):
            found |= devices(value.values())
    return found


class OnDevice(KeyedNoise):
    """Draws that are made where they are used, as `utils.random.Noise` makes them."""

    def normal(self, role: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(self.batch, *shape, device="meta")


class Copies(TorchFunctionMode):
    """Tensors that are made of the host's numbers, which dispatch does not see."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits(act: Callable[[], object]) -> list[str]:
    with Waits() as mode, Copies(mode.found):
        act()
    return mode.found


@pytest.mark.parametrize("noisy", [False, True])
def test_nothing_in_a_block_waits_for_the_device(noisy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where a read of a value is an error and a copy from the host is seen."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no meta device
    with torch.device("meta"):
        net = WanTransformer(MICRO)
        condition = Conditioning(torch.zeros(1, MICRO.text_len, MICRO.text_dim))
    video = opened(net, condition, config=StreamConfig([SIGMAS], noisy_context=noisy))
    video.source = OnDevice(5, 1)
    made(video, 6)
    assert waits(lambda: made(video, 3)) == []
    assert waits(lambda: torch.tensor([1.0], device="meta")) != []
    assert waits(lambda: torch.ones(2).to("meta")) != []


def traced(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Runs the operators alone, on the same memory and without the Python code around them, as a CUDA graph does."""
    graph = make_fx(run)()
    return lambda: graph()


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("sinks", [0, 2])
def test_recorded_passes_are_those_that_run(noisy: bool, sinks: int) -> None:
    """Through a window that fills and rolls, another prompt, and a recache; one recording for each number of frames."""
    net, condition, second = random_net(1), conditioning(3, 1), texts(9, 1)
    causal, config = replace(WINDOW, sink_frames=sinks), StreamConfig([SIGMAS, SIGMAS[:2]], noisy_context=noisy)
    plain, captured = (opened(net, condition, causal, config) for _ in range(2))
    passes = Captured(net, captured.cache, traced)
    captured.student = captured.student.through(passes)
    for blocks, text, recache in ((7, second, False), (4, condition.prompt["text"], True), (5, second, True)):
        for expected, block in zip(made(plain, blocks), made(captured, blocks), strict=True):
            assert torch.equal(block, expected)
        for video in (plain, captured):
            video.switch(text, recache=recache)
    assert {key[0] for key in passes.recorded} == {0, 2, 4, 5}
    assert len(passes.recorded) == 4
