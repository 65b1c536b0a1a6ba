"""The geometry of stored weights, from their config.json (Wan's own or Diffusers') or their shapes, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.wan.config import PRESETS, WanConfig
from utils.reading import read_json, reading

Fields = dict[str, Any]

# WanConfig's field -> Diffusers' key, where the value is the same
DIFFUSERS = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "cross_attn_norm": "cross_attn_norm",
    "eps": "eps",
    "image_dim": "image_dim",
}
# of Wan's own WanModel
NATIVE = (
    "model_type", "patch_size", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim", "num_heads",
    "num_layers", "qk_norm", "cross_attn_norm", "eps",
)  # fmt: skip
HEAD_DIM = 128  # of every published Wan
SHAPES_SAY = ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "text_dim", "freq_dim", "patch_size")


def read_config(file: Path) -> Fields | None:
    """WanConfig's fields that a config.json says; None for a config of something else.

    Raises ValueError when it is not JSON or lacks a size.
    """
    values = read_json("config of a Wan DiT", file, "fetch it again")
    with reading("config of a Wan DiT", file, "fetch it again"):
        if "num_attention_heads" in values and "attention_head_dim" in values:
            return _of_diffusers(values) | _of_pipeline(file.parent.parent / "model_index.json")
        if "num_heads" in values and "ffn_dim" in values:
            return _of_native(values)
    return None


def _of_diffusers(values: Mapping[str, Any]) -> Fields:
    fields = {ours: values[theirs] for ours, theirs in DIFFUSERS.items() if values.get(theirs) is not None}
    fields["dim"] = values["num_attention_heads"] * values["attention_head_dim"]
    fields.setdefault("out_dim", fields["in_dim"])
    fields["patch_size"] = tuple(values["patch_size"])
    fields["qk_norm"] = values.get("qk_norm", True) is not None
    fields["image_dim"] = values.get("image_dim")
    return fields | {"model_type": _task(fields)}


def _task(fields: Fields) -> str:
    """The task, where it is not named: given frames come as more channels than go out."""
    return "i2v" if fields["in_dim"] > fields["out_dim"] else "t2v"


def _of_pipeline(file: Path) -> Fields:
    """What Diffusers says of the task in its pipeline's file only: TI2V's time is one a token."""
    if not file.is_file():
        return {}
    return {"model_type": "ti2v"} if read_json("config", file, "fetch it again").get("expand_timesteps") else {}


def _of_native(values: Mapping[str, Any]) -> Fields:
    fields = {key: values[key] for key in (*NATIVE, "image_dim") if values.get(key) is not None}
    fields["dim"] = int(values["dim"])
    if "patch_size" in fields:
        fields["patch_size"] = tuple(fields["patch_size"])
    return fields


def fields_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Fields:
    """What shapes under Wan's own names say of the geometry: all but heads and precision. Missing names say nothing."""
    out: Fields = {}
    if len(patch := shapes.get("patch_embedding.weight", ())) == 5:
        out |= {"dim": patch[0], "in_dim": patch[1], "patch_size": tuple(patch[2:])}
        # always said, for it tells Wan2.1's image-to-video from Wan2.2's, which has no CLIP
        out["image_dim"] = shapes.get("img_emb.proj.0.weight", (None,))[0]
        if (head := shapes.get("head.head.weight")) is not None:
            out["out_dim"] = head[0] // (patch[2] * patch[3] * patch[4])
    names = {
        "ffn_dim": "blocks.0.ffn.2.weight",
        "text_dim": "text_embedding.0.weight",
        "freq_dim": "time_embedding.0.weight",
    }
    out |= {field: shapes[name][1] for field, name in names.items() if len(shapes.get(name, ())) == 2}
    if layers := {name.split(".")[1] for name in shapes if name.startswith("blocks.")}:
        out["num_layers"] = len(layers)
    return out


def geometry_from(config: Fields | None, shapes: Mapping[str, tuple[int, ...]]) -> WanConfig:
    """The geometry of weights with these shapes and, if there is one, this config.json (as `read_config` reads it).

    Raises ValueError when the shapes are not a Wan DiT's, or the geometry is not supported.
    """
    fields = (config or {}) | fields_of_shapes(shapes)
    told_by = {
        "dim": "patch_embedding.weight",
        "ffn_dim": "blocks.0.ffn.2.weight",
        "num_layers": "blocks.0.self_attn.q.weight",
    }
    if missing := [tensor for field, tensor in told_by.items() if field not in fields]:
        raise ValueError(
            f"these weights have no {missing[0]}: they are a part of a Wan DiT, or of another network: give all of its "
            "files"
        )
    if config is None:
        fields |= {"num_heads": fields["dim"] // HEAD_DIM} if fields["dim"] % HEAD_DIM == 0 else {}
        fields |= {"qk_norm": "blocks.0.self_attn.norm_q.weight" in shapes}
        fields |= {"cross_attn_norm": "blocks.0.norm3.weight" in shapes}
        fields |= {"model_type": _task(fields)}
    if "num_heads" not in fields:
        raise ValueError("without a config.json beside them these weights do not say their heads: put it there")
    return WanConfig(**fields)


def describe(fields: Mapping[str, Any]) -> str:
    """The presets that agree with these fields, else the fields themselves."""
    names = [name for name, preset in PRESETS.items() if not differences(preset, fields)]
    if names:
        return f"preset {' or '.join(names)}"
    return ", ".join(f"{key} {fields[key]}" for key in (*SHAPES_SAY, "image_dim") if fields.get(key) is not None)


def differences(config: WanConfig, fields: Mapping[str, Any]) -> list[str]:
    """The fields whose values are not the config's. text_len is left out: it is the text's, not the weights'."""
    ours = dataclasses.asdict(config)
    return [key for key, value in fields.items() if key not in ("text_len", "model_type") and ours[key] != value]


def diffusers_config(config: WanConfig) -> Fields:
    """What `WanTransformer3DModel` is built from, as its config.json."""
    values = dataclasses.asdict(config)
    out: Fields = {"_class_name": "WanTransformer3DModel"}
    out |= {theirs: values[ours] for ours, theirs in DIFFUSERS.items()}
    out |= {"attention_head_dim": config.head_dim, "patch_size": list(config.patch_size), "rope_max_seq_len": 1024}
    out["qk_norm"] = "rms_norm_across_heads" if config.qk_norm else None
    return out | {"added_kv_proj_dim": None if config.image_dim is None else config.dim, "pos_embed_seq_len": None}


def native_config(config: WanConfig) -> Fields:
    """What Wan's own `WanModel` is built from, as its config.json."""
    values = dataclasses.asdict(config)
    return {"_class_name": "WanModel"} | {key: values[key] for key in NATIVE}
