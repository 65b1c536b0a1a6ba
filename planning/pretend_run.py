"""One planned run: the trainer's own iterations under a `Meter`, with few layers and few micro-batches, and the law by
which they become those of the whole run.

Memory and cost are affine in the number of layers, so two depths give all; cost is affine in the exit step and in the
number of micro-batches. What is run is the real code: `Trainer.training_step`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from configs.rollout import ExitStepConfig
from configs.schema import RunConfig
from configs.sections import TrainerKind
from configs.sizes import largest
from model.attention.backends import Backend
from model.attention.kv_cache import KVCache
from model.attention.vsa.attention import SparseBackend
from model.attention.vsa.counting import kernels_counted_by
from model.discriminator import tapped_blocks
from model.network import NetworkConfig
from planning.meter import GRADIENTS, Meter, Owner, Phase
from tasks.kinds.synthetic import SyntheticData
from trainer.base import RunOptions, Trainer
from trainer.build import build_trainer
from trainer.micro_batch import MicroBatch
from trainer.networks import Trained
from trainer.observer import TrainerObserver
from utils.errors import UserError
from utils.parallel.mesh import EngineKind, build_mesh
from utils.random import Noise

ALLOCATION = 512  # bytes: the CUDA allocator's unit
SHARDED = "sharded gradients"
SHALLOW = 3  # the fewest layers that show what a first, an inner and a last one cost


class Key(NamedTuple):
    """When. iteration: number of the one planned; micro: of the micro-batch; stage: forward, backward or update;
    network, last: in whose layers, and whether in its last one."""

    iteration: int
    update: str
    micro: int
    stage: str
    network: str = "other"
    last: bool = False


@dataclass
class Iteration:
    """An iteration that is run for the plan. exits: the exit step that each of its micro-batches takes."""

    step: int
    exits: list[int]


@dataclass
class Record:
    """What a run gave. rest: what is held between iterations. growth: by (iteration, update), what each micro-batch
    leaves behind until the iteration's end."""

    phases: dict[Key, Phase]
    rest: dict[Owner, float]
    growth: dict[tuple[int, str], dict[Owner, float]] = field(default_factory=dict)
    micro_batches: int = 1


class PlannedNoise(Noise):
    """Draws that steer the program take the value that the plan wants: this exit step, and the longest rollout."""

    exit_step = 0

    def shared_randint(self, role: str, high: int, count: int) -> list[int]:
        return [min(self.exit_step, high - 1) if role == "exit_step" else high - 1] * count


def stripped(config: RunConfig) -> RunConfig:
    """The run without files, weights and other software: none of it changes what a GPU holds or computes. Of several
    sizes of videos it has the largest alone."""
    if config.trainer in (TrainerKind.ode, TrainerKind.consistency):
        raise UserError(
            f"--plan does not cover trainer {config.trainer.value}: plan its student with trainer diffusion"
        )
    if config.parallel.engine is not EngineKind.fsdp2:
        raise UserError(f"--plan does not cover parallel.engine {config.parallel.engine}: plan it as fsdp2")
    config = copy.deepcopy(config)
    for network in networks_of(config).values():
        network.init = None
        network.attention = Backend.SDPA if network.attention in (Backend.FLASH, Backend.FLEX) else network.attention
        if network.sparse is not None:
            network.sparse.backend = SparseBackend.TRITON  # whose kernels are counted: see `run`
            network.sparse.sparsity = network.sparse.at(0)  # a ramp's first iterations are the most expensive ones
            network.sparse.ramp_step = None
    config.data, config.training.sizes = SyntheticData.in_place_of(config.data, largest(config)), None
    config.validation.prompts = config.validation.every = config.training.threads = None
    if isinstance(config.rollout, ExitStepConfig):
        config.rollout.last_step_only = False
    config.parallel.compile = False
    config.logging.tensorboard = config.logging.wandb = False
    config.objective.reward = None  # a number a sample; what makes it is the task's own, and looks at real samples
    config.watchdog.stuck_after_seconds = None
    return config


def networks_of(config: RunConfig) -> dict[str, NetworkConfig]:
    found = {"student": config.student, "teacher": config.teacher, "critic": config.critic}
    used = found if config.trainer is TrainerKind.score_distillation else {"student": config.student}
    return {name: network for name, network in used.items() if network is not None}


def tapped(config: RunConfig) -> tuple[int, ...]:
    """The blocks that a discriminator looks at, of the teacher or critic; none without one."""
    gan = config.objective.gan
    backbone = None if gan is None else networks_of(config).get(gan.features.value)
    return () if gan is None or backbone is None else tapped_blocks(backbone.geometry().num_layers, gan.depths)


def shallower(config: RunConfig, layers: int) -> RunConfig:
    """Each network with so many layers less. A discriminator looks at as many blocks, and the last one is as far from
    the end: what comes after it is not computed."""
    config = copy.deepcopy(config)
    if config.objective.gan is not None and (blocks := tapped(config)):
        left = networks_of(config)[config.objective.gan.features.value].geometry().num_layers - layers
        kept = [max(block - layers, number) for number, block in enumerate(blocks)]
        config.objective.gan.depths = [(block + 0.5) / left for block in kept]
    for network in networks_of(config).values():
        network.overrides = {**network.overrides, "num_layers": network.geometry().num_layers - layers}
    return config


@contextmanager
def pretended_world(size: int) -> Iterator[None]:
    """As rank 0 of so many processes, of which there is one. Raises UserError inside a real process group."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--plan is one process: start it with python, not torchrun")
    if size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        if size > 1:
            dist.destroy_process_group()


def run(config: RunConfig, meter: Meter, iterations: list[Iteration]) -> Record:
    """Runs these iterations of a `stripped` config in the process group there is, pretended or (in tests) not."""
    mesh = build_mesh(config.parallel, dist.get_world_size() if dist.is_initialized() else 1, torch.device("cpu"))
    probe = Probe(meter)
    with kernels_counted_by(meter), meter.running():
        options = RunOptions(
            Path(os.devnull, "plan"), "never", wandb=False, save=False, visualize=False, log=False, mesh=mesh,
            observer=probe,
        )  # fmt: skip
        trainer = build_trainer(config, options)
        probe.attach(trainer)
        probe.settle()
        for number, iteration in enumerate(iterations):
            probe.iterate(number, iteration)
        return probe.record


class Probe(TrainerObserver):
    """Tells the meter where the trainer is: the trainer says which stage it is in, hooks say which network runs."""

    trainer: Trainer

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.nets: dict[str, nn.Module] = {}
        self.key = Key(-1, "", 0, "build")
        self.ends: dict[tuple[int, str], list[dict[Owner, float]]] = {}
        self.exits: list[int] = [0]
        self.record = Record({}, {})

    def attach(self, trainer: Trainer) -> None:
        """Hooks the networks of the trainer, which this observes."""
        self.trainer, self.record.micro_batches = trainer, trainer.micro_batches_per_rank
        if (teacher := getattr(trainer, "teacher", None)) is not None:
            self.nets["teacher"] = teacher.net
        # a network that plays several roles is the teacher's
        self.nets |= {
            name: trained.net for name, trained in trainer.networks.items() if trained.net not in self.nets.values()
        }
        parallel = trainer.config.parallel
        for name, net in self.nets.items():
            offloaded = parallel.offload_teacher if name == "teacher" else parallel.offload_optimizer
            if offloaded and trainer.mesh.world > 1:
                kept = ("parameters", "optimizer", "EMA", "update", SHARDED)
                self.meter.host |= {Owner(name, category) for category in kept}
            self._hook(name, net)

    def trained(self) -> list[Trained]:
        """The networks that are trained, and the heads beside them."""
        return [*self.trainer.networks.values(), *self.trainer.heads.values()]

    # -------------------------------------------------------------------------------------------------------- measuring

    def settle(self) -> None:
        """The state that a run is in after its first updates: optimizers have theirs."""
        for trained in self.trained():
            for p in trained.optimizer.parameters:
                p.grad = torch.zeros_like(p)
            trained.engine.step()
            trained.engine.zero_grad()
        self._assign()
        self.record.rest = {owner: size for owner, size in self.meter.held.items() if size}

    def iterate(self, number: int, iteration: Iteration) -> None:
        self.exits = iteration.exits
        self.trainer.step = iteration.step
        self.key = Key(number, "", 0, "forward")
        self._enter()
        self.trainer.training_step()
        self.record.phases = {k: phase for k, phase in self.meter.phases.items() if isinstance(k, Key) and k.update}
        self.record.growth = {update: left_behind(ends) for update, ends in self.ends.items() if len(ends) > 1}

    def _assign(self) -> None:
        for name, net in self.nets.items():
            self.meter.assign(net.parameters(), Owner(name, "parameters"))
        for trained in self.trained():
            name = trained.name
            self.meter.assign(trained.optimizer.parameters, Owner(name, "parameters"))
            for optimizer in trained.optimizer.optimizers.values():
                self.meter.assign(tree_leaves(list(optimizer.state.values())), Owner(name, "optimizer"))
            if trained.ema is not None:
                self.meter.assign(trained.ema.shadow.values(), Owner(name, "EMA"))

    # -------------------------------------------------------------------------------------------- where the trainer is

    def _enter(self, **changes: Any) -> None:
        self.key = self.key._replace(**changes)
        self.meter.owner = Owner(self.key.network, "update" if self.key.stage == "update" else "activations")
        self.meter.enter(self.key)

    def chosen(self, batch: list[MicroBatch]) -> list[MicroBatch]:
        """As many micro-batches as there are exit steps to take."""
        return [self._planned(micro, exit_step) for micro, exit_step in zip(batch, self.exits, strict=False)]

    @staticmethod
    def _planned(micro: MicroBatch, exit_step: int) -> MicroBatch:
        noise = PlannedNoise(micro.noise.seed, micro.noise.step, micro.noise.sample_ids, micro.noise.device)
        noise.exit_step = exit_step
        return replace(micro, noise=noise)

    def update_begins(self, name: str) -> None:
        self._enter(update=name, micro=-1)

    def forward_begins(self, name: str) -> None:
        self._enter(micro=self.key.micro + 1, stage="forward", network="other", last=False)

    def backward_begins(self, name: str) -> None:
        self._enter(stage="backward", network=name, last=False)

    def backward_ended(self, name: str) -> None:
        for trained in (self.trainer.networks.get(name), *self.trainer.heads.values()):
            if trained is not None:
                self._assign_gradients(trained.name, trained.net)
        ends = self.ends.setdefault((self.key.iteration, self.key.update), [])
        ends.append({owner: size for owner, size in self.meter.held.items() if size})

    def step_begins(self, name: str) -> None:
        self._enter(stage="update", network=name, last=False)

    # ------------------------------------------------------------------------------------------- where the networks are

    def _hook(self, name: str, net: nn.Module) -> None:
        blocks: Any = net.fsdp_units()  # type: ignore[operator]
        net.register_forward_pre_hook(partial(self._starts, name), with_kwargs=True, prepend=True)  # before sharding's
        net.register_forward_hook(lambda *_: self._enter(network="other", last=False))
        for number, block in enumerate(blocks):
            after = blocks[number + 1] if number + 1 < len(blocks) else None
            position = {"network": name, "last": number == len(blocks) - 1}
            block.register_forward_pre_hook(lambda *_, position=position: self._enter(**position), prepend=True)
            block.register_forward_hook(partial(self._runs, position, after))

    def _starts(self, name: str, _net: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if isinstance(cache := kwargs.get("cache"), KVCache):
            self.meter.assign(tree_leaves(vars(cache)), Owner(name, "KV cache"))
        self._enter(network=name, last=False)

    def _runs(self, position: dict[str, Any], after: nn.Module | None, _block: Any, _args: Any, out: Any) -> None:
        def turned(_gradient: Tensor) -> None:  # backward has come to this block: the one after it is done
            if after is not None:
                self._assign_gradients(position["network"], after)
            self._enter(**position)

        tensor = out[0] if isinstance(out, tuple) else out
        if tensor.requires_grad:
            tensor.register_hook(turned)

    def _assign_gradients(self, name: str, module: nn.Module) -> None:
        for p in module.parameters():
            sharded = isinstance(p.grad, DTensor)
            self.meter.assign([p.grad], Owner(name, SHARDED if sharded else GRADIENTS))
        for part in module.modules():
            if isinstance(part, FSDPModule):  # between micro-batches they stay whole, and out of sight
                shards = [p for group in part._get_fsdp_state()._fsdp_param_groups for p in group.fsdp_params]
                whole = [getattr(getattr(p, "_unsharded_param", None), "grad", None) for p in shards]
                self.meter.assign([*whole, *(p.unsharded_accumulated_grad for p in shards)], Owner(name, GRADIENTS))


# ------------------------------------------------------------------------------------------------------------ the laws


def left_behind(ends: list[dict[Owner, float]]) -> dict[Owner, float]:
    """What a micro-batch leaves until the update's end, beside gradients. ends: what was held after each backward."""
    first, last = ends[0], ends[-1]
    left = {o: last.get(o, 0) - first.get(o, 0) for o in last if o.category not in (GRADIENTS, SHARDED)}
    return {owner: size for owner, size in left.items() if size}


def line(a: dict[Any, Any], b: dict[Any, Any], x: float) -> dict[Any, Any]:
    """The value at `x` of what is `a` at 0 and `b` at 1, entry by entry."""
    return {key: a.get(key, 0) + (b.get(key, 0) - a.get(key, 0)) * x for key in a | b}


def deeper(shallow: Record, deep: Record, layers: int) -> Record:
    """The record of a run with `layers` more layers than `shallow`, of which `deep` has one more."""
    phases = {}
    for key in shallow.phases:
        a, b = shallow.phases[key], deep.phases[key]
        parts = line(a.parts, b.parts, layers)
        phases[key] = Phase(a.peak + (b.peak - a.peak) * layers, parts, line(a.cost, b.cost, layers))
    growth = {key: line(shallow.growth[key], deep.growth[key], layers) for key in shallow.growth}
    return Record(phases, line(shallow.rest, deep.rest, layers), growth, shallow.micro_batches)
