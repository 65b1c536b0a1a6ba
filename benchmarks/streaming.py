"""First frame and steady frames a second of a causal student: `python -m benchmarks.streaming [--size cpu|toy|1.3b]`

Weights are random, at the true geometry; a block is 3 latent frames, 12 pixel frames, in 4 steps. Each option has a
process of its own. `first` is from the text embedding to the first block's pixels, everything having run before once
(compiled, recorded); `steady` is pixel frames a second over blocks that see a full window, by the clock. The VAE is
Diffusers' and left out where that is not installed; `tiny` is the tiny decoder's geometry.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Clock, attempt, machine, peak_gb, table, write_json
from benchmarks.train_step import STEPS, KeyedDraws
from model.attention.backends import Backend
from model.attention.captured import Captured
from model.score import ScoreNet
from model.types import Conditioning, Evaluations
from model.wan.config import PRESETS
from model.wan.tiny_decoder import TinyDecoder
from model.wan.transformer import WanTransformer
from pipeline.causal import CausalConfig, VideoShape
from pipeline.causal_inference import CausalStream, StreamConfig
from utils.cli import ShowDefaults
from utils.overlap import SideDecoder

BLOCK, PIXEL_FRAMES = 3, 4  # latent frames of a block, pixel frames of a latent frame
TRAINED = 21  # latent frames


@dataclass(frozen=True)
class Size:
    """A network, its latents' height and width, and how many blocks are timed."""

    preset: str
    height: int
    width: int
    device: str
    blocks: int


SIZES = {
    "cpu": Size("bench", 16, 16, "cpu", 8),
    "toy": Size("toy", 8, 8, "cpu", 200),  # the toy world's network, as quickstart trains it
    "1.3b": Size("1.3b", 60, 104, "cuda", 20),  # 480x832
    "smoke": Size("tiny", 4, 4, "cpu", 2),  # for the tests
}


@dataclass(frozen=True)
class Option:
    """What is timed.

    name: in words.
    window: latent frames that a block sees.
    sinks: first latent frames that stay in the window.
    noisy: whether blocks see the context of the last denoising pass.
    recorded: whether passes are recorded as CUDA graphs.
    compiled: whether blocks are compiled.
    fp8: whether linear layers are in fp8.
    decoder: none, tiny or vae.
    """

    name: str
    window: int = TRAINED
    sinks: int = 0
    noisy: bool = False
    recorded: bool = False
    compiled: bool = False
    fp8: bool = False
    decoder: str = "none"


EAGER = Option("eager, 21 frames seen")
CPU_OPTIONS = (
    EAGER,
    Option("window 9, 3 sinks", 9, 3),
    Option("window 9, noisy context", 9, 3, noisy=True),
    Option("window 9, compiled", 9, 3, compiled=True),
    Option("window 9, tiny decoder", 9, 3, decoder="tiny"),
)
_COMPILED = Option("window 9, compiled", 9, 3, recorded=True, compiled=True)
_NOISY = replace(_COMPILED, name="window 9, compiled, noisy context", noisy=True)
_FP8 = replace(_NOISY, name="window 9, compiled, noisy context, fp8", fp8=True)
GPU_OPTIONS = (  # after the one that all are compared to, what is worth most comes first: time may run out
    EAGER,
    _COMPILED,
    replace(_COMPILED, name="window 9, compiled, VAE", decoder="vae"),
    replace(_FP8, name="window 9, compiled, noisy context, fp8, tiny decoder", decoder="tiny"),
    replace(_FP8, name="window 9, compiled, noisy context, fp8, VAE", decoder="vae"),
    _FP8,
    _NOISY,
    Option("recorded, 21 frames seen", recorded=True),
    Option("window 9, 3 sinks", 9, 3, recorded=True),
    Option("recorded, compiled, 21 frames seen", recorded=True, compiled=True),  # compiles longest
)


def options_of(size: Size) -> tuple[Option, ...]:
    return GPU_OPTIONS if size.device == "cuda" else CPU_OPTIONS


def lacks(option: Option) -> str | None:
    """What this machine has not got installed that the option needs."""
    needed = [name for name, wanted in (("diffusers", option.decoder == "vae"), ("torchao", option.fp8)) if wanted]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(missing)}: pip install {' '.join(missing)}" if missing else None


class Workload:
    """A student with random weights and its cache, which each video starts afresh."""

    def __init__(self, size: Size, option: Option) -> None:
        self.size, self.option, self.device = size, option, torch.device(size.device)
        self.dtype = torch.bfloat16 if size.device == "cuda" else torch.float32
        config = PRESETS[size.preset]
        torch.manual_seed(0)
        with self.device:
            net = WanTransformer(config, Backend.SDPA)
        torch.nn.init.normal_(net.head.head.weight, std=0.02)
        net = net.to(self.dtype).requires_grad_(False).eval()
        self._accelerate(net)
        self.causal = CausalConfig(BLOCK, window_frames=option.window, sink_frames=option.sinks)
        self.cache = self.causal.new_cache(
            net, VideoShape(1, None, size.height, size.width), self.dtype, self.device, trained_frames=TRAINED
        )
        self.evaluations = Evaluations()
        dtype = self.dtype if size.device == "cuda" else None
        self.score = ScoreNet(net, "student", self.evaluations, dtype)
        if option.recorded:
            self.score = self.score.through(Captured(net, self.cache))
        self.frame = (config.in_dim, size.height, size.width)
        self.source = KeyedDraws(self.device)
        self.text = self.source.normal("text", (config.text_len, config.text_dim))
        self.decoders = self._decoders(config.in_dim)

    def _accelerate(self, net: WanTransformer) -> None:
        from generation.acceleration import compile_blocks, fp8_linears

        if self.option.fp8:
            fp8_linears(net)
        if self.option.compiled:
            compile_blocks(net)

    def _decoders(self, channels: int) -> Callable[[], Callable[[Tensor], Tensor]]:
        """A new stream of the decoder at each call."""
        if self.option.decoder == "vae":
            from diffusers import AutoencoderKLWan

            from model.wan.vae import WanVAE

            with torch.device(self.device):
                vae = WanVAE(AutoencoderKLWan())
            vae.model.to(self.dtype)
            return vae.to(self.device).decoding
        if self.option.decoder == "tiny":
            with torch.device(self.device):
                tiny = TinyDecoder(channels).to(self.dtype).eval()
            return tiny.stream
        return lambda: lambda latents: latents

    def video(self) -> Callable[[], Callable[[], Tensor]]:
        """A new video: each call begins its next block, and gives what waits for its pixels."""
        self.cache.reset()
        config = StreamConfig([STEPS], self.option.noisy)
        stream = CausalStream(
            self.score, Conditioning({"text": self.text}), config, self.causal, self.source, self.cache
        )
        decoder = SideDecoder(self.decoders(), self.device)
        return lambda: decoder.start(stream.make(stream.noise(self.frame)))

    def full(self) -> int:
        """Blocks until the window is full, and one more."""
        return self.option.window // BLOCK + 1


def measure(size: Size, option: Option) -> dict[str, Any]:
    """One option, in this process."""
    work = Workload(size, option)
    begin = work.video()
    for _ in range(work.full() + 1):  # compiles, records, allocates
        begin()()
    first, begin = _first(work)
    for _ in range(work.full()):
        begin()()
    spent = work.evaluations.total_frames
    started, waiting = time.perf_counter(), begin()
    for _ in range(size.blocks - 1):
        following = begin()
        waiting()
        waiting = following
    waiting()
    taken = time.perf_counter() - started
    return {
        "first_seconds": first,
        "frames_per_second": size.blocks * BLOCK * PIXEL_FRAMES / taken,
        "forwards_a_block": (work.evaluations.total_frames - spent) / BLOCK / size.blocks,
        "cache_gb": work.cache.nbytes / 1e9,
        "peak_gb": peak_gb(work.device),
        "machine": machine(work.device),
    }


def _first(work: Workload) -> tuple[float, Callable[[], Callable[[], Tensor]]]:
    if work.device.type == "cuda":
        torch.cuda.synchronize(work.device)
    started = time.perf_counter()
    begin = work.video()
    begin()()
    return time.perf_counter() - started, begin


def report(results: list[dict[str, Any]]) -> str:
    """The table; ratios are to the first row of the same run. Below it, why an option has no numbers."""
    measured = [r for r in results if "refused" not in r]
    base = measured[0]["frames_per_second"] if measured else 1.0
    header = ["option", "first, s", "steady, frames/s", "ratio", "forwards a block", "cache GB", "peak GB"]
    rows = [
        [
            r["option"]["name"],
            f"{r['first_seconds']:.3f}",
            f"{r['frames_per_second']:.2f}",
            f"{r['frames_per_second'] / base:.2f}",
            f"{r['forwards_a_block']:.1f}",
            f"{r['cache_gb']:.3f}",
            f"{r['peak_gb']:.2f}",
        ]
        for r in measured
    ]
    refused = [f"{r['option']['name']}: {r['refused']}" for r in results if "refused" in r]
    return "\n".join([table(header, rows), *refused])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.streaming", description=__doc__.splitlines()[0], formatter_class=ShowDefaults
    )
    parser.add_argument("--size", choices=list(SIZES), default="cpu", help="what is measured")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--only", help="options whose name holds this")
    parser.add_argument("--seconds", type=float, help="in all; options that are not done by then have no numbers")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/streaming_SIZE.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    size = SIZES[options.size]
    if size.device == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks.streaming: --size {options.size} needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    chosen = {option.name: option for option in options_of(size) if (options.only or "") in option.name}
    if options.worker is not None:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(size, chosen[options.worker])))
        return 0
    if not chosen:
        print(f"benchmarks.streaming: --only {options.only}: no option's name holds this", file=sys.stderr)
        return 2
    clock = Clock(options.seconds)
    out = options.out or Path("benchmarks/results") / f"streaming_{options.size}.json"
    results: list[dict[str, Any]] = []
    for name, option in chosen.items():
        flags = ["--worker", name, "--size", options.size, "--threads", str(options.threads)]
        refusal = lacks(option)
        found = {"refused": refusal} if refusal else attempt("benchmarks.streaming", flags, options.threads, clock)
        results.append({"option": asdict(option)} | found)
        write_json(out, {"size": options.size, "results": results})
    print(report(results))
    print(f"wrote {out}")
    return 0 if any("refused" not in r for r in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
