"""Adapters as ComfyUI reads them, by its own names alone and by our reader: both are the merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from generation import export
from generation.find import find
from model.wan.weights import LazyWeights
from tests.generation.test_export import exported
from tests.generation.test_two_experts import HIGH, LOW
from tests.nets import random_net, with_loras
from tests.small import DISTILLATION, config, merged
from trainer.origin import base_digest
from utils import checkpoint
from utils.config import to_plain
from utils.errors import UserError

RANK, ALPHA = 3, 0.7  # alpha / rank is no power of two
PREFIX = "diffusion_model."
State = dict[str, Tensor]
SIDES: dict[str, dict[str, Any]] = {
    "whole": {},
    "high": {**HIGH, "student": {"expert": "high"}, "teacher": {"expert": "high"}},
    "low": {**LOW, "student": {"expert": "low"}, "teacher": {"expert": "low"}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(
        {key: value.detach() for key, value in random_net(0, config().student.geometry()).state_dict().items()}, file
    )
    return file


def adapter_run(folder: Path, base: Path, **changes: Any) -> Path:
    """A run whose student is an adapter beside some layers of `base`."""
    lora = {"rank": RANK, "alpha": ALPHA, "targets": ["q", "ffn.2"]}
    networks = {"student": {"init": str(base), "lora": lora}, "teacher": {"init": str(base)}}
    run = config(DISTILLATION, **merged(changes, networks))
    shapes = LazyWeights(base).shapes
    names = [name for name in shapes if name.startswith("blocks.") and name.endswith((".q.weight", ".ffn.2.weight"))]
    factors = {}
    for name in names:
        module, (out, inner) = name.removesuffix(".weight"), shapes[name]
        factors |= {
            f"{module}.lora_A.weight": torch.randn(RANK, inner),
            f"{module}.lora_B.weight": torch.randn(out, RANK),
        }
    digest = base_digest(LazyWeights(base), run.student.family.telling)
    state = {"config": to_plain(run), "networks": {"student": {"adapter": {"base": digest}}}}
    checkpoint.save(folder / "checkpoints", 5, {"student": factors}, state)
    return folder


def as_comfyui(file: Path, weights: State) -> State:
    """W + alpha / rank * up @ down, and W + diff, by the names in the file and nothing else, in fp64."""
    found, out = load_file(file), {name: value.double() for name, value in weights.items()}
    assert all(key.startswith(PREFIX) for key in found)
    for key, value in found.items():
        name, _, part = key.removeprefix(PREFIX).rpartition(".")
        if key.endswith(".lora_up.weight"):
            name = name.removesuffix(".lora_up")
            down, alpha = (found[f"{PREFIX}{name}.{other}"].double() for other in ("lora_down.weight", "alpha"))
            assert alpha.shape == ()
            change = alpha / down.shape[0] * value.double().flatten(1) @ down.flatten(1)
            out[f"{name}.weight"] += change.view(out[f"{name}.weight"].shape)
        elif part == "diff":
            out[name if name in out else f"{name}.weight"] += value.double()
        elif part == "diff_b":
            out[f"{name}.bias"] += value.double()
        else:
            assert part == "alpha" or key.endswith(".lora_down.weight"), key
    return out


def close(found: Tensor, expected: Tensor, eps: float) -> None:
    error = (found.double() - expected.double()).abs().max()
    assert float(error) <= eps * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("side", SIDES)
def test_by_comfyuis_names_it_is_the_merged_weights(base: Path, tmp_path: Path, side: str) -> None:
    run = adapter_run(tmp_path / "run", base, **SIDES[side])
    weights, whole = load_file(base), find(run, "student", None).weights()
    expected = dict(whole.read(weights))
    for dtype, eps in (("fp32", 1e-6), ("bf16", 0.02)):
        folder = exported(run, tmp_path / dtype, "--names", "comfyui", "--dtype", dtype, format="lora")
        assert sorted(file.name for file in folder.iterdir()) == ["README.md", f"{dtype}.safetensors"]
        file = folder / f"{dtype}.safetensors"
        ours = dict(with_loras(LazyWeights(base), [(folder, 1.0)]).read(weights))
        theirs = as_comfyui(file, weights)
        for name, value in expected.items():
            close(theirs[name], value, eps)
            torch.testing.assert_close(ours[name].double(), theirs[name], rtol=1e-5, atol=1e-5)
        assert not torch.equal(expected["blocks.0.ffn.2.weight"], weights["blocks.0.ffn.2.weight"])
    page = (tmp_path / "fp32/README.md").read_text()
    assert "Copy fp32.safetensors into ComfyUI's folder models/loras" in page and "library_name" not in page
    assert "LoraLoaderModelOnly" in page and "load_lora_weights" not in page and "an adapter (LoRA) for ComfyUI" in page
    levels = {
        "whole": "`1, 0.9, 0.75, 0`", "high": "`1, 0.9375` and the low-noise expert's first level",
        "low": "`0.833333, 0.625, 0`",
    }  # fmt: skip
    assert f"ManualSigmas has {levels[side]}" in page
    assert ("-noise expert of two" in page) == (side != "whole")


@pytest.mark.parametrize("format", ["diffusers", "native"])
def test_names_of_an_adapter_are_for_adapters(format: str) -> None:
    with pytest.raises(UserError, match="--names is for --format lora") as error:
        export.export_args(["--run", "run", "--format", format, "--out", "out", "--names", "comfyui"])
    assert "\n" not in str(error.value)
