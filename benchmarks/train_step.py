"""What a Self-Forcing + DMD update costs: `python -m benchmarks.train_step [--size cpu|1.3b] [--precision bf16] ...`

Times are in units of ONE full-sequence bidirectional forward without gradient of the same network, in the same process
and precision. A generator step is a rollout, the DMD loss (critic, teacher with and without prompt) and backward; a
critic step is a rollout without gradient, its loss and backward; neither counts the optimizer's update. The exit step
is forced to each of the four in turn. All three networks and both AdamW states are in memory.
An iteration is a critic step and a fifth of a generator step, each the mean over exits: the published recipe updates
the generator in every fifth iteration. Its floating-point operations are those of its matrix products, counted without
recomputation; MFU is their rate over the GPU's by its data sheet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Clock, attempt, machine, peak_gb, seconds, table, write_json
from generation.acceleration import compile_blocks
from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.dmd import critic_loss, dmd_loss
from model.query import Guidance, ScoreQuery
from model.schedule import step_sigmas
from model.score import ScoreNet
from model.types import Conditioning, Evaluations, Rollout
from model.wan.config import PRESETS, WanConfig
from model.wan.transformer import WanTransformer
from pipeline.causal import CausalConfig, VideoShape
from pipeline.self_forcing_training import RolloutPlan, self_forcing_rollout
from planning.hardware import GPUS
from planning.meter import FLOPS, Meter
from utils.cli import ShowDefaults
from utils.optimizers.adamw import AdamWConfig, adamw

CRITIC_STEPS = 5  # critic updates for each of the generator
STEPS = step_sigmas([1000, 750, 500, 250], warp=True, shift=5.0)


@dataclass(frozen=True)
class Size:
    """Networks and their latents [1, F, C, H, W] in blocks of three frames. teacher: None for one like the student."""

    preset: str
    frames: int
    height: int
    width: int
    device: str
    teacher: str | None = None

    @property
    def config(self) -> WanConfig:
        return PRESETS[self.preset]

    @property
    def teacher_config(self) -> WanConfig:
        return PRESETS[self.teacher or self.preset]


SIZES = {
    "cpu": Size("bench", 21, 16, 16, "cpu"),
    "1.3b": Size("1.3b", 21, 60, 104, "cuda"),  # 81 frames of 480x832
    "1.3b+14b": Size("1.3b", 21, 60, 104, "cuda", "14b"),  # Self-Forcing's own: the teacher is Wan2.1 14B
    "smoke": Size("tiny", 6, 4, 4, "cpu"),  # for the tests
}

# Self-Forcing (commit 33593df) made to run on a CPU, at size `cpu`: units at exit 0..3, and GB. Measured in another run
# and perhaps on another machine; fp32 without checkpointing runs there only with a patch.
PUBLIC: dict[tuple[str, str], dict[str, Any]] = {
    ("fp32", "on"): {"forward": 1.20, "generator": [8.3, 9.3, 10.3, 11.3], "critic": [6.2, 7.2, 8.2, 9.1], "gb": 1.77},
    ("fp32", "off"): {"forward": 1.19, "generator": [7.1, 8.2, 9.1, 9.8], "critic": [5.1, 6.1, 7.2, 8.3], "gb": 2.40},
    ("bf16", "on"): {"forward": 0.64, "generator": [7.9, 8.5, 9.2, 10.4], "critic": [5.3, 6.0, 6.8, 7.6], "gb": 1.75},
}


class KeyedDraws:
    """A NoiseSource whose draws depend on their role alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def normal(self, role: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(sum(role.encode()))
        return torch.randn(1, *shape, generator=generator, device=self.device)


class Workload:
    """Three networks with random weights, both optimizers' states, and one update's inputs.

    size: presets of the networks, shape of the latents, device.
    precision: fp32 or bf16.
    checkpointing: of the student and the critic.
    backend: of attention.
    layers: of the student and the critic, and of the teacher; None: as many as their presets say.
    compiled: the networks' blocks go through torch.compile; the replayed backward of a rollout does not.
    """

    def __init__(
        self,
        size: Size,
        precision: str,
        checkpointing: Checkpointing,
        backend: Backend,
        layers: tuple[int, int] | None = None,
        compiled: bool = False,
    ) -> None:
        self.size, self.device = size, torch.device(size.device)
        student, teacher = size.config, size.teacher_config
        if layers is not None:
            student, teacher = replace(student, num_layers=layers[0]), replace(teacher, num_layers=layers[1])
        self.configs = {"student": student, "critic": student, "teacher": teacher}
        self.compute_dtype = torch.bfloat16 if precision == "bf16" else None
        self.evaluations = Evaluations()
        torch.manual_seed(0)
        self.student, self.critic, self.teacher = (
            self._score(name, backend, checkpointing if name != "teacher" else Checkpointing.none)
            for name in ("student", "critic", "teacher")
        )
        if compiled:
            for score in (self.student, self.critic, self.teacher):
                assert isinstance(score.net, WanTransformer)
                compile_blocks(score.net)
        self.optimizers = {net.name: self._optimizer(net) for net in (self.student, self.critic)}
        c = size.config
        shape = (size.frames, c.in_dim, size.height, size.width)
        self.source = KeyedDraws(self.device)
        self.noise = self.source.normal("noise", shape)
        self.score_noise = self.source.normal("score", shape)
        self.sigma = torch.full((1,), 0.5, device=self.device)
        self.conditioning = Conditioning({"text": self.source.normal("text", (c.text_len, c.text_dim))})
        self.guidance = Guidance({"text": self.source.normal("negative", (c.text_len, c.text_dim))}, 4.0)
        self.causal = CausalConfig(num_frame_per_block=3)
        dtype = self.compute_dtype or torch.float32
        self.cache = self.causal.new_cache(
            self.student_net, VideoShape(1, size.frames, size.height, size.width), dtype, self.device
        )

    @property
    def student_net(self) -> WanTransformer:
        assert isinstance(self.student.net, WanTransformer)
        return self.student.net

    def _score(self, name: str, backend: Backend, checkpointing: Checkpointing) -> ScoreNet:
        if name == "teacher":  # frozen, so in the precision in which it runs, and never in another: 14B is large
            with torch.device("meta"):
                net = WanTransformer(self.configs[name], backend, checkpointing).requires_grad_(False)
            net = net.to(self.compute_dtype or torch.float32).to_empty(device=self.device)
            for p in net.parameters():
                torch.nn.init.normal_(p, std=0.02)
        else:
            with self.device:
                net = WanTransformer(self.configs[name], backend, checkpointing)
            torch.nn.init.normal_(net.head.head.weight, std=0.02)  # Wan's zero head would make some gradients zero
        return ScoreNet(net, name, self.evaluations, self.compute_dtype, batch_guidance=False)  # as the trainer has it

    def _optimizer(self, score: ScoreNet) -> torch.optim.Optimizer:
        """The published recipe's AdamW (beta1 = 0) with its state resident, as after a first update."""
        optimizer = adamw(list(score.net.parameters()), AdamWConfig())
        for p in score.net.parameters():
            optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg_sq": torch.empty_like(p).fill_(0)}
        return optimizer

    @torch.no_grad()
    def forward(self) -> None:
        """The unit."""
        self.student.velocity(self.noise, self.sigma, self.conditioning)

    def rollout(self, exit_step: int, with_gradient: bool) -> Rollout:
        self.cache.reset()
        exits = (exit_step,) * len(self.causal.blocks(self.size.frames))
        plan = RolloutPlan(self.causal, STEPS, exits, self.size.frames)
        return self_forcing_rollout(
            self.student, self.noise, self.conditioning, plan, self.source, self.cache,
            with_gradient=with_gradient,
        )  # fmt: skip

    def generator_step(self, exit_step: int) -> None:
        made = self.rollout(exit_step, True)
        query = ScoreQuery(
            made,
            real=self.teacher,
            fake=self.critic,
            conditioning=self.conditioning,
            guidance=self.guidance,
            sigma=self.sigma,
            noise=self.score_noise,
        )
        dmd_loss(query).loss.backward()
        self.optimizers["student"].zero_grad()

    def critic_step(self, exit_step: int) -> None:
        made = self.rollout(exit_step, False)
        critic_loss(made, self.critic, self.conditioning, self.sigma, self.score_noise).loss.backward()
        self.optimizers["critic"].zero_grad()

    def minimum_frames(self, exit_step: int, *, generator: bool) -> int:
        """Frame evaluations that the algorithm needs: each step up to the exit, a cache pass for all blocks but the
        last, and the scores (critic and, for the generator, the teacher twice)."""
        frames = self.size.frames
        rollout = frames * (exit_step + 1) + frames - self.causal.num_frame_per_block
        return rollout + frames * (3 if generator else 1)


def measure(
    size: Size,
    precision: str,
    checkpointing: Checkpointing,
    backend: Backend,
    repeats: int,
    compiled: bool = False,
) -> dict[str, Any]:
    """One configuration, in this process.

    size: of the networks and the videos.
    precision: of the networks.
    checkpointing: what is recomputed in the backward pass.
    backend: of attention.
    repeats: calls whose median counts.
    compiled: whether blocks are compiled.

    Returns seconds of the unit, units of both steps by exit step, peak memory in GB and the machine. `tokens` counts
    forward evaluations, recomputation left out.
    """
    work = Workload(size, precision, checkpointing, backend, compiled=compiled)
    tokens = size.config.tokens_per_frame(size.height, size.width)
    seconds(work.forward, work.device, 1)  # first calls allocate and choose kernels
    unit = seconds(work.forward, work.device, 3)
    out: dict[str, Any] = {"forward_seconds": unit, "generator": [], "critic": [], "tokens": [], "tokens_minimum": []}
    for kind, step in (("generator", work.generator_step), ("critic", work.critic_step)):
        step(1)  # makes passes of every kind, so what is compiled or chosen once is done
        for exit_step in range(len(STEPS)):
            before = work.evaluations.total_frames
            taken = seconds(partial(step, exit_step), work.device, repeats)
            out[kind].append(taken / unit)
            out["tokens"].append((work.evaluations.total_frames - before) // repeats * tokens)
            out["tokens_minimum"].append(work.minimum_frames(exit_step, generator=kind == "generator") * tokens)
    return out | {"peak_gb": peak_gb(work.device), "machine": machine(work.device)}


def operations(size: Size) -> dict[str, list[float]]:
    """Floating-point operations of the steps' matrix products, by exit step, of tensors that hold nothing.

    All layers of a network cost the same, and so do all denoising steps: what one more of each costs is counted.
    """
    parts = {layers: _counted(size, layers) for layers in ((1, 1), (2, 1), (1, 2))}
    out: dict[str, list[float]] = {}
    for kind in ("generator", "critic"):
        base, longer = parts[1, 1][kind], []
        for exit_step in (0, 1):
            student, teacher = (parts[layers][kind][exit_step] - base[exit_step] for layers in ((2, 1), (1, 2)))
            more = (size.config.num_layers - 1) * student + (size.teacher_config.num_layers - 1) * teacher
            longer.append(base[exit_step] + more)
        out[kind] = [longer[0] + exit_step * (longer[1] - longer[0]) for exit_step in range(len(STEPS))]
    return out


def _counted(size: Size, layers: tuple[int, int]) -> dict[str, list[float]]:
    """At exits 0 and 1, with so many layers in the student and the critic, and in the teacher."""
    meter = Meter()
    with meter.running():
        work = Workload(replace(size, device="cpu"), "fp32", Checkpointing.none, Backend.SDPA, layers)
        for kind, step in (("generator", work.generator_step), ("critic", work.critic_step)):
            for exit_step in (0, 1):
                meter.enter((kind, exit_step))
                step(exit_step)
    return {
        kind: [meter.phases[kind, exit_step].cost[FLOPS] for exit_step in (0, 1)] for kind in ("generator", "critic")
    }


def iteration(result: dict[str, Any], counted: dict[str, list[float]]) -> dict[str, float | None]:
    """Seconds and operations of an iteration; MFU, None for hardware without a known rate, and for fp32."""
    seconds = result["forward_seconds"] * _iteration(result)
    flops = _iteration(counted)
    gpu = next((gpu for name, gpu in GPUS.items() if name in result["machine"].get("gpu", "").lower()), None)
    mfu = None if gpu is None or result["precision"] != "bf16" else flops / seconds / (gpu.tflops * 1e12)
    return {"seconds": seconds, "flops": flops, "mfu": mfu}


def _iteration(steps: dict[str, Any]) -> float:
    return _mean(steps["critic"]) + _mean(steps["generator"]) / CRITIC_STEPS


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def report(results: list[dict[str, Any]], public: bool) -> str:
    """The table, and below it why a configuration has no numbers; with `public`, the public implementation's figures
    under each configuration that it has."""
    header = [
        "configuration",
        "forward s",
        "generator at exit 0/1/2/3",
        "mean",
        "s",
        "critic at exit 0/1/2/3",
        "mean",
        "s",
    ]
    header += ["GB", "tokens", "iteration s", "TFLOP/s", "MFU"]
    rows, refused = [], []
    for result in results:
        name = f"{result['precision']}, checkpointing {result['checkpointing']}, {result['backend']}"
        name += ", compiled" if result.get("compiled") else ""
        if "refused" in result:
            refused.append(f"{name}: {result['refused']}")
            continue
        spent, least = sum(result["tokens"]), sum(result["tokens_minimum"])
        whole = result["iteration"]
        rate = f"{whole['flops'] / whole['seconds'] / 1e12:.3g}"
        mfu = "" if whole["mfu"] is None else f"{whole['mfu']:.0%}"
        rows.append(
            [
                *_row(name, result["forward_seconds"], result, result["peak_gb"], f"{spent / least:.3f} x min"),
                f"{whole['seconds']:.1f}",
                rate,
                mfu,
            ]
        )
        known = PUBLIC.get((result["precision"], "off" if result["checkpointing"] == "none" else "on"))
        if public and known is not None:
            seconds = f"{known['forward'] * _iteration(known):.1f}"
            rows.append([*_row("  public Self-Forcing", known["forward"], known, known["gb"], ""), seconds, "", ""])
    return "\n".join([table(header, rows), *refused])


def _row(name: str, forward: float, units: dict[str, Any], gigabytes: float, tokens: str) -> list[str]:
    cells = [name, f"{forward:.3f}"]
    for kind in ("generator", "critic"):
        mean = _mean(units[kind])
        cells += [" / ".join(f"{value:.1f}" for value in units[kind]), f"{mean:.2f}", f"{mean * forward:.1f}"]
    return [*cells, f"{gigabytes:.2f}", tokens]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.train_step", description=__doc__.splitlines()[0], formatter_class=ShowDefaults
    )
    parser.add_argument("--size", choices=list(SIZES), default="cpu", help="what is measured")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: both")
    parser.add_argument("--checkpointing", choices=[c.name for c in Checkpointing], help="default: all")
    parser.add_argument(
        "--backend", choices=[b.value for b in Backend], help="default: sdpa, but plain for bf16 on a CPU"
    )
    parser.add_argument("--compile", action="store_true", help="blocks go through torch.compile, except in replays")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--repeats", type=int, default=2, help="of each measurement")
    parser.add_argument("--seconds", type=float, help="in all; what is not done by then has no numbers")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/train_step_SIZE.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    size = SIZES[options.size]
    if size.device == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks.train_step: --size {options.size} needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    if options.worker:
        torch.set_num_threads(options.threads)
        checkpointing, backend = Checkpointing[options.checkpointing], Backend(options.backend)
        found = measure(size, options.precision, checkpointing, backend, options.repeats, options.compile)
        print(json.dumps(found))
        return 0
    public = options.size == "cpu" and options.threads == 1 and not options.compile
    out = options.out or Path("benchmarks/results") / f"train_step_{options.size}.json"
    results: list[dict[str, Any]] = []
    clock, counted = Clock(options.seconds), operations(size)
    for found in _measured(options, size, clock):
        results.append(found if "refused" in found else found | {"iteration": iteration(found, counted)})
        write_json(out, {"size": options.size, "results": results, "public": _public_json() if public else None})
    print(report(results, public))
    if public:
        print("public Self-Forcing (33593df): its own run, perhaps on another machine; compare units first")
    print(f"wrote {out}")
    return 0 if any("refused" not in r for r in results) else 1


def _measured(options: argparse.Namespace, size: Size, clock: Clock) -> Iterator[dict[str, Any]]:
    """Each configuration that the options ask for, measured in a process of its own."""
    for precision in [options.precision] if options.precision else ["fp32", "bf16"]:
        backend = options.backend or ("plain" if (size.device, precision) == ("cpu", "bf16") else "sdpa")
        for checkpointing in [options.checkpointing] if options.checkpointing else [c.name for c in Checkpointing]:
            chosen = {"precision": precision, "checkpointing": checkpointing, "backend": backend}
            flags = [text for key, value in chosen.items() for text in (f"--{key}", value)]
            flags += ["--worker", "--size", options.size, "--repeats", str(options.repeats)]
            flags += ["--threads", str(options.threads), *(["--compile"] if options.compile else [])]
            found = attempt("benchmarks.train_step", flags, options.threads, clock)
            yield chosen | ({"compiled": True} if options.compile else {}) | found


def _public_json() -> list[dict[str, Any]]:
    return [{"precision": p, "checkpointing": c} | figures for (p, c), figures in PUBLIC.items()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
