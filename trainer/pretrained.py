"""A many-step model as it was released, from a folder in Diffusers' layout: `inference.py --model DIR`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.schema import (
    DataConfig,
    ObjectiveConfig,
    Precision,
    RolloutConfig,
    RolloutKind,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from model.schedule import ScheduleConfig
from model.score import ScoreNet
from model.types import Evaluations
from model.wan.config import NetworkConfig
from model.wan.folders import part_folder, pipeline_folder
from model.wan.folders import read_config as read_part
from model.wan.text_encoder import TextConfig
from model.wan.vae import ClipConfig, VAEConfig
from model.wan.weights import geometry_of
from trainer.build import build_for_inference, compute_dtype
from trainer.generate import Generator
from trainer.wan_task import WanTask
from utils.config import UserError

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
STEPS, GUIDANCE = 50, 5.0  # Wan's own (arXiv 2503.20314), where the command says nothing


@dataclass(frozen=True)
class Model:
    """path: a pipeline's folder, or a Hub name. height, width: of the video, in pixels. shift: null takes the
    scheduler's. negative: the negative prompt."""

    path: str
    height: int = 480
    width: int = 832
    shift: float | None = None
    negative: str = ""


def load_model(model: Model, frames: int | None, device: torch.device) -> Generator:
    """A generator of `frames` latent frames (null: 21). Raises UserError for what is no text-to-video model of Wan."""
    try:
        folder = pipeline_folder(model.path, [*PARTS, "model_index.json"])
        config = run_of(folder, model, frames or ClipConfig.frames, on_cpu=device.type == "cpu")
        task = WanTask(config.data, config.student.geometry(), config.seed, device, library=[])
    except (ValueError, OSError) as problem:
        raise UserError(f"--model {model.path}: {problem}") from None
    net = build_for_inference(config.student, "model", device, compute_dtype(config))
    score = ScoreNet(net, "model", Evaluations(), compute_dtype(config))
    return Generator(config, score, device, task=task, few_steps=False)


def run_of(folder: Path, model: Model, frames: int, *, on_cpu: bool) -> RunConfig:
    """The model as the student of a run that never trains. Raises ValueError in one line."""
    geometry = geometry_of(folder)
    if geometry.model_type == "i2v":
        raise ValueError("makes videos from an image, which cannot be given yet: choose a text-to-video model")
    network = NetworkConfig("1.3b", overrides=dataclasses.asdict(geometry), init=str(folder))
    side = spatial_of(folder) * geometry.patch_size[1]
    if model.height % side or model.width % side:
        raise ValueError(f"--size {model.height}x{model.width}: give multiples of {side}")
    side //= geometry.patch_size[1]
    dtype = "fp32" if on_cpu else "bf16"
    return RunConfig(
        name=folder.name,
        student=network,
        teacher=network,
        critic=network,  # neither is built
        rollout=RolloutConfig(kind=RolloutKind.backward_simulation),
        objective=ObjectiveConfig(),
        schedule=ScheduleConfig(timestep_shift=model.shift or shift_of(folder)),
        training=TrainingConfig(precision=Precision(dtype)),
        validation=ValidationConfig(steps=STEPS, guidance=GUIDANCE),
        data=DataConfig(
            kind="wan",
            real=False,
            wan=ClipConfig(frames, model.height // side, model.width // side),
            text=TextConfig(encoder=str(folder), dtype=dtype),
            vae=VAEConfig(path=str(folder), dtype=dtype),
            negative_prompt=model.negative,
        ),
    )


def spatial_of(folder: Path) -> int:
    """Pixels a side of one latent place."""
    return int(read_part(part_folder(folder, "vae"), "AutoencoderKLWan").get("scale_factor_spatial", 8))


def shift_of(folder: Path) -> float:
    """What the scheduler's file says. Raises ValueError where it says nothing."""
    file = folder / "scheduler/scheduler_config.json"
    values = json.loads(file.read_text()) if file.is_file() else {}
    for key in ("flow_shift", "shift"):
        if values.get(key):
            return float(values[key])
    raise ValueError("its scheduler names no flow_shift: give --shift (3 at 480p, 5 at 720p)")
