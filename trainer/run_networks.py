"""The networks of a run: its frozen teacher, and those that it trains with all that belongs to their training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from configs.schema import RunConfig
from configs.sections import Precision
from model.attention.backends import Backend
from model.ema import EMA
from model.family import Network
from model.lora import adapter_names
from model.network import LoraConfig, NetworkConfig
from model.score import ScoreNet
from model.types import Evaluations
from trainer.engine import Engine, FSDPEngine
from trainer.network_factory import NetworkSpec, Placement, build_network
from trainer.networks import TrainedNetwork
from trainer.origin import adapter_origin, base_digest
from trainer.weight_sources import is_run, lag_of, stored_weights
from trainer.zero import DeepSpeedEngine
from utils.compared import config_hash
from utils.errors import ConfigError
from utils.logging import warn
from utils.optim import NetworkOptimizer, TrainedConfig, trainable
from utils.parallel.mesh import EngineKind, Mesh, ParallelConfig
from utils.parallel.parallelize import Sharding, is_sharded


def compute_dtype(config: RunConfig) -> torch.dtype | None:
    """The autocast precision of every network of the run."""
    return torch.bfloat16 if config.training.precision is Precision.bf16 else None


def sharing(config: RunConfig) -> dict[str, LoraConfig]:
    """The adapters that lie on the teacher's copy of the weights, by the network that each makes of it."""
    if config.teacher is None:
        return {}
    trained = {"student": config.student, "critic": config.critic}
    return {name: net.lora for name, net in trained.items() if net is not None and net.lora and net.lora.share}


def left_uncompiled(config: RunConfig) -> dict[str, str]:
    """The networks that parallel.compile leaves as they are, each with the reason."""
    if not config.is_causal:
        return {}
    found = {"student": "the context of a causal student grows from block to block, and Inductor fails on it"}
    shared = sharing(config)
    if "student" in shared:
        others = ["teacher", *(name for name in shared if name != "student")]
        found |= dict.fromkeys(others, "it shares the student's weights")
    return found


def random_heads(config: RunConfig) -> bool:
    """Whether networks without weights begin with random heads: in smoke tests, where a broken gradient must show."""
    return config.data.is_noise


@dataclass(frozen=True)
class RunNetworks:
    """Makes the networks of a run.

    config: of the run.
    evaluations: counts what goes through them.
    device: where they are.
    mesh: over which they are sharded.
    """

    config: RunConfig
    evaluations: Evaluations
    device: torch.device
    mesh: Mesh

    def teacher(self, *, shared: bool = True) -> ScoreNet:
        """The frozen teacher, stored in bf16 where the run computes in it. Raises ConfigError.

        shared: with the adapters of the networks that share its weights (see `sharing`), if the run has any.
        """
        config, network = self.config, self.config.teacher
        assert network is not None
        _warn_of_lag("teacher", network)
        adapters = sharing(config) if shared else {}
        dtype, parallel = compute_dtype(config), config.parallel
        compiled, offload = parallel.compile, parallel.offload_teacher
        if adapters:  # attention and checkpointing are those that the adapters' networks ask for
            first = config.student if "student" in adapters else config.critic
            assert first is not None
            network = replace(network, attention=first.attention, checkpointing=first.checkpointing)
            compiled = compiled and "teacher" not in left_uncompiled(config)
            offload = offload or parallel.offload_optimizer
        sharding = Sharding(dtype, parallel.reshard_after_forward.teacher, offload, compiled)
        seed = config.seed if adapters else 0
        spec = NetworkSpec(
            network, "teacher", seed, dtype or torch.float32, trained=False, adapters=adapters,
            random_head=random_heads(config),
        )  # fmt: skip
        net = build_network(spec, self.device, Placement(self.mesh, parallel, sharding)).eval()
        # sharded, one call for both halves of the guidance gathers the weights once; else it would only cost memory
        return ScoreNet(
            net,
            "teacher",
            self.evaluations,
            dtype,
            batch_guidance=is_sharded(net),
            pins_initial=network.pins_initial,
            path=network.path,
        )

    def trained(
        self, name: str, updates: int, *, teacher: ScoreNet | None = None, empty: bool = False
    ) -> TrainedNetwork:
        """The student, with its average if the run keeps one, or the critic. Raises ConfigError.

        name: "student" or "critic".
        updates: in the whole run, for the schedule of the learning rate.
        teacher: of `teacher()`; a network that shares its weights is an adapter on it.
        empty: without values, for a network that is about to get others.

        Weights and optimizer are fp32; the weights below an adapter are stored in the precision of the run.
        """
        config, device = self.config, self.device
        network = config.student if name == "student" else config.critic
        section = "generator_training" if name == "student" else "critic_training"
        training: TrainedConfig = getattr(config, section)
        assert network is not None
        if not empty:
            _warn_of_lag(name, network)
        if device.type == "cpu" and Backend(network.attention) is Backend.FLEX:
            raise ConfigError(f"{name}.attention: flex has no backward on a CPU: use sdpa or plain")
        dtype, place = compute_dtype(config), self._placement(name)
        adapter = origin = None
        if network.lora is None:
            spec = NetworkSpec(network, name, config.seed, empty=empty, random_head=random_heads(config))
            net = build_network(spec, device, place)
            named = trainable(net)
        else:
            if shares := teacher is not None and name in sharing(config):
                net = cast(Network, teacher.net)
            else:
                adapters = {name: network.lora}
                spec = NetworkSpec(
                    network, name, config.seed, dtype or torch.float32, trained=False, adapters=adapters,
                    random_head=random_heads(config),
                )  # fmt: skip
                net = build_network(spec, device, place)
            live = dict(net.named_parameters())
            named = {key: live[parameter] for key, parameter in adapter_names(net, name).items()}
            base = _base_name(config, network, "teacher" if shares else name)
            adapter, origin = name, adapter_origin(network.lora, base)
        inside = {id(p) for p in net.matrices()}
        matrices = [key for key, p in named.items() if id(p) in inside]
        if training.optimizer.takes_matrices and not matrices:
            raise ConfigError(
                f"{section}.optimizer: kind {training.optimizer.kind} updates matrices, and the blocks of "
                f"{network.preset} have none: choose adamw"
            )
        optimizer = NetworkOptimizer(named, training.optimizer, training.lr_schedule, updates, matrices, dtype)
        ema = None
        if name == "student" and config.ema.decay is not None:
            ema = EMA(net, config.ema.decay, config.ema.start, config.ema.every, named)
        engine = self._engine(net, optimizer, name, updates)
        score = ScoreNet(
            net, name, self.evaluations, dtype, pins_initial=network.pins_initial, adapter=adapter, path=network.path
        )
        return TrainedNetwork(name, net, optimizer, engine, ema, score, origin=origin)

    def _placement(self, name: str) -> Placement:
        config, parallel = self.config, self.config.parallel
        reshard = parallel.reshard_after_forward.critic if name == "critic" else parallel.reshard_after_forward.student
        compiled = parallel.compile and name not in left_uncompiled(config)
        sharding = Sharding(compute_dtype(config), reshard, parallel.offload_optimizer, compiled)
        return Placement(self.mesh, parallel, sharding)

    def _engine(self, net: Network, optimizer: NetworkOptimizer, name: str, updates: int) -> Engine:
        parallel = self.config.parallel
        if parallel.engine is not EngineKind.deepspeed:
            return build_engine(parallel, net, optimizer)
        # in CPU memory, and sharded as FSDP2 does it: one format of checkpoint for all
        usual = replace(self.config, parallel=replace(parallel, engine=EngineKind.fsdp2, offload_optimizer=True))
        twin = partial(replace(self, config=usual, evaluations=Evaluations()).trained, name, updates, empty=True)
        return DeepSpeedEngine(net, optimizer, parallel.deepspeed, twin)


def _warn_of_lag(name: str, network: NetworkConfig) -> None:
    """Says in one line where a network begins from a run's average that lags behind the run's student."""
    if network.init is None or not is_run(Path(network.init)):
        return
    if lag := lag_of(Path(network.init), network.init_weights):
        warn(f"{name}.init {network.init}: {lag}: set {name}.init_weights to raw")


def build_for_inference(
    network: NetworkConfig,
    name: str,
    device: torch.device,
    dtype: torch.dtype | None,
    place: Placement | None = None,
) -> Network:
    """A trained network for inference only, stored in the precision in which it runs (None: fp32)."""
    spec = NetworkSpec(network, name, 0, dtype or torch.float32, trained=False)
    return build_network(spec, device, place).eval()


def _base_name(config: RunConfig, network: NetworkConfig, name: str) -> str:
    """Names the weights below an adapter, so that other weights have another name. name: whose random weights they
    are, where they are random."""
    if network.init is None:
        heads = ["random head"] if random_heads(config) else []
        return config_hash(["random", config.seed, name, network.geometry(), *heads])
    return base_digest(stored_weights(network), network.family.telling)


def build_engine(config: ParallelConfig, net: Network, optimizer: NetworkOptimizer) -> Engine:
    """The engine of a network that FSDP2 shards, or that each rank holds whole."""
    if is_sharded(net):
        return FSDPEngine(
            net, optimizer, keep_gathered=config.keep_gathered_in_rollout, sync_each=config.sync_each_micro_batch
        )
    return Engine(net, optimizer)
