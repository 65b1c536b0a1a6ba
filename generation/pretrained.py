"""A many-step model as it was released, from a folder in Diffusers' layout: `inference.py --model DIR`."""

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
from generation.sampling import Sampler
from model.codec import ClipConfig, VAEConfig
from model.experts import Experts
from model.network import Expert, LoraWeights, network_of, released_model
from model.released import Released
from model.schedule import ScheduleConfig
from model.score import ScoreNet
from model.text_encoder import TextConfig
from model.types import Evaluations
from pipeline.bidirectional_inference import Solver
from tasks.build import task_to_sample
from tasks.kinds.encoded import EncodedData
from trainer.run_networks import build_for_inference, compute_dtype
from utils.errors import UserError
from utils.precision import Dtype


@dataclass(frozen=True)
class Model:
    """A released model, and what it is asked for.

    path: a pipeline's folder, or a Hub name.
    height: the video's height in pixels, None takes the one that it was released for.
    width: the video's width in pixels, None takes the one that it was released for.
    shift: the shift of the noise levels, None takes the scheduler's.
    negative: the negative prompt.
    """

    path: str
    height: int | None = None
    width: int | None = None
    shift: float | None = None
    negative: str = ""


def load_model(
    model: Model,
    frames: int | None,
    device: torch.device,
    *,
    loras: Sequence[LoraWeights] = (),
    low_loras: Sequence[LoraWeights] = (),
    tiny_decoder: str | None = None,
    acceleration: Acceleration = UNCHANGED,
) -> Generator:
    """What samples a released model.

    model: the model's folder, and what it is asked for.
    frames: latent frames of a video, None takes the number that the model was released for.
    device: where to load it.
    loras: LoRA files that are added to the weights, of two experts to the high-noise one's.
    low_loras: LoRA files that are added to the low-noise expert's weights.
    tiny_decoder: taehv's file, which decodes in place of the VAE.
    acceleration: changes the network in place.

    Raises UserError for what is no model of a family here.
    """
    try:
        folder, released = released_model(model.path)
        config = run_of(folder, model, released, frames or released.frames, on_cpu=device.type == "cpu")
        assert isinstance(config.data, EncodedData)
        config.data.vae.tiny_decoder = tiny_decoder
        task = task_to_sample(config, device)
    except (ValueError, OSError) as problem:
        raise UserError(f"--model {model.path}: {problem}") from None
    if low_loras and released.boundary is None:
        raise UserError(f"--low_lora: {model.path} is one network: give --lora")
    config.student.loras = list(loras)
    dtype = compute_dtype(config)
    net: nn.Module = build_for_inference(config.student, "model", device, dtype)
    if released.boundary is not None:
        other = replace(config.student, expert=Expert.low, loras=list(low_loras))
        net = Experts(net, build_for_inference(other, "model", device, dtype), released.boundary)
    score = ScoreNet(
        net,
        "model",
        Evaluations(),
        dtype,
        pins_initial=config.student.pins_initial,
        path=config.student.path,
    )
    sampler = Sampler(few_steps=False, solver=Solver(released.solver), guidance_2=released.low_guidance)
    return Generator(config, score, device, task=task, sampler=sampler, acceleration=acceleration)


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
