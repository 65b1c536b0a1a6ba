"""A published few-step student as a run that never trains: its settings, with those that a user gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from configs.checks import check_run
from configs.load import load_run
from configs.rollout import BackwardSimulationConfig, RolloutConfig, SelfForcingConfig
from configs.schema import RunConfig
from configs.sections import Precision, TrainingConfig
from generation.sampling import Sampler, Sampling
from model.attention.checkpointing import Checkpointing
from model.attention.sparse import SparseConfig
from model.codec import ClipConfig, VAEConfig
from model.family import families
from model.network import InitWeights, NetworkConfig
from model.released import Released, Student
from model.schedule import ScheduleConfig, step_sigmas
from model.text_encoder import TextConfig
from pipeline.causal import CausalConfig
from tasks.kinds.encoded import EncodedData
from utils.fields import member_of
from utils.precision import Dtype

CUBE = [4, 4, 4]  # tiles of FastVideo's sparse attention


@dataclass(frozen=True)
class Model:
    """A released model, and what it is asked for. None takes what it was released with, or what its layout publishes.

    path: a pipeline's folder, weights by themselves, or a Hub name of either.
    height, width: of videos in pixels.
    shift: of the noise levels.
    negative: the negative prompt of a many-step model.
    layout: name of a published student's settings.
    base: a pipeline's folder or Hub name, whose text encoder and VAE go with weights by themselves.
    config_path: YAML of a run that the weights are of.
    step_list: timesteps of a few-step student, 0..1000, falling; empty for its own.
    block_frames: latent frames of a block, 0 for a bidirectional student.
    weights: "ema" or "raw", of weights by themselves.
    """

    path: str
    height: int | None = None
    width: int | None = None
    shift: float | None = None
    negative: str = ""
    layout: str | None = None
    base: str | None = None
    config_path: Path | None = None
    step_list: tuple[float, ...] = ()
    block_frames: int | None = None
    weights: str | None = None


def layouts() -> list[str]:
    """Names of all families' published students."""
    return [name for family in families().values() for name in family.students]


def student_asked(
    model: Model, sampling: Sampling, network: NetworkConfig, released: Released | None
) -> Student | None:
    """The few-step student that a model is, with what is asked for in place of its settings; None for a many-step one.

    network: its network. released: of a pipeline's folder. Raises ValueError in one line.
    """
    assert network.init is not None
    if network.expert is not None:
        if model.layout or model.step_list or (released is not None and released.few_steps):
            raise ValueError("two distilled experts are sampled from their runs' folders: give --run and --low_run")
        return None
    described = model.step_list and None not in (model.shift, model.block_frames) and model.layout is None
    try:
        student = network.family.student_of(network.init, model.layout)
    except ValueError:
        if not described:
            raise
        student = None
    if student is not None:
        return _applied(student, model, sampling)
    if model.step_list or released is None or released.few_steps:
        return _described(model, sampling, released)
    if model.block_frames is not None:
        raise ValueError("--block_frames is for few-step students, and its files name a many-step model: give --steps "
                         "1000,750,... too, if it is none")  # fmt: skip
    return None


def _described(model: Model, sampling: Sampling, released: Released | None) -> Student:
    """The student that the options describe. Raises ValueError naming those that are missing."""
    frames = sampling.frames or sampling.window or (None if released is None else released.frames)
    height = model.height or (None if released is None else released.height)
    width = model.width or (None if released is None else released.width)
    shift = model.shift if released is None or model.shift is not None else released.shift
    settings_by_option = {
        "--steps 1000,750,...": model.step_list or None,
        "--shift": shift,
        "--block_frames (0 for a bidirectional one)": model.block_frames,
        "--size": height,
        "--frames (or --window)": frames,
    }
    if missing := [name for name, value in settings_by_option.items() if value is None]:
        what = "it is a few-step student" if released is not None else "neither its content nor its name tells"
        raise ValueError(
            f"{what}, and no file says how it is sampled: give --layout ({', '.join(layouts())}), or --config_path "
            f"(the YAML of its run), or {', '.join(missing)}"
        )
    assert shift is not None
    assert height is not None
    assert width is not None
    assert frames is not None
    return Student(
        "the student", "as given", model.step_list, warp=True, shift=shift, block=model.block_frames or None,
        height=height, width=width, frames=frames,
    )  # fmt: skip


def _applied(student: Student, model: Model, sampling: Sampling) -> Student:
    """What is asked for in place of what is published. Raises ValueError for what the student cannot take."""
    steps, warp, first, block = student.steps, student.warp, student.first_steps, student.block
    if model.step_list:
        steps, warp, first = model.step_list, warp or model.shift is not None, ()
    elif model.shift is not None and not warp:
        raise ValueError(f"--shift: the steps of {student.title} are noise levels themselves: add --steps 1000,...")
    if student.trigflow and sampling.steps is not None:
        steps = steps[: sampling.steps]
    if model.block_frames is not None:
        if (model.block_frames == 0) != (block is None):
            kind = "is bidirectional" if block is None else "makes videos block by block"
            raise ValueError(f"--block_frames {model.block_frames}: {student.title} {kind}: leave it out")
        block = model.block_frames or None
    frames, longest = student.frames, student.longest
    if block is not None:  # whole blocks
        frames = max(frames // block, 1) * block
        longest = None if longest is None else max(longest // block * block, frames)
    return replace(
        student, steps=steps, warp=warp, first_steps=first, block=block, frames=frames, longest=longest,
        shift=student.shift if model.shift is None else model.shift,
        height=model.height or student.height, width=model.width or student.width,
        weights=model.weights or student.weights,
    )  # fmt: skip


def base_of(model: Model, network: NetworkConfig) -> str:
    """Whose text encoder and VAE go with weights by themselves: by default their preset's. Raises ValueError."""
    if model.base is not None:
        return model.base
    family, geometry = network.family, network.geometry()
    for preset, source in family.sources.items():
        if family.presets[preset] == geometry:
            return source.repo
    raise ValueError("it has no text encoder and VAE, and its geometry is no known model's: give --base DIR")


def student_run(student: Student, network: NetworkConfig, base: str, *, on_cpu: bool) -> RunConfig:
    """The run of a student. base: a pipeline's folder or Hub name. Raises ValueError in one line."""
    geometry, spatial = network.geometry(), network.codecs.spatial(base)
    side = spatial * geometry.patch_size[1]
    if student.height % side or student.width % side:
        raise ValueError(f"--size {student.height}x{student.width}: give multiples of {side}")
    dtype = Dtype.fp32 if on_cpu else Dtype.bf16
    sparse = None if student.sparsity is None else SparseConfig(student.sparsity, cube=list(CUBE))
    network = replace(network, init_weights=member_of(InitWeights, student.weights, "weights"))
    rollout: RolloutConfig = BackwardSimulationConfig()
    causal = CausalConfig()
    if student.block is not None:
        rollout = SelfForcingConfig(num_training_frames=student.longest)
        causal = CausalConfig(student.block, window_frames=student.window, sink_frames=student.sinks)
    config = RunConfig(
        name=student.title,
        student=replace(network, sparse=sparse),
        teacher=network,
        critic=network,  # neither is built
        rollout=rollout,
        causal=causal,
        schedule=ScheduleConfig(
            denoising_step_list=list(student.steps), warp_denoising_step=student.warp, timestep_shift=student.shift
        ),
        training=TrainingConfig(precision=Precision(dtype)),
        data=EncodedData(
            real=False,
            wan=ClipConfig(student.frames, student.height // spatial, student.width // spatial),
            text=TextConfig(encoder=base, dtype=dtype),
            vae=VAEConfig(path=base, dtype=dtype),
        ),
    )
    check_run(config)
    return config


def sampler_of(student: Student) -> Sampler:
    """What a run cannot say of how it is sampled."""
    first: tuple[float, ...] = ()
    if student.first_steps:
        first = step_sigmas(student.first_steps, warp=student.warp, shift=student.shift)
    level = step_sigmas(student.steps, warp=student.warp, shift=student.shift)[0]
    # noise of variance 1 in TrigFlow is this much of it in the rectified flow, whose x is x_trig / (cos t + sin t)
    scale = math.hypot(level, 1 - level) if student.trigflow else 1.0
    return Sampler(first_block=first, start_scale=scale)


def described_run(model: Model) -> RunConfig:
    """The run of a YAML with the model's weights. Raises ConfigError."""
    assert model.config_path is not None
    config = load_run(model.config_path)
    config.student = replace(
        config.student, init=model.path, lora=None, loras=[], checkpointing=Checkpointing.none,
        init_weights=member_of(InitWeights, model.weights or "ema", "weights"),
    )  # fmt: skip
    return config


def told(student: Student, sampling: Sampling, base: str) -> str:
    """One line: the settings that a student is sampled with."""
    numbers = ",".join(f"{step:.6g}" for step in student.steps)
    parts = [f"steps {numbers} {f'through shift {student.shift:g}' if student.warp else 'as they are, no shift'}"]
    if sampling.steps is not None and not student.trigflow:
        parts.append(f"{sampling.steps} of them")
    elif student.first_steps:
        parts.append(f"the first block in {','.join(f'{step:g}' for step in student.first_steps)}")
    options = ["--steps", "--shift", "--size", "--frames", "--weights", "--base"]
    if student.block is None:
        parts.append("all frames at once")
    else:
        window = sampling.window or student.window
        sinks = student.sinks if sampling.sinks is None else sampling.sinks
        parts += [
            f"blocks of {student.block} latent frames",
            f"window {window or 'none'}",
            f"sinks {sinks}",
        ]
        options += ["--block_frames", "--window", "--sinks"]
    if student.sparsity is not None:
        parts.append(f"sparsity {student.sparsity:g}")
    frames = sampling.frames or student.frames
    parts += [
        "no guidance", f"{frames} latent frames of {student.height}x{student.width}", f"{student.weights} weights",
        f"text encoder and VAE of {base}",
    ]  # fmt: skip
    whose = f"{student.title}'s published settings ({student.source})"
    if student.source == "as given":
        whose = "settings as given"
    return f"{whose}: {', '.join(parts)}; override with {', '.join(options)}"
