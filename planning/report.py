"""A plan in words: what a GPU holds, sends and computes, how long that takes at least, and what would make it fit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from configs.schema import RunConfig
from configs.sizes import largest
from model.attention.checkpointing import Checkpointing
from planning.hardware import CONTEXT_GB, FRAGMENTS, GB, needed_gb
from planning.launch import fitted
from planning.meter import FLOPS, GATHERED, GRADIENTS, WORKSPACE, Traffic
from planning.plan import Cluster, Plan, make_plan
from planning.pretend_run import SHARDED, networks_of
from trainer.adversary import NAME as DISCRIMINATOR
from trainer.micro_batch import micro_batches
from utils.errors import ConfigError
from utils.logging import console
from utils.parallel.mesh import legal_splits, split

MFU = 0.4  # share of the data sheet's speed, for a second figure beside the bound: an assumption
COLUMNS = {
    "parameters": ("parameters",),
    "gathered": (GATHERED,),
    "gradients": (GRADIENTS, SHARDED),
    "optimizer": ("optimizer",),
    "EMA": ("EMA",),
    "KV cache": ("KV cache",),
    "activations": ("activations", "update", WORKSPACE),
}


LEGEND = """What the words say: a copy of the weights lies on shard x sequence GPUs, replicate is how many copies there
are, and sequence GPUs share a video. "gathered" are whole layers while they compute; "activations" are what a backward
pass needs. "overlapped" traffic runs beside the arithmetic, "all-to-all" never does. docs/planning.md has more."""


def plan_text(config: RunConfig, cluster: Cluster, max_steps: int | None = None) -> str:
    """The plan of a run in words, with remedies where it does not fit. Raises UserError.

    A run whose `parallel` names no split gets one that fits the GPUs and its batch.
    """
    config = copy.deepcopy(config)
    config.training.max_steps = min(config.training.max_steps, max_steps or config.training.max_steps)
    config = fitted(config, cluster)
    console.info("planning %s for %d GPUs: its iterations run once on pretended tensors", config.name, cluster.world)
    plan = make_plan(config, cluster)
    lines = [report(plan)]
    if not plan.fits:
        console.info("it does not fit: changes are planned one by one")
        lines += ["", *remedies(plan)]
    return "\n".join([*lines, "", LEGEND])


def report(plan: Plan) -> str:
    """All of it, as lines of text."""
    cluster, (replicate, shard, sequence) = plan.cluster, plan.split
    training = plan.config.training
    where = "" if plan.when.network == "other" else f", in the {plan.when.network}'s layers"
    size = "x".join(map(str, largest(plan.config)))
    several = "" if training.sizes is None else f"; every video of the largest of training.sizes, {size}"
    head = [
        f"{plan.config.name} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu_name}: "
        f"replicate {replicate} x shard {shard} x sequence {sequence}; "
        f"samples a rank and update: {plan.micro_batches} x {training.micro_batch_size}{several}",
        "",
        f"GB per GPU at the worst moment ({plan.when.stage} of the {plan.when.update}'s update{where}):",
    ]
    return "\n".join([*head, *memory(plan), "", *verdict(plan), "", *traffic(plan), "", *time(plan)])


def memory(plan: Plan) -> list[str]:
    heads = [DISCRIMINATOR] if plan.config.objective.gan is not None else []
    networks = [*networks_of(plan.config), *heads, "other"]
    cells = [["", *COLUMNS, "sum"]]
    rows = {
        name: [
            sum(
                s
                for o, s in plan.parts.items()
                if o.network == name and o.category in categories and o not in plan.host
            )
            for categories in COLUMNS.values()
        ]
        for name in networks
    }
    rows["sum"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    cells += [[name, *(f"{value / GB:.2f}" for value in [*row, sum(row)])] for name, row in rows.items()]
    lines = table(cells)
    in_host = sum(size for owner, size in plan.parts.items() if owner in plan.host)
    return lines + ([f"and in the CPU's memory, for each GPU: {in_host / GB:.2f} GB"] if in_host else [])


def verdict(plan: Plan) -> list[str]:
    gpu, needed = plan.cluster.gpu, needed_gb(plan.peak)
    says = "fits" if plan.fits else "does not fit"
    return [
        f"peak {plan.peak / GB:.1f} GB of tensors; {needed:.1f} GB with an assumed margin of {FRAGMENTS:.0%} for "
        f"fragments and {CONTEXT_GB:.0f} GB for CUDA and NCCL, of {gpu.memory:.0f} GB: {says}"
    ]


def traffic(plan: Plan) -> list[str]:
    """Bytes sent and FLOPs, for each kind of iteration."""
    kinds = dict.fromkeys(key.collective for item in plan.iterations for key in item.cost if isinstance(key, Traffic))
    cells = [["per GPU and iteration of", *(f"{kind}, GB" for kind in kinds), "between nodes, GB", "PFLOP"]]
    for item in plan.iterations:
        sizes = [sum(item.cost.get(Traffic(kind, far), 0.0) for far in (False, True)) for kind in kinds]
        far = sum(size for key, size in item.cost.items() if isinstance(key, Traffic) and key.inter_node)
        cells.append(
            [
                item.kind.name,
                *(f"{size / GB:.2f}" for size in sizes),
                f"{far / GB:.2f}",
                f"{item.cost[FLOPS] / 1e15:.2f}",
            ]
        )
    return table(cells)


def time(plan: Plan) -> list[str]:
    cells = [["least seconds of", "arithmetic", "overlapped", "all-to-all", "iteration", "iterations"]]
    for item in plan.iterations:
        b = item.bound
        seconds = (b.compute, max(b.overlapped, b.host), b.exposed, b.total)
        cells.append([item.kind.name, *(f"{s:.2f}" for s in seconds), str(item.kind.count)])
    return [
        *table(cells),
        f"at the data sheet's bf16 speed; gathers and reductions wholly beside the arithmetic, all-to-all never: "
        f"{plan.gpu_hours:.0f} GPU-hours at least, {plan.seconds / 3600:.1f} h",
        f"at {MFU:.0%} of that speed (an assumption): {plan.gpu_hours / MFU:.0f} GPU-hours, "
        f"{plan.seconds / MFU / 3600:.1f} h",
    ]


def table(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


# ------------------------------------------------------------------------------------------------- when it does not fit


@dataclass(frozen=True)
class Change:
    """Settings to change, and how far they are thought to lower the peak, in bytes: which to plan depends on it."""

    settings: dict[str, object]
    saves: float

    def applied(self, config: RunConfig) -> RunConfig:
        changed = copy.deepcopy(config)
        for path, value in self.settings.items():
            *sections, name = path.split(".")
            target = changed
            for section in sections:
                target = getattr(target, section)
            setattr(target, name, value)
        return changed

    def __str__(self) -> str:
        return " ".join(f"{path}={_yaml(value)}" for path, value in self.settings.items())


def _yaml(value: object) -> str:
    if isinstance(value, Checkpointing):
        return value.value
    return str(value).lower() if isinstance(value, bool) else str(value)


def changes(plan: Plan) -> list[Change]:
    """Single changes that are legal, most of them cheaper in time the earlier they stand."""
    config, parallel, (replicate, shard, sequence) = plan.config, plan.config.parallel, plan.split

    def held(*categories: str, of: tuple[str, ...] | None = None) -> float:
        return sum(
            s
            for o, s in plan.parts.items()
            if (of is None or o.network in of) and o.category in categories and o not in plan.host
        )

    trained = [name for name in networks_of(config) if name != "teacher"]
    out: list[Change] = []
    if plan.cluster.world > 1 and parallel.keep_gathered_in_rollout:
        out.append(Change({"parallel.keep_gathered_in_rollout": False}, held(GATHERED)))
    for name in networks_of(config):
        if plan.cluster.world > 1 and not getattr(parallel.reshard_after_forward, name):
            out.append(Change({f"parallel.reshard_after_forward.{name}": True}, held(GATHERED, of=(name,))))
    if plan.micro_batches > 1 and shard * sequence > 1 and not parallel.sync_each_micro_batch:
        out.append(Change({"parallel.sync_each_micro_batch": True}, held(GRADIENTS)))
    if config.training.micro_batch_size > 1:
        half = config.training.micro_batch_size // 2
        out.append(Change({"training.micro_batch_size": half}, held("activations", "KV cache") / 2))
    state = held("parameters", "optimizer", "EMA", SHARDED)
    for fewer in range(replicate - 1, 0, -1):
        if replicate % fewer == 0:
            ways: dict[str, object] = {"parallel.replicate": fewer, "parallel.shard": shard * replicate // fewer}
            out.append(Change(ways, state * (1 - fewer / replicate)))
    partly = [name for name in trained if getattr(config, name).checkpointing is not Checkpointing.full]
    if partly:
        out.append(Change({f"{name}.checkpointing": Checkpointing.full for name in partly}, 0.9 * held("activations")))
    out += _sequences(plan, held("activations", "KV cache", WORKSPACE))
    if plan.cluster.world > 1 and "teacher" in networks_of(config) and not parallel.offload_teacher:
        out.append(Change({"parallel.offload_teacher": True}, held("parameters", of=("teacher",))))
    if plan.cluster.world > 1 and not parallel.offload_optimizer:
        saved = held("parameters", "optimizer", "EMA", SHARDED, of=tuple(trained))
        out.append(Change({"parallel.offload_optimizer": True}, saved))
    return [change for change in out if _legal(change.applied(config), plan.cluster)]


def _sequences(plan: Plan, held: float) -> Iterator[Change]:
    """Higher degrees of sequence parallelism, at the same replication."""
    replicate, _, sequence = plan.split
    for r, s, q in legal_splits(plan.cluster.world):
        splits_heads = all(network.geometry().num_heads % q == 0 for network in networks_of(plan.config).values())
        if r == replicate and q > sequence and splits_heads and q <= plan.cluster.gpus_per_node:
            yield Change({"parallel.shard": s, "parallel.sequence": q}, held * (1 - sequence / q))


def _legal(config: RunConfig, cluster: Cluster) -> bool:
    try:
        ways = split(config.parallel, cluster.world)
        micro_batches(config.training, ways[0] * ways[1])
    except ConfigError:
        return False
    return True


def remedies(plan: Plan, most: int = 3) -> list[str]:
    """The cheapest changes that make it fit, each planned anew, cheapest in time first; else more GPUs."""
    surplus = (needed_gb(plan.peak) - plan.cluster.gpu.memory) * GB / (1 + FRAGMENTS)
    fitting: list[tuple[str, Plan]] = []
    for change in _promising(changes(plan), surplus)[: most + 2]:
        console.info("planning with %s", change)
        other = make_plan(change.applied(plan.config), plan.cluster)
        if other.fits:
            fitting.append((str(change), other))
        if len(fitting) == most:
            break
    if not fitting:
        fitting = _larger(plan, surplus)
    if not fitting:
        return ["no change of the settings and no four times as many GPUs make it fit: take larger ones"]
    lines = ["would fit (planned anew, cheapest in time first):"]
    for what, other in sorted(fitting, key=lambda item: item[1].gpu_hours):
        more = other.gpu_hours / plan.gpu_hours - 1
        lines.append(f"  {what}: {needed_gb(other.peak):.1f} GB, least GPU-hours {more:+.1%}")
    return lines


def _promising(singles: list[Change], surplus: float) -> list[Change]:
    """Those thought to be enough, alone before in pairs; where none is, as many together as it takes."""
    pairs = [
        Change(change.settings | other.settings, change.saves + other.saves)
        for i, change in enumerate(singles)
        for other in singles[i + 1 :]
        if not change.settings.keys() & other.settings.keys() and max(change.saves, other.saves) < surplus
    ]
    enough = [change for change in [*singles, *pairs] if change.saves >= surplus]
    return enough or _together(singles, surplus)


def _together(singles: list[Change], surplus: float) -> list[Change]:
    """Changes of different settings, those that save most first, until they are thought to be enough."""
    settings: dict[str, object] = {}
    saved = 0.0
    for change in sorted(singles, key=lambda change: -change.saves):
        if change.settings.keys() & settings.keys():
            continue
        settings |= change.settings
        saved += change.saves
        if saved >= surplus:
            break
    return [Change(settings, saved)] if settings else []


def _larger(plan: Plan, surplus: float) -> list[tuple[str, Plan]]:
    """Two or four times as many GPUs that share one copy of the weights."""
    replicate, shard, _sequence = plan.split
    kept = ("parameters", "optimizer", "EMA", SHARDED, GRADIENTS)
    state = sum(size for owner, size in plan.parts.items() if owner.category in kept and owner not in plan.host)
    for times in (2, 4):
        settings: dict[str, object] = {"parallel.replicate": replicate, "parallel.shard": shard * times}
        change = Change(settings, state * (1 - 1 / times))
        nodes, each = plan.cluster.nodes, plan.cluster.gpus_per_node
        nodes, each = (nodes, each * times) if nodes == 1 and each * times <= 8 else (nodes * times, each)
        cluster = dataclasses.replace(plan.cluster, nodes=nodes, gpus_per_node=each)
        config = change.applied(plan.config)
        if change.saves < surplus or not _legal(config, cluster):
            continue
        other = make_plan(config, cluster)
        if other.fits:
            return [(f"--nodes {nodes} --gpus_per_node {each} {change}", other)]
    return []
