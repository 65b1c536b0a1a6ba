"""Replays reference cases (schema 1): `python -m tests.replay DIR [--digest]`.

Prints a line a case (name, worst relative L2 error over its outputs, ok or FAIL) and exits non-zero unless all pass.
A kind or setting that is not known here is a failure, not a skip.
With --digest it prints a line an output instead: case, output and the SHA-256 of its bytes. One thread computes them,
so on one machine two versions of the code that do the same operations in the same order print the same lines.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.dmd import critic_loss, dmd_loss
from model.query import Guidance, ScoreQuery
from model.score import ScoreNet
from model.sid import sid_loss
from model.types import Conditioning, LossOutput, Rollout
from model.wan.config import WanConfig
from model.wan.transformer import WanTransformer
from pipeline.causal import CausalConfig, VideoShape
from pipeline.causal_inference import generate
from pipeline.diffusion_forcing import CleanContext, teacher_forced_velocity
from pipeline.self_forcing_training import RolloutPlan, self_forcing_rollout

TOLERANCE = 1e-4  # relative L2 error in fp32, as the cases' README asks
CAUSAL = {"frames_per_block", "independent_first_frame", "window_frames", "sink_frames"}
ROLLOUT = CAUSAL | {"step_sigmas", "exit_steps", "context_sigma", "initial_frames"}
SETTINGS: dict[str, set[str]] = {
    "forward": set(),
    "causal_forward": CAUSAL,
    "teacher_forcing": CAUSAL | {"clean_noised"},
    "cached_forward": CAUSAL | {"clean_noised"},
    "rollout": ROLLOUT,
    "stream": ROLLOUT - {"exit_steps"},
    "dmd": ROLLOUT | {"guidance", "fake_guidance"},
    "critic": ROLLOUT | {"guidance"},
    "sid": ROLLOUT | {"guidance", "fake_guidance", "alpha"},
}
Tensors = dict[str, Tensor]


class GivenNoise:
    """A NoiseSource whose draws were made elsewhere."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def normal(self, role: str, shape: tuple[int, ...]) -> Tensor:
        return self.tensors[role].reshape(-1, *shape)


@dataclass
class Case:
    """One reference case: what it is, its inputs, and the networks it may use."""

    kind: str
    settings: dict[str, Any]
    inputs: Tensors
    grad_norm_order: list[str]
    nets: dict[str, WanTransformer]
    checkpointing: bool = False

    def score(self, name: str) -> ScoreNet:
        return ScoreNet(self.nets[name], name)

    @property
    def causal(self) -> CausalConfig:
        s = self.settings
        return CausalConfig(
            num_frame_per_block=s["frames_per_block"],
            # one given frame is a block of its own, whatever the others are
            independent_first_frame=s.get("independent_first_frame", False) or self.conditioning.initial_frames == 1,
            window_frames=s.get("window_frames"),
            sink_frames=s.get("sink_frames", 0),
            context_noise=1000 * s.get("context_sigma", 0.0),
        )

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(self.inputs["text"], self.inputs.get("initial"))

    def cache(self, x: Tensor) -> Any:
        videos = VideoShape.of(x, self.conditioning.initial_frames)
        return self.causal.new_cache(self.nets["student"], videos, torch.float32, x.device)


def _with_x0(x: Tensor, sigma: Tensor, velocity: Tensor) -> Tensors:
    from model.schedule import velocity_to_x0

    return {"velocity": velocity, "x0": velocity_to_x0(x, velocity, sigma)}


@torch.no_grad()
def forward(case: Case) -> Tensors:
    x, sigma, text = (case.inputs[k] for k in ("x", "sigma", "text"))
    return _with_x0(x, sigma, case.score("student").velocity(x, sigma, text))


@torch.no_grad()
def causal_forward(case: Case) -> Tensors:
    x, sigma, text = (case.inputs[k] for k in ("x", "sigma", "text"))
    mask = case.causal.mask(x.shape[1])
    return _with_x0(x, sigma, case.score("student").velocity(x, sigma, text, mask=mask))


@torch.no_grad()
def teacher_forcing(case: Case) -> Tensors:
    x, sigma, text, clean = (case.inputs[k] for k in ("x", "sigma", "text", "clean"))
    clean_sigma = case.inputs.get("clean_sigma", torch.zeros_like(sigma))
    context = CleanContext(clean, clean_sigma)
    velocity = teacher_forced_velocity(case.score("student"), x, sigma, context, text, case.causal)
    return _with_x0(x, sigma, velocity)


@torch.no_grad()
def cached_forward(case: Case) -> Tensors:
    x, sigma, text, clean = (case.inputs[k] for k in ("x", "sigma", "text", "clean"))
    clean_sigma = case.inputs.get("clean_sigma", torch.zeros_like(sigma))
    student, cache, parts, start = case.score("student"), case.cache(x), [], 0
    blocks = case.causal.blocks(x.shape[1])
    for index, size in enumerate(blocks):
        part = slice(start, start + size)
        parts.append(student.velocity(x[:, part], sigma[:, part], text, cache=cache))
        if index < len(blocks) - 1:
            student.velocity(clean[:, part], clean_sigma[:, part], text, cache=cache, write_cache=True)
        start += size
    return _with_x0(x, sigma, torch.cat(parts, 1))


def _rollout(case: Case, with_gradient: bool) -> Rollout:
    noise = case.inputs["noise"]
    frames = noise.shape[1] + case.conditioning.initial_frames
    plan = RolloutPlan(case.causal, case.settings["step_sigmas"], tuple(case.settings["exit_steps"]), frames)
    return self_forcing_rollout(
        case.score("student"),
        noise,
        case.conditioning,
        plan,
        GivenNoise(case.inputs),
        case.cache(noise),
        with_gradient=with_gradient,
    )


def rollout(case: Case) -> Tensors:
    return {"x0": _rollout(case, False).x0}


def stream(case: Case) -> Tensors:
    noise, steps = case.inputs["noise"], case.settings["step_sigmas"]
    source = GivenNoise(case.inputs)
    return {
        "x0": generate(case.score("student"), noise, case.conditioning, steps, case.causal, source, case.cache(noise))
    }


def _backward(case: Case, trained: str, output: LossOutput, x0: Tensor) -> Tensors:
    net = case.nets[trained]
    output.loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    norms = torch.stack([gradients[name].norm() for name in case.grad_norm_order])
    out = {"loss": output.loss.detach(), "x0": x0.detach(), "grad_norms": norms}
    return out | {f"grad.{name}": gradient for name, gradient in gradients.items()}


def _prepare(case: Case, trained: str) -> None:
    for name, net in case.nets.items():
        net.requires_grad_(name == trained).zero_grad(set_to_none=True)
        net.checkpointing = Checkpointing.full if case.checkpointing and name == trained else Checkpointing.none


def _score_draw(case: Case) -> tuple[Tensor, Tensor]:
    return case.inputs["score_sigma"], case.inputs["score_noise"]


def _query(case: Case, made: Rollout) -> ScoreQuery:
    s, scores = case.settings, (case.score("teacher"), case.score("critic"))
    guidance = Guidance(case.inputs["negative_text"], s["guidance"], s.get("fake_guidance", 1.0))
    return ScoreQuery(made, *scores, case.conditioning, guidance, *_score_draw(case))


def dmd(case: Case) -> Tensors:
    _prepare(case, "student")
    made = _rollout(case, True)
    output = dmd_loss(_query(case, made))
    assert output.kl_gradient is not None
    return _backward(case, "student", output, made.x0) | {"kl_gradient": output.kl_gradient}


def critic(case: Case) -> Tensors:
    _prepare(case, "critic")
    made = _rollout(case, False)
    return _backward(
        case, "critic", critic_loss(made, case.score("critic"), case.conditioning, *_score_draw(case)), made.x0
    )


def sid(case: Case) -> Tensors:
    _prepare(case, "student")
    made = _rollout(case, True)
    output = sid_loss(_query(case, made), alpha=case.settings.get("alpha", 1.0))
    return _backward(case, "student", output, made.x0)


KINDS: dict[str, Callable[[Case], Tensors]] = {
    "forward": forward, "causal_forward": causal_forward, "teacher_forcing": teacher_forcing,
    "cached_forward": cached_forward, "rollout": rollout, "stream": stream, "dmd": dmd, "critic": critic, "sid": sid,
}  # fmt: skip


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, infinite where shapes differ or a value is not finite."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if difference > 0 else 0.0


@dataclass
class Folder:
    """A folder of reference cases, read once."""

    manifest: dict[str, Any]
    tensors: Tensors
    nets: dict[str, WanTransformer]

    @classmethod
    def read(cls, path: Path, backend: Backend = Backend.SDPA) -> Folder:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["schema"] != 1:
            raise ValueError(f"{path}: schema {manifest['schema']} is not known, only 1 is")
        config = WanConfig(**manifest["model_config"])
        student = load_file(path / "weights_student.safetensors")
        nets = {}
        for name in ("student", "teacher", "critic"):
            file = path / f"weights_{name}.safetensors"
            net = WanTransformer(config, backend)
            net.load_state_dict({k: v.float() for k, v in (student | load_file(file)).items()})
            nets[name] = net.eval()
        return cls(manifest, load_file(path / "cases.safetensors"), nets)

    def case(self, name: str, checkpointing: bool = False) -> Case:
        """Raises ValueError for a kind or setting that is not known."""
        entry = self.manifest["cases"][name]
        kind, settings = entry["kind"], entry["settings"]
        if kind not in KINDS:
            raise ValueError(f"{name}: kind '{kind}' is not known, only {', '.join(KINDS)}")
        unknown = sorted(set(settings) - SETTINGS[kind] - {"batch", "frames"})
        if unknown:
            raise ValueError(f"{name}: setting '{unknown[0]}' of a {kind} case is not known")
        inputs = self.part(name, "in")
        length = self.nets["student"].config.text_len
        for key in {"text", "negative_text"} & set(inputs):  # Wan pads what is shorter with zeros
            inputs[key] = torch.nn.functional.pad(inputs[key], (0, 0, 0, length - inputs[key].shape[1]))
        return Case(kind, settings, inputs, entry.get("grad_norm_order", []), self.nets, checkpointing)

    def part(self, name: str, side: str) -> Tensors:
        prefix = f"{name}/{side}."
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def outputs(self, name: str, checkpointing: bool = False) -> Tensors:
        """What this code makes of a case's inputs, by name."""
        case = self.case(name, checkpointing)
        return KINDS[case.kind](case)

    def worst_error(self, name: str, checkpointing: bool = False) -> float:
        """The worst relative L2 error over a case's outputs; a missing output counts as infinite."""
        actual, expected = self.outputs(name, checkpointing), self.part(name, "out")
        if not expected:
            raise ValueError(f"{name}: the case has no outputs")
        missing = torch.tensor(float("inf"))
        return max(relative_error(actual.get(key, missing), value) for key, value in expected.items())


def digest(tensor: Tensor) -> str:
    """SHA-256 of shape, precision and values: equal for tensors that are equal bit for bit, and for no others."""
    values = tensor.detach().contiguous().cpu()
    head = f"{tuple(values.shape)} {values.dtype} ".encode()
    return hashlib.sha256(head + values.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def main(arguments: list[str]) -> int:
    paths = [word for word in arguments if word != "--digest"]
    if len(paths) != 1 or not (Path(paths[0]) / "manifest.json").is_file():
        print("usage: python -m tests.replay DIR [--digest] (DIR: a folder with manifest.json)", file=sys.stderr)
        return 2
    try:
        folder = Folder.read(Path(paths[0]))
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, SafetensorError) as problem:
        print(f"replay: {paths[0]} is not a folder of schema 1: {_one_line(problem)}", file=sys.stderr)
        return 2
    return print_digests(folder) if "--digest" in arguments else print_verdicts(folder)


def print_digests(folder: Folder) -> int:
    """A line an output. A case that fails ends it: a list with holes would compare equal to nothing."""
    torch.set_num_threads(1)
    for name in folder.manifest["cases"]:
        for key, value in folder.outputs(name).items():
            print(f"{name} {key} {digest(value)}")
    return int(not folder.manifest["cases"])


def print_verdicts(folder: Folder) -> int:
    failed = 0
    for name in folder.manifest["cases"]:
        try:
            error = folder.worst_error(name)
            said, verdict = f"{error:.2e}", "ok" if error <= TOLERANCE else "FAIL"
        except Exception as problem:  # whatever a case dies of, it failed, and the others are still to be seen
            said, verdict = _one_line(problem), "FAIL"
        print(f"{name:32s} {said}  {verdict}")
        failed += verdict == "FAIL"
    print(f"{len(folder.manifest['cases']) - failed} of {len(folder.manifest['cases'])} cases ok")
    return int(failed > 0 or not folder.manifest["cases"])


def _one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
