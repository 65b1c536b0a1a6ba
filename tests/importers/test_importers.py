"""Recipes of other projects: what they mean here, and that nothing of them is lost in silence."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import import_recipe
from configs.load import load_run
from configs.schema import RunConfig
from importers.lora import ATTENTION, FASTVIDEO_LAYERS
from importers.recipe import Recipe
from importers.tables import DIALECTS
from importers.translate import read_options, shell_options, to_text, translate
from model.lora import linear_layers
from model.network import LoraConfig
from model.wan.config import geometry
from model.wan.transformer import WanTransformer
from tests import forked
from tests.utils.test_writing import files_of_at_most, names
from utils.errors import ConfigError, UserError

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
data_path: prompts/vidprom.txt
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
    out = path.with_suffix(".ours.yaml")
    out.write_text(to_text(recipe, path.name))
    return recipe, load_run(out)


def listed(lines: list[str]) -> list[str]:
    """The keys or options that begin these lines."""
    return [re.split(r"[:( ]", line)[0] for line in lines]


def test_self_forcing(tmp_path: Path) -> None:
    """Its published run is our recipe of it: the same guidance, steps, rates, average."""
    recipe, run = imported("self_forcing", SELF_FORCING, tmp_path / "sf.yaml")
    ours = load_run("configs/wan2.1_1.3b/self_forcing_dmd.yaml")
    assert run.schedule == ours.schedule
    assert run.objective == ours.objective
    assert run.ema == ours.ema
    assert run.generator_training == ours.generator_training
    assert run.critic_training.optimizer.lr == 4e-7
    assert run.critic_training.optimizer.betas == [0.0, 0.99]
    assert run.teacher is not None
    assert run.teacher.preset == "14b"
    assert run.student.init == "checkpoints/ode_init.pt"
    assert run.data.wan == ours.data.wan
    assert run.data.kind == "wan"
    assert run.data.prompts == "prompts/vidprom.txt"
    assert not run.data.real
    assert run.data.text.encoder == run.data.vae.path == "Wan2.1-T2V-1.3B-Diffusers"  # the layout they are read in
    assert run.training.generator_update_interval == 5
    assert run.validation.fps == ours.validation.fps
    assert listed(recipe.left) == ["sharding_strategy", "brand_new"]
    assert listed(recipe.missing) == ["data.text.encoder,", "data.text.cache", "data.negative_prompt"]


def test_fastvideo(tmp_path: Path) -> None:
    recipe, run = imported("fastvideo", FASTVIDEO, tmp_path / "run.slurm")
    assert run.objective.real_guidance_scale == 4.5
    assert run.schedule.denoising_step_list == [1000, 757, 522]
    assert run.schedule.timestep_shift == run.schedule.score_timestep_shift == 8
    assert run.training.max_steps == 4000
    assert run.training.global_batch_size == 32  # 64 GPUs, two of which share a video
    assert (run.data.wan.frames, run.data.wan.height, run.data.wan.width) == (16, 56, 104)
    base = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert run.data.kind == "wan"
    assert run.data.text.encoder == run.data.vae.path == run.student.init == base
    assert listed(recipe.missing) == ["data.prompts", "data.text.cache", "data.negative_prompt"]
    assert run.generator_training.optimizer.lr == run.critic_training.optimizer.lr == 1e-5
    assert run.rollout.kind == "backward_simulation"
    assert run.student.checkpointing.value == "full"
    assert listed(recipe.left) == ["log_validation", "VSA_sparsity"]
    assert run.student.lora is None
    assert listed(recipe.notes) == ["rollout.kind"]  # noised videos, and none are named


def test_simpletuner(tmp_path: Path) -> None:
    recipe, run = imported("simpletuner", json.dumps(SIMPLETUNER), tmp_path / "config.json")
    assert run.objective.real_guidance_scale == 3.0  # uncond + w (cond - uncond) there too
    optimizer, critic = run.generator_training.optimizer, run.critic_training
    assert (optimizer.lr, optimizer.clip_value, optimizer.clip_norm) == (2e-5, 0.5, None)
    assert (critic.optimizer.lr, critic.optimizer.clip_value, critic.optimizer.clip_norm) == (1e-5, None, 1.0)
    assert (critic.lr_schedule.kind, critic.lr_schedule.floor) == ("cosine", 0.5)
    assert run.ema.decay is None
    assert run.training.global_batch_size == 2
    assert run.data.kind == "wan"
    assert run.data.vae.path == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert listed(recipe.left) == ["report_to", "lora_dropout"]  # 0.1 by its default
    assert "training.global_batch_size" in listed(recipe.notes)
    assert "data.wan" in listed(recipe.missing)


@pytest.mark.parametrize(("scale", "w"), [(0.0, 1.0), (3.0, 3.0)])
def test_simpletuner_guidance_is_ours_and_zero_is_none(scale: float, w: float, tmp_path: Path) -> None:
    text = json.dumps({"distillation_config": {"real_score_guidance_scale": scale, "fake_score_guidance_scale": scale}})
    recipe, run = imported("simpletuner", text, tmp_path / "a.json")
    assert run.objective.real_guidance_scale == run.objective.fake_guidance_scale == w
    assert "objective.real_guidance_scale" in listed(recipe.notes)  # SimpleTuner applies it to some batches, we to all


def test_simpletuner_lora(tmp_path: Path) -> None:
    """The student's alone: its critic trains all weights. Both start from the teacher's, so one copy serves."""
    recipe, run = imported("simpletuner", json.dumps(SIMPLETUNER), tmp_path / "config.json")
    lora = run.student.lora
    assert lora == LoraConfig(rank=128, alpha=None, targets=["q", "k", "v", "o"], share=True)
    assert run.critic is not None
    assert run.critic.lora is None
    assert {"student.lora.share", "critic.lora"} <= set(listed(recipe.notes))
    recipe, run = imported("simpletuner", json.dumps({"lora_alpha": 8, "lora_dropout": 0.0}), tmp_path / "b.json")
    assert run.student.lora is not None
    assert (run.student.lora.rank, run.student.lora.scale) == (16, 0.5)
    assert "model_type" in listed(recipe.notes)
    assert "lora_dropout" not in listed(recipe.left)
    recipe, run = imported("simpletuner", json.dumps({"model_type": "full", "lora_rank": 4}), tmp_path / "c.json")
    assert run.student.lora is None
    assert listed(recipe.left) == ["lora_rank"]


LORA = "  --lora_training True\n  --lora-rank 32\n  --lora_alpha 16\n"


@pytest.mark.parametrize(
    ("more", "targets"),
    [
        ("", ["q", "k", "v", "o"]),
        ("--lora_target_modules to_q to_v ffn\n", ["q", "v", "ffn.0", "ffn.2"]),
        ("--lora_target_modules attn2.to_q fc_in\n", ["cross_attn.q", "ffn.0"]),
    ],
)
def test_fastvideo_lora(more: str, targets: list[str], tmp_path: Path) -> None:
    """Student and critic, each target any part of a layer's name."""
    recipe, run = imported("fastvideo", FASTVIDEO.replace("  --sp_size", f"{LORA}{more}  --sp_size"), tmp_path / "a.sh")
    expected = LoraConfig(rank=32, alpha=16.0, targets=targets, share=True)
    assert run.student.lora == expected
    assert run.critic is not None
    assert run.critic.lora == expected
    assert listed(recipe.left) == ["log_validation", "VSA_sparsity"]
    assert run.parallel.sequence == 2  # the option after the list is its own


def test_imported_targets_are_layers() -> None:
    """All names that an import can write are found in a block, those of images in an image-to-video one."""
    with torch.device("meta"):
        net = WanTransformer(geometry("tiny", {"model_type": "i2v", "in_dim": 8, "image_dim": 32}))
    assert {*FASTVIDEO_LAYERS.values(), *ATTENTION} <= set(linear_layers(net))
    assert {name for name in linear_layers(net) if "." in name} == set(FASTVIDEO_LAYERS.values())


def test_an_adapter_on_other_weights_has_its_own_copy(tmp_path: Path) -> None:
    """What the teacher's weights cannot carry is not laid on them; a target that is no layer is listed."""
    options = {
        "lora_training": True, "lora_rank": 8, "pretrained_model_name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "real_score_model_path": "Wan-AI/Wan2.1-T2V-14B-Diffusers", "lora_target_modules": ["to_q", "norm"],
    }  # fmt: skip
    recipe, run = imported("fastvideo", json.dumps(options), tmp_path / "a.json")
    assert run.student.lora is not None
    assert not run.student.lora.share
    assert run.student.lora.targets == ["q"]
    assert run.teacher is not None
    assert run.teacher.preset == "14b"
    assert run.student.preset == "1.3b"
    assert any("no linear layer" in line and "norm" in line for line in recipe.left)
    recipe, run = imported("fastvideo", json.dumps({"lora_rank": 8}), tmp_path / "b.json")
    assert run.student.lora is None
    assert listed(recipe.left) == ["lora_rank"]


@pytest.mark.parametrize(
    ("name", "preset", "size", "missing"),
    [
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "14b", (21, 60, 104), ""),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "5b", (31, 44, 80), ""),
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "i2v-14b", (21, 60, 104), "data.image_encoder"),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "a14b", (21, 60, 104), "student.expert,"),
        ("checkpoints/mine", "1.3b", (21, 60, 104), "student.preset"),
    ],
)
def test_models(name: str, preset: str, size: tuple[int, int, int], missing: str, tmp_path: Path) -> None:
    """Each model gives its geometry, its size and its parts, whatever stands before it."""
    options = {"seed": 1, "pretrained_model_name_or_path": name}
    recipe, run = imported("fastvideo", json.dumps(options), tmp_path / "a.json")
    assert run.teacher is not None
    assert run.critic is not None
    assert {run.student.preset, run.teacher.preset, run.critic.preset} == {preset}
    assert (run.data.wan.frames, run.data.wan.height, run.data.wan.width) == size
    assert run.data.vae.path == run.student.init == name
    assert run.validation.fps == (24 if preset == "5b" else 16)
    assert not missing or missing in listed(recipe.missing)


def test_simpletuner_model_and_frames(tmp_path: Path) -> None:
    """A flavour is a model; frames that are not whole blocks are cut to them, and that is said."""
    options: dict[str, Any] = {
        "model_flavour": "ti2v-5b-2.2",
        "model_type": "full",
        "distillation_config": {"num_training_frames": 31},
    }
    recipe, run = imported("simpletuner", json.dumps(options), tmp_path / "a.json")
    assert run.student.preset == "5b"
    assert run.critic is not None
    assert run.critic.init == run.student.init
    assert (run.data.wan.frames, run.data.wan.height) == (30, 44)
    assert "data.wan.frames" in listed(recipe.notes)
    options["distillation_config"] = {"num_training_frames": 31, "independent_first_frame": True}
    recipe, run = imported("simpletuner", json.dumps(options), tmp_path / "c.json")
    assert run.data.wan.frames == 31
    assert "data.wan.frames" not in listed(recipe.notes)


def test_fastvideo_inputs(tmp_path: Path) -> None:
    """Noised videos, unless it is told to simulate the student's own inputs."""
    options = {"data_path": "data/parquet", "pretrained_model_name_or_path": "Wan2.1-T2V-1.3B-Diffusers"}
    _, run = imported("fastvideo", json.dumps(options), tmp_path / "a.json")
    assert run.rollout.kind == "noised_data"
    assert run.data.real
    assert run.data.latents == "data/parquet"
    recipe, run = imported(
        "fastvideo", json.dumps({**options, "simulate_generator_forward": True}), tmp_path / "b.json"
    )
    assert run.rollout.kind == "backward_simulation"
    assert not run.data.real
    assert run.data.latents is None
    assert listed(recipe.left) == ["data_path"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_recipe_that_says_nothing_loads(dialect: str, tmp_path: Path) -> None:
    """Also where there is no model to take the encoder and the VAE from."""
    recipe, run = imported(dialect, "seed: 3", tmp_path / "a.yaml")
    assert run.seed == 3
    assert run.data.kind == "wan"
    assert (run.data.vae.path is None) == ("data.vae.path" in listed(recipe.missing)) == (run.validation.every is None)


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
        "ti2v-5b-2.2",
    ]
    harmless = {"trainer"}
    for name in DIALECTS[dialect].rules.keys() - harmless:
        outcomes = []
        for value in samples:
            others = {"use_ema": True} if dialect == "simpletuner" and name != "use_ema" else {}
            try:
                recipe = translate(DIALECTS[dialect], {**others, name: value})
            except ConfigError:
                continue
            bare = translate(DIALECTS[dialect], others)
            outcomes.append(recipe != bare)
        assert any(outcomes), name


def test_words_of_a_script() -> None:
    options = shell_options(FASTVIDEO, Path("x.sh"))
    assert options["pretrained_model_name_or_path"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert options["learning_rate"] == 1e-5
    assert options["log_validation"] is True
    assert "nproc_per_node" not in options
    assert options["dmd_denoising_steps"] == "1000,757,522"


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
    arguments = ["import_recipe.py", "self_forcing", str(tmp_path / "sf.yaml"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert import_recipe.main() == 0
    assert '#   sharding_strategy: "hybrid_full"' in out.read_text()
    assert "# To fill in:\n" in out.read_text()
    assert "# Means something else" not in out.read_text()
    assert load_run(out).objective.real_guidance_scale == 4.0
    assert "before train.py takes it" not in out.read_text()
    with pytest.raises(ConfigError, match="is there already"):
        import_recipe.main()


def test_a_disk_that_takes_no_recipe_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sf.yaml").write_text(SELF_FORCING)
    out = tmp_path / "ours.yaml"
    monkeypatch.setattr(sys, "argv", ["import_recipe.py", "self_forcing", str(tmp_path / "sf.yaml"), "--out", str(out)])
    with (
        files_of_at_most(100),
        pytest.raises(UserError, match=r"--out .*ours.yaml could not be written: File too large"),
    ):
        import_recipe.main()
    assert names(tmp_path) == ["sf.yaml"]
    sys.argv[-1] = str(tmp_path / "sf.yaml" / "ours.yaml")
    with pytest.raises(UserError, match=r"sf.yaml is a file and no folder: give another place"):
        import_recipe.main()


def test_what_train_py_would_refuse_is_said_in_the_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The importers know no schema; the command checks what they make."""
    (tmp_path / "sf.yaml").write_text(SELF_FORCING + "\nema_weight: 1.5\n")
    monkeypatch.setattr(sys, "argv", ["import_recipe.py", "self_forcing", str(tmp_path / "sf.yaml")])
    assert import_recipe.main() == 0
    assert "#   before train.py takes it (ema.decay must be in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "arguments", "new"),
    [
        ("trainer.evaluate", ("--help",), "evaluate.py"),
        ("trainer.export", ("--help",), "export.py"),
        ("utils.data.preprocess", ("text", "--help"), "preprocess.py"),
        ("utils.config", ("import", "--help"), "import_recipe.py"),
    ],
)
def test_commands_of_version_0_1_name_the_new_one_and_run_it(old: str, arguments: tuple[str, ...], new: str) -> None:
    done = forked.run(1, old, *arguments)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {new}")
    assert f"is now: python {new}" in done.stderr
