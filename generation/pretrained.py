"""A model as it was released: `inference.py --model X`, many-step models and few-step students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from configs.checks import check_run
from configs.rollout import BackwardSimulationConfig
from configs.schema import RunConfig
from configs.sections import Precision, TrainingConfig, ValidationConfig
from generation.acceleration import UNCHANGED, Acceleration
from generation.generator import Generator
from generation.run_data import change_data
from generation.sampling import Sampler, Sampling
from generation.students import Model, base_of, described_run, sampler_of, student_asked, student_run, told
from model.codec import ClipConfig, VAEConfig
from model.experts import Experts
from model.network import Expert, LoraWeights, is_pipeline, network_of, released_model
from model.released import Released
from model.schedule import ScheduleConfig
from model.score import ScoreNet
from model.text_encoder import TextConfig
from model.types import Evaluations
from pipeline.bidirectional_inference import Solver
from tasks.build import task_to_sample
from tasks.kinds.encoded import EncodedData
from trainer.run_networks import build_for_inference, compute_dtype
from utils import distributed
from utils.errors import UserError
from utils.precision import Dtype

__all__ = ["Model", "load_model", "run_of"]


@dataclass(frozen=True)
class _Opened:
    """A model as a run that never trains.

    config: the run, whose student is the model, or its high-noise expert.
    sampler: how it is sampled beyond that.
    boundary: the noise level that parts two experts, None for one network.
    said: the settings, in words.
    """

    config: RunConfig
    sampler: Sampler
    boundary: float | None
    said: str


def load_model(
    model: Model,
    sampling: Sampling,
    device: torch.device,
    *,
    loras: Sequence[LoraWeights] = (),
    low_loras: Sequence[LoraWeights] = (),
    tiny_decoder: str | None = None,
    acceleration: Acceleration = UNCHANGED,
) -> Generator:
    """What samples a released model. Its settings are printed in one line.

    model: where it is, and what it is asked for.
    sampling: its frames, window and steps go in place of what the model was released for.
    device: where to load it.
    loras: LoRA files that are added to the weights, of two experts to the high-noise one's.
    low_loras: LoRA files that are added to the low-noise expert's weights.
    tiny_decoder: taehv's file, which decodes in place of the VAE.
    acceleration: changes the network in place.

    Raises UserError for what is no model of a family here, and for a few-step student whose settings nobody knows.
    """
    try:
        opened = _opened(model, sampling, on_cpu=device.type == "cpu")
        config = opened.config
        change_data(config, None, None, tiny_decoder)
        task = task_to_sample(config, device)
    except (ValueError, OSError) as problem:
        raise UserError(f"--model {model.path}: {problem}") from None
    if low_loras and opened.boundary is None:
        raise UserError(f"--low_lora: {model.path} is one network: give --lora")
    config.student.loras = list(loras)
    dtype = compute_dtype(config)
    high = build_for_inference(config.student, "model", device, dtype)
    if high.sparse is not None:
        high.sparse.begin(config.training.max_steps)  # as at the end of a ramp
    net: nn.Module = high
    if opened.boundary is not None:
        other = replace(config.student, expert=Expert.low, loras=list(low_loras))
        net = Experts(high, build_for_inference(other, "model", device, dtype), opened.boundary)
    score = ScoreNet(
        net,
        "model",
        Evaluations(),
        dtype,
        pins_initial=config.student.pins_initial,
        path=config.student.path,
    )
    if distributed.is_main():
        print(f"{model.path}: {opened.said}", flush=True)
    return Generator(config, score, device, task=task, sampler=opened.sampler, acceleration=acceleration)


def _opened(model: Model, sampling: Sampling, *, on_cpu: bool) -> _Opened:
    """Raises ValueError in one line, or UserError."""
    if model.config_path is not None:
        config = described_run(model)
        if model.height is not None and model.width is not None:
            change_data(config, None, (model.height, model.width), None)
        return _Opened(config, Sampler(), None, f"sampled as {model.config_path} says")
    released: Released | None = None
    place = Path(model.path)
    if is_pipeline(model.path):
        place, released = released_model(model.path)
    experts = released is not None and released.boundary is not None
    network = network_of(model.path if released is None else place, Expert.high if experts else None)
    student = student_asked(model, sampling, network, released)
    if student is not None:
        base = base_of(model, network) if released is None else model.base or str(place)
        config = student_run(student, network, base, on_cpu=on_cpu)
        return _Opened(config, sampler_of(student), None, told(student, sampling, base))
    assert released is not None
    if model.base is not None or model.weights is not None:
        raise ValueError("--base and --weights are for weights by themselves: a pipeline's folder has its own")
    config = run_of(place, model, released, sampling.frames or released.frames, on_cpu=on_cpu)
    sampler = Sampler(few_steps=False, solver=Solver(released.solver), guidance_2=released.low_guidance)
    return _Opened(config, sampler, released.boundary, _many_steps(config, released, sampling))


def _many_steps(config: RunConfig, released: Released, sampling: Sampling) -> str:
    """How a many-step model is sampled, in words."""
    guidance = released.guidance if sampling.guidance is None else sampling.guidance
    low = released.low_guidance if sampling.guidance is None else guidance
    low = low if sampling.guidance_2 is None else sampling.guidance_2
    both = f"{guidance:g}" if released.boundary is None or low is None else f"{guidance:g} and {low:g}"
    return (
        f"sampled as a many-step model: {sampling.steps or released.steps} steps of "
        f"{sampling.solver or released.solver}, shift {config.schedule.timestep_shift:g}, guidance {both}"
    )


def run_of(folder: Path, model: Model, released: Released, frames: int, *, on_cpu: bool) -> RunConfig:
    """The model, or its high-noise expert, as the student of a run that never trains. Raises ValueError in one line."""
    network = network_of(folder, None if released.boundary is None else Expert.high)
    geometry = network.geometry()
    spatial = network.codecs.spatial(str(folder))
    side = spatial * geometry.patch_size[1]
    height = released.height if model.height is None else model.height
    width = released.width if model.width is None else model.width
    if height % side or width % side:
        raise ValueError(f"--size {height}x{width}: give multiples of {side}")
    shift = released.shift if model.shift is None else model.shift
    if shift is None:
        raise ValueError("its scheduler names no shift of the noise levels: give --shift")
    dtype = Dtype.fp32 if on_cpu else Dtype.bf16
    config = RunConfig(
        name=folder.name,
        student=network,
        teacher=network,
        critic=network,  # neither is built
        rollout=BackwardSimulationConfig(),
        schedule=ScheduleConfig(timestep_shift=shift),
        training=TrainingConfig(precision=Precision(dtype)),
        validation=ValidationConfig(steps=released.steps, guidance=released.guidance),
        data=EncodedData(
            real=False,
            wan=ClipConfig(frames, height // spatial, width // spatial),
            text=TextConfig(encoder=str(folder), dtype=dtype),
            vae=VAEConfig(path=str(folder), dtype=dtype),
            image_encoder=None if geometry.image_dim is None else str(folder),
            negative_prompt=model.negative,
        ),
    )
    check_run(config)
    return config
