"""FastGen's configs: read as syntax, with the conventions that a naive reading gets wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from importers.read import read_options
from importers.translate import refusals
from tests.importers.cases import RECIPES, imported, recipe_of

DMD, SELF_FORCING = RECIPES / "fastgen.py", RECIPES / "fastgen_self_forcing.py"


def test_dmd() -> None:
    recipe, run = imported("fastgen", DMD)
    assert run.objective.real_guidance_scale == 5.0  # uncond + w (cond - uncond), as here
    assert run.objective.critic_loss.value == "x0"
    assert run.training.update_schedule.value == "alternating"
    assert run.training.generator_update_interval == 5
    assert run.schedule.sigmas() == pytest.approx((0.999, 0.937, 0.833, 0.624))
    assert run.rollout.kind == "noised_data"  # several steps: from noised videos
    assert run.data.real and "data.latents" in recipe.missing
    assert run.critic is not None and run.teacher is not None
    assert (run.student.preset, run.teacher.preset, run.critic.preset) == ("1.3b", "14b", "14b")  # its teacher's copy
    student, critic = run.generator_training, run.critic_training
    assert (student.optimizer.clip_norm, critic.optimizer.clip_norm) == (10.0, None)  # the student's alone
    assert (student.optimizer.lr, critic.optimizer.lr) == (1e-5, 2e-5)
    assert (student.lr_schedule.warmup_steps, critic.lr_schedule.warmup_steps) == (10, 0)
    assert (run.training.global_batch_size, run.seed) == (64, 7)


def test_iterations_count_from_one() -> None:
    """`for i in range(1, max_iter)`, in which the student has those that N divides."""
    recipe, run = imported("fastgen", DMD)
    theirs = [i % 5 == 0 for i in range(1, 6000)]
    assert run.training.max_steps == len(theirs) == 5999
    assert [run.training.trains_generator(step) for step in range(5999)] == theirs
    assert [run.training.trains_critic(step) for step in range(5999)] == [not student for student in theirs]
    assert "training.critic_warmup_steps" in recipe.notes


def test_levels_are_shifted_between_bounds() -> None:
    """u of [min_t, max_t], shifted, then within min_t and max_t."""
    _, run = imported("fastgen", DMD)
    u = torch.linspace(0, 1, 101)
    t = 0.001 + (0.999 - 0.001) * u.double()
    theirs = (5 * t / (1 + 4 * t)).clamp(0.001, 0.999)
    assert torch.allclose(run.schedule.score_sigma(u).double(), theirs, atol=1e-6)


def test_self_forcing() -> None:
    recipe, run = imported("fastgen", SELF_FORCING)
    assert run.rollout.kind == "self_forcing"
    assert run.causal.num_frame_per_block == 3
    assert run.causal.context_noise == 100.0  # its 0.1 is a level
    assert run.objective.critic_loss.value == "flow"
    assert run.generator_training.optimizer.betas == [0.9, 0.999]
    assert run.generator_training.optimizer.lr == 1e-4  # its default
    assert "training.global_batch_size" in recipe.missing


def test_self_forcing_defaults_are_its_methods() -> None:
    """Four steps, one exit step for all blocks and even levels, where config_dmd2 has one step and polynomial ones."""
    options = read_options(SELF_FORCING)
    for name in ("student_sample_steps", "sample_t_cfg.t_list", "same_step_across_blocks",
                 "sample_t_cfg.time_dist_type"):  # fmt: skip
        del options[f"model.{name}"]
    recipe = recipe_of("fastgen", options)
    assert refusals(recipe) == []
    assert recipe.get("schedule.denoising_step_list") == pytest.approx([999, 749.25, 499.5, 249.75])
    assert recipe.get("rollout.same_step_across_blocks") is True
    assert recipe.get("schedule.score_timestep_shift") == 1.0


@pytest.mark.parametrize(
    ("file", "left_out", "changes", "says"),
    [
        (DMD, "sample_t_cfg.time_dist_type", {}, "model.sample_t_cfg.time_dist_type: config_dmd2 has polynomial"),
        (DMD, "student_sample_steps", {}, "model.student_sample_steps: it is 1, and t_list has 4"),
        (DMD, "", {"student_sample_steps": 1, "sample_t_cfg.t_list": [0.9, 0.0]}, "model.sample_t_cfg.t_list"),
        (SELF_FORCING, "", {"student_sample_steps": 1}, "model.student_sample_steps: 1: it is 1, and t_list has 4"),
        (SELF_FORCING, "teacher", {}, "model.teacher: its scores would be causal"),
        (SELF_FORCING, "", {"teacher": "CausalWan_14B_Config"}, "model.teacher: 'CausalWan_14B_Config': its scores"),
    ],
)
def test_what_its_code_would_do_otherwise(file: Path, left_out: str, changes: dict[str, Any], says: str) -> None:
    options = {**read_options(file), **{f"model.{name}": value for name, value in changes.items()}}
    options.pop(f"model.{left_out}", None)
    (problem,) = refusals(recipe_of("fastgen", options))
    assert problem.startswith(says)


def test_words_of_a_command_come_after_the_file() -> None:
    recipe, run = imported("fastgen", DMD, Path(__file__).parent / "fastgen_overrides.sh")
    assert (run.training.max_steps, run.objective.real_guidance_scale) == (99, 4.0)
    assert refusals(recipe) == []


@pytest.mark.parametrize("method", ["config_f_distill", "config_ladd", "config_sft", "config_causvid", "config_cm"])
def test_other_methods_are_refused_by_name(method: str) -> None:
    told = refusals(recipe_of("fastgen", {**read_options(DMD), "method": method}))
    assert any(line.startswith(f"method: '{method}'") for line in told)


def test_weights_in_bf16_are_refused() -> None:
    options = {**read_options(DMD), "model.precision_fsdp": "bfloat16"}
    (problem,) = refusals(recipe_of("fastgen", options))
    assert problem.startswith("model.precision: 'bfloat16': weights and AdamW in bf16: a later version")


def test_what_a_file_computes_is_no_value(tmp_path: Path) -> None:
    file = tmp_path / "config_dmd2.py"
    file.write_text(DMD.read_text().replace("guidance_scale = 5.0", "guidance_scale = float(open('x').read())"))
    (problem,) = refusals(recipe_of("fastgen", read_options(file)))
    assert problem.startswith("model.guidance_scale") and problem.endswith("it is computed: write the value itself")
