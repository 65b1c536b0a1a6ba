"""The composition root: from a config to networks, optimizers, data and the trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from configs.given import check_images
from configs.schema import DataConfig, Precision, RunConfig, TrainedConfig, TrainerKind
from model.ema import EMA
from model.score import ScoreNet
from model.types import Evaluations
from model.wan.attention import Backend, available
from model.wan.config import NetworkConfig, WanConfig
from model.wan.init import no_weights, random_weights
from model.wan.lora_files import MergedWeights
from model.wan.transformer import WanTransformer
from model.wan.weights import LazyWeights, Weights, fit
from trainer.engine import Engine, FSDPEngine
from trainer.networks import Trained
from trainer.task import SyntheticTask, Task, ToyTask
from trainer.wan_task import WanTask
from trainer.zero import DeepSpeedEngine
from utils import checkpoint, distributed
from utils.config import ConfigError
from utils.optim import NetworkOptimizer
from utils.parallel import deepspeed
from utils.parallel.mesh import Mesh, ParallelConfig
from utils.parallel.parallelize import Sharding, fill, is_sharded, materialise, parallelize
from utils.random import keyed_seed

if TYPE_CHECKING:
    from trainer.base import RunOptions, Trainer


@dataclass(frozen=True)
class Placement:
    """Where a network goes: the mesh, the run's parallelism, and how this network takes part in it."""

    mesh: Mesh
    config: ParallelConfig
    sharding: Sharding


def build_network(
    config: NetworkConfig,
    name: str,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    trained: bool = True,
    place: Placement | None = None,
    empty: bool = False,
) -> WanTransformer:
    """A network with its starting weights. Random ones are keyed by (seed, name): the same for any number of ranks.
    empty: without values, for one that is about to get others.

    It is made without memory and sharded; then rank 0 reads or draws its weights one by one and sends each rank its
    part. Raises ConfigError, on every rank, for a missing backend or weights that do not fit.
    """
    backend = Backend(config.attention)
    if problem := available(backend):
        raise ConfigError(f"{name}.attention: {problem}")
    with torch.device("meta"):
        net = WanTransformer(config.geometry(), backend, config.checkpointing).to(dtype)
    net.requires_grad_(trained)
    source = None if config.init is None or empty else open_init(net, config, name)
    if place is not None:
        parallelize(net, place.mesh, place.config, place.sharding)
    materialise(net, device, offload=place is not None and place.sharding.offload)
    if empty:
        return net
    reads = place is None or distributed.is_main()
    if source is not None:
        names = [key for key, _ in net.named_parameters()]
        fill(net, source.read(names) if reads else no_weights(net), shared=place is not None)
        return net
    with torch.random.fork_rng(devices=[]), contextlib.nullcontext() if reads else torch.device("meta"):
        torch.default_generator.manual_seed(keyed_seed(seed, "weights", name))
        fill(net, random_weights(config.geometry()), shared=place is not None)
    return net


def open_init(net: WanTransformer, config: NetworkConfig, name: str) -> Weights:
    """The weights that `config.init` names, its loras added, checked against `net` by their headers.

    Raises ConfigError naming the network.
    """
    assert config.init is not None
    try:
        if is_run(Path(config.init)):
            weights = open_run(Path(config.init), config.init_weights)
        else:
            weights = LazyWeights(config.init, config.init_weights, config.expert)
        if config.loras:
            weights = MergedWeights(weights, [(lora.path, lora.scale) for lora in config.loras], config.expert)
        fit(weights, {key: tuple(p.shape) for key, p in net.named_parameters()}, net.config)
        return weights
    except (ValueError, OSError) as problem:
        raise ConfigError(f"{name}.init: {problem}") from None


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run or of one of its checkpoints."""
    return (path / "checkpoints").is_dir() or (path / "state.json").is_file()


def open_run(path: Path, which: str) -> Weights:
    """The student of a run or checkpoint, its average for 'ema' if it has one, or its critic. Raises UserError."""
    folder = checkpoint.resolve_resume(str(path), path)
    assert folder is not None
    if which == "critic":
        return checkpoint.StoredGroup(folder, "critic")
    averaged = which == "ema" and "student_ema" in checkpoint.tensor_names(folder)
    return checkpoint.StoredGroup(folder, "student_ema" if averaged else "student")


def compute_dtype(config: RunConfig) -> torch.dtype | None:
    """The autocast precision of every network of the run."""
    return torch.bfloat16 if config.training.precision is Precision.bf16 else None


def pins(net: WanTransformer) -> bool:
    """Whether given frames are shown to a bidirectional network clean, each frame with its own time."""
    return net.config.model_type == "ti2v"


def build_frozen(
    config: RunConfig, network: NetworkConfig, name: str, evaluations: Evaluations, device: torch.device, mesh: Mesh
) -> ScoreNet:
    """A frozen network, stored in bf16 where the run computes in it."""
    dtype, parallel = compute_dtype(config), config.parallel
    sharding = Sharding(dtype, parallel.reshard_after_forward.teacher, parallel.offload_teacher, parallel.compile)
    net = build_for_inference(network, name, device, dtype, Placement(mesh, parallel, sharding))
    # sharded, one call for both halves of the guidance gathers the weights once; else it would only cost memory
    return ScoreNet(net, name, evaluations, dtype, batch_guidance=is_sharded(net), pins_initial=pins(net))


def build_for_inference(
    network: NetworkConfig,
    name: str,
    device: torch.device,
    dtype: torch.dtype | None,
    place: Placement | None = None,
) -> WanTransformer:
    """A trained network for inference only, stored in the precision in which it runs."""
    return build_network(network, name, 0, device, dtype or torch.float32, trained=False, place=place).eval()


def build_trained(
    config: RunConfig,
    network: NetworkConfig,
    name: str,
    training: TrainedConfig,
    updates: int,
    evaluations: Evaluations,
    device: torch.device,
    mesh: Mesh,
    *,
    with_ema: bool,
    empty: bool = False,
) -> Trained:
    """A network with fp32 master weights, its optimizer and schedule over `updates` updates, and maybe its EMA."""
    if device.type == "cpu" and Backend(network.attention) is Backend.FLEX:
        raise ConfigError(f"{name}.attention: flex has no backward on a CPU: use sdpa or plain")
    dtype, parallel = compute_dtype(config), config.parallel
    reshard = parallel.reshard_after_forward.critic if name == "critic" else parallel.reshard_after_forward.student
    cached = name == "student" and config.is_causal  # the context grows from block to block, and Inductor fails on it
    sharding = Sharding(dtype, reshard, parallel.offload_optimizer, parallel.compile and not cached)
    place = Placement(mesh, parallel, sharding)
    net = build_network(network, name, config.seed, device, place=place, empty=empty)
    matrices = [n for n, p in net.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    optimizer = NetworkOptimizer(net, training.optimizer, training.lr_schedule, updates, matrices, dtype)
    ema = None
    if with_ema and config.ema.decay is not None:
        ema = EMA(net, config.ema.decay, config.ema.start, config.ema.every)
    if parallel.engine == "deepspeed":
        # in CPU memory, and sharded as FSDP2 does it: one format of checkpoint for all
        usual = replace(config, parallel=replace(parallel, engine="fsdp2", offload_optimizer=True))
        twin = partial(
            build_trained, usual, network, name, training, updates, Evaluations(), device, mesh,
            with_ema=with_ema, empty=True,
        )  # fmt: skip
        engine: Engine = DeepSpeedEngine(net, optimizer, parallel.deepspeed, twin)
    else:
        engine = build_engine(parallel, net, optimizer)
    return Trained(name, net, ScoreNet(net, name, evaluations, dtype, pins_initial=pins(net)), optimizer, engine, ema)


def build_engine(config: ParallelConfig, net: WanTransformer, optimizer: NetworkOptimizer) -> Engine:
    if is_sharded(net):
        return FSDPEngine(
            net, optimizer, keep_gathered=config.keep_gathered_in_rollout, sync_each=config.sync_each_micro_batch
        )
    return Engine(net, optimizer)


def build_task(config: RunConfig, device: torch.device) -> Task:
    """What the run generates, by data.kind. Raises ConfigError."""
    kinds: dict[str, Callable[[DataConfig, WanConfig, int, torch.device], Task]] = {
        "toy": ToyTask,
        "synthetic": SyntheticTask,
        "wan": WanTask,
    }
    return kinds[config.data.kind](config.data, config.student.geometry(), config.seed, device)


def build_trainer(config: RunConfig, options: RunOptions) -> Trainer:
    """The trainer that the config names, resumed if there is something to resume. Raises ConfigError."""
    from trainer.diffusion import DiffusionTrainer
    from trainer.distillation import ScoreDistillationTrainer
    from trainer.ode import ODETrainer

    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    try:
        check_images(config, real=config.needs_data() is not None)
    except ValueError as problem:
        raise ConfigError(str(problem)) from None
    distributed.init()
    if config.parallel.engine == "deepspeed":
        deepspeed.start()
    match config.trainer:
        case TrainerKind.score_distillation:
            return ScoreDistillationTrainer(config, options)
        case TrainerKind.diffusion:
            return DiffusionTrainer(config, options)
        case TrainerKind.ode:
            return ODETrainer(config, options)
