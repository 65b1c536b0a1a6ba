"""train.py as a user meets it: one line for a mistake, exit code 2, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import load_run
from configs.sections import TrainerKind
from tests import ROOT, forked
from trainer.base import RunOptions
from trainer.build import build_trainer
from utils import cli
from utils.errors import ConfigError

YAML = "configs/toy/self_forcing_dmd.yaml"

MISTAKES = [
    ("training.max_stepz=5", ["training.max_stepz", "max_steps"]),
    ("training.max_steps=many", ["training.max_steps", "many", "whole number"]),
    ("trainer=ddpo", ["trainer", "ddpo", "score_distillation", "diffusion", "ode"]),
    ("objective.kind=gam", ["objective.kind", "gam", "dmd"]),
    ("objective.kind=gan", ["objective.gan", "null", "kind gan", "give it a gan section"]),
    ("objective.gan={}", ["data.real", "false", "objective.gan needs real videos"]),
    (
        "causal.num_frame_per_block=4",
        ["data.toy.frames", "causal.num_frame_per_block", "6 latent frames", "blocks of 4", "4 or 8"],
    ),
    ("student.overrides={num_heads: 3}", ["student", "num_heads 3", "dim 128", "divisor"]),
    ("schedule.denoising_step_list=[500,750]", ["schedule.denoising_step_list", "500", "decrease"]),
    ("schedule.min_sigma=0.99", ["schedule.min_sigma", "0.99"]),
    ("rollout.kind=noised_data", ["data.real", "noised_data", "set it to true"]),
    ("teacher.overrides={text_len: 9}", ["teacher", "text_len 9", "8"]),
    ("causal.window_frames=1", ["causal", "window of 1", "widen"]),
    ("rollout.num_training_frames=9", ["num_training_frames 9", "block of 2"]),
    ("student.attention=fast", ["student.attention", "fast", "sdpa"]),
    ("student.preset=2b", ["student", "2b", "1.3b"]),
    ("ema.decay=1.5", ["ema.decay", "1.5"]),
    ("generator_training.optimizer.clip_value=1", ["clip_norm", "clip_value", "null"]),
    ("generator_training.lr_schedule.kind=step", ["generator_training.lr_schedule.kind", "step", "cosine"]),
    ("teacher=null", ["teacher is null"]),
    ("student.overrides={dim:96}", ["student.overrides", "'dim:96'", "no space after the colon", "write {dim: 96}"]),
    ("training.sizes=[{frames:6}]", ["training.sizes[0]", "'frames:6'", "write {frames: 6}"]),
    ("student.overrides={num_layers: 0}", ["student", "num_layers", "at least 1", "0"]),
    ("student.overrides={dim: abc}", ["student", "dim", "abc"]),
    ("training.threads=0", ["training.threads", "0"]),
    ("training.update_schedule=alternating training.generator_update_interval=1", ["generator_update_interval"]),
    ("schedule.min_score_timestep=990", ["schedule.min_score_timestep", "990"]),
    (
        "rollout.kind=diffusion_forcing data.real=true schedule.ts_schedule=true",
        ["diffusion_forcing", "no exit step", "schedule.ts_schedule"],
    ),
    (
        "rollout.kind=diffusion_forcing rollout.last_step_only=true",
        ["rollout.last_step_only=True", "not for kind diffusion_forcing", "self_forcing"],
    ),
    ("data.kind=moon", ["data.kind", "moon", "give one of toy, digits, wan, shapes, synthetic"]),
    ("data.kind=wan", ["data.vae.path", "null", "validation.every"]),
    ("data.kind=synthetic data.synthetic.frames=7", ["data.synthetic.frames", "7 latent frames", "6 or 8"]),
    ("data.kind=synthetic data.synthetic.height=0", ["data.synthetic.height", "at least 1", "0"]),
    ("training.critic_warmup_steps=400", ["critic_warmup_steps", "400"]),
]


@pytest.mark.parametrize(("override", "words"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_mistake_is_one_line_with_key_value_and_remedy(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(ROOT / YAML, override.split(" ") if "{" not in override else [override])
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_ts_schedule_needs_one_exit_step_for_all_blocks() -> None:
    with pytest.raises(ConfigError, match="same_step_across_blocks"):
        load_run(
            ROOT / YAML,
            ["schedule.ts_schedule=true", "rollout.same_step_across_blocks=false", "rollout.last_step_only=false"],
        )


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*/*.yaml")), ids=str)
def test_every_recipe_loads_and_says_how_to_run_it(path: Path) -> None:
    load_run(path)
    header = path.read_text().split("\nname:")[0]
    assert f"--config_path {path.relative_to(ROOT)}" in header
    assert "Hardware" in header


def test_a_mistake_exits_with_2_and_no_traceback() -> None:
    command = [sys.executable, "train.py", "--config_path", YAML, "training.max_stepz=5"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "training.max_stepz" in done.stderr


ABSURD = 999999999999
SIZES = [
    ("data.wan.frames", "data={kind: wan, wan: {frames: %d}}"),
    ("data.wan.height", "data={kind: wan, wan: {height: %d}}"),
    ("data.wan.width", "data={kind: wan, wan: {width: %d}}"),
    ("data.synthetic.frames", "data={kind: synthetic, synthetic: {frames: %d}}"),
    ("data.synthetic.height", "data={kind: synthetic, synthetic: {height: %d}}"),
    ("data.synthetic.width", "data={kind: synthetic, synthetic: {width: %d}}"),
    ("data.synthetic.prompts", "data={kind: synthetic, synthetic: {prompts: %d}}"),
    ("data.toy: frames", "data.toy.frames=%d"),
    ("data.toy: canvas", "data.toy.canvas=%d"),
    ("rollout.num_training_frames", "rollout.num_training_frames=%d"),
    ("training.global_batch_size", "training.global_batch_size=%d"),
    ("training.micro_batch_size", "training.micro_batch_size=%d"),
    ("sizes[0].frames", "training.sizes=[{frames: %d}]"),
    ("sizes[0].width", "training.sizes=[{width: %d}]"),
]


@pytest.mark.parametrize(("key", "override"), SIZES, ids=[key for key, _ in SIZES])
def test_sizes_beyond_any_video_or_batch_are_refused(key: str, override: str) -> None:
    """Before anything of that size is made: block lists, masks, batches."""
    with pytest.raises(ConfigError) as caught:
        load_run(ROOT / YAML, [override % ABSURD])
    message = str(caught.value)
    words = (*key.replace(": ", ".").split("."), str(ABSURD), "at most", "lower it")
    assert "\n" not in message and all(word in message for word in words), message


def test_sides_that_are_possible_and_together_are_not() -> None:
    sides = "data={kind: synthetic, synthetic: {frames: 6000, height: 4096, width: 4096}}"
    with pytest.raises(ConfigError, match=r"data\.synthetic\.frames x height x width .* lower one of them"):
        load_run(ROOT / YAML, [sides])


@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["start", "plan"])
def test_an_absurd_size_exits_with_2_and_one_line(plan: list[str], tmp_path: Path) -> None:
    yaml = "configs/wan2.1_1.3b/self_forcing_dmd.yaml"
    done = forked.run(
        1, "train.py", "--config_path", yaml, "--logdir", str(tmp_path), *plan, f"data.wan.frames={ABSURD}"
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "data.wan.frames" in done.stderr
    assert str(ABSURD) in done.stderr


def test_what_does_not_fit_into_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.distributed, "leave", lambda code, **_: left.append(code))

        def too_long() -> int:
            raise MemoryError

        cli.run_cli(too_long)
    (line,) = capsys.readouterr().err.splitlines()
    assert left == [2]
    assert "too_long" in line
    assert "lower the sizes" in line


def test_missing_weights_name_the_network_and_the_path(tmp_path: Path) -> None:
    done = forked.run(1, "train.py", "--config_path", YAML, "--logdir", str(tmp_path), "teacher.init=/no/such/run")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "teacher.init" in done.stderr
    assert "/no/such/run" in done.stderr


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("data.prompts=nothing.txt", "nothing.txt"),
        ("data.negative_prompt=blurry", "blurry"),
        ("validation.prompts=nothing.txt", "validation.prompts"),
        (
            "data={kind: synthetic, synthetic: {frames: 20, height: 5}}",
            "latent size 5x104 is not a multiple of the patch 2x2",
        ),
        ("student.attention=flex", "flex has no backward on a CPU"),
    ],
)
def test_mistakes_that_only_the_task_can_see(override: str, word: str, tmp_path: Path) -> None:
    overrides = ["student.init=null", "teacher.init=null", "critic.init=null", override]
    with pytest.raises(ConfigError) as caught:
        build_trainer(load_run(ROOT / YAML, overrides), RunOptions(tmp_path))
    assert "\n" not in str(caught.value)
    assert word in str(caught.value)


def test_print_config_gives_a_yaml_that_loads_to_the_same(tmp_path: Path) -> None:
    done = forked.run(1, "train.py", "--config_path", YAML, "seed=3", "--print_config")
    assert done.returncode == 0
    (tmp_path / "c.yaml").write_text(done.stdout)
    again = load_run(tmp_path / "c.yaml")
    assert again == load_run(ROOT / YAML, ["seed=3"])
    assert again.trainer is TrainerKind.score_distillation
