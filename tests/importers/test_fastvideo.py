"""FastVideo's four forms: the conventions that a naive reading gets wrong, by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from importers.dialects import DIALECTS
from importers.lora import ATTENTION, FASTVIDEO_LAYERS
from importers.read import read_options
from importers.translate import refusals
from model.lora import linear_layers
from model.wan.config import geometry
from model.wan.transformer import WanTransformer
from tests.importers.cases import RECIPES, cases, imported, recipe_of

SHELL, CAUSAL = RECIPES / "fastvideo.sh", RECIPES / "fastvideo_causal.sh"
NESTED = (RECIPES / "fastvideo_nested.yaml", RECIPES / "fastvideo_nested_second.sh")
MODULAR = RECIPES / "fastvideo_modular.yaml"
MODULAR_CAUSAL = RECIPES / "fastvideo_modular_causal.yaml"


def test_a_script() -> None:
    recipe, run = imported("fastvideo", SHELL)
    assert recipe.form == "fastvideo"
    assert run.objective.real_guidance_scale == 4.5  # 3.5 on top of the conditional
    assert run.training.global_batch_size == 64  # 64 GPUs, two of which share a video, times 2
    assert (run.parallel.sequence, run.parallel.replicate, run.parallel.shard) == (2, 8, 4)
    assert (run.data.wan.frames, run.data.wan.height, run.data.wan.width) == (16, 56, 104)
    assert run.training.generator_update_interval == 5
    assert run.training.critic_warmup_steps == 4  # the student's iterations are the 5th, the 10th, ...
    assert (run.ema.decay, run.ema.start) == (0.99, 40)  # of 200 iterations
    student, critic = run.generator_training, run.critic_training
    assert (student.lr_schedule.warmup_steps, critic.lr_schedule.warmup_steps) == (10, 0)  # 50 iterations; constant
    assert (student.optimizer.lr, critic.optimizer.lr) == (1e-5, 2e-5)
    assert student.optimizer.clip_norm == critic.optimizer.clip_norm == 1.0
    assert (run.schedule.min_sigma, run.schedule.max_sigma) == (0.02, 0.98)
    assert run.schedule.sigmas()[0] == 1.0
    assert run.schedule.sigmas()[1] == pytest.approx(8 * 0.757 / (1 + 7 * 0.757))
    assert run.rollout.kind == "noised_data"
    assert (run.data.real, run.data.latents) == (True, "data/latents/train")
    assert run.student.init == "weights/start"
    assert run.critic is not None and run.teacher is not None
    assert (run.teacher.preset, run.critic.init) == ("14b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert run.student.lora is None and run.critic.lora is None  # lora_rank counts with lora_training


def test_the_ramp_of_sparsity() -> None:
    """r * min(step // I, floor(S / r)) of steps from 1: ours is the same but for the one step at which it climbs."""
    _, run = imported("fastvideo", SHELL)
    sparse = run.student.sparse
    assert sparse is not None and sparse.cube == [4, 4, 4]
    assert run.critic is not None and run.critic.sparse is not None and run.critic.sparse.sparsity == 0.0
    theirs = [0.03 * min(step // 50, int(0.8 / 0.03)) for step in range(1, 2001)]
    ours = [sparse.at(iteration) for iteration in range(2000)]
    off = [step for step in range(2000) if abs(ours[step] - theirs[step]) > 1e-9]
    assert off == [50 * k - 1 for k in range(1, 27)]
    assert ours[-1] == pytest.approx(theirs[-1]) == pytest.approx(0.78)
    _, run = imported("fastvideo", SHELL, VSA_decay_interval_steps=1)
    assert run.student.sparse is not None and run.student.sparse.at(0) == 0.8  # no ramp, whatever its rate
    recipe, run = imported("fastvideo", SHELL, **{"env.FASTVIDEO_ATTENTION_BACKEND": "FLASH_ATTN"})
    assert run.student.sparse is None and "student.sparse" in recipe.notes


LEAST: dict[str, Any] = {  # what the parser asks for
    "program": "wan_distillation_pipeline.py", "pretrained_model_name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "learning_rate": 1e-5, "weight_decay": 0.01, "dmd_denoising_steps": "1000,757,522", "data_path": "data/latents",
    "num_latent_t": 16, "num_height": 448, "num_width": 832, "max_train_steps": 4000, "train_batch_size": 1,
    "gradient_accumulation_steps": 1, "sp_size": 1, "hsdp_shard_dim": 8,
}  # fmt: skip


def test_what_a_script_leaves_out() -> None:
    """The parser's values, not the data class's."""
    _, run = imported("fastvideo", **LEAST)
    assert run.generator_training.optimizer.clip_norm is None
    assert run.generator_training.optimizer.betas == run.critic_training.optimizer.betas == [0.9, 0.999]
    assert run.critic_training.optimizer.lr == 1e-5  # its 0 is the student's
    assert run.schedule.min_sigma == 0.2
    assert run.schedule.score_timestep_shift == 3.0  # of the 1.3B at 480p
    assert run.objective.real_guidance_scale == 4.5
    assert run.ema.decay is None  # without use_ema
    assert (run.seed, run.training.global_batch_size) == (42, 8)
    assert run.teacher is not None and run.teacher.init == run.student.init
    _, run = imported("fastvideo", **LEAST, use_ema=True)
    assert run.ema.decay == 0.999
    _, run = imported("fastvideo", **LEAST, simulate_generator_forward=True)
    assert (run.rollout.kind, run.data.real, run.data.latents) == ("backward_simulation", False, None)


@pytest.mark.parametrize("missing", LEAST)
def test_what_a_script_must_say(missing: str) -> None:
    told = refusals(recipe_of("fastvideo", {name: value for name, value in LEAST.items() if name != missing}))
    assert any(line.startswith(f"{missing}: ") for line in told)


def test_rates_that_fall() -> None:
    """The bidirectional launcher's in every iteration; the causal one's with the student's updates, up to the same
    number, so that they fall by a fifth of the way alone."""
    _, run = imported("fastvideo", SHELL, lr_scheduler="linear", fake_score_lr_scheduler="cosine")
    student, critic = run.generator_training.lr_schedule, run.critic_training.lr_schedule
    theirs = [max(0.0, (4000 - 5 * update) / (4000 - 50)) for update in range(10, 800)]
    assert [student.factor(update, 800) for update in range(10, 800)] == pytest.approx(theirs)
    assert critic.factor(2025, 4000) == pytest.approx(0.5)
    _, run = imported("fastvideo", CAUSAL, lr_scheduler="linear", lr_warmup_steps=0)
    student = run.generator_training.lr_schedule
    assert [student.factor(update, 120) for update in range(120)] == pytest.approx([1 - u / 600 for u in range(120)])
    told = refusals(recipe_of("fastvideo", {**read_options(CAUSAL), "lr_scheduler": "cosine"}))
    assert told == ["lr_scheduler: 'cosine': its code ends the cosine at 600 updates of this network, which are 120 in "
                    "the run"]  # fmt: skip


def test_a_causal_student() -> None:
    recipe, run = imported("fastvideo", CAUSAL)
    assert recipe.form == "fastvideo, causal students"
    assert run.rollout.kind == "self_forcing"
    assert run.objective.real_guidance_scale == 4.0
    assert (run.causal.num_frame_per_block, run.training.critic_warmup_steps) == (3, 4)
    assert run.schedule.sigmas() == pytest.approx((1.0, 15 / 16, 5 / 6, 0.625))
    _, run = imported("fastvideo", CAUSAL, num_latent_t=27)
    assert (run.data.wan.frames, run.rollout.num_training_frames) == (21, 27)  # it judges the last 21
    options = read_options(CAUSAL)
    del options["same_step_across_blocks"]
    assert recipe_of("fastvideo", options).get("rollout.same_step_across_blocks") is False


def test_a_config_file_says_what_a_script_says() -> None:
    recipe, run = imported("fastvideo", *NESTED)
    assert recipe.form == "fastvideo, --config"
    assert (run.objective.real_guidance_scale, run.schedule.score_timestep_shift) == (4.5, 8.0)
    assert (run.training.global_batch_size, run.training.critic_warmup_steps) == (8, 4)
    assert (run.ema.decay, run.student.init) == (0.99, "weights/start")
    assert (run.rollout.kind, run.training.max_steps) == ("backward_simulation", 3000)  # the script's word counts
    lora = run.student.lora
    assert run.critic is not None and run.critic.lora is not None and lora is not None
    assert (lora.rank, lora.alpha, lora.targets) == (64, 32.0, ["q", "v", "ffn.0", "ffn.2"])
    assert not lora.share  # it lies on other weights than the teacher's
    assert run.critic.lora == dataclasses.replace(lora, share=True)  # student and critic alike
    options = {**read_options(*NESTED), "training.lora.target_modules": ["norm"]}
    options |= {"training.optimizer.lr_scheduler": "polynomial"}
    told = [line.split(":")[0] for line in refusals(recipe_of("fastvideo", options))]
    assert told == ["training.optimizer.lr_scheduler", "training.lora.target_modules"]  # by the names of the file


def test_the_modular_trainer() -> None:
    """The same words mean something else: guidance is w, the average counts iterations, steps have their own shift."""
    recipe, run = imported("fastvideo", MODULAR)
    assert recipe.form == "fastvideo, modular"
    assert run.objective.real_guidance_scale == 3.5
    assert run.ema.decay == pytest.approx(0.998**5)
    assert run.ema.start == 40
    assert (run.schedule.timestep_shift, run.schedule.score_timestep_shift) == (5.0, 8.0)
    assert run.training.global_batch_size == 8  # of 8 GPUs in 4 groups, times 2
    assert (run.parallel.sequence, run.parallel.shard) == (2, 4)
    assert run.training.critic_warmup_steps == 4
    assert run.rollout.reuse_rollout
    assert run.student.lora is not None and run.critic is not None and run.critic.lora is None


def test_what_a_modular_file_leaves_out() -> None:
    gone = ("method.generator_update_interval", "method.real_score_guidance_scale", "method.min_timestep_ratio",
            "method.max_timestep_ratio", "models.student.flow_shift", "training.distributed.sp_size")  # fmt: skip
    options = {n: v for n, v in read_options(MODULAR).items() if n not in gone and not n.startswith("callbacks.")}
    recipe = recipe_of("fastvideo", options)
    assert refusals(recipe) == []
    get = recipe.get
    assert (get("objective.real_guidance_scale"), get("training.generator_update_interval")) == (1.0, 1)
    assert (get("schedule.min_sigma"), get("schedule.max_sigma"), get("schedule.timestep_shift")) == (0.0, 1.0, 3.0)
    assert get("generator_training.optimizer.clip_norm") is None and get("ema.decay") is None
    assert get("parallel.sequence") == 8 and get("training.global_batch_size") == 2  # one group of all ranks


def test_a_causal_student_of_the_modular_trainer() -> None:
    _, run = imported("fastvideo", MODULAR_CAUSAL)
    assert run.rollout.kind == "self_forcing"
    assert (run.causal.window_frames, run.causal.sink_frames) == (12, 3)
    assert run.schedule.timestep_shift == run.schedule.score_timestep_shift == 5.0
    assert (run.schedule.min_sigma, run.schedule.max_sigma) == (0.0, 1.0)  # it reads no ratio
    assert run.objective.real_guidance_scale == 4.0


@pytest.mark.parametrize(
    ("name", "preset", "shift"),
    [("Wan-AI/Wan2.1-T2V-14B-Diffusers", "14b", 5.0), ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "5b", 5.0)],
)
def test_models(name: str, preset: str, shift: float) -> None:
    """Each model gives its geometry, its parts and its shift."""
    _, run = imported("fastvideo", **{**LEAST, "pretrained_model_name_or_path": name})
    assert run.teacher is not None and run.critic is not None
    assert {run.student.preset, run.teacher.preset, run.critic.preset} == {preset}
    assert run.data.vae.path == run.student.init == name
    assert run.validation.fps == (24 if preset == "5b" else 16)
    assert run.schedule.score_timestep_shift == shift
    assert run.data.wan.height == (28 if preset == "5b" else 56)  # 448 pixels


@pytest.mark.parametrize("name", ["Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"])
def test_models_that_are_trained_otherwise(name: str) -> None:
    told = refusals(recipe_of("fastvideo", {**LEAST, "pretrained_model_name_or_path": name}))
    assert {line.split(":")[0] for line in told} == {"student", "teacher", "critic"}


def test_a_name_that_tells_no_size_needs_a_preset() -> None:
    options = {**LEAST, "pretrained_model_name_or_path": "checkpoints/mine", "flow_shift": 8}
    told = refusals(recipe_of("fastvideo", options))
    assert [line.split(":")[0] for line in told] == ["student", "teacher", "critic"]
    assert all("give --preset" in line for line in told)
    recipe = recipe_of("fastvideo", options, preset="14b")
    assert refusals(recipe) == [] and recipe.get("student.preset") == "14b"


def test_targets_are_layers() -> None:
    """All names that an import can write are found in a block, those of images in an image-to-video one."""
    with torch.device("meta"):
        net = WanTransformer(geometry("tiny", {"model_type": "i2v", "in_dim": 8, "image_dim": 32}))
    assert {*FASTVIDEO_LAYERS.values(), *ATTENTION} <= set(linear_layers(net))
    assert {name for name in linear_layers(net) if "." in name} == set(FASTVIDEO_LAYERS.values())


def test_forms_are_told_apart() -> None:
    found = [files for files in cases() if files[0].name.startswith("fastvideo")]
    forms = {files[0].name: DIALECTS["fastvideo"].of(read_options(*files)).name for files in found}
    assert forms == {
        "fastvideo.sh": "fastvideo", "fastvideo_causal.sh": "fastvideo, causal students",
        "fastvideo_nested.yaml": "fastvideo, --config", "fastvideo_modular.yaml": "fastvideo, modular",
        "fastvideo_modular_causal.yaml": "fastvideo, modular",
    }  # fmt: skip


def test_a_section_of_a_callback_acts_by_its_defaults() -> None:
    options = {name: value for name, value in read_options(MODULAR).items() if not name.startswith("callbacks.")}
    recipe = recipe_of("fastvideo", {**options, "callbacks.grad_clip": {}, "callbacks.ema": {}})
    assert refusals(recipe) == []
    assert recipe.get("generator_training.optimizer.clip_norm") == 1.0
    assert recipe.get("ema.decay") == pytest.approx(0.9999**5)
