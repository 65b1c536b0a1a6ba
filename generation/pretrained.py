"""A many-step model as it was released, from a folder in Diffusers' layout: `inference.py --model DIR`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from model.folders import pipeline_folder
from model.network import Expert, LoraWeights, network_of
from model.schedule import ScheduleConfig
from model.score import ScoreNet
from model.text_encoder import TextConfig
from model.types import Evaluations
from pipeline.bidirectional_inference import Solver
from tasks.kinds.encoded import EncodedData
from trainer.run_networks import build_for_inference, compute_dtype
from utils.errors import UserError
from utils.precision import Dtype

PARTS = (
    "model_index.json", "transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler",
    "image_encoder", "image_processor",
)  # fmt: skip
# Wan's own (arXiv 2503.20314, and Wan2.2's configs), where the command says nothing; of two experts high and low noise
STEPS, GUIDANCE = 50, 5.0
EXPERTS_GUIDANCE = {"t2v": (4.0, 3.0), "i2v": (3.5, 3.5)}
SCHEDULER = "scheduler/scheduler_config.json"
SOLVERS = {"UniPCMultistepScheduler": Solver.unipc, "FlowMatchEulerDiscreteScheduler": Solver.euler}


@dataclass(frozen=True)
class Model:
    """A released model, and what it is asked for.

    path: a pipeline's folder, or a Hub name.
    height: the video's height in pixels.
    width: the video's width in pixels.
    shift: the shift of the noise levels, None takes the scheduler's.
    negative: the negative prompt.
    """

    path: str
    height: int = 480
    width: int = 832
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
    frames: latent frames of a video, None: 21.
    device: where to load it.
    loras: LoRA files that are added to the weights, of two experts to the high-noise one's.
    low_loras: LoRA files that are added to the low-noise expert's weights.
    tiny_decoder: taehv's file, which decodes in place of the VAE.
    acceleration: changes the network in place.

    Raises UserError for what is no model of Wan.
    """
    try:
        folder = pipeline_folder(model.path, PARTS)
        boundary = boundary_of(folder)
        config = run_of(folder, model, frames or ClipConfig.frames, boundary is not None, on_cpu=device.type == "cpu")
        assert isinstance(config.data, EncodedData)
        config.data.vae.tiny_decoder = tiny_decoder
        solver = solver_of(folder)
        task = config.data.task_to_sample(config.student, config.seed, device)
    except (ValueError, OSError) as problem:
        raise UserError(f"--model {model.path}: {problem}") from None
    if low_loras and boundary is None:
        raise UserError(f"--low_lora: {model.path} is one network: give --lora")
    config.student.loras = list(loras)
    dtype, geometry = compute_dtype(config), config.student.geometry()
    net: nn.Module = build_for_inference(config.student, "model", device, dtype)
    low = None
    if boundary is not None:
        other = replace(config.student, expert=Expert.low, loras=list(low_loras))
        net = Experts(net, build_for_inference(other, "model", device, dtype), boundary)
        low = EXPERTS_GUIDANCE.get(geometry.model_type, (GUIDANCE, GUIDANCE))[1]
    score = ScoreNet(
        net,
        "model",
        Evaluations(),
        dtype,
        pins_initial=config.student.pins_initial,
        path=config.student.path,
    )
    sampler = Sampler(few_steps=False, solver=solver, guidance_2=low)
    return Generator(config, score, device, task=task, sampler=sampler, acceleration=acceleration)


def run_of(folder: Path, model: Model, frames: int, has_experts: bool, *, on_cpu: bool) -> RunConfig:
    """The model, or its high-noise expert, as the student of a run that never trains. Raises ValueError in one line."""
    expert = Expert.high if has_experts else None
    network = network_of(folder, expert)
    geometry = network.geometry()
    spatial = network.codecs.spatial(str(folder))
    side = spatial * geometry.patch_size[1]
    if model.height % side or model.width % side:
        raise ValueError(f"--size {model.height}x{model.width}: give multiples of {side}")
    dtype = Dtype.fp32 if on_cpu else Dtype.bf16
    guidance = EXPERTS_GUIDANCE.get(geometry.model_type, (GUIDANCE,))[0] if has_experts else GUIDANCE
    config = RunConfig(
        name=folder.name,
        student=network,
        teacher=network,
        critic=network,  # neither is built
        rollout=BackwardSimulationConfig(),
        schedule=ScheduleConfig(timestep_shift=shift_of(folder) if model.shift is None else model.shift),
        training=TrainingConfig(precision=Precision(dtype)),
        validation=ValidationConfig(steps=STEPS, guidance=guidance),
        data=EncodedData(
            real=False,
            wan=ClipConfig(frames, model.height // spatial, model.width // spatial),
            text=TextConfig(encoder=str(folder), dtype=dtype),
            vae=VAEConfig(path=str(folder), dtype=dtype),
            image_encoder=None if geometry.image_dim is None else str(folder),
            negative_prompt=model.negative,
        ),
    )
    check_run(config)
    return config


def boundary_of(folder: Path) -> float | None:
    """The noise level that parts the two experts, None for one network. Raises ValueError where no file names it."""
    if not (folder / "transformer_2").is_dir():
        return None
    boundary = _json(folder / "model_index.json").get("boundary_ratio")
    if boundary is None:
        raise ValueError(
            "it has a transformer_2, but its model_index.json no boundary_ratio: add it (Wan2.2: 0.875 for text, 0.9 "
            "for images)"
        )
    return float(boundary)


def solver_of(folder: Path) -> Solver:
    """The solver that the scheduler's file names, Euler where it names one that is not here."""
    return SOLVERS.get(str(_json(folder / SCHEDULER).get("_class_name")), Solver.euler)


def shift_of(folder: Path) -> float:
    """The shift that the scheduler's file names. Raises ValueError where it names none."""
    values = _json(folder / SCHEDULER)
    for key in ("flow_shift", "shift"):
        if values.get(key):
            return float(values[key])
    raise ValueError("its scheduler names no flow_shift: give --shift (3 at 480p, 5 at 720p)")


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        raise ValueError(f"{file} is not JSON: fetch it again") from None
    return values if isinstance(values, dict) else {}
