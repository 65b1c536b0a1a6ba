"""The planner: what a run will need of each GPU, found out without one, and the least time it can take.

`plan_run.py` runs the trainer's iterations under fake tensors; here they become a run's memory, traffic and time.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import RunConfig
from configs.sections import TrainerKind, UpdateSchedule
from planning.hardware import GPU, Bound, bound, needed_gb
from planning.meter import Cost, Meter, Owner, Phase
from planning.pretend_run import (
    ALLOCATION,
    SHALLOW,
    Iteration,
    Key,
    Record,
    deeper,
    networks_of,
    pretended_world,
    run,
    shallower,
    stripped,
    tapped,
)
from trainer.adversary import NAME as DISCRIMINATOR
from trainer.micro_batch import micro_batches
from utils.parallel.mesh import split


@dataclass(frozen=True)
class Cluster:
    """The GPUs that a run would get."""

    nodes: int
    gpus_per_node: int
    gpu_name: str
    gpu: GPU

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Kind:
    """Iterations of one kind: which updates they make and how many of them there are in the run."""

    name: str
    step: int
    count: int


@dataclass(frozen=True)
class KindPlan:
    """An iteration's cost per GPU and the least time it takes."""

    kind: Kind
    cost: Cost
    bound: Bound


@dataclass(frozen=True)
class Plan:
    """What a run needs, per GPU.

    split: replicate, shard and sequence, whose product is the number of GPUs.
    micro_batches: of a rank and update.
    rest: bytes between iterations, by owner.
    peak: bytes of the worst moment.
    parts: whose they are.
    when: which moment it is.
    host: whose bytes lie in the CPU's memory, and not in the peak.
    iterations: the kinds of iterations, with cost and least time.
    """

    config: RunConfig
    cluster: Cluster
    split: tuple[int, int, int]
    micro_batches: int
    rest: dict[Owner, float]
    peak: float
    parts: dict[Owner, float]
    when: Key
    host: frozenset[Owner]
    iterations: list[KindPlan]

    @property
    def fits(self) -> bool:
        return needed_gb(self.peak) <= self.cluster.gpu.memory

    @property
    def seconds(self) -> float:
        """Least seconds of the whole run."""
        return sum(item.bound.total * item.kind.count for item in self.iterations)

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.cluster.world / 3600


def kinds_of(config: RunConfig) -> list[Kind]:
    """The kinds of iterations that a run has."""
    training = config.training
    steps = training.max_steps
    if config.trainer is not TrainerKind.score_distillation:
        return [Kind("student", 0, steps)]
    students = training.generator_updates(steps)
    judge = DISCRIMINATOR if config.critic is None else "critic"
    joint = training.update_schedule is UpdateSchedule.joint
    found = [
        Kind(f"student and {judge}" if joint else "student", training.critic_warmup_steps, students),
        Kind(judge, 0 if training.critic_warmup_steps else 1, steps - students),
    ]
    return [kind for kind in found if kind.count]


def iterations_of(kind: Kind, parts: int) -> list[Iteration]:
    """What is run of a kind: two micro-batches, one for each of two exit steps; two iterations where they have one."""
    return [Iteration(kind.step, [1, 0])] if parts > 1 else [Iteration(kind.step, [exit_step]) for exit_step in (1, 0)]


def make_plan(config: RunConfig, cluster: Cluster, *, whole: bool = False) -> Plan:
    """Plans a run. whole: with all layers (slow), for tests. Raises ConfigError for an illegal split or batch."""
    ways = split(config.parallel, cluster.world)
    parts = micro_batches(config.training, ways[0] * ways[1])
    kinds = kinds_of(config)
    # an iteration of both makes the critic's update as one of the critic alone does, unless it reuses the rollout
    joint = config.training.update_schedule is UpdateSchedule.joint
    run_kinds = kinds[:1] if joint and not config.rollout.reuse_rollout else kinds
    iterations = [iteration for kind in run_kinds for iteration in iterations_of(kind, parts)]
    record, host = measure(config, cluster, iterations, whole)
    costs = [
        iteration_cost(config, record, number * len(iterations_of(kind, parts)))
        for number, kind in enumerate(run_kinds)
    ]
    if len(kinds) > len(run_kinds):
        costs.append(update_cost(record, 0, kinds[-1].name, mean_exit(config)))
    when, worst = worst_moment(record, host)
    planned = [KindPlan(kind, cost, bound(cost, cluster.gpu)) for kind, cost in zip(kinds, costs, strict=True)]
    return Plan(
        config=config, cluster=cluster, split=ways, micro_batches=parts, rest=record.rest, peak=worst.peak,
        parts=worst.parts, when=when, host=host, iterations=planned,
    )  # fmt: skip


def measure(
    config: RunConfig, cluster: Cluster, iterations: list[Iteration], whole: bool
) -> tuple[Record, frozenset[Owner]]:
    """The record of these iterations, and what lies in the CPU's memory."""
    plain = stripped(config)
    fewest = min(network.geometry().num_layers for network in networks_of(plain).values())
    most = [fewest - SHALLOW]
    if blocks := tapped(plain):
        most.append(blocks[-1] + 1 - len(blocks))  # as many blocks as there are must be left up to the last
    left_out = 0 if whole else max(min(most), 0)
    meters = []

    def record(layers: int) -> Record:
        meters.append(Meter(granularity=ALLOCATION, gpus_per_node=cluster.gpus_per_node, cuda=True))
        return run(shallower(plain, layers), meters[-1], iterations)

    with pretended_world(cluster.world):
        result = record(left_out) if left_out < 2 else deeper(record(left_out), record(left_out - 1), left_out)
    return result, frozenset(meters[0].host)


def iteration_cost(config: RunConfig, record: Record, first: int) -> Cost:
    """Cost of the iteration whose first number this is: of all its updates."""
    cost: Cost = {}
    for update in dict.fromkeys(key.update for key in record.phases if key.iteration == first):
        cost = added(cost, update_cost(record, first, update, mean_exit(config)))
    return cost


def added(a: Cost, b: Cost) -> Cost:
    return {key: a.get(key, 0.0) + b.get(key, 0.0) for key in a | b}


def mean_exit(config: RunConfig) -> float:
    """Of rollouts: the last step, or any of them with the same probability."""
    return config.rollout.mean_step(len(config.schedule.sigmas()))


def update_cost(record: Record, first: int, update: str, exit_step: float) -> Cost:
    """Cost of an update with all its micro-batches, from an iteration that `iterations_of` made (its first number).

    Only the forward stage, where rollouts are, depends on the exit step, and it is affine in it.
    """
    many = record.micro_batches > 1

    def stage(name: str, iteration: int, micro: int) -> Cost:
        total: Cost = {}
        for key, phase in record.phases.items():
            if (key.iteration, key.update, key.stage, key.micro) == (iteration, update, name, micro):
                total = added(total, phase.cost)
        return total

    long = stage("forward", first, 0)
    short = stage("forward", first, 1) if many else stage("forward", first + 1, 0)
    final = int(many)
    terms = [
        (long, record.micro_batches * exit_step),
        (short, record.micro_batches * (1 - exit_step)),
        (stage("backward", first, final), 1),
        (stage("update", first, final), 1),
        (stage("backward", first, 0), record.micro_batches - 1),
    ]
    keys = dict.fromkeys(key for cost, _ in terms for key in cost)  # in order: columns of the report, sums of floats
    return {key: sum(cost.get(key, 0.0) * times for cost, times in terms) for key in keys}


def worst_moment(record: Record, host: frozenset[Owner]) -> tuple[Key, Phase]:
    """The phase of the highest peak, which what earlier micro-batches left behind is added to."""
    more = max(record.micro_batches - 2, 0)
    moments = {}
    for key, phase in record.phases.items():
        parts = dict(phase.parts)
        for (iteration, update), left in record.growth.items():
            order = list(dict.fromkeys(k.update for k in record.phases if k.iteration == iteration))
            later = order.index(key.update) > order.index(update) if key.update in order else False
            if iteration == key.iteration and (later or (key.update == update and key.micro > 0)):
                for owner, size in left.items():
                    parts[owner] = parts.get(owner, 0) + size * more
        peak = sum(size for owner, size in parts.items() if owner not in host)
        moments[key] = Phase(peak, parts, phase.cost)
    when = max(moments, key=lambda key: moments[key].peak)
    return when, moments[when]
