"""Our samplers are Diffusers' Wan pipelines: tiny components of every kind, the same noise, latents compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.experts import Experts
from model.schedule import flow_match_euler_sigmas, unipc_sigmas, whole_timesteps
from model.score import ScoreNet
from model.types import Conditioning
from model.wan.config import WanConfig
from pipeline.bidirectional_inference import Solver, SolverGrid, euler_sample, many_step_sample, unipc_sample
from scripts.tiny_models import small_image_encoder
from tests.model.wan.test_diffusers_parity import pair

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SHIFT, STEPS, WIDTH = 3.0, 4, 12
TINY: dict[str, Any] = {
    "dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 1, "in_dim": 16, "out_dim": 16, "text_dim": WIDTH, "freq_dim": 16,
}  # fmt: skip
T2V = WanConfig(**TINY, text_len=8)
TI2V = WanConfig(**TINY, text_len=8, model_type="ti2v")
I2V = WanConfig(**(TINY | {"in_dim": 36}), text_len=512, model_type="i2v", image_dim=20)
I2V_EXPERT = WanConfig(**(TINY | {"in_dim": 36}), text_len=8, model_type="i2v")


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """A tiny VAE, text encoder and image encoder."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    text = transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=32, d_model=WIDTH, d_kv=4, d_ff=16, num_layers=2, num_heads=3)
    )
    size = {"height": 16, "width": 16}
    processor = transformers.CLIPImageProcessor(size=size, crop_size=size)
    return {
        "vae": vae.eval(),
        "text_encoder": text.eval(),
        "image_encoder": small_image_encoder(20),
        "image_processor": processor,
    }


def scheduler(solver: Solver) -> Any:
    if solver is Solver.unipc:
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=SHIFT
        )
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def prompts(parts: dict[str, Any], config: WanConfig, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Two prompts and a negative one, through the text encoder: zeros after their lengths."""
    ids = torch.randint(1, 32, (2 * batch, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        encoded = 4 * parts["text_encoder"](ids).last_hidden_state
    padded = torch.nn.functional.pad(encoded, (0, 0, 0, config.text_len - 6))
    return padded[:batch], padded[batch:]


def noise(seed: int = 5, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 4, 2, generator=torch.Generator().manual_seed(seed))


def ours(
    net: torch.nn.Module, conditioning: Conditioning, negative: Tensor, solver: Solver, guidance: float | list[float],
    **options: Any,
) -> Tensor:  # fmt: skip
    score = ScoreNet(net, "teacher", **options)
    if solver is Solver.euler:
        return euler_sample(score, noise(), conditioning, negative, flow_match_euler_sigmas(STEPS, SHIFT), guidance)
    sigmas = unipc_sigmas(STEPS, SHIFT)
    return unipc_sample(score, noise(), conditioning, negative, sigmas, guidance, whole_timesteps(sigmas))


def theirs(pipe: Any, text: Tensor, negative: Tensor, **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        prompt_embeds=text, negative_prompt_embeds=negative, height=32, width=16, num_frames=9, num_inference_steps=STEPS,
        latents=noise().transpose(1, 2).contiguous(), output_type="latent", return_dict=False, **options,
    )[0]  # fmt: skip
    return out.transpose(1, 2)


def worst(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("solver", "guidance"), [(Solver.euler, 4.0), (Solver.unipc, 4.0), (Solver.unipc, 1.0)])
def test_text_to_video(parts: dict[str, Any], solver: Solver, guidance: float) -> None:
    net, other = pair(T2V, seed=3)
    text, negative = prompts(parts, T2V)
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=parts["text_encoder"],
        vae=parts["vae"],
        scheduler=scheduler(solver),
        transformer=other,
    )
    expected = theirs(pipe, text, negative, guidance_scale=guidance)
    made = ours(net, Conditioning(text), negative, solver, guidance)
    assert worst(made, expected) < 1e-4
    assert worst(ours(net, Conditioning(text), negative, solver, guidance + 1), expected) > 1e-3
    if solver is Solver.unipc:
        score = ScoreNet(net, "teacher")
        usual = many_step_sample(
            score, noise(), text, negative, grid=SolverGrid(STEPS, SHIFT, solver), guidance=guidance
        )
        assert torch.equal(usual, made)


def picture() -> Any:
    from PIL import Image

    pixels = torch.randint(0, 256, (32, 16, 3), generator=torch.Generator().manual_seed(9))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def given_image(pipe: Any, config: WanConfig, batch: int = 2) -> dict[str, Tensor]:
    """What the pipeline makes of the image, as our conditioning has it."""
    cpu, latents = torch.device("cpu"), torch.zeros(batch, 16, 3, 4, 2)
    pixels = pipe.video_processor.preprocess(picture(), height=32, width=16)
    _, condition, *_ = pipe.prepare_latents(pixels, batch, 16, 32, 16, 9, torch.float32, cpu, None, latents)
    condition = condition.transpose(1, 2)
    if config.model_type == "ti2v":
        return {"initial": condition}
    conditions = {"channels": condition}
    if config.image_dim is not None:
        conditions["image"] = pipe.encode_image(picture(), cpu).expand(batch, -1, -1)
    return conditions


@pytest.mark.parametrize("config", [I2V, TI2V], ids=["clip_and_channels", "clean_first_frame"])
@pytest.mark.parametrize("solver", list(Solver))
@torch.no_grad()
def test_image_to_video(parts: dict[str, Any], solver: Solver, config: WanConfig) -> None:
    net, other = pair(config, seed=3)
    text, negative = prompts(parts, config)
    is_ti2v = config.model_type == "ti2v"
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=None, scheduler=scheduler(solver), transformer=other, expand_timesteps=is_ti2v, **parts
    )
    expected = theirs(pipe, text, negative, guidance_scale=3.0, image=picture())
    conditions = given_image(pipe, config)
    conditioning = Conditioning(text, **conditions)
    made = ours(net, conditioning, negative, solver, 3.0, pins_initial=is_ti2v)
    assert worst(made, expected) < 1e-4
    for name, value in conditions.items() if solver is Solver.euler else ():  # each of them counts
        other_image = Conditioning(text, **(conditions | {name: value.roll(1, -1)}))
        assert worst(ours(net, other_image, negative, solver, 3.0, pins_initial=is_ti2v), expected) > 1e-3
    if is_ti2v:
        assert conditioning.initial is not None
        assert torch.allclose(made[:, :1], conditioning.initial, atol=1e-5)
        assert worst(ours(net, conditioning, negative, solver, 3.0), expected) > 1e-3


@pytest.mark.parametrize("solver", list(Solver))
@torch.no_grad()
def test_two_experts(parts: dict[str, Any], solver: Solver) -> None:
    """T2V-A14B: the high-noise network down to the boundary, then the low-noise one, each with its guidance."""
    (high, their_high), (low, their_low) = pair(T2V, seed=3), pair(T2V, seed=4)
    text, negative = prompts(parts, T2V)
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=parts["text_encoder"], vae=parts["vae"], scheduler=scheduler(solver),
        transformer=their_high, transformer_2=their_low, boundary_ratio=0.875,
    )  # fmt: skip
    expected = theirs(pipe, text, negative, guidance_scale=4.0, guidance_scale_2=2.5)
    experts = Experts(high, low, 0.875)
    told = flow_match_euler_sigmas(STEPS, SHIFT)
    if solver is Solver.unipc:
        told = whole_timesteps(unipc_sigmas(STEPS, SHIFT))
    guidance = experts.each_step(told, 4.0, 2.5)
    assert set(guidance) == {4.0, 2.5}
    assert worst(ours(experts, Conditioning(text), negative, solver, guidance), expected) < 1e-4
    for wrong in (high, Experts(low, high, 0.875)):
        assert worst(ours(wrong, Conditioning(text), negative, solver, guidance), expected) > 1e-3


@torch.no_grad()
def test_two_experts_of_image_to_video(parts: dict[str, Any]) -> None:
    (high, their_high), (low, their_low) = pair(I2V_EXPERT, seed=3), pair(I2V_EXPERT, seed=4)
    text, negative = prompts(parts, I2V_EXPERT)
    without_clip = {name: part for name, part in parts.items() if not name.startswith("image")}
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=None, scheduler=scheduler(Solver.unipc), transformer=their_high, transformer_2=their_low,
        boundary_ratio=0.9, **without_clip,
    )  # fmt: skip
    expected = theirs(pipe, text, negative, guidance_scale=3.5, image=picture(), image_embeds=None)
    conditioning = Conditioning(text, **given_image(pipe, I2V_EXPERT))
    assert worst(ours(Experts(high, low, 0.9), conditioning, negative, Solver.unipc, 3.5), expected) < 1e-4


def test_the_grids_are_diffusers() -> None:
    for steps in (1, 2, 7, 50):
        for solver, grid in ((Solver.euler, flow_match_euler_sigmas), (Solver.unipc, unipc_sigmas)):
            other = scheduler(solver)
            other.set_timesteps(steps)
            assert torch.allclose(torch.tensor([*grid(steps, SHIFT), 0.0]), other.sigmas, rtol=0, atol=2e-7)
            told = grid(steps, SHIFT) if solver is Solver.euler else whole_timesteps(unipc_sigmas(steps, SHIFT))
            exact = 2e-4 if solver is Solver.euler else 1e-6  # whole timesteps must not fall to the one below
            assert torch.allclose(
                1000 * torch.tensor(told).double(), other.timesteps.double(), rtol=0, atol=1e-4 + exact
            )


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_unipc_of_any_length_is_diffusers(steps: int) -> None:
    """Orders at the start and at the end, on a velocity that is not linear in x."""

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
            return torch.sin(3 * x) * sigma.reshape(-1, 1, 1, 1, 1) + x.square().clamp(max=2)

    other, x, text = scheduler(Solver.unipc), noise(), torch.zeros(2, 1, 1)
    other.set_timesteps(steps)
    for t in other.timesteps:
        x = other.step(Net()(x, torch.full((2,), float(t) / 1000), text), t, x, return_dict=False)[0]
    sigmas = unipc_sigmas(steps, SHIFT)
    made = unipc_sample(ScoreNet(Net(), "n"), noise(), text, text, sigmas, 1.0, whole_timesteps(sigmas))
    assert worst(made, x) < 2e-5
