"""What a run says, as its user reads it: what it is, that it goes on, where its results are, and what to type next."""

from __future__ import annotations

import logging
import shlex
import signal
from pathlib import Path

import pytest
import torch

from configs.load import load_run
from evaluation.command import evaluation_parser
from generation.command import inference_args, open_generator
from generation.export import export, export_args
from generation.videos import generate_videos
from tests import ROOT, forked
from tests.small import BRIEF, DIFFUSION, config, merged, trainer
from trainer.base import RunOptions
from trainer.build import build_trainer
from trainer.command import train_args
from trainer.progress import Extent, Setting, compiled, dropped_captions, next_commands, short
from utils import checkpoint
from utils.config import to_yaml
from utils.logging import console

TWO_STEPS = merged(BRIEF, {"training": {"max_steps": 2}})


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(console, "propagate", True)
    caplog.set_level(logging.INFO, "fewstep")
    return caplog


def test_a_run_says_what_it_is_and_what_to_do_next(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    run = trainer(folder, TWO_STEPS)
    run.train()
    weights = sum(p.numel() for p in run.networks["student"].net.parameters())
    text = "\n".join(said.messages)
    for wanted in (
        f"small (score_distillation) in {folder}",
        f"student: toy, {short(weights)} parameters, trained",
        f"critic: toy, {short(weights)} parameters, trained",
        f"teacher: toy, {short(weights)} parameters, frozen",
        "cpu, 1 rank on 1 node (replicate 1 x shard 1 x sequence 1), precision fp32",
        f"toy: {len(run.task.library)} prompts",
        "2 = 1 at once x 1 in turn x micro-batches of 2",
        "a checkpoint every 5 steps (the last 3 kept), no validation videos",
        "2 to go: 0 of 2 are done",
        f"finished   2 steps: {folder}/checkpoints/step_00000002",
    ):
        assert wanted in text

    see, judge, write = [shlex.split(m.split(maxsplit=1)[1]) for m in said.messages if m.startswith("next ")]
    assert see[:2] == ["python", "inference.py"]
    assert judge[:2] == ["python", "evaluate.py"]
    assert write[:2] == ["python", "export.py"]
    args = inference_args(see[2:])
    generate_videos(open_generator(args, torch.device("cpu")), args)
    assert len(list((folder / "videos").glob("*.mp4"))) == 1
    assert evaluation_parser().parse_args(judge[2:]).run == folder
    assert (export(export_args(write[2:])) / "transformer").is_dir()

    said.clear()
    kept = (folder / "config.yaml").read_bytes()
    assert trainer(folder, TWO_STEPS, seed=9).train() == 0
    assert any("this run is finished: 2 steps are done, and training.max_steps 2" in m for m in said.messages)
    assert (folder / "config.yaml").read_bytes() == kept
    other = "nothing was trained with the config that differs: give another --logdir for it"  # of another seed
    assert any(m.endswith(other) for m in said.messages)


def test_a_teacher_says_what_it_learns_without_a_caption() -> None:
    def line(**changes: object) -> list[str]:
        return dropped_captions(config(DIFFUSION, **changes))

    negative = {"data": {"negative_prompt": "the digit two"}, "diffusion": {"dropped_caption": "negative"}}
    assert line() == ["captions   0.1 of them are dropped: the sample is trained with the empty text"]
    assert line(**negative)[0].endswith("trained with the negative prompt ('the digit two')")
    assert line(diffusion={"caption_dropout": 0.0}) == []


def test_a_run_says_what_it_leaves_uncompiled(tmp_path: Path) -> None:
    """And what it says is what is done: blocks of other networks have another forward than their class."""
    networks = dict.fromkeys(("student", "critic", "teacher"), {"attention": "sdpa"})
    changes = {**networks, "parallel": {"compile": True}, "data": {"real": True}, "objective": {"gan": {"weight": 0.1}}}
    run = trainer(tmp_path, BRIEF, **changes)
    setting = Setting(run.trained, run.teacher, run.mesh, run.device, {})
    blocks, left = compiled(run.config, setting)
    assert blocks == "compiled   the blocks of critic, teacher, at their first passes"
    assert left.startswith("left       uncompiled: student (the context of a causal student grows from block to block")
    heads = [name for name in run.trained if name not in run.networks]
    assert heads and all(f"; {name} (a head)" in left for name in heads)
    nets = {**{name: trained.net for name, trained in run.networks.items()}, "teacher": run.teacher.net}  # type: ignore[union-attr]
    changed = {name for name, net in nets.items() if all("forward" in vars(unit) for unit in net.fsdp_units())}
    assert changed == {"critic", "teacher"}
    assert compiled(config(BRIEF), setting) == []
    adapter = {"lora": {"rank": 2, "targets": ["q"]}}
    shared = config(merged(BRIEF, changes), student=adapter, critic=adapter, objective={"gan": None})
    _, left = compiled(shared, setting)
    assert "; critic (it shares the student's weights)" in left
    assert "; teacher (it shares the student's weights)" in left


def test_a_stopped_run_says_how_to_go_on(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", TWO_STEPS)
    step = run.training_step

    def stopped() -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return step()

    run.training_step = stopped  # type: ignore[method-assign]
    assert run.train() == 128 + signal.SIGTERM
    last = said.messages[-1]
    assert f"SIGTERM: step 1 of 2 is saved in {tmp_path}/run: to go on, start the same command again" in last
    program, file, *rest = shlex.split(last.rpartition("or: ")[2])
    assert (program, file) == ("python", "train.py")
    args = train_args(rest)
    again = build_trainer(load_run(args.config_path, args.overrides), RunOptions(args.logdir, args.resume, wandb=False))
    assert again.step == 1


def test_a_redirected_log_is_plain_lines(tmp_path: Path) -> None:
    changes = {"validation": {"every": 2, "count": 1}}
    (tmp_path / "run.yaml").write_text(to_yaml(config(TWO_STEPS, **changes)))
    done = forked.run(1, "train.py", "--config_path", str(tmp_path / "run.yaml"), "--logdir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert all(line.isprintable() for line in (done.stderr + done.stdout).split("\n"))
    order = [
        "run        small",
        "steps      2 to go",
        "small 1/2",
        "small 2/2",
        "validation after",
        "finished ",
        "next ",
    ]
    places = [done.stderr.index(text) for text in order]
    assert places == sorted(places)
    assert checkpoint.latest(tmp_path / "run/checkpoints") is not None


def test_commands_fit_what_was_trained() -> None:
    def programs(prompt: str = "it's", **changes: object) -> list[str]:
        run = config(BRIEF, **changes)
        return next_commands(Extent(run, Path("logs/x"), 4, 0), prompt, None)

    see, _, write = programs(student={"lora": {"rank": 2, "alpha": 2.0, "targets": ["q"]}})
    assert shlex.split(see)[-3] == "it's"
    assert "--format lora" in write
    low = {"rollout": {"kind": "backward_simulation"}, "schedule": {"denoising_step_list": [500, 250]}}
    see, _, write = programs(**low)
    assert "--run HIGH_NOISE_RUN --low_run logs/x" in see
    assert "--run HIGH_NOISE_RUN --low_run logs/x --format diffusers" in write
    see, judge, write = programs(
        **{**low, "schedule": {"denoising_step_list": [1000, 750], "min_score_timestep": 400}},
        objective={"kind": "phased_dmd"},
    )
    assert all("--run logs/x --low_run LOW_NOISE_RUN" in command for command in (see, judge, write))
    synthetic = {"data": {"kind": "synthetic", "synthetic": {"frames": 6, "height": 8, "width": 8}}}
    assert "demo.py" in programs(**synthetic)[1]
    nothing_exports = load_run(ROOT / "configs/digits_edm/dmd2.yaml")
    commands = next_commands(Extent(nothing_exports, Path("logs/x"), 4, 0), "the digit three", None)
    assert [line.split()[1] for line in commands] == ["inference.py", "evaluate.py"]
