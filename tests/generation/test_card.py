"""The card of each export: its code, as printed, loads it and samples it as the run does; its base is never a guess."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.sizes import schedule_at
from generation.base import base_of
from generation.card import PROMPT, scheduler_sigmas
from generation.export import described, export_args
from generation.find import find
from generation.two_experts import joined
from model.network import NetworkConfig
from model.released import Source
from model.text_encoder import toy_text_encoder
from model.wan.family import FAMILY
from model.wan.transformer import WanTransformer
from scripts.tiny_models import small_transformer
from tests.generation.test_export import BIDIRECTIONAL, NETWORKS, exported, make_run, network, parts, stock  # noqa: F401
from tests.generation.test_two_experts import HIGH, LOW
from tests.small import DIFFUSION, DISTILLATION, config, merged
from trainer.network_factory import NetworkSpec, build_network
from utils import checkpoint
from utils.config import to_plain
from utils.errors import UserError

CPU = torch.device("cpu")
BASE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SHAPE = (33, 64, 64, 3)  # of the toy world's videos through a VAE
# the tiny preset as it is: its own numbers over those of DISTILLATION
TINY = {"preset": "tiny", "overrides": {"dim": 96, "ffn_dim": 192, "num_layers": 2}, "attention": "plain"}


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stock: Any) -> Path:  # noqa: F811
    """A folder to work in, where the tiny preset is a released model that lies under its name on the Hub."""
    monkeypatch.setattr(FAMILY, "sources", {"tiny": Source(BASE, {}, "Apache-2.0")})
    monkeypatch.chdir(tmp_path)
    geometry = FAMILY.presets["tiny"]
    text = toy_text_encoder([PROMPT], geometry.text_len, geometry.text_dim, seed=0)
    pipe = stock.WanPipeline(
        vae=parts(geometry.out_dim, geometry.text_dim)["vae"], text_encoder=text.encoder, tokenizer=text.tokenizer,
        transformer=small_transformer(geometry, 0), scheduler=stock.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / BASE)
    return tmp_path


def tiny_run(folder: Path, **changes: Any) -> Path:
    networks = dict.fromkeys(("student", "teacher", "critic"), TINY)
    return make_run(folder, config(DISTILLATION, **merged({**BIDIRECTIONAL, **networks}, changes)))


def code(folder: Path) -> str:
    (found,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    return found


def ran(folder: Path) -> dict[str, Any]:
    """What the card's code leaves behind, run as it is printed beside the folder."""
    names: dict[str, Any] = {}
    exec(compile(code(folder), str(folder / "README.md"), "exec"), names)
    return names


def check_weights(theirs: Any, ours: WanTransformer, geometry: Any) -> None:
    """Both networks give the same in the precision of the card."""
    x, sigma = torch.randn(1, 3, geometry.in_dim, 4, 4), torch.tensor([0.7])
    text = torch.randn(1, geometry.text_len, geometry.text_dim)
    with torch.no_grad():
        found = theirs.float()(x.transpose(1, 2), 1000 * sigma, text, return_dict=False)[0].transpose(1, 2)
        expected = ours(x, sigma, text)
    assert float((found - expected).norm() / expected.norm()) < 0.03  # weights rounded to bf16


@pytest.mark.parametrize("format", ["diffusers", "native"])
def test_the_code_of_the_card_loads_and_samples_the_export(released: Path, format: str) -> None:
    folder = exported(tiny_run(released / "run"), released / "out", "--shard_gb", "0.0002", format=format)
    names = ran(folder)
    assert names["steps"] == pytest.approx([1.0, 0.6, 0.3])
    assert names["video"].shape == SHAPE
    pipe = names["pipe"]
    assert pipe.scheduler.config.shift == 3.0 and pipe.scheduler.config.stochastic_sampling
    settings = config(DISTILLATION, **BIDIRECTIONAL, student=TINY, teacher=TINY, critic=TINY)
    torch.testing.assert_close(pipe.scheduler.sigmas[:-1], torch.tensor(settings.schedule.sigmas()), rtol=1e-5, atol=0)
    check_weights(pipe.transformer, network(settings, NETWORKS["student_ema"]), settings.student.geometry())


def test_the_code_of_an_adapters_card_lays_it_over_its_base(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = {"rank": 2, "alpha": 6.0, "targets": ["q"]}
    started = {name: {**TINY, "init": BASE} for name in ("student", "teacher", "critic")}
    run = config(
        DISTILLATION, **merged({**BIDIRECTIONAL, **started}, {"student": {"lora": lora}, "critic": {"lora": lora}})
    )
    width, q = run.student.geometry().dim, "blocks.0.self_attn.q"
    adapter = {f"{q}.lora_A.weight": torch.randn(2, width), f"{q}.lora_B.weight": torch.randn(width, 2)}
    checkpoint.save(released / "run" / "checkpoints", 5, {"student": adapter}, {"config": to_plain(run)})
    elsewhere = released / "elsewhere"
    elsewhere.mkdir()
    with monkeypatch.context() as away:
        away.chdir(elsewhere)  # where no folder has the name of the base
        folder = exported(released / "run", released / "out", format="lora")
    page = (folder / "README.md").read_text()
    assert f"license: apache-2.0\nbase_model:\n- {BASE}\nbase_model_relation: adapter\n" in page
    assert "rank 2, alpha 6, beside q" in page
    names = ran(folder)
    assert names["pipe"].scheduler.config.shift == 3.0 and names["video"].shape == SHAPE
    expected = build_network(NetworkSpec(replace(run.student, lora=None, init=str(released / BASE)), "student", 0), CPU)
    with torch.no_grad():
        change = 3.0 * adapter[f"{q}.lora_B.weight"] @ adapter[f"{q}.lora_A.weight"]
        expected.get_parameter(f"{q}.weight").add_(change)
    check_weights(names["pipe"].transformer, expected, run.student.geometry())


def test_both_experts_are_native_folders_that_the_card_loads(released: Path) -> None:
    high = tiny_run(released / "high", **HIGH)
    low = tiny_run(released / "low", **LOW)
    folder = exported(high, released / "out", "--low_run", str(low), "--weights", "raw", format="native")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "high_noise_model", "low_noise_model"]
    from model.wan.weights import LazyWeights

    run = config(DISTILLATION, **merged(HIGH, dict.fromkeys(("student", "teacher", "critic"), TINY)))
    state = network(run, NETWORKS["student"]).state_dict()
    for expert in ("high", "low"):
        weights = LazyWeights(folder, expert=expert)
        assert all(torch.equal(value, state[name]) for name, value in weights.read(state))
    assert "high noise from sigma 0.875 up" in (folder / "README.md").read_text()
    names = ran(folder)
    pipe, (both, _) = (
        names["pipe"],
        joined(run, config(DISTILLATION, **merged(LOW, {"student": TINY, "teacher": TINY, "critic": TINY}))),
    )
    assert pipe.config.boundary_ratio == 0.875 and names["video"].shape == SHAPE
    assert names["steps"] == pytest.approx(scheduler_sigmas(both))
    check_weights(pipe.transformer_2, network(run, NETWORKS["student"]), run.student.geometry())


def test_the_code_of_a_teachers_card_takes_its_own_solver(released: Path) -> None:
    folder = exported(
        make_run(released / "run", config(DIFFUSION, student=TINY, validation={"steps": 3})), released / "out"
    )
    names = ran(folder)
    assert len(names["pipe"].scheduler.timesteps) == 3 and names["pipe"].scheduler.config.flow_shift == 3.0
    assert names["video"].shape == SHAPE


def settings(run: Path, *options: str, format: str = "native") -> str:
    out = exported(run, run.parent / f"out{len(list(run.parent.iterdir()))}", *options, format=format)
    return (out / "README.md").read_text()


def test_what_nobody_samples_with_diffusers_has_no_code(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(DISTILLATION, **BIDIRECTIONAL))
    page = settings(run)
    assert "no released model has this geometry" in page.lower() and "```" not in page
    for row in ("| steps | 3 |", "| noise levels (sigmas) | 1, 0.818182, 0.5625 |", "| timesteps | 1000, 818.182, 562.5 |",
                "| shift | 3 |", "| guidance | 1 (none: one pass a step) |", "| objective | dmd |"):  # fmt: skip
        assert row in page
    assert "as ComfyUI reads it" in settings(run, "--dtype", "fp8")
    assert "not meant to make any" in settings(run, "--network", "critic")
    low = make_run(tmp_path / "low", config(DISTILLATION, **LOW))
    assert "This is the low-noise expert of two" in settings(low)


def test_a_base_is_named_where_it_is_certain_and_never_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    known = base_of(NetworkConfig(init=f"{BASE}@main"))
    assert (known.repo, known.licence, known.is_whole_start) == (BASE, "Apache-2.0", True)
    cached = tmp_path / "hub/models--someone--tuned/snapshots/abc/transformer"
    for init in (str(cached), "someone/tuned/model.safetensors"):
        cached.mkdir(parents=True, exist_ok=True)
        found = base_of(NetworkConfig(init=init))
        assert (found.repo, found.licence, found.is_whole_start) == ("someone/tuned", None, False)
        assert found.told() == "Base model: someone/tuned (licence: unknown)."
    local = base_of(NetworkConfig(init="weights/Wan2.1-T2V-1.3B-Diffusers"))
    assert local.repo is local.licence is None
    assert local.told().startswith("Unknown base: training began from local weights named Wan2.1-T2V-1.3B-Diffusers")
    assert f"--base {BASE} if that is what" in local.remedy({BASE: FAMILY.sources["1.3b"]})
    assert base_of(NetworkConfig(), None).told() == "No base model: training began from random weights."


def test_a_base_is_found_through_earlier_runs_and_an_added_lora_makes_the_licence_unknown(tmp_path: Path) -> None:
    def run(name: str, **student: Any) -> Path:
        settings = config(DISTILLATION, name=name, **BIDIRECTIONAL, student=student)
        return make_run(tmp_path / name, settings)

    first = run("first", init=BASE)
    second = base_of(NetworkConfig(init=str(first)))
    assert (second.repo, second.licence, second.is_whole_start) == (BASE, "Apache-2.0", False)
    assert second.told().endswith("In between lie the runs first.")
    styled = run("styled", init=str(first), loras=[{"path": "/some/where/style.safetensors"}])
    third = base_of(NetworkConfig(init=str(styled)))
    assert (third.repo, third.licence, third.runs, third.loras) == (
        BASE,
        None,
        ("styled", "first"),
        ("style.safetensors",),
    )
    options = ["--run", str(styled), "--format", "native", "--out", str(tmp_path / "out"), "--push", "owner/name"]
    args = export_args(options)
    with pytest.raises(UserError, match="the licence is unknown.*give --licence NAME"):
        described(args, find(styled, "student", None), (find(styled, "student", None),), None)


def test_the_card_of_a_run_of_several_sizes_has_the_schedule_of_each(tmp_path: Path) -> None:
    changes = merged(BIDIRECTIONAL, {"training": {"sizes": [{}, {"frames": 3}]}})
    run = config(DISTILLATION, **changes)
    page = (exported(make_run(tmp_path / "run", run), tmp_path / "out") / "README.md").read_text()
    frames, height, width = run.data.size
    schedule = schedule_at(run, (3, height, width))
    levels = ", ".join(f"{sigma:.6g}" for sigma in schedule.sigmas())
    shift = 3 * (3 / frames) ** 0.5
    assert f"| for 9 frames of {8 * height}x{8 * width} pixels | shift {shift:.6g}, noise levels {levels} |" in page
    assert "| shift | 3 |" in page
    assert page.count("frames of") == 2
