"""For which GPUs a recipe is meant, which it would get, and the command that starts it."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.schema import RunConfig
from planning.hardware import GB, GPU, GPUS, find_gpu
from planning.plan import Cluster
from planning.pretend_run import networks_of
from trainer.command import PlanArgs, default_logdir
from trainer.micro_batch import micro_batches
from utils.errors import ConfigError
from utils.yaml_files import read_yaml

PER_NODE = 8  # GPUs of a node, where nobody says otherwise
DEFAULT_GPU = "h200"  # as train.py --plan takes it
CPU = "cpu"


@dataclass(frozen=True)
class Recipe:
    """A run as it is to be started. logdir: None is train.py's own choice."""

    path: Path
    overrides: tuple[str, ...] = ()
    logdir: Path | None = None

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.logdir or default_logdir(self.path)

    def arguments(self, *, with_logdir: bool = True) -> str:
        """Of the programs that read it, as a shell takes them."""
        said = [f"--config_path {shlex.quote(str(self.path))}", *map(shlex.quote, self.overrides)]
        if with_logdir and self.logdir is not None:
            said.append(f"--logdir {shlex.quote(str(self.logdir))}")
        return " ".join(said)

    def comments(self) -> list[str]:
        """The comment lines at the heads of its file and of those below it, in this order."""
        found, path = [], self.path
        for _ in range(10):  # the loader has refused a circle
            text = path.read_text(encoding="utf-8")
            found += re.findall(r"^# ?(.*)$", text, re.MULTILINE)
            base = read_yaml(path).get("base")
            if base is None:
                break
            path = path.parent / str(base)
        return found

    def hardware(self) -> Cluster | None:
        """The GPUs that the line "Hardware:" of its head names, None for CPU cores and where it names none."""
        line = re.search(r"^# Hardware:\s*(.+)$", self.path.read_text(encoding="utf-8"), re.MULTILINE)
        return None if line is None else cluster_in(line[1])


def cluster_in(text: str) -> Cluster | None:
    """ "8 nodes of 8 GPUs (H200)", "1 node of 8 GPUs with 80 GB or more", "2 GPUs with 80 GB": the first that is there.

    GPUs without a name are the slowest known ones of that memory, and H200 where no memory is named either.
    """
    found = re.search(r"(?:(\d+) nodes? of )?(\d+) GPUs?(?: with (\d+) GB| \((\w+)\))?", text)
    if found is None:
        return None
    nodes, each, memory, name = found.groups()
    if memory is not None:
        fitting = [key for key, gpu in GPUS.items() if gpu.memory == float(memory)]
        name = min(fitting, key=lambda key: GPUS[key].tflops, default=None)
        if name is None:
            return Cluster(int(nodes or 1), int(each), f"{memory} GB", GPU(float(memory), 1, 1, 1, 1))
    name = (name or DEFAULT_GPU).lower()
    return Cluster(int(nodes or 1), int(each), name, find_gpu(name))


def asked_cluster(gpus: int | None, name: str | None, other: Cluster | None) -> Cluster:
    """The GPUs that somebody asks about; what they leave out is as in `other`. Raises UserError for an unknown GPU."""
    count = gpus if gpus is not None else (1 if other is None else other.world)
    if name is None:
        gpu_name, gpu = (DEFAULT_GPU, find_gpu(DEFAULT_GPU)) if other is None else (other.gpu_name, other.gpu)
    else:
        gpu_name, gpu = name.lower(), find_gpu(name)
    nodes = -(-count // PER_NODE)
    return Cluster(nodes, -(-count // nodes), gpu_name, gpu)


def cluster_of(recipe: Recipe, config: RunConfig, asked: PlanArgs) -> Cluster:
    """The GPUs that `train.py --plan` plans for. Raises UserError for an unknown GPU.

    Where nobody says how many, they are those that the recipe's head names, or else as many as its `parallel` needs.
    """
    meant_for, parallel = recipe.hardware(), config.parallel
    needed = parallel.replicate * (parallel.shard or 1) * parallel.sequence
    if asked.nodes is not None or asked.gpus_per_node is not None:
        nodes, each = asked.nodes or 1, asked.gpus_per_node or PER_NODE
    elif meant_for is not None and meant_for.world % needed == 0:
        nodes, each = meant_for.nodes, meant_for.gpus_per_node
    else:
        nodes = -(-needed // PER_NODE)
        each = -(-needed // nodes)
    if asked.gpu is None and meant_for is not None:
        return dataclasses.replace(meant_for, nodes=nodes, gpus_per_node=each)
    name = (asked.gpu or DEFAULT_GPU).lower()
    return Cluster(nodes, each, name, find_gpu(name))


def fitted(config: RunConfig, cluster: Cluster) -> RunConfig:
    """The run with a split that these GPUs and its batch allow, where its `parallel` says none; else as it is.

    The fewest GPUs share a video.
    """
    parallel = config.parallel
    if (parallel.replicate, parallel.shard, parallel.sequence) != (1, None, 1):
        return config
    heads = math.gcd(*(network.geometry().num_heads for network in networks_of(config).values()))
    for sequence in (n for n in range(1, cluster.gpus_per_node + 1) if cluster.world % n == 0 and heads % n == 0):
        try:
            micro_batches(config.training, cluster.world // sequence)
        except ConfigError:
            continue
        return dataclasses.replace(config, parallel=dataclasses.replace(parallel, sequence=sequence))
    return config


def own_cluster(gpus: Sequence[tuple[str, int]], memory: float) -> Cluster:
    """This machine's GPUs, by name and bytes, or its processor, whose memory in bytes stands for that of a GPU."""
    if not gpus:
        return Cluster(1, 1, CPU, GPU(memory / GB, 1, 1, 1, 1))
    name, size = min(gpus, key=lambda gpu: gpu[1])
    key = table_name(name)
    like = GPUS[key] if key is not None else GPU(size / GB, 1, 1, 1, 1)
    return Cluster(1, len(gpus), key or name, dataclasses.replace(like, memory=size / GB))


def table_name(name: str) -> str | None:
    """The entry of the table that a device's own name ("NVIDIA A100-SXM4-80GB") is of, if there is one."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for key in GPUS:
        model, _, memory = key.partition("-")
        if model in plain and memory in plain:
            return key
    return None


def start_command(recipe: Recipe, cluster: Cluster) -> str:
    """What starts the run on these GPUs: torchrun on one node, Slurm on several."""
    if cluster.nodes == 1:
        ranks = f"--nproc_per_node {cluster.world} " if cluster.world > 1 else ""
        return f"torchrun {ranks}train.py {recipe.arguments()}"
    script = next((m[0] for line in recipe.comments() if (m := re.search(r"slurm/\w+\.slurm", line))), None)
    variables = [f"CONFIG={shlex.quote(str(recipe.path))}"]
    if recipe.logdir is not None:
        variables.append(f"LOGDIR={shlex.quote(str(recipe.logdir))}")
    return " ".join(
        [
            *variables,
            f"sbatch --nodes={cluster.nodes} --gpus-per-node={cluster.gpus_per_node}",
            script or "slurm/distill_14b.slurm",
            *map(shlex.quote, recipe.overrides),
        ]
    )
