"""`--model` on few-step students as their authors publish them: files of their layouts, with their settings.

Each file is written under the names that its repository uses, and sampled as a run folder of ours with the published
numbers, which stand here once more, in full.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import demo
from configs.load import run_from_plain
from generation.command import inference_args, open_generator
from generation.generator import Generator
from generation.sampling import Sampling
from model.attention.sparse import SparseConfig
from model.text_encoder import toy_text_encoder
from model.wan.config import WanConfig
from model.wan.formats import to_diffusers_key
from model.wan.geometry import diffusers_config
from scripts.tiny_models import save_text_encoder, small_vae
from serving.command import demo_args
from tests.nets import random_net
from utils import checkpoint
from utils.config import to_plain, to_yaml
from utils.errors import ConfigError, UserError
from utils.random import Noise

pytest.importorskip("diffusers")

CPU = torch.device("cpu")
PROMPT = "a cat on a mat"
# heads of 128, as in all published ones: a file without a config.json does not say them
GEOMETRY = WanConfig(dim=128, ffn_dim=32, num_heads=1, num_layers=1, text_dim=32, freq_dim=16)
State = dict[str, Tensor]


def state(seed: int, sparse: SparseConfig | None = None) -> State:
    return {key: value.detach() for key, value in random_net(seed, GEOMETRY, sparse=sparse).state_dict().items()}


RAW, AVERAGE = 1, 2  # seeds of the weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text encoder and VAE."""
    root = tmp_path_factory.mktemp("base")
    text = toy_text_encoder([PROMPT], 512, 32, seed=0)
    save_text_encoder(root, text)
    small_vae("2.1").save_pretrained(root / "vae")
    return root


def prefixed(prefix: str, values: State) -> State:
    return {prefix + key: value for key, value in values.items()}


def trained(*groups: str) -> dict[str, Any]:
    """What Self-Forcing's kin save: groups of wrapped networks, the average under FSDP's names."""
    wrapped = {
        "generator": prefixed("model.", state(RAW)),
        "generator_ema": prefixed("model._fsdp_wrapped_module.", state(AVERAGE)),
        "critic": prefixed("model.", state(3)),
    }
    return {name: wrapped[name] for name in groups}


def rcm(seed: int = RAW) -> State:
    """NVlabs/rcm's: `net.`, and a patch embedding that is a linear layer over (c, frames, rows, columns)."""
    values = state(seed)
    values["patch_embedding.weight"] = values["patch_embedding.weight"].flatten(1)
    return prefixed("net.", values)


def saved(path: Path, values: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(values), path)
    return path


def fastwan(path: Path, index: Mapping[str, Any], scheduler: Mapping[str, Any], weights: State, base: Path) -> Path:
    """A pipeline's folder, whose other parts are those of `base`."""
    (path / "transformer").mkdir(parents=True)
    (path / "scheduler").mkdir()
    for part in ("text_encoder", "tokenizer", "vae"):
        (path / part).symlink_to(base / part)
    (path / "model_index.json").write_text(json.dumps(index))
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    (path / "transformer/config.json").write_text(json.dumps(diffusers_config(GEOMETRY)))
    named = {to_diffusers_key(key): value for key, value in weights.items()}
    save_file(named, path / "transformer/diffusion_pytorch_model.safetensors")
    return path


def run_of(base: Path, steps: list[float], shift: float, size: tuple[int, int, int], **changes: Any) -> Any:
    """The config of a run with these settings. size: latent frames, rows and columns."""
    network = {"preset": "tiny", "overrides": asdict(GEOMETRY)}
    frames, height, width = size
    plain = {
        **dict.fromkeys(("student", "teacher", "critic"), network),
        "schedule": {"denoising_step_list": steps, "timestep_shift": shift, "warp_denoising_step": True},
        "training": {"precision": "fp32"},
        "data": {
            **{"kind": "wan", "real": False, "wan": {"frames": frames, "height": height, "width": width}},
            **{"text": {"encoder": str(base), "dtype": "fp32"}, "vae": {"path": str(base), "dtype": "fp32"}},
        },
    }
    for name, values in changes.items():
        plain[name] = {**plain.get(name, {}), **values}  # type: ignore[dict-item]
    return run_from_plain(plain)


def run_folder(path: Path, config: Any, weights: State) -> Generator:
    """That run's student, from a checkpoint."""
    folder = checkpoint.save(path, 1, {"student": weights}, {"step": 1, "config": to_plain(config)})
    return Generator.load(folder, CPU)


def opened(path: Path, base: Path | None, *more: str) -> tuple[Generator, Sampling]:
    argv = ["--model", str(path), "--prompt", PROMPT, *more, *([] if base is None else ["--base", str(base)])]
    args = inference_args(argv)
    return open_generator(args, CPU), args.sampling


SMALL = ["--size", "32x64"]
FOUR, THREE = [1000, 750, 500, 250], [1000, 757, 522]
CAUSAL: dict[str, tuple[Callable[[Path], Path], int, list[int], bool, float, dict[str, Any], str]] = {
    "self-forcing": (
        lambda root: saved(root / "self_forcing_dmd.pt", trained("generator", "generator_ema", "critic")),
        AVERAGE, FOUR, True, 5.0, {"num_frame_per_block": 3}, "ema",
    ),
    "causvid": (
        lambda root: saved(root / "autoregressive_checkpoint/model.pt", trained("generator", "critic")),
        RAW, THREE, False, 8.0, {"num_frame_per_block": 3}, "raw",
    ),
    "longlive": (
        lambda root: saved(root / "longlive_base.pt", trained("generator")),
        RAW, FOUR, True, 5.0, {"num_frame_per_block": 3, "window_frames": 12, "sink_frames": 3}, "raw",
    ),
    "causal-forcing": (
        lambda root: saved(root / "chunkwise/causal_forcing.pt", trained("generator", "generator_ema")),
        RAW, FOUR, True, 5.0, {"num_frame_per_block": 3}, "raw",
    ),
    "causal-forcing-framewise": (
        lambda root: saved(root / "framewise/causal_forcing.pt", trained("generator", "generator_ema")),
        AVERAGE, FOUR, True, 5.0, {"num_frame_per_block": 1}, "ema",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", list(CAUSAL))
@torch.no_grad()
def test_a_causal_student_is_sampled_as_published(
    layout: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, seed, steps, warp, shift, causal, weights = CAUSAL[layout]
    long = layout == "longlive"  # longer than its window, and within what it was trained on: sinks stay where they are
    frames = 18 if long else 6
    model, sampling = opened(write(tmp_path), base, *SMALL, "--frames", str(frames))
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for word in (
        "'s published settings (" if "," not in said[:20] else "",
        ",".join(map(str, steps)),
        f"{weights} weights",
    ):
        assert word in said
    assert all(torch.equal(model.score.net.state_dict()[key], value) for key, value in state(seed).items())
    run = run_of(
        base, [float(step) for step in steps], shift, (21, 4, 8), causal=causal,
        schedule={"denoising_step_list": steps, "timestep_shift": shift, "warp_denoising_step": warp},
        rollout={"kind": "self_forcing", "num_training_frames": 240 if long else None},
    )  # fmt: skip
    expected = run_folder(tmp_path / "run", run, state(seed))
    video = model([PROMPT], sampling, [0])
    assert torch.equal(video, expected([PROMPT], Sampling(frames=frames), [0]))
    assert model.trained_frames == (240 if long else 21)
    published = {"window_frames": 12, "sink_frames": 3} if long else {"window_frames": None, "sink_frames": 0}
    assert {key: getattr(model.config.causal, key) for key in published} == published
    assert model.config.causal.context_noise == 0


@torch.no_grad()
def test_a_student_whose_first_block_has_more_steps(base: Path, tmp_path: Path) -> None:
    """Causal-Forcing++: 2 steps a block of one frame, and 4 for the first."""
    file = saved(tmp_path / "causal-forcing++/framewise-2step.pt", trained("generator_ema"))
    model, sampling = opened(file, base, *SMALL, "--frames", "4")
    run = run_folder(
        tmp_path / "run", run_of(base, FOUR, 5.0, (21, 4, 8), causal={"num_frame_per_block": 1}), state(AVERAGE)
    )
    video = model([PROMPT], sampling, [0])
    assert torch.equal(video, run([PROMPT], Sampling(frames=4, block_steps=(4, 2)), [0]))
    assert not torch.equal(video, run([PROMPT], Sampling(frames=4, block_steps=(2,)), [0]))
    one, sampling = opened(file, base, *SMALL, "--frames", "4", "--layout", "causal-forcing-1step")
    assert torch.equal(one([PROMPT], sampling, [0]), run([PROMPT], Sampling(frames=4, block_steps=(4, 1)), [0]))


@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_rcm_is_sampled_in_trigflow(steps: int, base: Path, tmp_path: Path) -> None:
    """x = cos t x0 + sin t e from atan 80, then 1.3, 1.0, 0.6; the network sees x / (cos t + sin t), told 1000 s."""
    file = saved(tmp_path / "rCM_Wan2.1_T2V_1.3B_480p.pt", rcm())
    model, sampling = opened(file, base, *SMALL, "--frames", "2", *(["--steps", str(steps)] if steps < 4 else []))
    net, source = random_net(RAW, GEOMETRY), Noise(0, 0, [0])
    text = model.task.conditioning([PROMPT]).prompt["text"]
    angles = [math.atan(80.0), *[1.3, 1.0, 0.6][: steps - 1]]
    x = source.normal("noise", (2, 16, 4, 8))
    for index, t in enumerate(angles):
        total = math.cos(t) + math.sin(t)
        velocity = net(x / total, torch.tensor([math.sin(t) / total]), text)
        x0 = x / total - math.sin(t) / total * velocity
        if index + 1 < len(angles):
            fresh = source.normal(f"renoise.b0.s{index}", (2, 16, 4, 8))
            x = math.cos(angles[index + 1]) * x0 + math.sin(angles[index + 1]) * fresh
    torch.testing.assert_close(model([PROMPT], sampling, [0]), x0, rtol=1e-4, atol=1e-4)
    assert model.task.latent_shape[0] == 2 if sampling.frames is None else 20  # 77 frames of video


@pytest.mark.parametrize("sparse", [True, False])
@torch.no_grad()
def test_fastwan_is_known_by_its_class_and_sparse_where_it_has_gates(sparse: bool, base: Path, tmp_path: Path) -> None:
    config = {"sparsity": 0.8, "cube": [4, 4, 4]}
    weights = state(RAW, SparseConfig(0.8, [4, 4, 4]) if sparse else None)
    unipc = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 8.0}
    folder = fastwan(tmp_path / "model", {"_class_name": "WanDMDPipeline"}, unipc, weights, base)
    model, sampling = opened(folder, None, "--size", "64x128", "--frames", "8")
    network = {"preset": "tiny", "overrides": asdict(GEOMETRY)}
    run = run_of(
        base, [1000.0, 757.0, 522.0], 8.0, (8, 8, 16), rollout={"kind": "backward_simulation"},
        schedule={"denoising_step_list": [1000, 757, 522], "timestep_shift": 8.0, "warp_denoising_step": False},
        student={**network, "sparse": config if sparse else None},
    )  # fmt: skip
    expected = run_folder(tmp_path / "run", run, weights)
    assert model.step_list(None) == pytest.approx((1.0, 0.757, 0.522))
    assert (model.score.net.sparse is not None) == sparse  # type: ignore[union-attr]
    assert torch.equal(model([PROMPT], sampling, [0]), expected([PROMPT], Sampling(frames=8), [0]))
    whole, _ = opened(folder, None)
    assert whole.task.latent_shape == (16, 16, 56, 104)  # 61 frames of 448x832


@torch.no_grad()
def test_longlives_adapter_goes_on_its_base(base: Path, tmp_path: Path) -> None:
    """PEFT's names in the group generator_lora, alpha as large as the rank."""
    generator = torch.Generator().manual_seed(7)
    down, up = torch.randn(3, 128, generator=generator), torch.randn(128, 3, generator=generator)
    name = "blocks.0.self_attn.q"
    lora = {
        f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up,
    }  # fmt: skip
    adapter = saved(tmp_path / "lora.pt", {"generator_lora": lora, "critic_lora": {}, "step": 3000})
    file = saved(tmp_path / "longlive_base.pt", trained("generator"))
    model, _ = opened(file, base, *SMALL, "--lora", str(adapter))
    expected = state(RAW)
    expected[f"{name}.weight"] = (expected[f"{name}.weight"].double() + up.double() @ down.double()).float()
    for key, value in model.score.net.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"this is a LoRA: give the base weights here, .*--lora"):
        opened(saved(tmp_path / "alone/lora.pt", {"generator_lora": lora}), base)


@torch.no_grad()
def test_each_setting_can_be_given(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / "self_forcing_dmd.pt", trained("generator", "generator_ema"))
    more = [
        "--steps",
        "1000,500",
        "--shift",
        "3",
        "--block_frames",
        "2",
        "--window",
        "4",
        "--sinks",
        "2",
        "--weights",
        "raw",
    ]
    model, sampling = opened(file, base, *SMALL, "--frames", "8", *more)
    said = capsys.readouterr().out
    for word in (
        "steps 1000,500 through shift 3",
        "blocks of 2",
        "window 4",
        "sinks 2",
        "8 latent frames of 32x64",
        "raw",
    ):
        assert word in said
    causal = {"num_frame_per_block": 2, "window_frames": 4, "sink_frames": 2}
    run = run_folder(tmp_path / "run", run_of(base, [1000.0, 500.0], 3.0, (8, 4, 8), causal=causal), state(RAW))
    # sinks of a video that is longer than training's follow, and these students are told other lengths
    run.config.rollout.num_training_frames = model.trained_frames  # type: ignore[attr-defined]
    assert torch.equal(model([PROMPT], sampling, [0]), run([PROMPT], Sampling(frames=8), [0]))
    assert len(opened(file, base, *SMALL, "--steps", "2")[0].step_list(2)) == 2
    assert opened(file, base, *SMALL, "--steps", "1000,")[0].step_list(None) == (1.0,)


@torch.no_grad()
def test_an_unknown_student_is_described_by_options_or_by_its_run(base: Path, tmp_path: Path) -> None:
    known = saved(tmp_path / "self_forcing_dmd.pt", trained("generator_ema"))
    file = saved(tmp_path / "mine.pt", trained("generator_ema"))
    expected, sampling = opened(known, base, *SMALL, "--frames", "6")
    video = expected([PROMPT], sampling, [0])
    options = ["--steps", "1000,750,500,250", "--shift", "5", "--block_frames", "3"]
    for more in (["--layout", "self-forcing"], options):
        model, sampling = opened(file, base, *SMALL, "--frames", "6", *more)
        assert torch.equal(model([PROMPT], sampling, [0]), video)
    run = run_of(base, FOUR, 5.0, (21, 4, 8), causal={"num_frame_per_block": 3})
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    model, sampling = opened(file, None, "--frames", "6", "--config_path", str(tmp_path / "run.yaml"))
    assert torch.equal(model([PROMPT], sampling, [0]), video)


@torch.no_grad()
def test_a_folder_that_a_student_was_exported_to_needs_its_steps(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its scheduler noises anew at each step; with another one it is a many-step model, and that is said."""
    again = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0, "stochastic_sampling": True}
    folder = fastwan(tmp_path / "student", {"_class_name": "WanPipeline"}, again, state(RAW), base)
    with pytest.raises(UserError, match=r"it is a few-step student, .* --steps 1000,750,..., --block_frames \(0 for"):
        opened(folder, None, *SMALL)
    model, sampling = opened(folder, None, *SMALL, "--frames", "2", "--steps", "1000,500", "--block_frames", "0")
    run = run_of(base, [1000.0, 500.0], 5.0, (2, 4, 8), rollout={"kind": "backward_simulation"})
    expected = run_folder(tmp_path / "run", run, state(RAW))
    assert torch.equal(model([PROMPT], sampling, [0]), expected([PROMPT], Sampling(frames=2), [0]))
    plain = {key: value for key, value in again.items() if key != "stochastic_sampling"}
    capsys.readouterr()
    opened(fastwan(tmp_path / "teacher", {"_class_name": "WanPipeline"}, plain, state(RAW), base), None, *SMALL)
    assert "sampled as a many-step model: 50 steps of euler, shift 5, guidance 5" in capsys.readouterr().out


@torch.no_grad()
def test_the_demo_takes_them_too(base: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "self_forcing_dmd.pt", trained("generator", "generator_ema"))
    args = demo_args(["--model", str(file), "--base", str(base), *SMALL, "--seed", "4"])
    model = demo.open_generator(args, CPU)
    run = run_of(base, FOUR, 5.0, (21, 4, 8), causal={"num_frame_per_block": 3})
    expected = run_folder(tmp_path / "run", run, state(AVERAGE))
    first, second = (g.endless([PROMPT], args.sampling(4), [0]) for g in (model, expected))
    for _ in range(2):
        assert torch.equal(first.make(first.noise((16, 4, 8))), second.make(second.noise((16, 4, 8))))


REFUSED: list[tuple[str, Callable[[], Mapping[str, Any]], list[str], str]] = [
    ("mine.pt", lambda: trained("generator"), [], "neither its content nor its name tells, .* --layout .*self-forcing.*"
     r"--config_path .* or --steps 1000,750,..., --shift, --block_frames \(0 for a bidirectional one\), --frames"),
    ("mine.pt", lambda: trained("generator"), ["--steps", "4", "--shift", "5"], "--steps 1000,750"),
    ("mine.pt", lambda: trained("generator"), ["--layout", "sora"], "--layout sora is unknown: choose among self-forcing"),
    ("self_forcing_gan.pt", lambda: trained("generator"), [], "neither its content nor its name tells"),
    ("wan2.1_1.3b.pt", rcm, [], "NVlabs/rcm, in which students, their teachers .* give --layout rcm"),
    ("Causal_rCM_Wan2.1_T2V_1.3B_480p.pt", rcm, [], "causal students look alike"),
    ("rCM_Wan2.1_T2V_1.3B.pt", rcm, ["--shift", "5"], "--shift: the steps of rCM are noise levels themselves"),
    ("rCM_Wan2.1_T2V_1.3B.pt", rcm, ["--block_frames", "3"], "--block_frames 3: rCM is bidirectional: leave it out"),
    ("self_forcing_dmd.pt", lambda: trained("generator"), ["--weights", "ema", "--block_frames", "0"],
     "Self-Forcing makes videos block by block: leave it out"),
    ("self_forcing_dmd.pt", lambda: trained("generator"), ["--steps", "250,1000"], "must strictly decrease"),
    ("self_forcing_dmd.pt", lambda: trained("generator"), ["--size", "30x64"], "--size 30x64: give multiples of 16"),
    ("self_forcing_dmd.pt", lambda: {"generator": {"layer.weight": torch.ones(2)}}, [], "no Wan DiT"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "more", "message"), REFUSED)
def test_what_is_not_known_is_refused_in_one_line(
    name: str, content: Callable[[], Mapping[str, Any]], more: list[str], message: str, base: Path, tmp_path: Path
) -> None:
    file = saved(tmp_path / name, content())
    size = [] if "--size" in more else SMALL
    with pytest.raises((UserError, ConfigError), match=message) as caught:
        opened(file, base, *size, *more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--run", "x", "--layout", "rcm"], "--layout is for --model: a run has its own"),
        (["--run", "x", "--steps", "1000,500"], "--steps: a list is for --model"),
        (
            ["--model", "x.pt", "--config_path", "y.yaml", "--shift", "5"],
            "--shift: y.yaml says how the model is sampled",
        ),
        (["--model", "x.pt", "--steps", "four"], "'four' is neither a number of steps nor a list"),
        (["--model", "x.pt", "--block_frames", "-1"], "--block_frames -1: give a number of frames"),
    ],
)
def test_options_that_cannot_go_together(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inference_args([*argv, "--prompt", PROMPT])
    with pytest.raises(UserError, match=message):
        demo_args(argv)


def test_text_encoder_and_vae_are_those_of_its_geometry_or_to_be_given(base: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "self_forcing_dmd.pt", trained("generator_ema"))
    with pytest.raises(
        UserError, match="no text encoder and VAE, and its geometry is no known model's: give --base DIR"
    ):
        opened(file, None, *SMALL)
