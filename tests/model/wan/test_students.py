"""Published students are told by what their files hold and are called, and by nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.family import families
from model.wan import sources
from model.wan.config import WanConfig
from model.wan.geometry import diffusers_config
from model.wan.students import STUDENTS, student_of
from model.wan.weights import LazyWeights
from tests.nets import MICRO, random_net

STATE = {key: value.detach() for key, value in random_net(0).state_dict().items()}


def saved(path: Path, state: object = STATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("checkpoints/self_forcing_dmd.pt", "self-forcing"),
        ("self_forcing_sid.safetensors.pt", None),
        ("my_self_forcing_dmd.pt", None),
        ("autoregressive_checkpoint/model.pt", "causvid"),
        ("autoregressive_checkpoint_warp_4step_cfg2/model.pt", None),
        ("bidirectional_checkpoint2/model.pt", "causvid-bidirectional"),
        ("models/longlive_base.pt", "longlive"),
        ("chunkwise/causal_forcing.pt", "causal-forcing"),
        ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("causal_forcing.pt", None),  # chunks or frames: the folder says it
        ("framewise-1step.pt", "causal-forcing-1step"),
        ("rCM_Wan2.1_T2V_14B_480p.pt", "rcm"),
        ("ode_init.pt", None),
    ],
)
def test_a_file_is_known_by_its_published_name(tmp_path: Path, name: str, layout: str | None) -> None:
    file = saved(tmp_path / name)
    found = student_of(str(file), None)
    assert (None if found is None else found.title) == (None if layout is None else STUDENTS[layout].title)
    if name.endswith("/model.pt") and layout:
        assert student_of(str(file.parent), None) == found
    assert student_of(str(file), "rcm") == STUDENTS["rcm"]


def test_a_hub_name_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "checkpoints/self_forcing_dmd.pt")
    monkeypatch.setattr(sources, "snapshot", lambda *_: tmp_path)
    found = student_of("gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt", None)
    assert found == STUDENTS["self-forcing"]


def test_the_weights_that_are_there_are_taken_and_told(tmp_path: Path) -> None:
    """Self-Forcing is published with the average, Causal-Forcing's chunks without."""
    for groups, weights in ((["generator"], "raw"), (["generator_ema"], "ema"), (["generator", "generator_ema"], None)):
        for name, published in (("self_forcing_dmd.pt", "ema"), ("chunkwise/causal_forcing.pt", "raw")):
            found = student_of(str(saved(tmp_path / name, dict.fromkeys(groups, STATE))), None)
            assert found is not None
            assert found.weights == (weights or published)


def test_a_linear_patch_embedding_is_a_convolution(tmp_path: Path) -> None:
    """NVlabs/rcm's: rows, columns and channels of a patch in one row of the matrix."""
    flat = {
        f"net.{key}": value.flatten(1) if key == "patch_embedding.weight" else value for key, value in STATE.items()
    }
    weights = LazyWeights(saved(tmp_path / "x.pt", flat))
    assert weights.linear_patch
    assert all(torch.equal(value, STATE[name]) for name, value in weights.read(STATE))
    assert {name: tuple(value.shape) for name, value in STATE.items()} == weights.shapes


@pytest.mark.parametrize(("preset", "layout"), [("t2v", "fastwan"), ("ti2v", "fastwan-5b")])
def test_fastwan_is_told_by_class_and_geometry(tmp_path: Path, preset: str, layout: str) -> None:
    sizes = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 1, "text_dim": 12, "freq_dim": 16}
    config = WanConfig(**sizes, in_dim=4, out_dim=4, model_type=preset)  # type: ignore[arg-type]
    state = {key: value.detach() for key, value in random_net(0, config).state_dict().items()}
    saved(tmp_path / "transformer/diffusion_pytorch_model.bin", state)
    (tmp_path / "transformer/config.json").write_text(json.dumps(diffusers_config(config)))
    index = {"_class_name": "WanDMDPipeline", "expand_timesteps": preset == "ti2v"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    found = student_of(str(tmp_path), None)
    assert found is not None
    assert (found.title, found.sparsity) == (STUDENTS[layout].title, None)  # these weights have no gates
    released = families()["wan"].released(tmp_path)
    assert released.few_steps
    assert "text_encoder" in released.parts


def test_every_layout_says_where_its_numbers_are_from() -> None:
    assert MICRO.model_type == "t2v"
    for student in STUDENTS.values():
        owner, _, file = student.source.partition(", ")
        assert "/" in owner
        assert file.endswith((".yaml", ".py"))
