"""What a run writes to disk: the checkpoints that are there at a time, and the trajectories that it makes.

Bytes are those of the trainer's own tensors, made on the meta device: networks, averages, optimizer state. What a
checkpoint holds beside tensors (names, tables, counters) is left out: kilobytes for a small network, a few megabytes
for a large one.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch

from configs.schema import RunConfig
from configs.sections import CheckpointConfig, TrainerKind
from model.attention.backends import Backend
from model.discriminator import tapped_blocks
from model.gan_config import Features
from model.network import NetworkConfig
from model.ode_regression import store_levels
from model.schedule import uniform_sigmas
from model.types import Evaluations
from trainer.adversary import NAME as DISCRIMINATOR
from trainer.adversary import build_heads
from trainer.engine import Engine
from trainer.networks import Trained
from trainer.run_networks import RunNetworks
from trainer.state import save_run
from utils.optim import NetworkOptimizer, trainable
from utils.parallel.mesh import EngineKind, Mesh

META = torch.device("meta")


@dataclass(frozen=True)
class State:
    """Bytes of what a run holds between iterations, over all ranks together.

    checkpoint: what a checkpoint keeps: trained weights, averages, optimizer state.
    gradients: of the trained weights.
    frozen: the teacher's weights.
    """

    checkpoint: int
    gradients: int
    frozen: int


def networks_of_run(config: RunConfig) -> dict[str, NetworkConfig]:
    """The networks that a run builds, by role."""
    names = {
        TrainerKind.score_distillation: ("student", "teacher", "critic"),
        TrainerKind.diffusion: ("student",),
        TrainerKind.ode: ("student", "teacher") if config.ode.path is None else ("student",),
        TrainerKind.consistency: ("student", "teacher"),
    }[config.trainer]
    found = {name: getattr(config, name) for name in names}
    return {name: network for name, network in found.items() if network is not None}


def state_of(config: RunConfig) -> State:
    """The bytes of a run's state. Nothing is read and nothing drawn. Raises ConfigError for an impossible network."""
    config = _without_files(config)
    with META:
        make = RunNetworks(config, Evaluations(), META, Mesh())
        teacher = make.teacher() if "teacher" in networks_of_run(config) else None
        names = [name for name in networks_of_run(config) if name != "teacher"]
        trained: dict[str, Trained] = {name: make.trained(name, 1, teacher=teacher, empty=True) for name in names}
        if (heads := _heads(config)) is not None:
            trained[DISCRIMINATOR] = heads
    for network in trained.values():
        for p in network.optimizer.parameters:
            p.grad = torch.zeros_like(p)
        for optimizer in network.optimizer.optimizers.values():
            optimizer.step()  # after its first update it has all its state
    tensors, _ = save_run(trained)
    frozen = [] if teacher is None else list(teacher.net.parameters())
    return State(
        sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()),
        sum(p.numel() * p.element_size() for network in trained.values() for p in network.optimizer.parameters),
        sum(p.numel() * p.element_size() for p in frozen if not p.requires_grad),  # but not adapters on it
    )


def _without_files(config: RunConfig) -> RunConfig:
    """The run with random weights, and with what shapes do not depend on as every machine has it."""
    config = copy.deepcopy(config)
    for network in networks_of_run(config).values():
        network.init, network.loras, network.init_lora_scale = None, [], 1.0
        network.attention = Backend.SDPA
        if network.sparse is not None:
            network.sparse.backend = None
    config.parallel.engine, config.parallel.compile = EngineKind.fsdp2, False
    config.parallel.offload_optimizer = config.parallel.offload_teacher = False
    return config


def _heads(config: RunConfig) -> Trained | None:
    """The discriminator's, of a run that has one."""
    gan = config.objective.gan
    if config.trainer is not TrainerKind.score_distillation or gan is None:
        return None
    backbone = config.teacher if gan.features is Features.teacher else config.critic
    assert backbone is not None
    geometry = backbone.geometry()
    blocks = len(tapped_blocks(geometry.num_layers, gan.depths))
    net = build_heads(gan, geometry, blocks, config.data.size[1:])
    optimizer = NetworkOptimizer(trainable(net), gan.training.optimizer, gan.training.lr_schedule, 1)
    return Trained(DISCRIMINATOR, net, optimizer, Engine(net, optimizer), None)


def most_checkpoints(cadence: CheckpointConfig, steps: int) -> int:
    """How many checkpoints lie on disk at most: those that are kept and, before the oldest goes, the one being written.

    steps: iterations of the run, after the last of which it is saved too.
    """
    saves = -(-steps // cadence.every)
    gone = saves - cadence.keep_last - 1  # saves that are neither among the last ones nor being written
    if gone < 0:
        return saves
    for_good = 0 if cadence.keep_every is None else gone * cadence.every // math.lcm(cadence.every, cadence.keep_every)
    return for_good + cadence.keep_last + 1


def trajectory_bytes(config: RunConfig) -> int:
    """Bytes of the trajectories that an ODE initialisation makes itself; 0 for other runs."""
    if config.trainer is not TrainerKind.ode or config.ode.path is not None:
        return 0
    return stored_bytes(config)


def stored_bytes(config: RunConfig) -> int:
    """Bytes of `ode.pairs` trajectories in fp32, at the noise levels of the student's steps and at 0."""
    ode = config.ode
    grid = uniform_sigmas(ode.steps, ode.shift, config.student.path.start)
    points = len(store_levels(grid, config.schedule.sigmas())) + 1
    return 4 * ode.pairs * points * config.student.geometry().out_dim * math.prod(config.data.size)
