"""Geometry presets against Wan's published sizes and Diffusers' model, on the meta device; loading weights from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.export import Format
from model.wan.config import PRESETS, WanConfig, geometry
from model.wan.transformer import WanTransformer
from model.wan.weights import (
    detect_format,
    load_native,
    load_weights,
    to_diffusers_key,
    to_native,
    to_native_key,
    weight_files,
)

# Wan2.1's own code for the first two; the others as Diffusers builds them. A14B: each of its experts.
PARAMETERS = {
    "1.3b": 1_418_996_800, "14b": 14_288_491_584, "5b": 4_999_787_712,
    "i2v-14b": 16_394_878_784, "a14b": 14_288_491_584, "i2v-a14b": 14_288_901_184,
}  # fmt: skip


def native_key(key: str) -> str:
    from tests.model.wan.test_diffusers_parity import native_key

    return native_key(key)


def meta(config: WanConfig) -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(config)


@pytest.mark.parametrize("preset", PARAMETERS)
def test_published_parameter_counts(preset: str) -> None:
    assert sum(p.numel() for p in meta(PRESETS[preset]).parameters()) == PARAMETERS[preset]


@pytest.mark.parametrize("preset", PARAMETERS)
def test_every_key_and_shape_is_diffusers(preset: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    c = PRESETS[preset]
    with torch.device("meta"):
        other = diffusers.WanTransformer3DModel(
            patch_size=c.patch_size, num_attention_heads=c.num_heads, attention_head_dim=c.head_dim,
            in_channels=c.in_dim, out_channels=c.out_dim, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim,
            num_layers=c.num_layers, cross_attn_norm=c.cross_attn_norm, eps=c.eps,
            image_dim=c.image_dim, added_kv_proj_dim=None if c.image_dim is None else c.dim,
        )  # fmt: skip
    ours = {key: value.shape for key, value in meta(c).state_dict().items()}
    assert ours == {native_key(key): value.shape for key, value in other.state_dict().items()}


def parameters_in_closed_form(c: WanConfig) -> int:
    """Counted by hand from the paper's figure, not from the code."""
    d, patch = c.dim, c.patch_size[0] * c.patch_size[1] * c.patch_size[2]
    attention = 4 * (d * d + d) + 2 * d
    block = 2 * attention + 2 * d + (d * c.ffn_dim + c.ffn_dim) + (c.ffn_dim * d + d) + 6 * d
    embeddings = (c.in_dim * patch * d + d) + (c.text_dim * d + d + d * d + d) + (c.freq_dim * d + d + d * d + d)
    if c.image_dim is not None:
        block += 2 * (d * d + d) + d
        embeddings += 2 * c.image_dim + (c.image_dim**2 + c.image_dim) + (c.image_dim * d + d) + 2 * d
    return c.num_layers * block + embeddings + (d * 6 * d + 6 * d) + (d * c.out_dim * patch + c.out_dim * patch) + 2 * d


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_count_in_closed_form(preset: str) -> None:
    c = PRESETS[preset]
    assert sum(p.numel() for p in meta(c).parameters()) == parameters_in_closed_form(c)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "num_heads 5 does not divide dim 96"),
        ({"num_heads": 24}, "head dim 4"),
        ({"freq_dim": 63}, "freq_dim 63"),
        ({"patch_size": (2, 2, 2)}, "must not join frames"),
        ({"patch_size": (1, 2)}, "three positive numbers"),
        ({"model_type": "i2v"}, "in_dim 4 must be more than out_dim 4"),
        ({"model_type": "s2v"}, "model_type 's2v' is unknown: choose one of t2v, i2v, ti2v"),
        ({"image_dim": 8}, "image_dim 8 needs model_type 'i2v'"),
        ({"model_type": "i2v", "in_dim": 9, "image_dim": 0}, "image_dim must be a whole number of at least 1"),
        ({"width": 3}, "unknown geometry field 'width'"),
    ],
)
def test_bad_geometry_is_one_line(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        geometry("tiny", overrides)
    assert "\n" not in str(error.value)


def test_unknown_preset_names_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="choose one of tiny"):
        geometry("2b")


def test_tokens_per_frame() -> None:
    assert PRESETS["1.3b"].tokens_per_frame(60, 104) == 1560  # 480x832
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        PRESETS["1.3b"].tokens_per_frame(61, 104)


TINY = PRESETS["tiny"]


def random_net(seed: int) -> WanTransformer:
    torch.manual_seed(seed)
    return WanTransformer(TINY)


def assert_same(net: WanTransformer, expected: dict[str, torch.Tensor]) -> None:
    state = net.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("wrapper", ["", "model.", "_orig_mod.", "model._fsdp_wrapped_module."])
@pytest.mark.parametrize("native", [True, False])
def test_load_weights_of_any_format_and_prefix(tmp_path: Path, wrapper: str, native: bool) -> None:
    state = random_net(1).state_dict()
    names = {key: key if native else to_diffusers_key(key) for key in state}
    file = tmp_path / "x.safetensors"
    save_file({wrapper + names[key]: value.contiguous() for key, value in state.items()}, file)
    net = random_net(2)
    load_weights(net, file)
    assert_same(net, state)


def test_wrappers_within_names_are_stripped() -> None:
    state = random_net(1).state_dict()
    wrapped = {
        key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._orig_mod."): value for key, value in state.items()
    }
    assert wrapped.keys() != state.keys()
    assert to_native(wrapped).keys() == state.keys()
    with pytest.raises(ValueError, match="twice"):
        to_native(state | {"model.head.head.bias": state["head.head.bias"]})


def test_load_weights_of_a_sharded_folder(tmp_path: Path) -> None:
    state = {to_diffusers_key(key): value for key, value in random_net(1).state_dict().items()}
    keys = sorted(state)
    shards = {"d-00001-of-00002.safetensors": keys[:20], "d-00002-of-00002.safetensors": keys[20:]}
    for name, part in shards.items():
        save_file({key: state[key] for key in part}, tmp_path / name)
    with pytest.raises(ValueError, match="2 .safetensors files and 0 index files"):
        weight_files(tmp_path)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (tmp_path / "d.safetensors.index.json").write_text(json.dumps(index))
    net = random_net(2)
    load_weights(net, tmp_path)
    assert_same(net, {to_native_key(key): value for key, value in state.items()})
    (tmp_path / "d-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="d-00002-of-00002.safetensors, which is not there"):
        weight_files(tmp_path)


def test_load_casts_to_the_nets_own_precision(tmp_path: Path) -> None:
    state = {key: value.bfloat16() for key, value in random_net(1).state_dict().items()}
    net = random_net(2)
    load_native(net, state)
    assert all(p.dtype is torch.float32 for p in net.parameters())
    assert_same(net, {key: value.float() for key, value in state.items()})


def test_every_misfit_is_named_and_nothing_is_copied() -> None:
    net = random_net(1)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = random_net(2).state_dict()
    del state["head.head.bias"]
    state["img_emb.proj.0.weight"] = torch.zeros(1)
    state["patch_embedding.bias"] = torch.zeros(3)
    with pytest.raises(ValueError) as error:
        load_native(net, state)
    for part in (
        "1 missing (head.head.bias)",
        "1 unexpected (img_emb.proj.0.weight)",
        "patch_embedding.bias [3] instead of [96]",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert_same(net, before)


def test_formats_are_told_apart_by_names() -> None:
    keys = list(random_net(1).state_dict())
    assert detect_format(keys) is Format.NATIVE
    assert detect_format(map(to_diffusers_key, keys)) is Format.DIFFUSERS
    with pytest.raises(ValueError, match="no Wan DiT"):
        detect_format(["encoder.layer.0.weight"])
    with pytest.raises(ValueError, match="no weights at"):
        weight_files("nowhere")
