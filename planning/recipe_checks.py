"""Whether a recipe could start: software, ranks, memory, disk. Its files are for planning/files.py."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

from configs.schema import RunConfig
from model.attention.backends import Backend
from model.attention.vsa import attention as vsa
from planning.disk import State, most_checkpoints, networks_of_run, trajectory_bytes
from planning.finding import Finding
from planning.hardware import GB, GPUS, needed_gb
from planning.launch import CPU, Recipe, own_cluster
from planning.machine import Machine
from planning.packages import check_package
from planning.plan import Cluster, Plan, make_plan
from tasks.kinds.encoded import EncodedData
from trainer.micro_batch import micro_batches
from utils import checkpoint
from utils.errors import ConfigError, UserError
from utils.parallel.mesh import EngineKind, split
from utils.space import size_text

# ------------------------------------------------------------------------------------------------------------- software


def needs_of(config: RunConfig, *, on_gpu: bool) -> dict[str, str]:
    """Checks of the machine that a recipe cannot do without, by name, and what of the recipe needs each."""
    found: dict[str, str] = {}
    for name, network in networks_of_run(config).items():
        backend = Backend(network.attention)
        if name != "teacher" or backend is not Backend.FLEX or on_gpu:  # a frozen network needs no backward
            found.setdefault(f"attention {backend.value}", f"{name}.attention")
        sparse = network.sparse
        if sparse is not None and on_gpu and sparse.backend in (None, vsa.SparseBackend.TRITON):
            found.setdefault("Triton", f"{name}.sparse")
    if isinstance(config.data, EncodedData):
        if config.data.vae.path is not None:
            found["VAE"] = "data.vae.path"
        if config.data.text.encoder is not None and config.data.text.cache is None:
            found["text encoder"] = "data.text.encoder"
    if config.validation.every is not None:
        found["video"] = "validation.every"
    return found


def needed(finding: Finding, needs: dict[str, str]) -> Finding:
    """A finding about the machine as a recipe sees it, which may need what others can do without."""
    why = needs.get(finding.name)
    if why is None or finding.ok:
        return finding
    return dataclasses.replace(finding, needed=True, what=f"{finding.what} (here {why} needs it)")


def check_software(config: RunConfig, machine: Machine) -> Iterator[Finding]:
    """What only some recipes need."""
    networks, version = networks_of_run(config), machine.probes.version
    if with_lora := next((name for name, network in networks.items() if network.lora is not None), None):
        yield check_package("peft", f"{with_lora}.lora", version)
    if config.parallel.engine is EngineKind.deepspeed:
        yield check_package("deepspeed", "parallel.engine", version)
    for package in config.data.packages:
        yield check_package(package, f"data.kind {config.data.kind}", version)
    for name, network in networks.items():
        if network.sparse is None:
            continue
        if problem := vsa.refused(network.sparse.backend, machine.device, backward=name != "teacher"):
            yield Finding(f"{name}.sparse", False, problem, f"{name}.sparse.backend=reference, or a machine with a GPU")


# ----------------------------------------------------------------------------------------------------- ranks and memory


def check_ranks(config: RunConfig, cluster: Cluster, meant_for: Cluster | None) -> Finding:
    """Whether so many processes can share the run."""
    try:
        ways = split(config.parallel, cluster.world)
        micro_batches(config.training, ways[0] * ways[1])
    except ConfigError as problem:
        remedy = "set parallel to what is there"
        if meant_for is not None and meant_for.gpu_name != CPU:
            remedy = f"start it on {cluster_text(meant_for)}, for which it is meant, or {remedy}"
        return Finding("ranks", False, f"on {cluster_text(cluster)}: {problem}", remedy)
    replicate, shard, sequence = ways
    what = f"{cluster_text(cluster)}: replicate {replicate} x shard {shard} x sequence {sequence}"
    return Finding("ranks", True, what)


def cluster_text(cluster: Cluster) -> str:
    """As "8 nodes of 8 GPUs (h200)"."""
    if cluster.gpu_name == CPU:
        return "the processor of this machine"
    nodes = "" if cluster.nodes == 1 else f"{cluster.nodes} nodes of "
    return f"{nodes}{cluster.gpus_per_node} GPU{'s' * (cluster.gpus_per_node > 1)} ({cluster.gpu_name})"


def check_memory(recipe: Recipe, config: RunConfig, cluster: Cluster, state: State) -> Finding:
    """The planner's answer. What the planner does not cover is held against its state alone, a lower bound."""
    on_cpu = cluster.gpu_name == CPU
    copy = state.checkpoint if on_cpu and config.checkpoint.background else 0  # while a thread writes it
    limit, each = cluster.gpu.memory, "of memory" if on_cpu else "a GPU"
    least = needed_gb(_least(config, cluster, state) + copy)
    held = "weights, gradients, optimizer and average alone"
    if least > limit:
        what = f"{least:.1f} GB at least ({held}) of {limit:.0f} GB {each}: does not fit"
        return Finding("memory", False, what, _plan_remedy(recipe, cluster))
    try:
        plan = make_plan(config, cluster)
    except UserError as problem:
        what = f"{least:.1f} GB at least ({held}) of {limit:.0f} GB {each}; of activations nothing is known: {problem}"
        return Finding("memory", True, what)
    need = needed_gb(plan.peak + copy)
    copied = f" and {copy / GB:.1f} GB for a checkpoint that is being written" if copy else ""
    what = (
        f"peak {plan.peak / GB:.1f} GB{copied}, with margins {need:.1f} of {limit:.0f} GB {each}: "
        f"{'fits' if need <= limit else 'does not fit'}{_hours(plan)}"
    )
    return Finding("memory", need <= limit, what, "" if need <= limit else _plan_remedy(recipe, cluster))


def _least(config: RunConfig, cluster: Cluster, state: State) -> float:
    """Bytes that a rank holds at the least."""
    _, shard, sequence = split(config.parallel, cluster.world)
    offload = cluster.world > 1 and (config.parallel.offload_teacher or config.parallel.offload_optimizer)
    if offload or config.parallel.engine is not EngineKind.fsdp2:
        return 0.0
    return (state.checkpoint + state.gradients + state.frozen) / (shard * sequence)


def _hours(plan: Plan) -> str:
    """The least time, for GPUs whose speed is known."""
    known = plan.cluster.gpu_name in GPUS
    return f"; at least {plan.seconds / 3600:.1f} h, {plan.gpu_hours:.0f} GPU-hours" if known else ""


def _plan_remedy(recipe: Recipe, cluster: Cluster) -> str:
    if cluster.gpu_name not in GPUS:
        return "take GPUs, or larger ones; train.py --plan says which are enough"
    return (
        f"python train.py {recipe.arguments(with_logdir=False)} --plan --nodes {cluster.nodes} --gpus_per_node "
        f"{cluster.gpus_per_node} --gpu {cluster.gpu_name}   (names the cheapest changes after which it fits)"
    )


def check_host(config: RunConfig, machine: Machine, state: State) -> Finding:
    """Memory of the processor beside GPUs: of the copy from which a checkpoint is written."""
    copy = state.checkpoint if config.checkpoint.background else 0
    what = f"{copy / GB:.1f} GB for a checkpoint that is being written, of {machine.memory / GB:.1f} GB"
    ok = copy < machine.memory
    return Finding("host memory", ok, what, "" if ok else "checkpoint.background=false")


# ---------------------------------------------------------------------------------------------------------------- disk


def check_run_folder(recipe: Recipe, config: RunConfig) -> Finding:
    """Whether a run is there already."""
    folder, steps = recipe.folder, config.training.max_steps
    found = checkpoint.latest_sound(folder / "checkpoints")
    if found is None:
        return Finding("run folder", True, f"{folder}: new, {steps} iterations")
    step = checkpoint.step_of(found)
    says = f"goes on after iteration {step} of {steps}" if step < steps else f"finished after iteration {step}"
    return Finding("run folder", True, f"{folder}: {says}")


def check_disk(recipe: Recipe, config: RunConfig, machine: Machine, state: State) -> Finding:
    """The checkpoints that lie there at a time, and trajectories, against what is free."""
    folder, cadence, steps = recipe.folder, config.checkpoint, config.training.max_steps
    free, stored = machine.probes.free_disk(folder), checkpoint.list_checkpoints(folder / "checkpoints")
    at_once = most_checkpoints(cadence, steps)
    left = max(at_once - len(stored), 1) if not stored or checkpoint.step_of(stored[-1]) < steps else 0
    need = left * state.checkpoint + trajectory_bytes(config)
    for_good = "" if cadence.keep_every is None else f", each {cadence.keep_every}th for good"
    what = (
        f"{size_text(need)} of {size_text(free)} free: {left} checkpoint{'s' * (left != 1)} of "
        f"{size_text(state.checkpoint)} (the last {cadence.keep_last}{for_good}, and the one being written)"
    )
    if trajectories := trajectory_bytes(config):
        what += f", {size_text(trajectories)} of trajectories"
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if not os.access(nearest, os.W_OK):
        return Finding("disk", False, f"{nearest} cannot be written to", "give another folder: --logdir DIR")
    remedy = f"free {size_text(need - free)}, give --logdir on a larger disk, or keep fewer: checkpoint.keep_last=1"
    return Finding("disk", need <= free, what, "" if need <= free else remedy)


def cluster_here(machine: Machine) -> Cluster:
    """This machine as a cluster."""
    return own_cluster(machine.gpus, machine.memory)
