"""What a sample is conditioned on beside its text, through networks, rollouts, losses and samplers; two experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.attention.checkpointing import Checkpointing
from model.dmd import critic_loss, dmd_loss
from model.experts import I2V_BOUNDARY, T2V_BOUNDARY, Experts
from model.query import Guidance, ScoreQuery
from model.schedule import ScheduleConfig, mix
from model.score import ScoreNet
from model.sid import sid_loss
from model.types import Conditioning, Rollout
from model.wan.transformer import WanTransformer
from pipeline.bidirectional_inference import euler_sample, euler_trajectory, from_clip
from pipeline.bidirectional_training import backward_simulation
from pipeline.causal import CausalConfig, VideoShape
from pipeline.causal_inference import generate
from pipeline.diffusion_forcing import CleanContext, teacher_forced_velocity
from pipeline.self_forcing_training import RolloutPlan, self_forcing_rollout
from tests.nets import MICRO, KeyedNoise, gradients, latents, random_net, relative, texts

I2V = replace(MICRO, in_dim=7, model_type="i2v", image_dim=10)
SIGMAS = (1.0, 0.8, 0.5)
SIGMA = torch.tensor([0.7, 0.4])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning_on_image(frames: int, initial: int = 0) -> Conditioning:
    """For 2 samples: text, channels of `frames` frames, an image's tokens, and maybe given frames."""
    first = latents(8, 2, initial) if initial else None
    return Conditioning(texts(3, 2), first, normal(11, 2, frames, 4, 4, 6), normal(12, 2, 5, 10))


def new_cache(net: WanTransformer, causal: CausalConfig, frames: int) -> Any:
    return causal.new_cache(net, VideoShape(2, frames, 4, 6), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("initial", [0, 1])
def test_block_by_block_each_block_takes_its_own_channels(initial: int) -> None:
    """Cached velocities are those of one masked pass over the whole video and all its channels."""
    net, causal = random_net(1, I2V), CausalConfig(2, independent_first_frame=bool(initial))
    total = 4 + initial
    condition, x = conditioning_on_image(total), latents(2, 2, total)
    score = ScoreNet(net, "n")
    with torch.no_grad():
        times = torch.zeros(2, total)
        expected = score.velocity(x, times, condition, mask=causal.mask(total))
        cache, start, parts = new_cache(net, causal, total), 0, []
        for size in causal.blocks(total):
            block = condition.frames(start, size)
            part = slice(start, start + size)
            parts.append(score.velocity(x[:, part], times[:, part], block, cache=cache))
            if start + size < total:
                score.velocity(x[:, part], times[:, part], block, cache=cache, write_cache=True)
            start += size
        assert relative(torch.cat(parts, 1), expected) < 2e-6
        late = replace(condition, channels=condition.channels[:, :1].expand(-1, total, -1, -1, -1))  # type: ignore[index]
        assert relative(score.velocity(x, times, late, mask=causal.mask(total)), expected) > 1e-3


def rollout(net: WanTransformer, condition: Conditioning, noise: Tensor, exits: tuple[int, ...]) -> Rollout:
    causal = CausalConfig(2, independent_first_frame=condition.initial_frames == 1)
    total = noise.shape[1] + condition.initial_frames
    return self_forcing_rollout(
        ScoreNet(net, "student"), noise, condition, RolloutPlan(causal, SIGMAS, exits, total), KeyedNoise(5, 2),
        new_cache(net, causal, total), with_gradient=True,
    )  # fmt: skip


def test_rollout_with_an_image_is_inference_and_every_checkpointing_has_its_gradients() -> None:
    noise, condition, weight = latents(2, 2, 4), conditioning_on_image(5, 1), latents(6, 2, 5)
    causal = CausalConfig(2, independent_first_frame=True)
    net = random_net(1, I2V)
    sampled = generate(
        ScoreNet(net, "s"), noise, condition, SIGMAS, causal, KeyedNoise(5, 2), new_cache(net, causal, 5)
    )
    assert torch.equal(rollout(net, condition, noise, (2, 2)).x0.detach(), sampled)
    found = []
    for checkpointing in (Checkpointing.none, Checkpointing.full):
        net = random_net(1, I2V, checkpointing=checkpointing)
        (rollout(net, condition, noise, (0, 2)).x0 * weight).sum().backward()
        found.append(gradients(net))
    plain, replayed = found
    assert len(plain) == len(replayed) == len(dict(net.named_parameters()))  # those of the image's path too
    for name, value in plain.items():
        assert relative(replayed[name], value) < 1e-5, name


def test_a_window_of_a_video_with_channels_cannot_be_judged_alone() -> None:
    net, causal = random_net(1, I2V), CausalConfig(2)
    with pytest.raises(ValueError, match="channels describe a whole video"):
        self_forcing_rollout(
            ScoreNet(net, "s"), latents(2, 2, 4), conditioning_on_image(4), RolloutPlan(causal, SIGMAS, (0, 0), 2), KeyedNoise(5, 2),
            new_cache(net, causal, 4), with_gradient=False,
        )  # fmt: skip


def test_teacher_forcing_gives_both_halves_their_frames_channels() -> None:
    """A noisy half that equals the clean one is what a block-causal pass over the clean frames sees of itself."""
    net, causal, x, condition = random_net(1, I2V), CausalConfig(2), latents(2, 2, 4), conditioning_on_image(4)
    zero = torch.zeros(2, 4)
    with torch.no_grad():
        forced = teacher_forced_velocity(ScoreNet(net, "n"), x, zero, CleanContext(x, zero), condition, causal)
        plain = ScoreNet(net, "n").velocity(x, zero, condition, mask=causal.mask(4))
    assert relative(forced, plain) < 2e-6


@pytest.mark.parametrize("batched", [True, False])
def test_the_negative_branch_sees_the_same_image(batched: bool) -> None:
    net, x, condition, negative = random_net(1, I2V), latents(2, 2, 3), conditioning_on_image(3), texts(9, 2)
    with torch.no_grad():
        cond, uncond = (
            net(x, SIGMA, text, channels=condition.channels, image=condition.image)
            for text in (condition.prompt["text"], negative)
        )
        made = ScoreNet(net, "n", batch_guidance=batched).guided_velocity(x, SIGMA, condition, negative, 3.0)
    assert relative(made, uncond + 3 * (cond - uncond)) < 1e-5


class Spy(nn.Module):
    """A linear velocity network that notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.calls: list[dict[str, Any]] = []

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor, **mode: Any) -> Tensor:
        self.calls.append({"x": x.detach(), "sigma": sigma, "text": text} | mode)
        return self.gain * x


def test_losses_and_rollouts_pass_all_conditioning_on() -> None:
    condition, spies = conditioning_on_image(3), [Spy() for _ in range(3)]
    student, real, fake = (ScoreNet(spy, "n") for spy in spies)
    noise, negative = latents(2, 2, 3), texts(9, 2)
    made = backward_simulation(student, noise, condition, SIGMAS, 1, KeyedNoise(5, 2), with_gradient=True)
    for loss in (dmd_loss, sid_loss):
        loss(ScoreQuery(made, real, fake, condition, Guidance(negative, 3.0), SIGMA, noise))
    critic_loss(made, fake, condition, SIGMA, noise)
    assert [len(spy.calls) for spy in spies] == [2, 2, 3]
    for call in (call for spy in spies for call in spy.calls):
        times = call["x"].shape[0] // 2
        assert torch.equal(call["channels"], condition.channels.repeat(times, 1, 1, 1, 1))  # type: ignore[union-attr]
        assert torch.equal(call["image"], condition.image.repeat(times, 1, 1))  # type: ignore[union-attr]


# clean first frames (TI2V)


def test_pinned_frames_are_seen_clean_and_predicted_exactly() -> None:
    spy, x, first = Spy(), latents(2, 2, 3), latents(8, 2, 1)
    score = ScoreNet(spy, "n", pins_initial=True)
    for sigma in (SIGMA, SIGMA[:, None].expand(2, 3)):
        x0 = score.x0(x, sigma, Conditioning(texts(3, 2), first))
        assert torch.allclose(x0[:, :1], first, atol=1e-6)
        assert torch.equal(x0[:, 1:], (x - 0.3 * x * SIGMA.reshape(2, 1, 1, 1, 1))[:, 1:])
        call = spy.calls.pop()
        assert torch.equal(call["x"], torch.cat([first, x[:, 1:]], 1))
        assert call["sigma"].tolist() == [[0.0, *[float(s)] * 2] for s in SIGMA]
    score.x0(x, SIGMA, Conditioning(texts(3, 2)))
    assert torch.equal(spy.calls[-1]["sigma"], SIGMA)  # nothing given, nothing pinned
    clean = score.velocity(first, torch.zeros(2), Conditioning(texts(3, 2), first))
    assert torch.equal(clean, torch.zeros_like(first))


def test_given_frames_have_no_loss_and_no_gradient_where_they_are_pinned() -> None:
    first, data, noise = latents(8, 2, 1), latents(2, 2, 3), latents(4, 2, 3)
    condition = Conditioning(texts(3, 2), first)
    x0 = torch.cat([first, data[:, 1:]], 1).requires_grad_()
    spies = Spy(), Spy()
    with torch.no_grad():
        spies[0].gain.fill_(0.7)
    real, fake = (ScoreNet(spy, "n", pins_initial=True) for spy in spies)
    out = dmd_loss(
        ScoreQuery(Rollout(x0), real, fake, condition, Guidance(condition.prompt["text"], 1.0), SIGMA, noise)
    )
    assert out.kl_gradient is not None
    assert float(out.kl_gradient[:, :1].abs().max()) < 1e-5 < float(out.kl_gradient[:, 1:].abs().min())
    loss = critic_loss(Rollout(x0), fake, condition, SIGMA, noise).loss
    x = mix(x0.detach(), noise, SIGMA)
    alone = (0.3 * x - (noise - x0.detach()))[:, 1:].square().sum() / x.numel()
    assert float(loss.detach()) == pytest.approx(float(alone), rel=1e-5)


def test_every_state_of_a_pinned_trajectory_is_the_given_frame_noised() -> None:
    noise, first = latents(2, 2, 3), latents(8, 2, 1)
    condition = Conditioning(texts(3, 2), first)
    score = ScoreNet(Spy(), "n", pins_initial=True)
    states = list(euler_trajectory(score, noise, condition, condition.prompt["text"], SIGMAS, 1.0))
    for sigma, x in zip((*SIGMAS, 0.0), states, strict=True):
        assert torch.allclose(x[:, :1], mix(first, noise[:, :1], torch.full((2,), sigma)), atol=1e-5)
    assert torch.equal(states[-1][:, :1], first)


# video to video


def test_a_clip_is_the_start_of_a_shorter_trajectory() -> None:
    clip, noise, grid = latents(2, 2, 3), latents(4, 2, 3), (1.0, 0.9, 0.7, 0.4)
    assert torch.equal(from_clip(clip, noise, grid, 1.0)[0], noise)
    x, rest = from_clip(clip, noise, grid, 0.5)
    assert rest == (0.7, 0.4)
    assert torch.equal(x, mix(clip, noise, torch.full((2,), 0.7)))
    assert from_clip(clip, noise, grid, 0.01)[1] == (0.4,)  # one step at least
    text = texts(3, 2)

    class Clip(nn.Module):  # all data is this clip: any trajectory ends there
        def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
            return (x - clip) / sigma.reshape(-1, 1, 1, 1, 1)

    assert relative(euler_sample(ScoreNet(Clip(), "n"), x, text, text, rest, 1.0), clip) < 1e-5
    for strength in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"strength {strength} must be in"):
            from_clip(clip, noise, grid, strength)


# two experts


def test_each_sample_goes_to_the_expert_of_its_noise_level() -> None:
    high, low = random_net(1, I2V), random_net(2, I2V)
    experts, condition, x = Experts(high, low, T2V_BOUNDARY), conditioning_on_image(3), latents(2, 2, 3)
    beside = condition.beside_prompt
    with torch.no_grad():
        for sigma, nets in (([0.9, 0.2], (high, low)), ([0.874, 0.875], (low, high)), ([0.95, 1.0], (high, high))):
            made = experts(x, torch.tensor(sigma), **condition.prompt, **beside)
            for row, net in enumerate(nets):
                alone = net(x, torch.tensor(sigma), condition.prompt["text"], **beside)[row]
                assert relative(made[row], alone) < 1e-6
        per_frame = torch.tensor([[0.0, 0.9, 0.9], [0.0, 0.5, 0.5]])  # a clean frame does not make a sample clean
        made = experts(x, per_frame, **condition.prompt, **beside)
        assert relative(made[0], high(x, per_frame, condition.prompt["text"], **beside)[0]) < 1e-6
        assert relative(made[1], low(x, per_frame, condition.prompt["text"], **beside)[1]) < 1e-6
    assert experts.each_step((0.95, 0.875, 0.87), 4.0, 3.0) == [4.0, 4.0, 3.0]
    assert experts.fsdp_units() == [*high.fsdp_units(), *low.fsdp_units()]
    with pytest.raises(ValueError, match="cannot share a KV cache"):
        experts(x, SIGMA, **condition.prompt, cache=object())
    with pytest.raises(ValueError, match=r"boundary 875 must be a noise level in \(0, 1\)"):
        Experts(high, low, 875)


@pytest.mark.parametrize("boundary", [T2V_BOUNDARY, I2V_BOUNDARY])
def test_an_expert_is_trained_within_its_own_noise_levels(boundary: float) -> None:
    """The schedule's bounds keep every draw on the expert's side, with the shifted density of the whole range."""
    u = torch.linspace(0, 1, 20001)[:-1]
    whole = ScheduleConfig(min_sigma=0.0, max_sigma=1.0)
    high = replace(whole, min_score_timestep=1000 * boundary)
    low = replace(whole, max_score_timestep=1000 * boundary)
    for draw in ("score_sigma", "training_sigma"):
        everything, above, below = (getattr(schedule, draw)(u) for schedule in (whole, high, low))
        assert float(above.min()) >= boundary - 1e-6
        assert float(below.max()) <= boundary + 1e-6
        share = float((everything >= boundary).double().mean())
        for part, drawn in ((everything[everything >= boundary], above), (everything[everything < boundary], below)):
            for q in (0.1, 0.5, 0.9):
                assert float(drawn.quantile(q)) == pytest.approx(float(part.quantile(q)), abs=1e-3)
        assert 0.3 < share < 0.5  # shift 5 puts as much above the boundary
    assert float(high.score_sigma(u, sigma_from=1.0, sigma_to=0.9).min()) >= boundary - 1e-6
    for bad in ({"max_score_timestep": 300.0, "min_score_timestep": 300.0}, {"max_score_timestep": 1001.0}):
        with pytest.raises(ValueError, match="max_score_timestep must be above"):
            ScheduleConfig(**bad)
    with pytest.raises(ValueError, match="max_score_timestep 10.0 is not above min_sigma"):
        ScheduleConfig(max_score_timestep=10.0)
