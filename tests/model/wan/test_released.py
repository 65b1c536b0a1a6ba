"""Wan's released models: how they are sampled by their JSON files alone, and how large they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from model.network import released_model
from model.wan.config import PRESETS
from model.wan.family import FAMILY
from model.wan.geometry import diffusers_config
from model.wan.released import SOURCES
from tests import ROOT

UNIPC = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}


def folder(
    path: Path, preset: str, index: Mapping[str, Any], scheduler: Mapping[str, Any] | None, *, experts: bool = False
) -> Path:
    """A pipeline's folder of a preset, without any weights."""
    config = diffusers_config(PRESETS[preset])
    files = {"transformer/config.json": config, "scheduler/scheduler_config.json": scheduler, "model_index.json": index}
    files |= {"transformer_2/config.json": config} if experts else {}
    for name, values in files.items():
        if values:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("preset", "index", "scheduler", "sampling", "size"),
    [
        ("1.3b", {"_class_name": "WanPipeline"}, UNIPC, (50, 5.0, None, None, "unipc", 3.0), (480, 832, 21)),
        ("i2v-14b", {"_class_name": "WanImageToVideoPipeline"}, UNIPC, (50, 5.0, None, None, "unipc", 3.0), (480, 832, 21)),
        (
            "5b", {"_class_name": "WanPipeline", "expand_timesteps": True},
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0},
            (50, 5.0, None, None, "euler", 5.0), (704, 1280, 31),
        ),
        (
            "a14b", {"_class_name": "WanPipeline", "boundary_ratio": 0.875}, {**UNIPC, "flow_shift": 12},
            (40, 4.0, 3.0, 0.875, "unipc", 12.0), (480, 832, 21),
        ),
        (
            "i2v-a14b", {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9}, UNIPC,
            (40, 3.5, 3.5, 0.9, "unipc", 3.0), (480, 832, 21),
        ),
        ("14b", {}, None, (50, 5.0, None, None, "euler", None), (480, 832, 21)),  # what it is, its transformer says
    ],
)  # fmt: skip
def test_a_released_model_says_how_it_is_sampled(
    tmp_path: Path, preset: str, index: dict[str, Any], scheduler: Any, sampling: tuple[Any, ...], size: tuple[int, ...]
) -> None:
    """Before any weights are there, so that only the parts that it needs are fetched."""
    path = folder(tmp_path, preset, index, scheduler, experts=preset.endswith("a14b"))
    found, said = released_model(str(path))
    assert found == path
    assert (said.steps, said.guidance, said.low_guidance, said.boundary, said.solver, said.shift) == sampling
    assert (said.height, said.width, said.frames) == size
    assert ("transformer_2" in said.parts) == preset.endswith("a14b")
    assert ("image_encoder" in said.parts) == (preset == "i2v-14b")


def test_of_a_hub_name_what_says_the_most_is_fetched_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path, "1.3b", {"_class_name": "WanPipeline"}, UNIPC)
    fetched: list[list[str]] = []

    def snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
        assert repo == "owner/model"
        fetched.append(patterns)
        return path

    monkeypatch.setattr("model.folders.snapshot", snapshot)
    released_model("owner/model")
    small = ["model_index.json", "*config.json"]
    parts = ["transformer/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*"]
    assert fetched == [small, ["model_index.json", *parts]]


@pytest.mark.parametrize(
    ("index", "scheduler", "problem"),
    [
        ({"_class_name": "WanVACEPipeline"}, UNIPC, "it is a model of WanVACEPipeline, and known are WanPipeline, "),
        ({"_class_name": "FluxPipeline"}, UNIPC, "it is a model of FluxPipeline, and known are"),
        ({"boundary_ratio": 0.9}, UNIPC, "it is a model of no class, and known are"),
        ({"_class_name": "WanPipeline"}, {"_class_name": "DDIMScheduler"}, "its scheduler is DDIMScheduler for"),
        ({"_class_name": "WanPipeline"}, {**UNIPC, "prediction_type": "epsilon"}, "UniPCMultistepScheduler for epsilon"),
    ],
)  # fmt: skip
def test_an_unknown_release_is_refused_in_one_line(
    tmp_path: Path, index: dict[str, Any], scheduler: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        released_model(str(folder(tmp_path, "1.3b", index, scheduler)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", SOURCES)
def test_the_bytes_of_a_source_are_those_of_its_geometry_in_fp32(preset: str) -> None:
    """And the preset's weights are one expert's, where there are two."""
    source = FAMILY.sources[preset]
    with torch.device("meta"):  # a layer's first weights may be drawn anew: the last count
        weights = dict(FAMILY.random_weights(PRESETS[preset], None))
    count = sum(value.numel() for value in weights.values())
    assert source.parts["transformer"] == 4 * count
    assert source.parts.get("transformer_2", 4 * count) == 4 * count
    assert ("image_encoder" in source.parts) == (PRESETS[preset].image_dim is not None)
    assert source.size == sum(source.parts.values())


def test_the_page_says_how_large_they_are() -> None:
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    for preset, source in SOURCES.items():
        network, everything = (f"{size / 1e9:.1f} GB" for size in (source.parts["transformer"], source.size))
        assert f"| {preset} | {source.repo} | {network} | {everything} |" in page
    assert {source.licence for source in SOURCES.values()} == {"Apache-2.0"}


def test_a_source_is_fetched_by_one_command() -> None:
    source = SOURCES["1.3b"]
    assert source.download_command() == "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    said = source.download_command("transformer", "vae")
    assert said == "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --include 'transformer/*' --include 'vae/*'"


def test_the_bytes_of_its_other_parts_are_those_of_their_published_sizes() -> None:
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    umt5 = transformers.UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    clip = transformers.CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
    )
    wide = {
        "z_dim": 48, "base_dim": 160, "decoder_base_dim": 256, "is_residual": True, "patch_size": 2,
        "in_channels": 12, "out_channels": 12, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
    }  # fmt: skip
    with torch.device("meta"):
        parts = {
            "text_encoder": transformers.UMT5EncoderModel(umt5),
            "image_encoder": transformers.CLIPVisionModel(clip),
            "vae": diffusers.AutoencoderKLWan(),
            "wide": diffusers.AutoencoderKLWan(**wide),
        }
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    for preset, source in SOURCES.items():
        of_wan21 = "Wan2.1" in source.repo
        assert source.parts["text_encoder"] == (4 if of_wan21 else 2) * count["text_encoder"]
        assert source.parts["vae"] == 4 * count["wide" if preset == "5b" else "vae"]
    assert SOURCES["i2v-14b"].parts["image_encoder"] == 2 * count["image_encoder"]
