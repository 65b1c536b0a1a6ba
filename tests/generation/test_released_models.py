"""`inference.py --model` on folders that Diffusers' pipelines save: the same prompt, image and noise give its latents.

Whole pipelines, tiny: text encoder, tokenizer, VAE, image encoder, one or two networks, scheduler, model_index.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from generation import generator as generate
from generation.command import inference_args, open_generator
from generation.generator import Generator
from generation.sampling import Sampling
from generation.videos import generate_videos
from model.schedule import flow_match_euler_sigmas
from model.score import ScoreNet
from model.wan.config import WanConfig
from model.wan.tiny_decoder import TinyDecoder
from pipeline.bidirectional_inference import euler_sample
from pipeline.causal import CausalConfig
from scripts.tiny_models import SHIFT, pipeline_class, save_pipeline, small_text_encoder
from tests.model.wan.test_image_encoder import as_pil, picture
from tests.nets import relative
from utils.errors import UserError
from utils.random import Noise
from utils.video import read_video, write_video

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
PROMPTS, NEGATIVE = ["a cat on a mat", "a hat"], "no cat"
WIDTH, STEPS = 32, 4
KINDS = ("t2v", "t2v_experts", "i2v", "i2v_experts", "ti2v")


def geometry(kind: str) -> WanConfig:
    sizes: dict[str, Any] = {
        "dim": 24,
        "ffn_dim": 32,
        "num_heads": 2,
        "num_layers": 1,
        "text_dim": WIDTH,
        "freq_dim": 16,
    }
    if kind == "ti2v":
        return WanConfig(**sizes, in_dim=48, out_dim=48, model_type="ti2v")
    if kind.startswith("i2v"):
        return WanConfig(**sizes, in_dim=36, model_type="i2v", image_dim=20 if kind == "i2v" else None)
    return WanConfig(**sizes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved pipeline of each kind, made when it is first asked for."""
    root = tmp_path_factory.mktemp("released")
    text = small_text_encoder([*PROMPTS, NEGATIVE], WIDTH)

    def folder(kind: str) -> Path:
        path = root / kind
        if not path.is_dir():
            save_pipeline(path, geometry(kind), text, experts=kind.endswith("experts"))
        return path

    return folder


def command(folder: Path, *more: str) -> list[str]:
    size = ["--size", "32x64", "--frames", "3", "--steps", str(STEPS), "--negative_prompt", NEGATIVE]
    return ["--model", str(folder), "--prompt", PROMPTS[0], *size, *more]


def opened(folder: Path, *more: str) -> tuple[Generator, Any]:
    args = inference_args(command(folder, *more))
    return open_generator(args, CPU), args


def theirs(folder: Path, cls: Any, noise: Tensor, **options: Any) -> Tensor:
    """The pipeline's latents [B, F, C, H, W]."""
    pipe = cls.from_pretrained(folder)
    if isinstance(options.get("scheduler"), diffusers.FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = options.pop("scheduler")
    pipe.set_progress_bar_config(disable=True)
    length = {} if "video" in options else {"num_frames": 9}
    out: Tensor = pipe(
        prompt=PROMPTS, negative_prompt=NEGATIVE, height=32, width=64, num_inference_steps=STEPS,
        latents=noise.transpose(1, 2).contiguous(), output_type="latent", return_dict=False, **length, **options,
    )[0]  # fmt: skip
    return out.transpose(1, 2)


def noise(generator: Generator) -> Tensor:
    return Noise(0, 0, [0, 1]).normal("noise", generator.task.latent_shape)


GUIDANCE = {
    "t2v": (4.0, 4.0),
    "t2v_experts": (4.0, 2.0),
    "i2v": (3.0, 3.0),
    "i2v_experts": (3.5, 2.0),
    "ti2v": (5.0, 5.0),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_released_model_gives_the_pipelines_latents(folders: Callable[[str], Path], kind: str) -> None:
    folder, (high, low) = folders(kind), GUIDANCE[kind]
    has_experts, takes_image = kind.endswith("experts"), not kind.startswith("t2v")
    options = ["--guidance", str(high), *(["--guidance_2", str(low)] if has_experts else [])]
    generator, args = opened(folder, *options)
    image = picture(32, 64) if takes_image else None
    arguments: dict[str, Any] = {"guidance_scale": high}
    arguments |= {"guidance_scale_2": low} if has_experts else {}
    arguments |= {"image": as_pil(image)} if image is not None else {}
    expected = theirs(folder, pipeline_class(geometry(kind)), noise(generator), **arguments)
    first = None if image is None else image[None]
    made = generator(PROMPTS, args.sampling, [0, 1], first)
    assert relative(made, expected) < 1e-4
    if first is not None:
        assert relative(generator(PROMPTS, args.sampling, [0, 1], first.flip(-1)), expected) > 1e-3
    if kind == "ti2v":  # the given frame comes back bit for bit, and without one it is a text-to-video model
        assert torch.equal(made[:, :1], generator.task.encode(image[None, None]).expand(2, -1, -1, -1, -1))  # type: ignore[index]
        plain = theirs(folder, diffusers.WanPipeline, noise(generator), guidance_scale=high)
        assert relative(generator(PROMPTS, args.sampling, [0, 1]), plain) < 1e-4 < 1e-3 < relative(plain, expected)
    if has_experts:
        other, args = opened(folder, "--guidance", str(high))  # as in Diffusers, one guidance is both experts'
        arguments.pop("guidance_scale_2")
        same = theirs(folder, pipeline_class(geometry(kind)), noise(generator), **arguments)
        assert relative(other(PROMPTS, args.sampling, [0, 1], first), same) < 1e-4 < 1e-3 < relative(same, expected)


@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
@torch.no_grad()
def test_and_by_euler_on_diffusers_grid(folders: Callable[[str], Path], kind: str) -> None:
    folder, image = folders(kind), picture(32, 64)
    generator, _ = opened(folder)
    task, sigmas = generator.task, flow_match_euler_sigmas(STEPS, SHIFT)
    conditioning = task.image_conditioning(PROMPTS, image[None, None])
    made = euler_sample(generator.score, noise(generator), conditioning, task.negative(2), sigmas, 3.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    cls = diffusers.WanImageToVideoPipeline
    expected = theirs(folder, cls, noise(generator), image=as_pil(image), guidance_scale=3.0, scheduler=scheduler)
    assert relative(made, expected) < 1e-4


@pytest.mark.parametrize("strength", [0.5, 0.8])
@torch.no_grad()
def test_video_to_video_gives_the_pipelines_latents(
    folders: Callable[[str], Path], strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders("t2v")
    generator, args = opened(folder, "--guidance", "4", "--video", "x.mp4", "--strength", str(strength))
    clip = torch.stack([picture(32, 64, seed) for seed in range(9)])
    drawn = torch.randn(1, 16, 3, 4, 8, generator=torch.Generator().manual_seed(7))  # as the pipeline draws it

    class Drawn:
        def __init__(self, *_: object) -> None: ...

        def normal(self, role: str, shape: tuple[int, ...]) -> Tensor:
            assert role == "noise"
            assert shape == (3, 16, 4, 8)
            return drawn.transpose(1, 2)

    monkeypatch.setattr(generate, "Noise", Drawn)
    made = generator(PROMPTS[:1], args.sampling, [0], clip=clip)
    pipe = diffusers.WanVideoToVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt=PROMPTS[:1], negative_prompt=NEGATIVE, height=32, width=64, num_inference_steps=STEPS, strength=strength,
        video=[as_pil(frame) for frame in clip], guidance_scale=4.0, generator=torch.Generator().manual_seed(7),
        output_type="latent", return_dict=False,
    )[0].transpose(1, 2)  # fmt: skip
    assert relative(made, expected) < 1e-4
    assert relative(generator(PROMPTS[:1], args.sampling, [0], clip=clip.flip(0)), expected) > 1e-3


@pytest.mark.parametrize("kind", ["i2v", "i2v_experts"])
@torch.no_grad()
def test_a_few_step_student_of_such_a_network_takes_the_image(folders: Callable[[str], Path], kind: str) -> None:
    """Bidirectional by hand; and block by block, where each block has its own channels. Its clip brings its image."""
    model, _ = opened(folders(kind))
    config = model.config
    config.schedule.denoising_step_list = [1000.0, 500.0]
    task, net = model.task, model.score.net.high if kind == "i2v_experts" else model.score.net  # type: ignore[union-attr]
    student = Generator(config, ScoreNet(net, "student"), CPU, task=task)  # type: ignore[arg-type]
    image = picture(32, 64)[None]
    made = student(PROMPTS, Sampling(), [0, 1], image)
    condition, source, (first, second) = (
        task.image_conditioning(PROMPTS, image[None]),
        Noise(0, 0, [0, 1]),
        config.schedule.sigmas(),
    )
    assert condition.channels is not None
    assert (condition.image is None) == (kind == "i2v_experts")

    def x0(x: Tensor, sigma: float) -> Tensor:
        return x - sigma * net(
            x, torch.full((2,), sigma), condition.prompt["text"], channels=condition.channels, image=condition.image
        )  # type: ignore[no-any-return, operator]

    fresh = source.normal("renoise.b0.s0", (3, 16, 4, 8))
    by_hand = x0((1 - second) * x0(noise(student), first) + second * fresh, second)
    assert relative(made, by_hand) < 1e-5
    blocks = student.as_causal(replace(config, causal=CausalConfig(1)))
    for way in (student, blocks):
        expected = way(PROMPTS, Sampling(), [0, 1], image)
        assert expected.shape == (2, 3, 16, 4, 8)
        assert relative(way(PROMPTS, Sampling(), [0, 1], image.flip(-1)), expected) > 1e-3
        clip = torch.cat([image, *[picture(32, 64, seed)[None] for seed in range(1, 9)]])
        assert torch.equal(way(PROMPTS, Sampling(strength=1.0), [0, 1], clip=clip), expected)


def test_a_tiny_decoder_and_loras_in_place_of_the_models_own(folders: Callable[[str], Path], tmp_path: Path) -> None:
    save_file(TinyDecoder(16, 1, (8, 8, 8, 8)).state_dict(), tmp_path / "tiny.safetensors")
    plain, _ = opened(folders("t2v"))
    other, _ = opened(folders("t2v"), "--tiny_decoder", str(tmp_path / "tiny.safetensors"))
    x = latents_like(plain)
    assert plain.task.decode(x).shape == other.task.decode(x).shape
    assert not torch.allclose(plain.task.decode(x), other.task.decode(x), atol=1e-2)
    with pytest.raises(UserError, match="is one network: give --lora"):
        opened(folders("t2v"), "--low_lora", "x.safetensors")
    with pytest.raises(UserError, match="--model has no adapter of its own"):
        opened(folders("t2v"), "--lora_scale", "0.5")


def latents_like(generator: Generator) -> Tensor:
    return Noise(0, 0, [0]).normal("latents", generator.task.latent_shape)


def test_the_image_option_makes_a_video(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The picture is scaled to cover the size, and its middle is what the network sees."""
    middle = picture(16, 32)
    wide = torch.cat([torch.zeros(3, 16, 4), middle, torch.ones(3, 16, 4)], 2)
    large = wide.repeat_interleave(2, 1).repeat_interleave(2, 2)  # 32 x 80
    write_video(tmp_path / "wide.png", large[None], 8)
    out = tmp_path / "video.mp4"
    generator, args = opened(folders("ti2v"), "--image", str(tmp_path / "wide.png"), "--out", str(out))
    assert generate_videos(generator, args) == 0
    assert read_video(out).shape == (9, 3, 64, 128)  # enlarged, for it is small
    seen = []
    original = generator.task.image_conditioning
    generator.task.image_conditioning = lambda prompts, pixels, frames: (
        seen.append(pixels) or original(prompts, pixels, frames)
    )  # type: ignore[method-assign, func-returns-value]
    generate_videos(generator, args)
    assert torch.equal(seen[0][0, 0], large[:, :, 8:72])


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("t2v", ["--image", "{image}"], "--image, --extend: a bidirectional network takes none unless it was made for"),
        ("i2v", [], r"this network makes videos from an image \(model_type i2v\): give --image"),
        ("t2v", ["--guidance_2", "3"], "--guidance_2 is for models of two experts"),
        ("ti2v", ["--image", "nothing.png"], "--image: no such file: nothing.png"),
        ("ti2v", ["--image", "{video}"], "--image: .*video.mp4 cannot be decoded"),
        ("ti2v", ["--video", "{image}", "--extend", "2"], "--video: .* has 1 frames, 5 are needed"),
        ("ti2v", ["--video", "{video}", "--extend", "3"], "--frames 3: 3 of them are given, nothing is left"),
        ("t2v", ["--video", "{video}"], "--video: add --strength 0.6, say, to make it anew, or --extend"),
        ("t2v", ["--strength", "0.5"], "--strength is for --video"),
        ("t2v", ["--video", "{video}", "--strength", "1.5"], r"--strength 1.5: give a share of the steps in \(0, 1\]"),
        ("t2v", ["--video", "{video}", "--extend", "-1"], "--extend -1: give at least 1"),
        ("t2v", ["--image", "{image}", "--video", "{video}"], "not allowed with argument --image"),
        ("t2v", ["--solver", "dpm"], "argument --solver: invalid choice"),
        ("t2v", ["--size", "0x64"], "height"),
    ],
)
def test_what_cannot_be_is_one_line(
    folders: Callable[[str], Path], tmp_path: Path, kind: str, more: list[str], message: str
) -> None:
    write_video(tmp_path / "image.png", picture(32, 64)[None], 8)
    write_video(tmp_path / "video.mp4", picture(32, 64)[None].expand(9, -1, -1, -1), 8)
    files = {"image": tmp_path / "image.png", "video": tmp_path / "video.mp4"}
    with pytest.raises(UserError, match=message) as caught:
        generator, args = opened(folders(kind), *(word.format(**files) for word in more), "--out", str(tmp_path / "x"))
        generate_videos(generator, args)
    assert "\n" not in str(caught.value)


def test_two_experts_need_a_boundary_and_have_wans_guidance(folders: Callable[[str], Path], tmp_path: Path) -> None:
    generator, _ = opened(folders("t2v_experts"))
    assert (generator.config.validation.guidance, generator.guidance_2) == (4.0, 3.0)
    folder = tmp_path / "copy"
    folder.mkdir()
    for part in folders("t2v_experts").iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    index = json.loads((folders("t2v_experts") / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": None}))
    with pytest.raises(UserError, match="has a transformer_2, but its model_index.json no boundary_ratio: add it"):
        opened(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON .*: fetch it again"):
        opened(folder)
