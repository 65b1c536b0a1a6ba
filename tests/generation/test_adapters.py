"""Adapters as ComfyUI reads them, by its own names alone and by our reader: both are the merged weights."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from generation import export
from generation.find import find
from model.wan.geometry import native_config
from model.wan.weights import LazyWeights
from tests.generation.test_export import BIDIRECTIONAL, exported, stock  # noqa: F401
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


# ---------------------------------------------------------------------------------------------------------- extraction


def whole_run(folder: Path, state: State, **changes: Any) -> Path:
    run = config(DISTILLATION, **merged(BIDIRECTIONAL, changes))
    checkpoint.save(folder / "checkpoints", 5, {"student": state}, {"config": to_plain(run)})
    return folder


def moved(weights: State, rank: int | None, *, others: bool) -> State:
    """Each matrix with a change of this rank (None for any), and with `others` each other parameter changed too."""
    generator, out = torch.Generator().manual_seed(9), {}
    for name, value in weights.items():
        matrix = name.endswith(".weight") and value.ndim > 1
        change = torch.randn(value.shape, generator=generator)
        if matrix and rank is not None:
            flat = value.flatten(1)
            up, down = (torch.randn(side, rank, generator=generator) for side in flat.shape)
            change = (up @ down.T).view(value.shape)
        out[name] = value + 0.05 * change if matrix or others else value
    return out


def error(found: Tensor, expected: Tensor, start: Tensor) -> tuple[float, float]:
    return float((found.double() - expected.double()).square().sum()), float((expected - start).double().square().sum())


def table(page: str) -> dict[int, float]:
    """Rank -> relative error."""
    return {
        int(rank): float(value) / 100
        for rank, value in re.findall(r"^\| (\d+)(?: \(full\))? \| ([\d.e+-]+)% \|$", page, re.M)
    }


@pytest.mark.parametrize("names", ["diffusers", "comfyui"])
def test_an_exact_change_of_low_rank_comes_back(base: Path, tmp_path: Path, names: str) -> None:
    weights = load_file(base)
    expected = moved(weights, 3, others=False)
    run = whole_run(tmp_path / "run", expected)
    folder = exported(run, tmp_path / "out", "--base", str(base), "--rank", "3", "--names", names, format="lora")
    found = dict(with_loras(LazyWeights(base), [(folder, 1.0)]).read(weights))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6)
    page = (folder / "README.md").read_text()
    errors = table(page)
    assert errors[3] < 1e-5 and errors[4] < 1e-5
    assert "Nothing but matrices differs." in page and "from local weights named base.safetensors" in page
    if names == "diffusers":
        config, state = (
            json.loads((folder / "peft/adapter_config.json").read_text()),
            load_file(folder / "peft/adapter_model.safetensors"),
        )
        assert config["r"] == config["lora_alpha"] == 3
        assert {value.shape[0] for key, value in state.items() if "lora_A" in key} == {3}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_error_of_each_rank_is_that_of_the_merged_weights(base: Path, tmp_path: Path, dtype: str) -> None:
    """Beside ComfyUI's names lies all that is no matrix, so that is exact; of the matrices only the tail is absent."""
    weights = load_file(base)
    expected = moved(weights, None, others=True)
    run = whole_run(tmp_path / "run", expected)
    told: list[dict[int, float]] = []
    for rank in (4, 5, 32, 64):
        options = ["--base", str(base), "--rank", str(rank), "--names", "comfyui", "--dtype", dtype]
        folder = exported(run, tmp_path / str(rank), *options, format="lora")
        page = (folder / "README.md").read_text()
        told.append(table(page))
        found = as_comfyui(folder / f"{rank}.safetensors", weights)
        ours = dict(with_loras(LazyWeights(base), [(folder, 1.0)]).read(weights))
        squares = [0.0, 0.0]
        for name, value in expected.items():
            torch.testing.assert_close(ours[name].double(), found[name], rtol=1e-5, atol=1e-5)
            if name.endswith(".weight") and value.ndim > 1:
                squares = [a + b for a, b in zip(squares, error(found[name], value, weights[name]), strict=True)]
            else:
                close(found[name], value, 1e-6 if dtype == "fp32" else 2**-8)
        measured = (squares[0] / squares[1]) ** 0.5
        if dtype == "fp32":
            assert measured == pytest.approx(told[-1][min(rank, 32)], rel=5e-3, abs=1e-5)
        stored = float(re.findall(r"as it is stored it lacks ([\d.e+-]+)%", page)[0]) / 100
        assert measured == pytest.approx(stored, rel=5e-3, abs=1e-5)
        assert "blocks.N.modulation" in page and "blocks.N.self_attn.q.bias" in page and "head.modulation" in page
    assert told[0] == {rank: told[1][rank] for rank in told[0]}
    assert 1 > told[0][4] > told[0][8] > told[0][16] > told[0][32] == 0.0
    assert sorted(told[1]) == [4, 5, 8, 16, 32]


def test_what_diffusers_has_no_names_for_is_told_and_counted(
    base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    stock: Any,  # noqa: F811
) -> None:
    """Stock Diffusers lays the rest over its own network, the patch embedding included."""
    weights = load_file(base)
    expected = moved(weights, None, others=True)
    run = whole_run(tmp_path / "run", expected)
    folder = exported(run, tmp_path / "out", "--base", str(base), format="lora")
    others = [name for name, value in weights.items() if not name.endswith(".weight") or value.ndim < 2]
    change = {name: float((expected[name] - weights[name]).double().square().sum()) for name in weights}
    share = 100 * (sum(change[name] for name in others) / sum(change.values())) ** 0.5
    [line] = [record.getMessage() for record in caplog.records if record.name == "fewstep"]
    assert f"{len(others)} parameters that are no matrices are left out, {share:.3g}% of the whole change" in line
    lacks = f"It lacks {len(others)} other parameters ({share:.3g}% of the whole change)"
    assert lacks in (folder / "README.md").read_text()
    mixed = {name: weights[name] if name in others else expected[name] for name in weights}
    plain = exported(whole_run(tmp_path / "plain", weights), tmp_path / "theirs")
    net = stock.WanTransformer3DModel.from_pretrained(plain, subfolder="transformer")
    net.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
    geometry = config().student.geometry()
    ours = random_net(0, geometry)
    ours.load_state_dict(mixed)
    x, sigma = torch.randn(1, 3, geometry.in_dim, 4, 6), torch.tensor([0.4])
    text = torch.randn(1, geometry.text_len, geometry.text_dim)
    with torch.no_grad():
        found = net(x.transpose(1, 2), 1000 * sigma, text, return_dict=False)[0].transpose(1, 2)
        torch.testing.assert_close(found, ours(x, sigma, text), rtol=1e-4, atol=1e-4)


def test_the_base_may_be_a_run_or_a_pipelines_folder(base: Path, tmp_path: Path) -> None:
    weights = load_file(base)
    run, before = whole_run(tmp_path / "run", moved(weights, 2, others=False)), whole_run(tmp_path / "before", weights)
    pipeline = exported(before, tmp_path / "pipeline")
    out = [
        exported(run, tmp_path / f"out{i}", "--base", str(a), "--rank", "2", format="lora")
        for i, a in enumerate((base, before, pipeline))
    ]
    first, *rest = [load_file(folder / "pytorch_lora_weights.safetensors") for folder in out]
    assert all(torch.equal(value, other[key]) for other in rest for key, value in first.items())
    assert "It is the difference from the run small" in (out[1] / "README.md").read_text()


def test_what_cannot_be_extracted_is_one_line(base: Path, tmp_path: Path) -> None:
    weights = load_file(base)
    run, other = whole_run(tmp_path / "run", weights), tmp_path / "other.safetensors"
    save_file({key: value for key, value in weights.items() if "blocks.1." not in key}, other)
    adapted = adapter_run(tmp_path / "adapted", base)
    cases = [
        (run, ["--base", str(base)], "no matrix of these weights differs from the base's"),
        (run, ["--base", str(other)], "not of one geometry: .* missing|unexpected"),
        (run, ["--base", str(tmp_path / "none.safetensors")], "no weights at"),
        (run, ["--base", "owner/name"], "'owner/name' is no local path, and HF_HUB_OFFLINE is set"),
        (run, ["--rank", "3"], "--rank is of an adapter that is extracted"),
        (run, ["--rank", "0", "--base", str(base)], "--rank 0: give a whole number from 1"),
        (run, ["--dtype", "fp8", "--base", str(base)], "--dtype fp8 is for whole weights"),
        (adapted, ["--rank", "3", "--base", "owner/name"], "trained an adapter of rank 3: leave it out"),
        (adapted, ["--base", str(base)], "give a repository of the Hub as owner/name"),
    ]
    for folder, options, message in cases:
        with pytest.raises(UserError, match=message) as refused:
            exported(folder, tmp_path / "out", *options, format="lora")
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", ["diffusers", "comfyui"])
def test_two_files_are_subtracted_as_a_run_and_a_file_are(
    base: Path, tmp_path: Path, names: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of Self-Forcing's layout and Wan's own: no run says anything of either."""
    weights = load_file(base)
    expected = moved(weights, 2, others=True)
    groups = {"generator": weights, "generator_ema": {f"model.{key}": value for key, value in expected.items()}}
    torch.save(groups, tmp_path / "student.pt")
    (tmp_path / "config.json").write_text(json.dumps(native_config(config().student.geometry())))  # says its heads
    options = ["--base", str(base), "--rank", "2", "--names", names, "--licence", "mit"]
    run = exported(whole_run(tmp_path / "run", expected), tmp_path / "a/out", *options, format="lora")
    argv = ["export.py", "--model", str(tmp_path / "student.pt"), "--format", "lora", "--out", str(tmp_path / "b/out")]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*argv, *options])
    assert export.main() == 0
    folder, said = tmp_path / "b/out", capsys.readouterr().out
    ((theirs, ours),) = zip(run.glob("*.safetensors"), folder.glob("*.safetensors"), strict=True)
    assert theirs.name == ours.name
    assert theirs.read_bytes() == ours.read_bytes()
    page = (folder / "README.md").read_text()
    assert "license: mit" in page and table(page) == table((run / "README.md").read_text())
    assert "the difference of local weights named student.pt from local weights named base.safetensors" in page
    assert ("load_lora_weights" in page) == (names == "diffusers") == ("models/loras" not in page)
    assert "rank 2: error" in said and "It has rank 2" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "r", "--base", "A"], "--model and --run are two networks"),
        (["--format", "native", "--base", "A"], "--model is what --format lora subtracts"),
        ([], "--model is what --format lora subtracts"),
        (["--network", "critic", "--base", "A"], "--network is of a --run"),
    ],
)
def test_what_goes_with_files_is_one_line(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        export.export_args(["--model", "B", "--format", "lora", "--out", "out", *options])
    assert "\n" not in str(refused.value)
