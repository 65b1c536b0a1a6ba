"""Recipe files as options: YAML, JSON, words of shell scripts, and Python that is never run."""

from __future__ import annotations

from pathlib import Path

import pytest

from importers.python_syntax import python_options
from importers.read import read_options
from importers.shell import shell_options
from utils.errors import ConfigError

SCRIPT = """#!/bin/bash
#SBATCH --nodes=8
export WANDB_API_KEY=hunter2
export FASTVIDEO_ATTENTION_BACKEND=VIDEO_SPARSE_ATTN
NUM_GPUS=8
MODEL_PATH="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
DATA_DIR="${DATA_DIR:-data/parquet}"
training_args=(
  --max_train_steps=4000
  --train_batch_size 1  # of a GPU
  --data-path "$DATA_DIR/train"
  --output_dir "${OUT:-checkpoints/x}"
  --log_validation
)
dmd_args=(
  --pretrained_model_name_or_path $MODEL_PATH
  --learning_rate=1e-5
  --learning_rate 2e-5
  --lora_target_modules to_q to_k
  --dmd_denoising_steps '1000,757,522'
)
srun torchrun --nnodes $SLURM_JOB_NUM_NODES \\
  --nproc_per_node $NUM_GPUS \\
  fastvideo/training/wan_distillation_pipeline.py "${training_args[@]}" "${dmd_args[@]}"
"""


def test_words_of_a_script() -> None:
    options = shell_options(SCRIPT, Path("x.sh"))
    assert options == {
        "env.FASTVIDEO_ATTENTION_BACKEND": "VIDEO_SPARSE_ATTN",
        "program": "wan_distillation_pipeline.py",
        "max_train_steps": 4000, "train_batch_size": 1, "data_path": "data/parquet/train",
        "output_dir": "checkpoints/x", "log_validation": True,
        "pretrained_model_name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "learning_rate": 2e-5,  # the last one counts
        "lora_target_modules": "to_q,to_k", "dmd_denoising_steps": "1000,757,522",
    }  # fmt: skip


def test_words_of_hydra() -> None:
    text = """WORK=/data
    torchrun --nproc_per_node=8 -m scripts.train --config=rcm/configs/registry_distill.py -- \\
      experiment=wan2pt1_1pt3B model.config.teacher_ckpt=$WORK/t.pth model.config.rate=1e-6 ~trainer.callbacks.x=null"""
    options = shell_options(text, Path("x.sh"))
    assert options["experiment"] == "wan2pt1_1pt3B"
    assert options["model.config.teacher_ckpt"] == "/data/t.pth"
    assert options["model.config.rate"] == 1e-6
    assert options["config"] == "rcm/configs/registry_distill.py"
    assert options["program"] == "scripts.train"
    assert "nproc_per_node" not in options


def test_a_variable_of_this_process_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PATH", "hunter2")
    options = shell_options("python train.py --model $MODEL_PATH --other ${MODEL_PATH:-x}", Path("x.sh"))
    assert options["model"] == "$MODEL_PATH"
    assert options["other"] == "x"


PYTHON = '''
import os
from fastgen.configs.methods import config_dmd2 as default
from fastgen.configs.net import WAN21_1_3B
def create_config():
    """A config."""
    config = default.create_config()
    config.model.net = WAN21_1_3B
    config.model.lr = 1e-5
    config.model.t_list = [0.999, 1 / 2, -1.0]
    config.model.shape = (16, 2 * 10 + 1)
    config.log.group = f"x_{os.getpid()}"
    config.model.sample = {"steps": 4}
    config.data.size = [config.model.shape[0], open("/etc/passwd").read()]
    config.data.none = 1 / 0
    return config
'''


def test_python_is_read_as_syntax() -> None:
    assert python_options(PYTHON, Path("c.py")) == {
        "method": "config_dmd2", "model.net": "WAN21_1_3B", "model.lr": 1e-5, "model.t_list": [0.999, 0.5, -1.0],
        "model.shape": [16, 21], "log.group": "f'x_{os.getpid()}'", "model.sample.steps": 4,
        "data.size": "[config.model.shape[0], open('/etc/passwd').read()]", "data.none": "1 / 0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("if 1:\n        config.a = 2", 4),
        ("config.a += 1", 4),
        ("exec('boom')", 4),
        ("other.a = 1", 4),
        ("config.a = config.b = 1", 4),
        ("config['a'] = 1", 4),
    ],
)
def test_python_that_is_no_plain_assignment_is_refused_by_its_line(line: str, number: int) -> None:
    text = f"import m\ndef create_config():\n    config = m.create_config()\n    {line}\n    return config\n"
    with pytest.raises(ConfigError, match=rf"c.py, line {number}: no plain assignment to config"):
        python_options(text, Path("c.py"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a: [1", "not valid YAML"),
        ("a.yaml", "a: 1\na: 2", "found duplicate key a"),
        ("a.json", '{"a": 1, "a": 2}', "a stands twice in a section"),
        ("a.json", "[{}]", "holds no options"),
        ("a.json", "[1]", "holds no options"),
        ("a.json", "{}", "holds no options"),
        ("a.sh", "echo 'open", "close its quotes"),
        ("a.sh", "echo nothing", "no --option"),
        ("a.py", "def create_config(:", "not Python that can be read"),
        ("a.py", "x = 1", "has no function create_config"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_options(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_several_files_are_one_recipe(tmp_path: Path) -> None:
    """A later one counts; a list of sections is named by their ids."""
    (tmp_path / "a.yaml").write_text("x: {y: 1, z: 2}\n")
    (tmp_path / "b.json").write_text('{"--x": {"z": 3}}')
    (tmp_path / "c.json").write_text('[{"id": "videos", "crop": true}, {"type": "local"}]')
    options = read_options(*(tmp_path / name for name in ("a.yaml", "b.json", "c.json")))
    assert options == {"x.y": 1, "x.z": 3, "backend.videos.id": "videos", "backend.videos.crop": True,
                       "backend.1.type": "local"}  # fmt: skip
