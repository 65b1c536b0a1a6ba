"""Recipes of other projects: what they mean here, and that nothing of them is lost in silence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.schema import RunConfig
from utils import config as config_module
from utils.config import ConfigError, from_plain, load
from utils.foreign import Recipe, read_options, shell_options, translate
from utils.foreign_tables import DIALECTS

SELF_FORCING = """
generator_ckpt: checkpoints/ode_init.pt
real_name: Wan2.1-T2V-14B
denoising_step_list: [1000, 750, 500, 250, 0]
warp_denoising_step: true
timestep_shift: 5.0
guidance_scale: 3.0
lr: 2.0e-06
lr_critic: 4.0e-07
beta1: 0.0
beta2: 0.999
beta1_critic: 0.0
beta2_critic: 0.99
total_batch_size: 64
batch_size: 1
ema_weight: 0.99
ema_start_step: 200
dfake_gen_update_ratio: 5
image_or_video_shape: [1, 21, 16, 60, 104]
distribution_loss: dmd
num_frame_per_block: 3
sharding_strategy: hybrid_full
brand_new: 7
model_kwargs: {timestep_shift: 5.0}
"""
FASTVIDEO = """#!/bin/bash
#SBATCH --nodes=8
NUM_GPUS=8
MODEL_PATH="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
training_args=(
  --max_train_steps=4000
  --train_batch_size 1  # of a GPU
  --num_latent_t 16
  --num_height 448
  --num_width 832
  --enable_gradient_checkpointing_type "full"
  --log_validation
)
dmd_args=(
  --num_gpus 64
  --sp_size 2
  --pretrained_model_name_or_path $MODEL_PATH
  --learning_rate=1e-5
  --max_grad_norm 1.0
  --flow_shift 8
  --dmd_denoising_steps '1000,757,522'
  --real_score_guidance_scale 3.5
  --VSA_sparsity 0.8
)
srun torchrun --nnodes $SLURM_JOB_NUM_NODES \\
  --nproc_per_node $NUM_GPUS \\
  training/pipeline.py "${training_args[@]}" "${dmd_args[@]}"
"""
SIMPLETUNER = {
    "--distillation_method": "dmd",
    "distillation_config": {
        "dmd_denoising_steps": "1000,757,522",
        "generator_update_interval": 5,
        "real_score_guidance_scale": 3.0,
        "fake_score_lr": 1e-5,
        "fake_score_lr_scheduler": "cosine_with_min_lr",
        "min_lr_ratio": 0.5,
    },
    "learning_rate": 2e-5,
    "grad_clip_method": "value",
    "max_grad_norm": 0.5,
    "lr_scheduler": "cosine_with_min_lr",
    "lr_warmup_steps": 100,
    "max_train_steps": 4000,
    "gradient_accumulation_steps": 2,
    "model_type": "lora",
    "lora_rank": 128,
    "pretrained_model_name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "report_to": "wandb",
}


def imported(dialect: str, text: str, path: Path) -> tuple[Recipe, RunConfig]:
    path.write_text(text)
    recipe = translate(DIALECTS[dialect], read_options(path))
    return recipe, from_plain(RunConfig, recipe.values)


def test_self_forcing(tmp_path: Path) -> None:
    """Its published run is our recipe of it: the same guidance, steps, rates, average."""
    recipe, run = imported("self_forcing", SELF_FORCING, tmp_path / "sf.yaml")
    ours = load(RunConfig, "configs/wan2.1_1.3b/self_forcing_dmd.yaml")
    assert run.schedule == ours.schedule and run.objective == ours.objective and run.ema == ours.ema
    assert run.generator_training == ours.generator_training
    assert run.critic_training.optimizer.lr == 4e-7 and run.critic_training.optimizer.betas == [0.0, 0.99]
    assert run.teacher is not None and run.teacher.preset == "14b" and run.student.init == "checkpoints/ode_init.pt"
    assert run.data.synthetic == ours.data.synthetic and run.training.generator_update_interval == 5
    assert [line.split(":")[0] for line in recipe.left] == ["sharding_strategy", "brand_new"]


def test_fastvideo(tmp_path: Path) -> None:
    recipe, run = imported("fastvideo", FASTVIDEO, tmp_path / "run.slurm")
    assert run.objective.real_guidance_scale == 4.5 and run.schedule.denoising_step_list == [1000, 757, 522]
    assert run.schedule.timestep_shift == run.schedule.score_timestep_shift == 8 and run.training.max_steps == 4000
    assert run.training.global_batch_size == 32  # 64 GPUs, two of which share a video
    assert (run.data.synthetic.frames, run.data.synthetic.height, run.data.synthetic.width) == (16, 56, 104)
    assert run.generator_training.optimizer.lr == run.critic_training.optimizer.lr == 1e-5
    assert run.rollout.kind.value == "backward_simulation" and run.student.checkpointing.value == "full"
    assert [line.split(":")[0] for line in recipe.left] == ["log_validation", "VSA_sparsity"]


def test_simpletuner(tmp_path: Path) -> None:
    recipe, run = imported("simpletuner", json.dumps(SIMPLETUNER), tmp_path / "config.json")
    assert run.objective.real_guidance_scale == 3.0  # uncond + w (cond - uncond) there too
    optimizer, critic = run.generator_training.optimizer, run.critic_training
    assert (optimizer.lr, optimizer.clip_value, optimizer.clip_norm) == (2e-5, 0.5, None)
    assert (critic.optimizer.lr, critic.optimizer.clip_value, critic.optimizer.clip_norm) == (1e-5, None, 1.0)
    assert (critic.lr_schedule.kind, critic.lr_schedule.floor) == ("cosine", 0.5)
    assert run.ema.decay is None and run.training.global_batch_size == 2
    left = " ".join(recipe.left)
    assert all(name in left for name in ("model_type", "lora_rank", "report_to", "global batch"))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_option_is_carried_over_or_listed(dialect: str) -> None:
    """A rule that forgot its key would drop the option: each changes the recipe, or lists itself, or says why not."""
    samples: list[Any] = [
        "Wan2.1-14B",
        True,
        False,
        2,
        "flow",
        "dmd",
        "sid",
        "wan",
        [1, 4, 16, 8, 8],
        "0.5,0.9",
        "cosine",
    ]
    harmless = {"simulate_generator_forward", "trainer"}
    for name in DIALECTS[dialect].rules.keys() - harmless:
        outcomes = []
        for value in samples:
            others = {"use_ema": True} if dialect == "simpletuner" and name != "use_ema" else {}
            try:
                recipe = translate(DIALECTS[dialect], {**others, name: value})
            except ConfigError:
                continue
            bare = translate(DIALECTS[dialect], others)
            outcomes.append(recipe.values != bare.values or recipe.left != bare.left)
        assert any(outcomes), name


def test_words_of_a_script() -> None:
    options = shell_options(FASTVIDEO, Path("x.sh"))
    assert options["pretrained_model_name_or_path"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert options["learning_rate"] == 1e-5 and options["log_validation"] is True
    assert "nproc_per_node" not in options and options["dmd_denoising_steps"] == "1000,757,522"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a: [1", "neither YAML nor JSON"),
        ("a.json", "[1]", "holds no options"),
        ("a.sh", "echo 'open", "close its quotes"),
        ("a.sh", "echo nothing", "no --option"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_options(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_value_of_another_kind_names_the_option() -> None:
    with pytest.raises(ConfigError, match=r'^lr: "fast" is not what this option takes'):
        translate(DIALECTS["self_forcing"], {"lr": "fast"})


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes is a config that loads, headed by what is not in it; a file is never written over."""
    (tmp_path / "sf.yaml").write_text(SELF_FORCING)
    out = tmp_path / "ours.yaml"
    arguments = ["config", "import", "self_forcing", str(tmp_path / "sf.yaml"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert config_module.main() == 0
    assert '#   sharding_strategy: "hybrid_full"' in out.read_text()
    assert load(RunConfig, out).objective.real_guidance_scale == 4.0
    with pytest.raises(ConfigError, match="is there already"):
        config_module.main()
