"""The Slurm scripts, unmodified, on a real Slurm of two nodes: slurm_up.sh starts it from Debian's packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.tiny_models import small_vae
from tests import ROOT
from tests.distributed.test_data_parallel import run
from tests.small import ODE, SHORT, config
from tests.trainer.test_trainer import curve, tensors
from tests.utils.data.test_videos import encode
from utils.checkpoint import list_checkpoints, step_of
from utils.config import to_yaml
from utils.data.latents import open_latents

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("SLURM_FIX_DIR") or Path(os.environ.get("TMPDIR", "/tmp"), "slurm-fixture"))
STEPS = 30


def slurm(*command: str, env: dict[str, str] | None = None) -> str:
    """What a command of Slurm says. It knows our cluster by SLURM_CONF."""
    environment = os.environ | {
        "SLURM_CONF": str(FOLDER / "etc/slurm.conf"), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "NPROC": "1",
    } | (env or {})  # fmt: skip
    done = subprocess.run(
        command, cwd=env and env.get("PWD"), env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two nodes for this file. One that runs already is used, and left running."""
    running = (FOLDER / "run/slurmctld.pid").is_file()
    up = subprocess.run(["bash", str(HERE / "slurm_up.sh")], capture_output=True, text=True, timeout=300)
    if up.returncode == 77:
        pytest.skip(f"no Slurm on this machine: {up.stderr.strip().splitlines()[-1]}")
    assert up.returncode == 0, up.stderr
    yield
    if not running:
        subprocess.run(["bash", str(HERE / "slurm_down.sh"), "--purge"], check=True, capture_output=True, timeout=120)


def submit(folder: Path, script: str, *arguments: str, **settings: str) -> str:
    """The number of a job submitted from `folder`. Words that begin with `--sbatch:` are sbatch's, the rest the script's."""
    options = [word for word in arguments if word.startswith("--sbatch:")]
    rest = [word for word in arguments if word not in options]
    command = ["sbatch", "--parsable", *(f"--{word.removeprefix('--sbatch:')}" for word in options)]
    return slurm(*command, str(ROOT / "slurm" / script), *rest, env=settings | {"PWD": str(folder)})


def field(job: str, name: str) -> list[str]:
    """One field of a job, or of each task of an array."""
    words = slurm("scontrol", "show", "job", job).split()
    return [word.split("=", 1)[1] for word in words if word.startswith(f"{name}=")]


def ended(job: str, seconds: float = 400) -> list[str]:
    """Waits for the job's end and returns the states."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        states = field(job, "JobState")
        if all(state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") for state in states):
            return states
        time.sleep(0.2)
    raise AssertionError(f"job {job} is still {states}")


def until(happened: Callable[[], bool], job: str, folder: Path) -> None:
    """Waits for something that a job does which has not ended."""
    deadline = time.monotonic() + 400
    while not happened() and time.monotonic() < deadline:
        assert field(job, "JobState")[0] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), log(folder)
        time.sleep(0.1)
    assert happened(), log(folder)


def small_yaml(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(
        to_yaml(config(training={"max_steps": 500, "micro_batch_size": 1}, checkpoint={"every": 1000}, **SHORT))
    )
    return path


@pytest.fixture(scope="module")
def requeued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run over two nodes that was signalled, requeued itself and finished, and its job's number."""
    folder = tmp_path_factory.mktemp("job")
    yaml = small_yaml(folder)
    job = submit(
        folder, "distill_14b.slurm", "--sbatch:nodes=2", "--sbatch:time=30", f"training.max_steps={STEPS}",
        CONFIG="small.yaml", LOGDIR="run", OVERRIDES="seed=7 'name=in quotes'",
    )  # fmt: skip
    until(lambda: (folder / "run/metrics.jsonl").is_file(), job, folder)
    slurm("scancel", "--signal=USR1", "--batch", job)
    yaml.write_text("name: edited meanwhile")  # of no concern to a job that runs
    (folder / "whole.yaml").write_text((folder / f"run/slurm/{job}/config.yaml").read_text())
    run(2, folder / "whole.yaml", folder / "whole")
    assert ended(job) == ["COMPLETED"], log(folder)
    return folder, job


def log(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("slurm-*.log")))


@pytest.mark.slow
def test_signalled_requeued_and_resumed_ends_as_an_unbroken_run(requeued: tuple[Path, str]) -> None:
    folder, job = requeued
    assert field(job, "Restarts") == ["1"]
    first, last = map(step_of, list_checkpoints(folder / "run/checkpoints"))
    assert 0 < first < last == STEPS  # the first was saved by the signal alone: `checkpoint.every` is beyond the end
    assert curve(folder / "run") == curve(folder / "whole")
    resumed, unbroken = tensors(folder / "run"), tensors(folder / "whole")
    assert all(bool((resumed[file][key] == unbroken[file][key]).all()) for file in resumed for key in resumed[file])


@pytest.mark.slow
def test_run_folder_says_what_ran(requeued: tuple[Path, str]) -> None:
    folder, job = requeued
    inside = folder / "run/slurm" / job
    text = (inside / "config.yaml").read_text()
    assert f"max_steps: {STEPS}" in text
    assert "seed: 7" in text
    assert "name: in quotes" in text
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for attempt, codes in ((0, {"138"}), (1, {"0"})):
        assert revision in (inside / f"attempt_{attempt}/revision.txt").read_text()
        files = [*(inside / f"attempt_{attempt}/exit_codes").iterdir()]
        assert len(files) == 2
        assert {file.read_text().strip() for file in files} == codes
    # one log a node, and each node ran one rank
    assert {path.name for path in inside.glob("*.log")} == {"node0.log", "node1.log"}
    assert "resumed from" in (inside / "node0.log").read_text()
    said = log(folder)
    assert said.count("attempt 0: 2 nodes x 1 processes") == said.count("attempt 1: 2 nodes x 1 processes") == 1
    assert said.index("slurm: USR1: saving") < said.index("slurm: requeued") < said.index("slurm: finished")


@pytest.mark.slow
def test_inference_in_a_container(requeued: tuple[Path, str], tmp_path: Path) -> None:
    """The container is apptainer's command line with nothing behind it: it notes its options and runs the rest. Two
    processes share the prompts."""
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/bash\necho "$@" > {tmp_path}/options\nwhile [[ $1 != image.sif ]]; do shift; done\nshift\nexec "$@"\n'
    )
    program.chmod(0o755)
    (tmp_path / "two.txt").write_text("the digit three moving left\nthe digit one moving up\n")
    job = submit(
        tmp_path, "inference.slurm", "--sbatch:time=30", "--format", "png", RUN=str(requeued[0] / "run"),
        PROMPTS="two.txt", OUT="videos", NPROC="2", CONTAINER="image.sif", CONTAINER_RUNTIME="apptainer",
        CONTAINER_PYTHON=sys.executable, PATH=f"{program.parent}:{os.environ['PATH']}",
    )  # fmt: skip
    assert ended(job) == ["COMPLETED"], log(tmp_path)
    options = (tmp_path / "options").read_text()
    assert options.startswith("exec --nv --bind ")
    assert f"{tmp_path}/videos:{tmp_path}/videos" in options
    assert len([*(tmp_path / "videos").glob("*.png")]) == 2
    assert "2 videos" in log(tmp_path)


@pytest.mark.slow
def test_an_array_preprocesses_every_prompt_exactly_once(tmp_path: Path) -> None:
    small_yaml(tmp_path)
    prompts = ROOT / "configs/toy/prompts.txt"
    # a cluster's partition, and an interpreter that only a file of its own names
    (tmp_path / "cluster.sh").write_text(f"export ALSO=$of_nothing\nPYTHON={sys.executable}\n")
    settings = {"SETUP": "cluster.sh", "PYTHON": "no-python", "SBATCH_PARTITION": "gpu"}
    settings |= {"CONFIG": "small.yaml", "PROMPTS": str(prompts), "OUT": "text"}
    job = submit(tmp_path, "preprocess.slurm", "--sbatch:array=0-2", "--sbatch:time=30", **settings)
    assert ended(job) == ["COMPLETED"] * 3, log(tmp_path)
    assert field(job, "Partition") == ["gpu"] * 3
    manifest = json.loads((tmp_path / "text/manifest.json").read_text())
    parts = [(part["first"], part["prompts"]) for part in manifest["shards"].values()]
    assert manifest["count"] == 9 == len(prompts.read_text().splitlines()) + 1  # and the negative prompt
    assert parts == [(0, 3), (3, 3), (6, 3)]
    assert len([*(tmp_path / "text").glob("shard_*")]) == 3


@pytest.mark.slow
def test_a_mistake_is_one_line_before_anything_is_launched(tmp_path: Path) -> None:
    small_yaml(tmp_path)
    two = ["--sbatch:nodes=2", "--sbatch:time=30"]  # far beyond the 5 minutes before the end that USR1 comes at
    absent = submit(tmp_path, "distill_1.3b.slurm", *two, CONFIG="no.yaml", LOGDIR="a")
    wrong = submit(tmp_path, "distill_5b.slurm", *two, "training.max_stepz=5", CONFIG="small.yaml", LOGDIR="b")
    bare = submit(tmp_path, "distill_5b.slurm", *two, "--sbatch:export=NONE", CONFIG="small.yaml", LOGDIR="c")
    for job, words in (
        (absent, "CONFIG="), (wrong, "training.max_stepz: unknown key"), (bare, "--export=NONE keeps the settings"),
    ):  # fmt: skip
        assert ended(job) == ["FAILED"]
        assert field(job, "Restarts") == ["0"]
        assert field(job, "ExitCode") == ["2:0"]
        (said,) = [path.read_text().splitlines() for path in tmp_path.glob(f"slurm-*-{job}.log")]
        assert len(said) == 1
        assert said[0].startswith("slurm: error: ")
        assert words in said[0]
    assert not (tmp_path / "a").exists()
    assert not [*tmp_path.glob("b/slurm/*/node*.log")]


@pytest.mark.slow
def test_arrays_share_out_videos_and_trajectories_and_processes_a_task(tmp_path: Path) -> None:
    for i in range(4):
        encode(tmp_path / f"clips/{i}.mp4", 5)
    small_vae("2.1").save_pretrained(tmp_path / "vae")
    (tmp_path / "ode.yaml").write_text(to_yaml(config(ODE, ode={"pairs": 4, "steps": 6}, **SHORT)))
    how = ["--sbatch:array=0-1", "--sbatch:time=30", "--rows", "1"]
    latents = {"VIDEOS": "clips", "VAE": "vae", "OUT": "latents"}
    video = submit(tmp_path, "preprocess_video.slurm", *how, "--bucket", "5x32x32", **latents)
    ode = submit(tmp_path, "preprocess_ode.slurm", *how, CONFIG="ode.yaml", OUT="trajectories", NPROC="2")
    assert ended(video) == ended(ode) == ["COMPLETED"] * 2, log(tmp_path)
    assert sum(open_latents(tmp_path / "latents").shard_sizes) == 4
    assert len([*(tmp_path / "trajectories").glob("ode_0000?_of_00004.safetensors")]) == 4
    # each task made its part: both files of one process, or one of each of two, of which the first speaks
    assert log(tmp_path).count("2 files made") == log(tmp_path).count("1 files made") == 2


@pytest.mark.slow
def test_vbenchs_videos_are_made_by_the_processes_of_a_job(requeued: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "info.json").write_text(json.dumps([{"prompt_en": "the digit one", "dimension": ["scene"]}]))
    job = submit(
        tmp_path, "evaluate.slurm", "--sbatch:time=30", "--suite", "vbench", "--only_videos", "--prompts",
        str(tmp_path / "info.json"), "--dimensions", "scene", "--videos", str(tmp_path / "videos"),
        RUN=str(requeued[0] / "run"), NPROC="2",
    )  # fmt: skip
    assert ended(job) == ["COMPLETED"], log(tmp_path)
    assert len([*(tmp_path / "videos").glob("*.mp4")]) == 5


@pytest.mark.slow
def test_a_failed_node_is_slurms_to_requeue_and_a_wanted_stop_is_no_failure(tmp_path: Path) -> None:
    small_yaml(tmp_path)
    job = submit(
        tmp_path, "distill_14b.slurm", "--sbatch:nodes=2", "--sbatch:time=30", CONFIG="small.yaml", LOGDIR="run"
    )
    rank_0 = tmp_path / f"run/slurm/{job}/node0.log"
    try:
        until(lambda: (tmp_path / "run/metrics.jsonl").is_file(), job, tmp_path)
        slurm("scontrol", "update", "nodename=node1", "state=down", "reason=test")
        until(lambda: field(job, "Restarts") == ["1"] and field(job, "JobState") == ["PENDING"], job, tmp_path)
    finally:
        # it may have come back by itself
        slurm(
            "bash",
            "-c",
            "scontrol update nodename=node1 state=resume || sinfo --noheader --nodes node1 --states idle,alloc",
        )
    assert "slurm: Slurm requeues this job by itself" in log(tmp_path)
    assert "sbatch again" not in log(tmp_path)
    before = len(rank_0.read_text())
    until(lambda: "it/s" in rank_0.read_text()[before:], job, tmp_path)  # it trains again
    slurm("scancel", "--signal=TERM", job)
    assert ended(job) == ["CANCELLED"]
    assert (
        "slurm: stopped as asked (SIGTERM; torchrun's exit code is then 1), not requeued: sbatch again to resume"
        in log(tmp_path)
    )
    assert "slurm: failed" not in log(tmp_path)
