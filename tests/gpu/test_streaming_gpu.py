"""Streams on CUDA: recorded passes against those that run, compiled and fp8 ones against plain ones, waits, decoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from generation.acceleration import FP8_CAPABILITY, compile_blocks, fp8_linears
from model.attention.backends import Backend
from model.attention.captured import Captured
from model.score import ScoreNet
from model.types import Conditioning
from model.wan.config import WanConfig
from model.wan.transformer import WanTransformer
from pipeline.causal import CausalConfig, VideoShape
from pipeline.causal_inference import CausalStream, StreamConfig
from tests.nets import random_net, relative, texts
from utils.overlap import SideDecoder
from utils.random import Noise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CONFIG = WanConfig(
    dim=128, ffn_dim=256, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=16, text_len=8, freq_dim=32
)
SIGMAS, FRAME = (1.0, 0.8, 0.5), (4, 8, 8)
CAUSAL = CausalConfig(2, window_frames=7, sink_frames=2)
CUDA = torch.device("cuda")


def net() -> WanTransformer:
    return random_net(1, CONFIG, backend=Backend.SDPA).to(CUDA, torch.bfloat16).requires_grad_(False)


def opened(net: WanTransformer, *, seed: int = 0, noisy: bool = False, recorded: bool = False) -> CausalStream:
    cache = CAUSAL.new_cache(net, VideoShape(1, None, 8, 8), torch.bfloat16, CUDA, trained_frames=9)
    score = ScoreNet(net, "student", compute_dtype=torch.bfloat16)
    student = score.through(Captured(net, cache)) if recorded else score
    conditioning = Conditioning(texts(3, 1, CONFIG).to(CUDA))
    return CausalStream(student, conditioning, StreamConfig([SIGMAS], noisy), CAUSAL, Noise(seed, 0, [0], CUDA), cache)


def made(video: CausalStream, blocks: int) -> list[Tensor]:
    return [video.make(video.noise(FRAME)) for _ in range(blocks)]


@pytest.mark.parametrize("noisy", [False, True])
def test_graphs_are_the_passes_that_they_recorded(noisy: bool) -> None:
    """Through a window that fills and rolls, another prompt and a recache, with two videos at a time."""
    network, other = net(), texts(9, 1, CONFIG).to(CUDA)
    plain = [opened(network, seed=seed, noisy=noisy) for seed in (1, 2)]
    graphs = [opened(network, seed=seed, noisy=noisy, recorded=True) for seed in (1, 2)]
    for recache in (False, True, True):
        for _ in range(6):
            for a, b in zip(plain, graphs, strict=True):
                assert relative(made(b, 1)[0], made(a, 1)[0]) < 1e-3
        for video in (*plain, *graphs):
            video.switch(other, recache=recache)


def test_a_block_waits_for_nothing() -> None:
    for recorded in (False, True):
        video = opened(net(), recorded=recorded)
        made(video, 8)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            made(video, 3)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_blocks_recorded_or_not() -> None:
    plain, compiled = net(), net()
    compile_blocks(compiled)
    expected = made(opened(plain), 6)
    for recorded in (False, True):
        for a, b in zip(expected, made(opened(compiled, recorded=recorded), 6), strict=True):
            assert relative(b, a) < 3e-2


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY, reason="needs fp8 products"
)
def test_fp8_is_near() -> None:
    pytest.importorskip("torchao")
    plain, coarse = net(), net()
    fp8_linears(coarse)
    for recorded in (False, True):
        assert relative(made(opened(coarse, recorded=recorded), 2)[0], made(opened(plain), 2)[0]) < 0.15


def test_pixels_of_a_side_stream_are_the_decoders() -> None:
    """While the next blocks are made, and their memory used again."""
    decoder = torch.nn.Conv2d(4, 3, 3, padding=1, device=CUDA)

    def decode(latents: Tensor) -> Tensor:
        return decoder(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])

    video, side = opened(net(), recorded=True), SideDecoder(decode, CUDA)
    blocks, waiting = [], []
    for _ in range(8):
        block = video.make(video.noise(FRAME))
        waiting.append(side.start(block))
        blocks.append(block.clone())
        del block
    with torch.no_grad():
        for block, wait in zip(blocks, waiting, strict=True):
            torch.testing.assert_close(wait(), decode(block).cpu())
