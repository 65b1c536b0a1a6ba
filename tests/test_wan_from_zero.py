"""docs/wan_from_zero.md: each tiny command is the real one made small, its configs load, and the page runs as typed."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

from configs.load import load_run
from generation.generator import Generator
from generation.sampling import Sampling
from scripts.tiny_models import captions
from tests import ROOT
from tests.nets import relative
from utils.logging import read_jsonl
from utils.random import Noise
from utils.video import read_video

PAGE = (ROOT / "docs/wan_from_zero.md").read_text()
TITLED = re.compile(r'^```\w+ title="(\S+)"\n(.*?)^```$', re.M | re.S)
PROGRAM = r"\b(train|preprocess|doctor|inference|evaluate|export|demo)\.py"
FETCHING = ("mkdir ", "hf ", "head -n 40000 ", "sed ", "make ", "source ", "pip ")  # what the trial does without
SETTING_UP = ("python -m scripts.tiny_models", "cd ")
NEVER_ENDS = "../demo.py"
PROMPT, SECONDS = "a red square moves left", 1200  # alone a command takes half a minute
LOGDIRS = {
    "wan2.1_1.3b/ode_init",
    "wan2.1_1.3b/self_forcing_dmd",
    "causvid",
    "i2v",
    "wan2.2_a14b/dmd_high",
    "wan2.2_a14b/dmd_low",
}


def lines(title: str) -> list[str]:
    return [line for name, body in TITLED.findall(PAGE) if name == title for line in body.splitlines()]


def made_small(command: str) -> str:
    """A real command as the page says that it becomes a tiny one."""
    command = re.sub(r"^torchrun .*?(?=\w+\.py)", "python ", command)
    command = re.sub(PROGRAM, r"../\1.py", command)
    command = re.sub(r"(--config_path|doctor\.py) (configs/\S+)", r"\1 ../\2 ../configs/wan_tiny.yaml", command)
    command = re.sub(r" --base \S+$", "", command)
    command = command.replace("data/held_out.txt", "data/prompts.txt")
    return command.replace("81x480x832", "21x64x64").replace("--count 400", "--count 8")


def test_a_tiny_command_is_the_real_one_made_small() -> None:
    real = [line for line in lines("real") if not line.startswith(FETCHING)]
    tiny = [line for line in lines("tiny") if not line.startswith(SETTING_UP)]
    assert len(tiny) > 20
    assert list(map(made_small, real)) == tiny


@pytest.mark.parametrize("title", ["real", "tiny"])
def test_the_configs_of_a_command_load(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    folder = tmp_path if title == "real" else tmp_path / "tiny"
    folder.mkdir(exist_ok=True)
    (folder / "i2v.yaml").write_text("\n".join(lines("i2v.yaml")))
    monkeypatch.chdir(folder)
    found = [re.search(r"(?:--config_path|doctor\.py) (.*)", line) for line in lines(title)]
    commands = [shlex.split(match[1]) for match in found if match]
    assert len(commands) == 13
    for path, *rest in commands:
        overrides = [word for word, before in zip(rest, [path, *rest], strict=False) if "--" not in word + before]
        run = load_run(path, overrides)
        assert (run.student.geometry().dim == 48) == (title == "tiny")
        assert (run.student.preset == "i2v-14b") == ("i2v.yaml" in overrides)


def test_the_overlay_makes_every_recipe_small_and_keeps_its_method() -> None:
    kept = (
        "name",
        "trainer",
        "rollout",
        "objective",
        "schedule",
        "causal",
        "data.prompts",
        "data.real",
        "validation.every",
    )
    recipes = sorted((ROOT / "configs").glob("wan2*/*.yaml"))
    assert len(recipes) > 10
    for recipe in recipes:
        real, tiny = load_run(recipe), load_run(recipe, [str(ROOT / "configs/wan_tiny.yaml")])
        for key in kept:
            one, other = real, tiny
            for part in key.split("."):
                one, other = getattr(one, part), getattr(other, part)
            assert one == other, (recipe, key)
        for name in ("student", "teacher", "critic"):
            one, other = getattr(real, name), getattr(tiny, name)
            assert (one is None) == (other is None), recipe
            if one is not None:
                assert other.geometry().dim == 48
                assert (one.init, one.preset, one.expert) == (other.init, other.preset, other.expert)
                assert (one.lora is None, one.sparse is None) == (other.lora is None, other.sparse is None)


# -------------------------------------------------------------------------------------------------- the page, as typed


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `tiny` after all commands of the page, in their order, each with exit code 0."""
    checkout = tmp_path_factory.mktemp("zero") / "fewstep"
    checkout.mkdir()
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("configs", "scripts", "model", "utils"))]:
        (checkout / path.name).symlink_to(path)
    here = checkout
    for title, body in TITLED.findall(PAGE):
        if title == "i2v.yaml":
            (here / title).write_text(body)
        for command in body.splitlines() if title == "tiny" else ():
            if command.startswith("cd "):
                here /= command.removeprefix("cd ")
            elif NEVER_ENDS in command:
                watch(command, here)
            else:
                done = subprocess.run(
                    ["bash", "-c", command],
                    cwd=here,
                    env=environment(),
                    capture_output=True,
                    text=True,
                    timeout=SECONDS,
                )
                assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return here


def environment() -> dict[str, str]:
    """Programs of the environment that runs this test, and the modules that a folder of links would not find."""
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": paths, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def watch(command: str, here: Path) -> None:
    """The demo, on any port: its page is asked for, and Ctrl+C ends it."""
    process = subprocess.Popen(
        shlex.split(f"{command} --port 0"), cwd=here, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        with urllib.request.urlopen(address, timeout=30) as page:
            assert b"<title>" in page.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_as_typed_every_file_is_there(typed: Path) -> None:
    runs = {path.parent.relative_to(typed / "logs").as_posix() for path in (typed / "logs").rglob("metrics.jsonl")}
    assert runs == LOGDIRS
    for run in runs:
        assert (typed / "logs" / run / "checkpoints/step_00000006/state.json").is_file(), run
    assert len(list((typed / "trajectories").iterdir())) >= 1
    assert (typed / "adapter/README.md").is_file()
    assert (typed / "exported/README.md").is_file()
    assert {path.name for path in (typed / "exported_a14b").iterdir()} == {
        "README.md",
        "high_noise_model",
        "low_noise_model",
    }
    rows = json.loads((typed / "fid.json").read_text())
    assert rows["generated"]["videos"] == 8
    assert math.isfinite(rows["generated"]["fd_videos"])


def test_as_typed_videos_have_their_frames(typed: Path) -> None:
    for name in ("square.mp4", "i2v.mp4", "a14b.mp4"):
        assert read_video(typed / name).shape == (21, 3, 128, 128)  # small videos are enlarged
    videos = sorted((typed / "videos").glob("*.mp4"))
    assert [path.stem for path in videos] == [f"{i:04}_{text.replace(' ', '-')}" for i, text in enumerate(captions())]
    assert {read_video(path).shape[0] for path in videos} == {21}


def test_as_typed_runs_learn_something_finite(typed: Path) -> None:
    for run in LOGDIRS:
        entries = read_jsonl(typed / "logs" / run / "metrics.jsonl")
        assert [entry["step"] for entry in entries if "samples_per_second" in entry] == list(range(1, 7)), run
        shown = {key: [entry[key] for entry in entries if key in entry] for key in entries[0]}
        for key, values in shown.items():
            if key.endswith(("/loss", "/grad_norm", "dmd_gradient_norm")):
                assert all(math.isfinite(value) and value > 0 for value in values), (run, key)
        assert shown["skipped_updates"][-1] == 0


@torch.no_grad()
def test_as_typed_diffusers_gives_the_exported_students_latents(typed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one block of frames, in which a causal student sees what a bidirectional one sees."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(typed)
    generator = Generator.load(Path("logs/wan2.1_1.3b/self_forcing_dmd"), torch.device("cpu"))
    made = generator([PROMPT], Sampling(frames=3), [0])
    net = diffusers.WanTransformer3DModel.from_pretrained("exported", subfolder="transformer")
    pipe = diffusers.WanPipeline.from_pretrained("weights/Wan2.1-T2V-1.3B-Diffusers", transformer=net)
    text = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    noise, shape = Noise(0, 0, [0]), (3, 16, 8, 8)
    sigmas = [5 * u / (1 + 4 * u) for u in (1.0, 0.75, 0.5, 0.25)]  # the published steps, shifted by 5
    x = noise.normal("noise.b0", shape)
    for step, (sigma, following) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        velocity = net(x.transpose(1, 2), torch.tensor([1000 * sigma]), text, return_dict=False)[0].transpose(1, 2)
        x0 = x - sigma * velocity
        x = (1 - following) * x0 + following * noise.normal(f"renoise.b0.s{step}", shape)
    assert relative(made, x0) < 1e-4
    assert relative(made, generator(["a blue square moves right"], Sampling(frames=3), [0])) > 1e-3
