"""Every recipe loads, says what it needs, and its smoke test's overrides leave nothing that has to be fetched."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from configs.load import load_run
from tests import ROOT
from trainer.run_networks import sharing
from utils.errors import ConfigError
from utils.parallel.mesh import split

RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("wan2*/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_loads_and_so_does_its_smoke_test(recipe: str) -> None:
    text = (ROOT / recipe).read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert all(any(line.startswith(f"# {word}:") for line in header) for word in ("Command", "Hardware", "Settings"))
    config = load_run(ROOT / recipe)
    assert config.data.kind == "wan"
    assert config.data.text.encoder
    assert config.data.vae.path
    assert config.data.prompts
    (smoke,) = [line for line in header if line.startswith("# Smoke test")]
    overrides = smoke.split(": add ")[1].split()
    bare = load_run(ROOT / recipe, overrides)
    assert bare.data.kind == "synthetic"
    assert bare.validation.every is None
    assert bare.data.prompts is None
    networks = (bare.student, bare.teacher, bare.critic)
    assert all(network is None or network.init is None for network in networks)
    assert bare.data.size == config.data.size


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_the_processes_of_its_command(recipe: str) -> None:
    config, text = load_run(ROOT / recipe), (ROOT / recipe).read_text()
    (command,) = re.findall(r"^# Command: +torchrun (.*)$", text, re.MULTILINE)
    ((nodes, each),) = re.findall(r"(?:--nnodes (\d+) )?--nproc_per_node (\d+)", command)
    split(config.parallel, int(nodes or 1) * int(each))  # else ConfigError


@pytest.mark.parametrize("script", [path.name for path in (ROOT / "slurm").glob("*.slurm")])
def test_a_slurm_script_asks_for_the_processes_of_its_recipe(script: str) -> None:
    text = (ROOT / "slurm" / script).read_text()
    for recipe in re.findall(r"^distill (\S+)", text, re.MULTILINE):
        nodes, each = (int(n) for name in ("nodes", "gpus-per-node") for n in re.findall(rf"--{name}=(\d+)", text))
        split(load_run(ROOT / recipe).parallel, nodes * each)


def test_adapters_of_a_recipe_lie_on_one_copy() -> None:
    adapted = [recipe for recipe in RECIPES if recipe.endswith("_lora.yaml")]
    assert len(adapted) >= 3
    for recipe in adapted:
        assert set(sharing(load_run(ROOT / recipe))) == {"student", "critic"}


def test_experts_take_steps_and_scores_on_their_side_of_the_boundary() -> None:
    high, low = (load_run(ROOT / f"configs/wan2.2_a14b/dmd_{side}.yaml").schedule for side in ("high", "low"))
    assert min(high.sigmas()) >= 0.875 > max(low.sigmas())
    assert high.min_score_timestep == low.max_score_timestep == 875
    whole = load_run(ROOT / "configs/wan2.1_1.3b/self_forcing_dmd.yaml").schedule
    assert (*high.sigmas(), *low.sigmas()) == whole.sigmas()


NO_FILES = {"configs/toy/x.yaml", "configs/wan/old.yaml"}  # of tests that want a missing one


def named_configs(path: Path) -> set[str]:
    """Paths of configs in a file's text; of Python also those joined from strings by /."""
    text = path.read_text(encoding="utf-8")
    found = set(re.findall(r"\bconfigs/[\w./-]+\.yaml\b", text))
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            parts = []
            while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                parts.append(node.right.value if isinstance(node.right, ast.Constant) else None)
                node = node.left
            if parts and all(isinstance(part, str) for part in parts):
                joined = "/".join(map(str, reversed(parts)))
                found |= {joined} if re.fullmatch(r"configs/.*\.yaml", joined) else set()
    return found


def test_every_config_that_a_program_names_is_there(tmp_path: Path) -> None:
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "logs"))]
    files = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), ROOT / "Makefile"]
    files += [path for folder in folders for pattern in ("*.py", "*.sh", "*.slurm") for path in folder.rglob(pattern)]
    named = {name: path for path in files for name in named_configs(path)}
    assert "configs/wan2.1_14b/self_forcing_dmd.yaml" in named
    missing = {name: path for name, path in named.items() if name not in NO_FILES and not (ROOT / name).exists()}
    assert not missing, missing
    (tmp_path / "old.py").write_text('x = ROOT / "configs" / "wan" / "old.yaml"\n')
    assert named_configs(tmp_path / "old.py") == {"configs/wan/old.yaml"}


def test_an_overlay_in_the_place_of_a_recipe_is_told() -> None:
    recipe, tiny = ROOT / "configs/wan2.1_1.3b/self_forcing_dmd.yaml", ROOT / "configs/wan_tiny.yaml"
    with pytest.raises(
        ConfigError, match="wan_tiny.yaml is an overlay, and .*self_forcing_dmd.yaml a recipe: give the"
    ):
        load_run(tiny, [str(recipe)])


def test_a_recipe_in_the_place_of_an_overlay_is_told() -> None:
    """Its bases would set keys of the recipe again that its own lines do not name."""
    low, adapters = (ROOT / f"configs/wan2.2_a14b/{name}.yaml" for name in ("dmd_low", "dmd_high_lora"))
    with pytest.raises(ConfigError, match="dmd_high_lora.yaml has `base:`, so it is a recipe, .*: give it alone, or"):
        load_run(low, [str(adapters)])
