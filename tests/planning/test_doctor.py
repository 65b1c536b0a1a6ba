"""What the doctor says is missing is what a run would miss, and what it computes is what a run writes."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from configs.sections import CheckpointConfig
from model.attention.backends import Backend
from planning.disk import State, most_checkpoints, state_of
from planning.doctor import Asked, doctor, doctor_args, lines, machine_findings
from planning.files import check_files
from planning.finding import Finding
from planning.hardware import GPUS
from planning.launch import Recipe, cluster_in, start_command, table_name
from planning.machine import Machine, Probes, check_machine
from planning.packages import before_torch, check_core, older
from planning.plan import Cluster
from planning.recipe_checks import check_disk, check_memory, check_ranks
from tests import ROOT, small
from utils.config import save
from utils.errors import UserError

H200 = ("NVIDIA H200", 150_000_000_000)


def probes(**changes: Any) -> Probes:
    """Of a machine without a GPU and with all software, where no trial costs anything."""
    base: dict[str, Any] = {
        "version": lambda name: "99.0", "gpus": list, "driver_sees": list, "memory": lambda: 64 * 10**9,
        "cores": lambda: 2, "has_bf16": lambda: True, "free_disk": lambda folder: 10**13,
        "has_module": lambda name: True, "attention": lambda backend, device: None, "triton": lambda device: None,
        "codec": lambda: None, "text_encoder": lambda: None, "video": lambda: None, "partitions": lambda: ["gpu (4)"],
    }  # fmt: skip
    return Probes(**{**base, **changes})


def raising(problem: Exception) -> Any:
    def probe(*_: object) -> None:
        raise problem

    return probe


def findings(**changes: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_machine(Machine(probes(**changes)))}


def recipe(path: Path, base: dict[str, Any] = small.DIFFUSION, **changes: Any) -> Recipe:
    save(small.config(base, **changes), path / "run.yaml")
    return Recipe(path / "run.yaml", logdir=path / "run")


def said(asked: Asked, capsys: pytest.CaptureFixture[str], **changes: Any) -> tuple[int, dict[str, Any]]:
    """The exit code, and the JSON."""
    code = doctor(dataclasses.replace(asked, as_json=True), probes(**changes))
    return code, json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------------- the machine


def test_a_bare_machine_can_train_and_is_told_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    bare = probes(
        has_module=lambda name: False, has_bf16=lambda: False, partitions=lambda: None,
        video=raising(ImportError("No module named 'av'")), codec=raising(ImportError("No module named 'diffusers'")),
    )  # fmt: skip
    assert doctor(Asked(), bare) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == "nothing is missing: runs can be trained here"
    assert "No module named 'av': no video is written or read\n" in text
    assert "> pip install av==" in text
    for name in ("GPU", "processor", "attention flash", "Triton", "VAE", "video", "Slurm"):
        assert f"\n  -       {name} " in text
    assert len(text.splitlines()) < 40


def test_a_program_ends_before_it_imports_what_is_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    assert before_torch() == {"OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "einops" else name)
    with pytest.raises(SystemExit, match="2"):
        before_torch()
    assert "error: this Python has no einops: " in capsys.readouterr().err


def test_every_program_says_what_a_bare_python_lacks() -> None:
    """Started by a Python that has no packages at all."""
    for name in ("train", "inference", "export", "evaluate", "preprocess", "demo", "import_recipe"):
        done = subprocess.run([sys.executable, "-S", str(ROOT / f"{name}.py")], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(f"{name}.py: error: this Python has no torch, numpy, ")
        assert done.stderr.count("\n") == 1


def test_without_attention_nothing_can_be_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(Asked(), probes(attention=raising(RuntimeError("no kernel")))) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 things are missing: nothing can be trained here"


def test_a_broken_library_is_the_failure_of_its_own_check_alone() -> None:
    def broken(backend: Backend, device: torch.device) -> None:
        if backend is Backend.FLASH:
            raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c10\nmore of it")

    found = findings(gpus=lambda: [H200], attention=broken)
    assert found["attention flash"].what.startswith("flash_attn_2_cuda.so: undefined symbol: _ZN3c10: ")
    assert not found["attention flash"].blocks
    assert found["attention flex"].ok
    assert found["GPU"].what == "1 x NVIDIA H200, 150 GB"
    assert all(finding.ok for name, finding in found.items() if name != "attention flash")


def test_gpus_that_torch_cannot_use_are_named() -> None:
    assert "the driver sees 2" in findings(driver_sees=lambda: ["GPU 0", "GPU 1"])["GPU"].what
    broken = findings(gpus=raising(RuntimeError("CUDA driver version is insufficient\nfor this")))["GPU"]
    assert broken.blocks
    assert broken.what.startswith("CUDA driver version is insufficient: ")


def test_packages_are_held_against_what_is_tested() -> None:
    assert older("2.10.1+cpu", "2.11")
    assert not older("2.13.0+cu130", "2.13.0")
    absent = check_core(lambda name: None if name == "einops" else "99.0")[-1]
    assert absent.blocks
    assert absent.remedy.startswith("pip install einops==")
    old = check_core(lambda name: "0.1" if name == "diffusers" else "99.0")[-1]
    assert not old.ok and not old.blocks and "diffusers 0.1 (tested: " in old.what


def test_each_failure_is_shown_with_its_remedy() -> None:
    assert lines(Finding("a", False, "not there", "get it")) == [
        "  MISSING a                 not there",
        "                            > get it",
    ]


# ----------------------------------------------------------------------------------------------------------- the recipe


def test_all_that_a_recipe_lacks_is_named_once_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    networks = tuple(f"{name}.overrides={{num_layers: 1}}" for name in ("student", "teacher", "critic"))
    overrides = (*networks, "parallel.shard=5")
    asked = Asked(Recipe(ROOT / "configs/wan2.1_1.3b/self_forcing_dmd.yaml", overrides))
    code, found = said(asked, capsys)
    assert code == 1
    missing = {finding["name"]: finding for finding in found["findings"] if not finding["ok"] and finding["needed"]}
    model = "Wan2.1-T2V-1.3B-Diffusers"
    assert list(missing) == [
        "weights/ode_init.pt", "weights/Wan2.1-T2V-14B-Diffusers", f"weights/{model}", "data/prompts.txt", "data/text",
        "ranks",
    ]  # fmt: skip
    assert found["missing"] == len(missing) and not found["could_start"]
    assert missing["weights/ode_init.pt"]["remedy"].startswith(
        "hf download gdhe17/Self-Forcing checkpoints/ode_init.pt "
    )
    fetched = f"hf download Wan-AI/{model}" + "".join(
        f" --include '{part}/*'" for part in ("transformer", "text_encoder", "tokenizer", "vae")
    )
    assert missing[f"weights/{model}"]["remedy"] == f"{fetched} --local-dir weights/{model}   (28.9 GB, Apache-2.0)"
    assert missing["data/text"]["remedy"].startswith("python preprocess.py text --config_path ")
    assert missing["data/text"]["remedy"].endswith(" --prompts data/prompts.txt --out data/text")


def test_a_run_folder_to_start_from_is_trained_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher, student = {"init": "logs/toy/teacher"}, {"init": "logs/mine"}
    start = recipe(tmp_path, small.DISTILLATION, teacher=teacher, critic=teacher, student=student)
    found = {finding.name: finding for finding in check_files(start, small.config(
        teacher=teacher, critic=teacher, student=student
    ))}  # fmt: skip
    assert (
        found["logs/toy/teacher"].remedy == "train it first: torchrun train.py --config_path configs/toy/teacher.yaml"
    )
    assert found["logs/toy/teacher"].what == "absent; teacher.init, critic.init"
    assert "--logdir logs/mine" in found["logs/mine"].remedy


def test_a_recipe_that_could_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = recipe(tmp_path)
    assert doctor(Asked(start), probes()) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[-3:] == [
        "start it",
        f"  torchrun train.py --config_path {start.path} --logdir {start.logdir}",
        "nothing is missing: the recipe could start",
    ]
    assert len(text) < 45


def test_what_others_can_do_without_a_recipe_may_need() -> None:
    """Validation videos need PyAV; a run that is to start elsewhere needs nothing of this machine."""
    config = small.config(validation={"every": 5})
    for gpus, blocks in ((None, True), (8, False)):
        machine = Machine(probes(video=raising(ImportError("No module named 'av'"))))
        found = {finding.name: finding for finding in machine_findings(machine, config, Asked(gpus=gpus))}
        assert found["video"].blocks == blocks
        assert ("validation.every needs it" in found["video"].what) == blocks


def test_weights_of_another_geometry_or_cut_short_are_told_by_their_headers(tmp_path: Path) -> None:
    small.save_networks(tmp_path)
    whole = small.with_weights(small.DIFFUSION, tmp_path)
    deeper = small.merged(whole, {"student": {"overrides": {"num_layers": 3}}})
    file = tmp_path / "student.safetensors"

    def only(base: dict[str, Any]) -> Finding:
        (finding,) = check_files(recipe(tmp_path, base), small.config(base))
        return finding

    assert only(whole).ok
    other = only(deeper)
    assert other.blocks and "weights do not fit this geometry" in other.what and str(file) == other.name
    file.write_bytes(file.read_bytes()[:-1000])
    assert only(whole).blocks
    save_file({"something": torch.zeros(1)}, file)
    assert only(whole).blocks


def test_memory_that_is_too_small(tmp_path: Path) -> None:
    start, config = recipe(tmp_path), small.config(small.DIFFUSION)
    cluster = Cluster(1, 1, "h200", dataclasses.replace(GPUS["h200"], memory=2.0))
    too_small = check_memory(start, config, cluster, state_of(config))
    assert too_small.blocks and "does not fit" in too_small.what
    assert "--plan --nodes 1 --gpus_per_node 1 --gpu h200" in too_small.remedy


def test_ranks_that_cannot_share_a_run_are_sent_to_the_gpus_it_is_meant_for() -> None:
    config, one = small.config(parallel={"shard": 8}), cluster_in("1 GPU")
    assert one is not None
    finding = check_ranks(config, one, cluster_in("8 nodes of 8 GPUs (H200)"))
    assert finding.blocks and "start it on 8 nodes of 8 GPUs (h200)" in finding.remedy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8 nodes of 8 GPUs (H200)", (8, 8, "h200")),
        ("1 node of 8 GPUs with 80 GB or more; weights are sharded", (1, 8, "a100-80")),
        ("2 GPUs with 80 GB: no weights", (1, 2, "a100-80")),
        ("8 nodes of 8 GPUs", (8, 8, "h200")),
        ("2 CPU cores", None),
    ],
)
def test_the_hardware_in_a_head(text: str, expected: tuple[int, int, str] | None) -> None:
    found = cluster_in(text)
    assert (found and (found.nodes, found.gpus_per_node, found.gpu_name)) == expected


def test_every_recipe_here_names_hardware_that_is_understood() -> None:
    for path in ROOT.glob("configs/wan*/*.yaml"):
        assert Recipe(path).hardware() is not None, path


def test_commands_that_start_a_recipe() -> None:
    start = Recipe(Path("configs/wan2.2_5b/dmd_3step.yaml"), ("student.overrides={num_layers: 2}",))
    eight, many = cluster_in("8 GPUs"), cluster_in("8 nodes of 8 GPUs")
    assert eight is not None and many is not None
    override = "'student.overrides={num_layers: 2}'"
    assert start_command(start, eight) == (
        f"torchrun --nproc_per_node 8 train.py --config_path configs/wan2.2_5b/dmd_3step.yaml {override}"
    )
    assert start_command(start, many) == (
        "CONFIG=configs/wan2.2_5b/dmd_3step.yaml sbatch --nodes=8 --gpus-per-node=8 slurm/distill_5b.slurm " + override
    )


def test_a_device_is_found_in_the_table_by_its_own_name() -> None:
    assert [table_name(f"NVIDIA {name}") for name in ("H200", "A100-SXM4-80GB", "GeForce RTX 4090", "T4")] == [
        "h200", "a100-80", "rtx4090", None
    ]  # fmt: skip


def test_mistakes_on_the_command_line() -> None:
    for argv in (["seed=1"], ["--gpus", "2"], ["run.yaml", "--gpus", "0"]):
        with pytest.raises(UserError):
            doctor_args(argv)
    asked = doctor_args(["run.yaml", "seed=1", "--gpus", "16", "--gpu", "h100", "--json"])
    assert asked == Asked(Recipe(Path("run.yaml"), ("seed=1",)), 16, "h100", as_json=True)


# ------------------------------------------------------------------------------------------------------------- the disk

CASES: dict[str, dict[str, Any]] = {
    "average and two optimizers": {"generator_training": {"optimizer": {"kind": "muon"}}},
    "adapters": {"student": {"lora": {"rank": 2}}, "critic": {"lora": {"rank": 2}}},
    "discriminator": {"objective": {"gan": {"depths": [0.5]}}, "data": {"real": True}, "ema": {"decay": None}},
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_of_a_checkpoint_are_those_that_a_run_writes(case: str, tmp_path: Path) -> None:
    changes = small.merged(CASES[case], {"data": {"toy": {"frames": 3}}, "checkpoint": {"every": 2}})
    run = small.trainer(tmp_path, max_steps=2, **changes)
    run.train()
    files = list(tmp_path.glob("checkpoints/step_00000002/*.safetensors"))
    headers = sum(8 + struct.unpack("<Q", file.read_bytes()[:8])[0] for file in files)
    assert state_of(run.config).checkpoint == sum(file.stat().st_size for file in files) - headers


def test_as_many_checkpoints_as_pruning_leaves() -> None:
    for steps in (1, 7, 20, 23):
        for every, last, kept in ((1, 1, None), (3, 2, 6), (5, 1, 5), (2, 3, 3), (10, 2, 4)):
            there: list[int] = []
            most = 0
            for step in range(1, steps + 1):
                if step % every == 0 or step == steps:
                    there.append(step)
                    most = max(most, len(there))
                    there = [s for s in there[:-last] if kept is not None and s % kept == 0] + there[-last:]
            assert most_checkpoints(CheckpointConfig(every, last, kept), steps) == most


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    start, config = recipe(tmp_path), small.config(small.DIFFUSION)  # ten iterations, saved at 5 and 10
    state = State(10**9, 0, 0)
    for free, ok in ((2 * 10**9, True), (2 * 10**9 - 1, False)):
        finding = check_disk(start, config, Machine(probes(free_disk=lambda folder, free=free: free)), state)
        assert finding.ok == ok and "2 checkpoints of 1.0 GB" in finding.what
