"""Weights as others store them: eight bits with each form of scale, FastVideo's names, wrappers, and what is no weights.

Each file is written here in the published layout, and must give the numbers that it stands for, or be refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.wan.config import WanConfig
from model.wan.formats import FASTVIDEO_BLOCK, FASTVIDEO_TOP, native_names, to_diffusers_key
from model.wan.weights import LazyWeights
from tests.nets import random_net

CONFIG = WanConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=3, out_dim=3, text_dim=12, text_len=512, freq_dim=16
)
State = dict[str, Tensor]
LAYER = "blocks.1.ffn.0"  # [64, 48]


@pytest.fixture(scope="module")
def state() -> State:
    return {key: value.detach() for key, value in random_net(1, CONFIG).state_dict().items()}


def read(path: Path, name: str = f"{LAYER}.weight") -> Tensor:
    [(_, value)] = LazyWeights(path).read([name])
    return value


# ------------------------------------------------------------------------------------------------------------ eight bits

SCALES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "one number": ((), lambda scale: scale.expand(64, 48)),
    "one of [1]": ((1,), lambda scale: scale.expand(64, 48)),
    "outputs": ((64,), lambda scale: scale[:, None].expand(64, 48)),
    "outputs as a column": ((64, 1), lambda scale: scale.expand(64, 48)),
    "blocks of 16 x 16": ((4, 3), lambda scale: scale.repeat_interleave(16, 0).repeat_interleave(16, 1)),
    "blocks of 22 x 20, cut": ((3, 3), lambda scale: scale.repeat_interleave(22, 0)[:64].repeat_interleave(16, 1)),
    "rows' blocks of 12": ((64, 4), lambda scale: scale.repeat_interleave(12, 1)),
}


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("form", SCALES)
def test_each_form_of_scale_gives_the_product(
    state: State, tmp_path: Path, form: str, dtype: torch.dtype, name: str
) -> None:
    shape, spread = SCALES[form]
    whole = torch.arange(64 * 48).reshape(64, 48) % 251 - 125
    stored = whole.to(dtype) if dtype is torch.int8 else (whole / 16).to(dtype)
    scale = torch.rand(shape) + 0.5
    save_file(state | {f"{LAYER}.weight": stored, f"{LAYER}.{name}": scale}, tmp_path / "a.safetensors")
    weights = LazyWeights(tmp_path / "a.safetensors")
    assert weights.shapes.keys() == state.keys()
    assert torch.equal(read(tmp_path / "a.safetensors"), stored.float() * spread(scale))


def marked(state: State, prefix: str, said: dict[str, Any], *, in_header: bool) -> tuple[State, dict[str, str] | None]:
    """A file as ComfyUI writes it, and its header."""
    eight = state[f"{LAYER}.weight"].to(torch.float8_e4m3fn)
    out = {f"{prefix}{name}": value for name, value in state.items()}
    out |= {f"{prefix}{LAYER}.weight": eight, f"{prefix}{LAYER}.weight_scale": torch.tensor(0.25)}
    out[f"{prefix}{LAYER}.input_scale"] = torch.tensor(1.0)
    out[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if in_header:
        layers = {"format_version": "1.0", "layers": {f"{prefix}{LAYER}": said}}
        return out, {"_quantization_metadata": json.dumps(layers)}
    out[f"{prefix}{LAYER}.comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return out, None


@pytest.mark.parametrize("in_header", [True, False])
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_comfyuis_marks_are_read_under_every_prefix(state: State, tmp_path: Path, prefix: str, in_header: bool) -> None:
    file = tmp_path / "a.safetensors"
    tensors, header = marked(state, prefix, {"format": "float8_e4m3fn"}, in_header=in_header)
    save_file(tensors, file, header)
    assert LazyWeights(file).shapes.keys() == state.keys()
    assert torch.equal(read(file), tensors[f"{prefix}{LAYER}.weight"].float() * 0.25)
    assert torch.equal(read(file, "head.head.weight"), state["head.head.weight"])


@pytest.mark.parametrize("in_header", [True, False])
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"format": "nvfp4"}, r"blocks\.1\.ffn\.0 is stored as 'nvfp4', which is not known: take the bf16"),
        ({"format": "mxfp8"}, "is stored as 'mxfp8'"),
        ({"format": "int8_tensorwise", "convrot": True}, "of rotated weights"),
        ({}, "is stored as None"),
    ],
)
def test_formats_that_are_not_known_are_named(
    state: State, tmp_path: Path, said: dict[str, Any], message: str, in_header: bool
) -> None:
    tensors, header = marked(state, "", said, in_header=in_header)
    save_file(tensors, tmp_path / "a.safetensors", header)
    with pytest.raises(ValueError, match=message):
        LazyWeights(tmp_path / "a.safetensors")


EIGHT = torch.ones(64, 48, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.weight": EIGHT}, "is of torch.int8 and has no scale beside it"),
        (
            {f"{LAYER}.weight": EIGHT.int(), f"{LAYER}.weight_scale": torch.ones(())},
            "is of torch.int32, and weights are real",
        ),
        ({f"{LAYER}.weight": EIGHT.int()}, "is of torch.int32, and weights are real"),
        ({f"{LAYER}.weight": EIGHT[:, :24].byte()}, "is of torch.uint8, and weights are real"),
        (
            {f"{LAYER}.weight_scale": torch.ones(())},
            "is a scale, and .* is of torch.float32: a part of the file is missing",
        ),
        ({f"{LAYER}.weight": EIGHT, f"{LAYER}.weight_scale": torch.ones(48)}, r"is \[48\], which fits no block"),
        ({f"{LAYER}.weight": EIGHT, f"{LAYER}.weight_scale": torch.ones(65, 1)}, r"is \[65, 1\], which fits no"),
        ({f"{LAYER}.weight": EIGHT, f"{LAYER}.weight_scale": torch.ones(64, dtype=torch.uint8)}, "as MXFP8 has it"),
    ],
)
def test_what_cannot_be_made_real_numbers_is_refused_before_it_is_read(
    state: State, tmp_path: Path, change: State, message: str
) -> None:
    save_file(state | change, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        LazyWeights(tmp_path / "a.safetensors")


def test_a_scale_that_is_not_finite_is_refused(state: State, tmp_path: Path) -> None:
    spoilt = {f"{LAYER}.weight": EIGHT, f"{LAYER}.weight_scale": torch.full((64,), float("nan"))}
    save_file(state | spoilt, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        read(tmp_path / "a.safetensors")


def test_a_file_of_blocks_alone_names_what_is_missing(state: State, tmp_path: Path) -> None:
    blocks = {name: value for name, value in state.items() if name.startswith("blocks.")}
    save_file(blocks, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"patch_embedding\.weight"):
        LazyWeights(tmp_path / "a.safetensors").geometry()


# ----------------------------------------------------------------------------------------------------- names, wrappers


def test_fastvideos_names_are_known(state: State, tmp_path: Path) -> None:
    def theirs(name: str) -> str:
        block = re.match(r"blocks\.\d+\.", name)
        before, table = (block[0], FASTVIDEO_BLOCK) if block else ("", FASTVIDEO_TOP)
        module, _, leaf = name.removeprefix(before).rpartition(".")
        return f"{before}{table[module]}.{leaf}" if module in table else to_diffusers_key(name)

    saved = {theirs(name): value for name, value in state.items()}
    assert {"blocks.0.to_q.weight", "blocks.0.ffn.fc_in.bias", "blocks.0.attn2.to_k.weight"} <= saved.keys()
    assert {"patch_embedding.proj.weight", "condition_embedder.time_modulation.linear.weight"} <= saved.keys()
    assert {
        "blocks.0.self_attn_residual_norm.norm.weight",
        "blocks.0.scale_shift_table",
        "proj_out.bias",
    } <= saved.keys()
    save_file(saved, tmp_path / "a.safetensors")
    weights = LazyWeights(tmp_path / "a.safetensors")
    assert weights.shapes.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in weights.read(state))


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {"module": state, "ds_version": "0.16", "ds_config": {"zero": 2}, "lr_scheduler": None},
        lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3, "global_step": 10},
        lambda state: {"generator": {f"model.{k}": v for k, v in state.items()}, "critic": {}, "step": 1},
        lambda state: {"generator_ema": {f"model._fsdp_wrapped_module.{k}": v for k, v in state.items()}},
    ],
    ids=["DeepSpeed", "Lightning", "CausVid", "Self-Forcing"],
)
def test_trainers_wrappings_are_taken_off(
    state: State, tmp_path: Path, wrapped: Callable[[State], dict[str, Any]]
) -> None:
    torch.save(wrapped(state), tmp_path / "a.pt")
    weights = LazyWeights(tmp_path / "a.pt")
    assert weights.shapes.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in weights.read(state))


def test_an_unknown_wrapper_is_named(state: State) -> None:
    with pytest.raises(ValueError, match=r"names begin with 'student\.core\.', which no wrapper"):
        native_names(f"student.core.{name}" for name in state)


@pytest.mark.parametrize(
    ("name", "begins", "message"),
    [
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "run git lfs pull"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "run git lfs pull"),
        ("a.gguf", b"GGUF\3\0\0\0", "is a GGUF file, whose packed blocks are not read: take the bf16"),
    ],
)
def test_what_stands_in_place_of_weights_is_named(tmp_path: Path, name: str, begins: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(begins)
    with pytest.raises(ValueError, match=message):
        LazyWeights(tmp_path / name)
