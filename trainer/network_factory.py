"""Networks as a run needs them: from files or random, frozen or trained, sharded or whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from configs.load import run_from_plain
from configs.schema import RunConfig
from configs.sections import Precision, TrainedConfig
from model.ema import EMA
from model.score import ScoreNet
from model.types import Evaluations
from model.wan.attention import Backend, available
from model.wan.config import LoraConfig, NetworkConfig
from model.wan.formats import GATE
from model.wan.init import no_weights, random_weights, zero_gates
from model.wan.lora import adapter_names, adapter_weights, add_adapter, base_names
from model.wan.lora_files import MergedWeights, StoredLora
from model.wan.transformer import WanTransformer
from model.wan.vsa import attention as vsa
from model.wan.weights import LazyWeights, Weights, fit
from trainer.engine import Engine, FSDPEngine
from trainer.networks import TrainedNetwork
from trainer.origin import adapter_origin, base_digest
from trainer.zero import DeepSpeedEngine
from utils import checkpoint, distributed
from utils.config import config_hash
from utils.errors import ConfigError
from utils.optim import NetworkOptimizer, trainable
from utils.parallel.mesh import Mesh, ParallelConfig
from utils.parallel.parallelize import Sharding, fill, is_sharded, materialise, parallelize
from utils.random import keyed_seed

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Placement:
    """Where a network goes: the mesh, the run's parallelism, and how this network takes part in it."""

    mesh: Mesh
    config: ParallelConfig
    sharding: Sharding


def build_network(  # noqa: PLR0913 - each is a part of what a network is
    config: NetworkConfig,
    name: str,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    trained: bool = True,
    place: Placement | None = None,
    empty: bool = False,
    adapters: Mapping[str, LoraConfig] | None = None,
) -> WanTransformer:
    """A network with its starting weights. Random ones are keyed by (seed, name): the same for any number of ranks.
    empty: without values, for one that is about to get others. adapters: put beside the weights, which are then frozen;
    their values are keyed by (seed, adapter).

    It is made without memory and sharded; then rank 0 reads or draws its weights one by one and sends each rank its
    part. Raises ConfigError, on every rank, for a missing backend or weights that do not fit.
    """
    backend = Backend(config.attention)
    if problem := available(backend):
        raise ConfigError(f"{name}.attention: {problem}")
    learns = trained or bool(adapters)
    if config.sparse is not None and (problem := vsa.refused(config.sparse.chosen, device, backward=learns)):
        raise ConfigError(f"{name}.sparse: {problem}")
    with torch.device("meta"):
        net = WanTransformer(config.geometry(), backend, config.checkpointing, config.sparse).to(dtype)
    net.requires_grad_(trained)
    source = None if config.init is None or empty else open_init(net, config, name)
    bare = [] if source is None else [key for key, _ in net.named_parameters() if key not in source.shapes]
    if adapters and bare:
        raise ConfigError(
            f"{name}.sparse: {config.init} has no gates of sparse attention, and an adapter would leave them at zero: "
            f"set {next(iter(adapters))}.lora null, or start from weights that have them"
        )
    for adapter, lora in (adapters or {}).items():
        try:
            add_adapter(net, adapter, lora)
        except ValueError as problem:
            raise ConfigError(f"{adapter}.{problem}") from None
    if place is not None:
        parallelize(net, place.mesh, place.config, place.sharding)
    materialise(net, device, offload=place is not None and place.sharding.offload)
    if empty:
        return net
    reads, shared, there = place is None or distributed.is_main(), place is not None, base_names(net)
    if source is not None:
        stored = [key for key in there if key not in bare]
        weights = source.read(stored) if reads else no_weights(net, [there[key] for key in stored])
        named = ((there.get(key, key), value) for key, value in weights)
        fill(net, chain(named, zero_gates(net, [there[key] for key in bare])), shared=shared)
    else:
        with _drawn(seed, "weights", name, reads):
            weights = random_weights(config.geometry(), config.sparse)
            fill(net, ((there[key], value) for key, value in weights), shared=shared)
    for adapter in adapters or {}:
        with _drawn(seed, "adapter", adapter, reads):
            fill(net, adapter_weights(net, adapter), shared=shared)
    return net


@contextlib.contextmanager
def _drawn(seed: int, kind: str, name: str, reads: bool) -> Iterator[None]:
    """Inside, torch's default generator draws what (seed, kind, name) say; nothing on a rank that does not read."""
    with torch.random.fork_rng(devices=[]), contextlib.nullcontext() if reads else torch.device("meta"):
        torch.default_generator.manual_seed(keyed_seed(seed, kind, name))
        yield


def open_init(net: WanTransformer, config: NetworkConfig, name: str) -> Weights:
    """The weights that `config.init` names, its loras added, checked against `net` by their headers.

    Raises ConfigError naming the network.
    """
    try:
        weights = stored_weights(config)
        own = {key: tuple(p.shape) for key, p in net.named_parameters()}
        if not any(GATE.match(key) for key in weights.shapes):  # of a dense model: its gates begin at zero
            own = {key: shape for key, shape in own.items() if not GATE.match(key)}
        fit(weights, own, net.config)
        return weights
    except (ValueError, OSError) as problem:
        raise ConfigError(f"{name}.init: {problem}") from None


def stored_weights(config: NetworkConfig) -> Weights:
    """What `config.init` names, its loras added, without an adapter in training. Raises ValueError or OSError."""
    if config.init is None:
        raise ValueError("null: the weights were random, and are kept nowhere")
    if is_run(Path(config.init)):
        weights = open_run(Path(config.init), config.init_weights, config.init_lora_scale)
    elif config.init_lora_scale != 1:
        raise ValueError("init_lora_scale is of a run's adapter, and this is no run: leave it 1")
    else:
        weights = LazyWeights(config.init, config.init_weights, config.expert)
    if not config.loras:
        return weights
    return MergedWeights(weights, [(lora.path, lora.scale) for lora in config.loras], config.expert)


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run or of one of its checkpoints."""
    return (path / "checkpoints").is_dir() or (path / "state.json").is_file()


def open_run(path: Path, which: str, lora_scale: float = 1.0) -> Weights:
    """The student of a run or checkpoint, its average for 'ema' if it has one, or its critic. An adapter is added to
    the weights that it was trained on, times `lora_scale`. Raises UserError or ValueError."""
    folder = checkpoint.resolve_resume(str(path), path)
    assert folder is not None
    name = "critic" if which == "critic" else "student"
    averaged = which == "ema" and f"{name}_ema" in checkpoint.tensor_names(folder)
    return open_group(folder, f"{name}_ema" if averaged else name, lora_scale)


def open_group(folder: Path, group: str, lora_scale: float = 1.0) -> Weights:
    """All weights of a checkpoint's group: `student`, `student_ema`, `critic`; an adapter among them counts times
    `lora_scale`. Raises UserError, and ValueError where those that it was trained on are not there any more."""
    stored = checkpoint.StoredGroup(folder, group)
    name, state = group.removesuffix("_ema"), checkpoint.load_state(folder)
    network = getattr(run_from_plain(state["config"]), name)
    if network.lora is None:
        if lora_scale != 1:
            raise ValueError(f"init_lora_scale {lora_scale}: {folder} has no adapter: leave it 1")
        return stored
    try:
        base = stored_weights(network)
        if state["networks"][name]["adapter"]["base"] != base_digest(base):
            raise ValueError("other weights lie there now: put back those that it was trained on")
        return MergedWeights(base, [(StoredLora(stored, network.lora, folder), lora_scale)])
    except (ValueError, OSError) as problem:
        raise ValueError(f"{folder} is an adapter on {name}.init {network.init}: {problem}") from None


def compute_dtype(config: RunConfig) -> torch.dtype | None:
    """The autocast precision of every network of the run."""
    return torch.bfloat16 if config.training.precision is Precision.bf16 else None


def pins(net: WanTransformer) -> bool:
    """Whether given frames are shown to a bidirectional network clean, each frame with its own time."""
    return net.config.model_type == "ti2v"


def sharing(config: RunConfig) -> dict[str, LoraConfig]:
    """The adapters that lie on the teacher's copy of the weights, by the network that each makes of it."""
    if config.teacher is None:
        return {}
    trained = {"student": config.student, "critic": config.critic}
    return {name: net.lora for name, net in trained.items() if net is not None and net.lora and net.lora.share}


def build_frozen(
    config: RunConfig,
    network: NetworkConfig,
    name: str,
    evaluations: Evaluations,
    device: torch.device,
    mesh: Mesh,
    adapters: Mapping[str, LoraConfig] | None = None,
) -> ScoreNet:
    """A frozen network, stored in bf16 where the run computes in it. adapters: of networks that are to share it."""
    dtype, parallel = compute_dtype(config), config.parallel
    compiled, offload = parallel.compile, parallel.offload_teacher
    if adapters:  # it is theirs in all that it does for them
        first = config.student if "student" in adapters else config.critic
        assert first is not None
        network = replace(network, attention=first.attention, checkpointing=first.checkpointing)
        compiled = compiled and not ("student" in adapters and config.is_causal)
        offload = offload or parallel.offload_optimizer
    sharding = Sharding(dtype, parallel.reshard_after_forward.teacher, offload, compiled)
    place = Placement(mesh, parallel, sharding)
    seed = config.seed if adapters else 0
    net = build_network(
        network, name, seed, device, dtype or torch.float32, trained=False, place=place, adapters=adapters
    ).eval()
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


def build_trained(  # noqa: PLR0913 - each is a part of what a network is
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
    base: WanTransformer | None = None,
) -> TrainedNetwork:
    """A network with fp32 master weights, its optimizer and schedule over `updates` updates, and maybe its EMA.
    base: the network that its adapter is part of already, see `sharing`."""
    if device.type == "cpu" and Backend(network.attention) is Backend.FLEX:
        raise ConfigError(f"{name}.attention: flex has no backward on a CPU: use sdpa or plain")
    dtype, parallel = compute_dtype(config), config.parallel
    reshard = parallel.reshard_after_forward.critic if name == "critic" else parallel.reshard_after_forward.student
    cached = name == "student" and config.is_causal  # the context grows from block to block, and Inductor fails on it
    sharding = Sharding(dtype, reshard, parallel.offload_optimizer, parallel.compile and not cached)
    place = Placement(mesh, parallel, sharding)
    if network.lora is None:
        net = build_network(network, name, config.seed, device, place=place, empty=empty)
        named = trainable(net)
    else:
        net = base or build_network(
            network, name, config.seed, device, dtype or torch.float32, trained=False, place=place,
            adapters={name: network.lora},
        )  # fmt: skip
        live = dict(net.named_parameters())
        named = {key: live[there] for key, there in adapter_names(net, name).items()}
    matrices = [key for key, p in named.items() if key.startswith("blocks.") and p.ndim == 2]
    optimizer = NetworkOptimizer(named, training.optimizer, training.lr_schedule, updates, matrices, dtype)
    ema = None
    if with_ema and config.ema.decay is not None:
        ema = EMA(net, config.ema.decay, config.ema.start, config.ema.every, named)
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
    adapter = origin = None
    if network.lora is not None:
        adapter, origin = name, adapter_origin(network.lora, _base_of(config, network, "teacher" if base else name))
    score = ScoreNet(net, name, evaluations, dtype, pins_initial=pins(net), adapter=adapter)
    return TrainedNetwork(name, net, optimizer, engine, ema, score, origin=origin)


def _base_of(config: RunConfig, network: NetworkConfig, name: str) -> str:
    """A name of the weights below an adapter that differs where they would; name: whose random ones they are."""
    if network.init is None:
        return config_hash(["random", config.seed, name, network.geometry()])
    return base_digest(stored_weights(network))


def build_engine(config: ParallelConfig, net: WanTransformer, optimizer: NetworkOptimizer) -> Engine:
    if is_sharded(net):
        return FSDPEngine(
            net, optimizer, keep_gathered=config.keep_gathered_in_rollout, sync_each=config.sync_each_micro_batch
        )
    return Engine(net, optimizer)
