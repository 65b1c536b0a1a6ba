"""Launchers other than torchrun, by the variables that they set."""

from __future__ import annotations

import pytest

from utils.errors import UserError
from utils.ranks import PORTS, adopt, first_node

SRUN = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-7@1"}


def of(**variables: str) -> dict[str, str]:
    environment = dict(variables)
    adopt(environment)
    return {name: value for name, value in environment.items() if name not in variables}


def test_each_task_of_srun_is_a_rank() -> None:
    tasks = [of(**SRUN, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank % 2)) for rank in range(4)]
    assert [task["RANK"] for task in tasks] == ["0", "1", "2", "3"]
    assert [task["LOCAL_RANK"] for task in tasks] == ["0", "1", "0", "1"]
    assert {(task["WORLD_SIZE"], task["MASTER_ADDR"]) for task in tasks} == {("4", "gpu07")}
    [port] = {task["MASTER_PORT"] for task in tasks}
    assert int(port) in PORTS
    other = of(**SRUN | {"SLURM_JOB_ID": "72"}, SLURM_PROCID="0", SLURM_LOCALID="0")
    assert other["MASTER_PORT"] != port


def test_a_process_that_is_alone_stays_so() -> None:
    script = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    for alone in ({}, script, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, MPI | {"OMPI_COMM_WORLD_SIZE": "1"}):
        assert of(**alone) == {}


def test_accelerates_single_process_in_place_of_several_is_refused() -> None:
    one = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}
    assert of(**one) == {}
    with pytest.raises(UserError, match=r"MASTER_PORT=29500 .* accelerate .* torchrun --nproc_per_node"):
        of(**one, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert of(**one, **torchrun) == {}  # which it starts for several GPUs


def test_torchruns_own_variables_come_first() -> None:
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert of(**SRUN, **torchrun, SLURM_PROCID="0") == {}
    assert of(**SRUN, RANK="0", WORLD_SIZE="1", SLURM_PROCID="0") == {}


def test_mpi_on_one_node_and_on_several() -> None:
    mine = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    found = of(**MPI, **mine)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == (
        "1",
        "1",
        "2",
        "127.0.0.1",
    )
    several = MPI | mine | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_SIZE=2 .* give all of them MASTER_ADDR.* torchrun"):
        of(**several)
    assert of(**several, MASTER_ADDR="head", MASTER_PORT="2")["RANK"] == "1"
    hydra = {"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    with pytest.raises(UserError, match="PMI_SIZE=2 .* MASTER_PORT"):
        of(**hydra)
    assert of(**hydra, MASTER_PORT="2")["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        (SRUN, "SLURM_STEP_NUM_TASKS=4 .* SLURM_PROCID is not set: .* torchrun"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 .* RANK is not set: start them with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: is no number"),
    ],
)
def test_what_is_left_open_is_refused_by_name(variables: dict[str, str], match: str) -> None:
    with pytest.raises(UserError, match=match) as problem:
        of(**variables)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("a[3,5]b,c", "a3b"),
        ("rack[2-3]n[01-04]", "rack2n01"),
        ("h-100-[001-064]", "h-100-001"),
    ],
)
def test_the_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first
