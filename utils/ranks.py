"""Which rank this process is: torchrun's variables, filled in from those of another launcher where it said enough.

N processes that do not know of each other would be N runs in one folder. So a launcher of several that leaves a rank,
a size or an address open is refused.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from utils.errors import UserError

TORCHRUN = "torchrun --nproc_per_node GPUS train.py ..."
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(15_000, 30_000)  # below those that systems hand out


@dataclass(frozen=True)
class Launcher:
    """The variables that a launcher sets for each process.

    size, rank, local: how many processes there are, which one this is, and which one on its node.
    local_size: how many there are on its node.
    nodes: names of the nodes, the first one's first; empty where none says.
    job: what is the same for all processes and for no other run; empty where nothing is.
    """

    name: str
    size: str
    rank: str
    local: str
    local_size: str
    nodes: str
    job: tuple[str, ...]


# A job's script of Slurm has SLURM_NTASKS too, and is one process: SLURM_STEP_NUM_TASKS is of what srun starts.
LAUNCHERS = (
    Launcher(
        "srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "", "SLURM_STEP_NODELIST",
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
    Launcher(
        "Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE", "", ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    Launcher(
        "a launcher of PMI, such as mpiexec", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "", (),
    ),
)  # fmt: skip


def adopt(environment: MutableMapping[str, str]) -> None:
    """Fills in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which a user may set as well.

    Raises UserError, one line, where there are several processes and one of these cannot be known. Does nothing for a
    process of torchrun, and for one that is alone.
    """
    if _number(environment, "WORLD_SIZE", 1) > 1:
        missing = [name for name in NEEDED if name not in environment]
        if missing:
            raise UserError(
                f"WORLD_SIZE={environment['WORLD_SIZE']} says that there are several processes, and {missing[0]} is "
                f"not set: start them with {TORCHRUN}"
            )
        return
    if "RANK" in environment:
        return
    for launcher in LAUNCHERS:
        if _number(environment, launcher.size, 1) > 1:
            environment.update(_of(launcher, environment))
            return
    # `accelerate launch --cpu --num_processes 2` starts one process, and says no number: only that there is an address
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment:
        raise UserError(
            f"MASTER_PORT={environment['MASTER_PORT']} says that accelerate was asked for several processes, and RANK "
            f"is not set, for it started one: start them with {TORCHRUN}"
        )


def _of(launcher: Launcher, environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set. Raises UserError."""
    started = f"{launcher.size}={environment[launcher.size]} says that {launcher.name} started several processes"
    for name in (launcher.rank, launcher.local):
        if name not in environment:
            raise UserError(f"{started}, and {name} is not set: start one process a node, which is {TORCHRUN}")
    found = {
        "WORLD_SIZE": environment[launcher.size],
        "RANK": environment[launcher.rank],
        "LOCAL_RANK": environment[launcher.local],
    }
    if "MASTER_ADDR" not in environment:
        if environment.get(launcher.nodes):
            found["MASTER_ADDR"] = first_node(environment[launcher.nodes])
        elif environment.get(launcher.local_size) == environment[launcher.size]:
            found["MASTER_ADDR"] = "127.0.0.1"
        else:
            raise UserError(
                f"{started} on several nodes, and none says which node has rank 0: give all of them MASTER_ADDR, its "
                f"name, or start one process a node, which is {TORCHRUN}"
            )
    if "MASTER_PORT" not in environment:
        named = [f"{name}={environment[name]}" for name in launcher.job if name in environment]
        if not named:
            raise UserError(f"{started}, and nothing says which port is theirs: give all of them one MASTER_PORT")
        found["MASTER_PORT"] = str(PORTS[zlib.crc32(" ".join(named).encode()) % len(PORTS)])
    return found


def first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes: "gpu[07-09,12],cpu1" begins with gpu07."""
    name, inside = "", False
    taken = True  # whether a character in brackets is still part of the first number
    for character in nodes:
        if character == "[":
            inside, taken = True, True
        elif character == "]":
            inside = False
        elif inside:
            taken = taken and character not in "-,"
            name += character if taken else ""
        elif character == ",":
            break
        else:
            name += character
    return name


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(f"{name}={text}: is no number of processes: unset it, or start with {TORCHRUN}")
    return int(text)
