"""The composition root: from a config to networks, optimizers, data and the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from configs.schema import Precision, RunConfig, TrainedConfig, TrainerKind
from model.ema import EMA
from model.score import ScoreNet
from model.types import Evaluations
from model.wan.attention import Backend, available
from model.wan.config import NetworkConfig
from model.wan.transformer import WanTransformer
from model.wan.weights import load_native, load_weights, to_native
from trainer.networks import Trained
from trainer.task import ToyTask
from utils import checkpoint, distributed
from utils.config import ConfigError
from utils.optim import NetworkOptimizer
from utils.random import keyed_seed

if TYPE_CHECKING:
    from trainer.base import RunOptions, Trainer


def build_network(
    config: NetworkConfig, name: str, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> WanTransformer:
    """A network with its starting weights. Random ones are keyed by (seed, name), whatever was built before it.

    Raises ConfigError for a missing backend or weights that do not fit.
    """
    backend = Backend(config.attention)
    if problem := available(backend):
        raise ConfigError(f"{name}.attention: {problem}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(keyed_seed(seed, "weights", name))
        net = WanTransformer(config.geometry(), backend, config.checkpointing)
    if config.init is not None:
        load_init(net, Path(config.init), config.init_weights, name)
    return net.to(device=device, dtype=dtype)


def load_init(net: WanTransformer, path: Path, which: str, name: str) -> None:
    """Weights from a run, a checkpoint, or a safetensors file or folder. Raises ConfigError naming the network."""
    try:
        if (path / "checkpoints").is_dir() or (path / "state.json").is_file():
            folder = checkpoint.resolve_resume(str(path), path)
            assert folder is not None
            has_ema = "student_ema" in checkpoint.tensor_names(folder)
            weights = checkpoint.load_tensors(folder, "student_ema" if which == "ema" and has_ema else "student")
            load_native(net, to_native(weights))
        else:
            load_weights(net, path)
    except (ValueError, OSError) as problem:
        raise ConfigError(f"{name}.init: {problem}") from None


def compute_dtype(config: RunConfig) -> torch.dtype | None:
    """The autocast precision of every network of the run."""
    return torch.bfloat16 if config.training.precision is Precision.bf16 else None


def build_frozen(
    config: RunConfig, network: NetworkConfig, name: str, evaluations: Evaluations, device: torch.device
) -> ScoreNet:
    """A frozen network, stored in bf16 where the run computes in it."""
    dtype = compute_dtype(config)
    net = build_for_inference(network, name, device, dtype)
    # not sharded: one call for both halves of the guidance would gather nothing less, and hold twice the activations
    return ScoreNet(net, name, evaluations, dtype, batch_guidance=False)


def build_for_inference(
    network: NetworkConfig, name: str, device: torch.device, dtype: torch.dtype | None
) -> WanTransformer:
    """A trained network for inference only, stored in the precision in which it runs."""
    return build_network(network, name, 0, device, dtype or torch.float32).requires_grad_(False).eval()


def build_trained(
    config: RunConfig,
    network: NetworkConfig,
    name: str,
    training: TrainedConfig,
    updates: int,
    evaluations: Evaluations,
    device: torch.device,
    *,
    with_ema: bool,
) -> Trained:
    """A network with fp32 master weights, its optimizer and schedule over `updates` updates, and maybe its EMA."""
    if device.type == "cpu" and Backend(network.attention) is Backend.FLEX:
        raise ConfigError(f"{name}.attention: flex has no backward on a CPU: use sdpa or plain")
    net = build_network(network, name, config.seed, device)
    matrices = [n for n, p in net.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    optimizer = NetworkOptimizer(net, training.optimizer, training.lr_schedule, updates, matrices)
    ema = None
    if with_ema and config.ema.decay is not None:
        ema = EMA(net, config.ema.decay, config.ema.start, config.ema.every)
    return Trained(name, net, ScoreNet(net, name, evaluations, compute_dtype(config)), optimizer, ema)


def build_task(config: RunConfig, device: torch.device) -> ToyTask:
    return ToyTask(config.data, config.student.geometry(), config.seed, device)


def build_trainer(config: RunConfig, options: RunOptions) -> Trainer:
    """The trainer that the config names, resumed if there is something to resume. Raises ConfigError."""
    from trainer.diffusion import DiffusionTrainer
    from trainer.distillation import ScoreDistillationTrainer
    from trainer.ode import ODETrainer

    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    distributed.init()
    match config.trainer:
        case TrainerKind.score_distillation:
            return ScoreDistillationTrainer(config, options)
        case TrainerKind.diffusion:
            return DiffusionTrainer(config, options)
        case TrainerKind.ode:
            return ODETrainer(config, options)
