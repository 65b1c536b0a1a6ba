"""Defects of the field's public implementations that the model or the rollout could have, one test each.

Those that another file's tests hold carry the number in their names there: 1 and 12 in test_rollout, 2 in test_golden,
3, 4 and 5 in test_transformer and test_attention, 9 in test_masks_rope, 6 and 7 in test_schedule, 7, 8, 9 and 12 in test_dmd.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from model.attention.backends import Backend
from model.attention.checkpointing import Checkpointing
from model.attention.masks import FrameMask
from model.dmd import critic_loss
from model.score import ScoreNet
from model.types import Conditioning, Rollout
from model.wan.config import PRESETS
from model.wan.transformer import WanTransformer
from pipeline.causal import CausalConfig, VideoShape
from pipeline.self_forcing_training import RolloutPlan, self_forcing_rollout
from tests.nets import MICRO, KeyedNoise, conditioning, gradients, latents, random_net, relative, texts

CPU = torch.device("cpu")
SIGMAS = (1.0, 0.8, 0.5)


def rollout(
    net: WanTransformer,
    causal: CausalConfig,
    exits: tuple[int, ...],
    compute_dtype: torch.dtype | None = None,
    condition: Conditioning | None = None,
) -> Tensor:
    frames = 2 * len(exits)
    noise = latents(2, 2, frames)
    dtype = compute_dtype or torch.float32
    cache = causal.new_cache(net, VideoShape(2, frames, 4, 6), dtype, CPU)
    return self_forcing_rollout(
        ScoreNet(net, "student", compute_dtype=compute_dtype), noise, condition or conditioning(3, 2),
        RolloutPlan(causal, SIGMAS, exits, frames), KeyedNoise(5, 2), cache, with_gradient=True,
    ).x0  # fmt: skip


@pytest.mark.parametrize("backend", [Backend.PLAIN, Backend.SDPA], ids=lambda b: b.value)
def test_defect_02_text_projections_get_gradient_with_and_without_checkpointing(backend: Backend) -> None:
    """Cross-attention keys and values kept from passes without gradient must not cut these weights off."""
    found = []
    for checkpointing in Checkpointing:
        net = random_net(1, backend=backend, checkpointing=checkpointing)
        rollout(net, CausalConfig(2), (1, 2, 0)).square().mean().backward()
        found.append({
            name: g for name, g in gradients(net).items()
            if name.startswith("text_embedding") or ".cross_attn.k." in name or ".cross_attn.v." in name or "cross_attn.norm_k" in name
        })  # fmt: skip
    assert len(found[0]) == 4 + MICRO.num_layers * 5
    for name, gradient in found[0].items():
        if not name.endswith("cross_attn.k.bias"):  # under a norm its gradient may be small, never the others'
            assert float(gradient.norm()) > 1e-6, name
        # checkpointing sums over the blocks in another order
        assert relative(found[1][name], gradient) < 3e-6 and relative(found[2][name], gradient) < 3e-6, name


def test_defect_02_backward_runs_for_every_kind_of_cache_without_checkpointing() -> None:
    """In-place writes after the exit step must not touch what backward still needs."""
    for causal in (
        CausalConfig(2),
        CausalConfig(2, window_frames=4, sink_frames=1),
        CausalConfig(2, context_noise=100),
    ):
        net = random_net(1)
        rollout(net, causal, (0, 0, 1, 0)).square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_defect_02_autocast_keeps_no_weights_from_passes_without_gradient() -> None:
    """Autocast's copies of the weights, made in the steps without gradient, would cut the exit step off from them."""
    exact, rough = random_net(1), random_net(1)
    rollout(exact, CausalConfig(2), (2, 2, 2)).square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):  # the trainer's own region, if it has one, must not matter either
        x0 = rollout(rough, CausalConfig(2), (2, 2, 2), torch.bfloat16)
    x0.square().mean().backward()
    want, got = gradients(exact), gradients(rough)
    assert got.keys() == want.keys() == dict(rough.named_parameters()).keys()
    both = [torch.cat([g.flatten() for g in grads.values()]) for grads in (want, got)]
    assert float(functional.cosine_similarity(both[0], both[1], dim=0)) > 0.995
    assert all(g.dtype is torch.float32 for g in got.values())


def test_defect_03_query_and_key_get_their_gradient_through_rope() -> None:
    """Against finite differences: a rotation without a backward would leave these weights untrained, silently."""
    net, weight = random_net(1), latents(6, 2, 2)

    def loss() -> Tensor:
        return (rollout(net, CausalConfig(2), (0,)).double() * weight.double()).sum()

    loss().backward()
    for part in ("q", "k"):
        name = f"self_attn.{part}.weight"
        direction = {
            key: p.grad.clone() for key, p in net.named_parameters() if key.endswith(name) and p.grad is not None
        }
        size = torch.stack([d.norm() for d in direction.values()]).norm()
        assert len(direction) == MICRO.num_layers
        assert float(size) > 1e-3
        ends = []
        with torch.no_grad():
            for step in (1e-2, -2e-2):
                for key, p in net.named_parameters():
                    if key in direction:
                        p.add_(direction[key] / size, alpha=step)
                ends.append(loss())
            for key, p in net.named_parameters():
                if key in direction:
                    p.add_(direction[key] / size, alpha=1e-2)
        assert float((ends[0] - ends[1]) / 2e-2) == pytest.approx(float(size), rel=2e-2)


def test_defect_04_cache_size_follows_geometry_and_window() -> None:
    """Bytes by hand: 2 (k, v) x layers x batch x frames that are read back x tokens x width x 4."""
    config = dataclasses.replace(MICRO, num_layers=3, dim=60, num_heads=3)
    net = WanTransformer(config)
    for causal, held in (
        (CausalConfig(2), 10),
        (CausalConfig(2, window_frames=6), 4),
        (CausalConfig(2, window_frames=40), 10),
    ):
        cache = causal.new_cache(net, VideoShape(2, 12, 8, 10), torch.float32, CPU)
        room = held + causal.num_frame_per_block  # the block being computed lies behind its context
        assert cache.nbytes == 2 * 3 * 2 * room * 20 * 60 * 4


def test_defect_05_sinks_and_window_count_in_training() -> None:
    plain, window, sinks = (
        rollout(random_net(1), causal, (1, 0, 1, 0)).detach()
        for causal in (
            CausalConfig(2),
            CausalConfig(2, window_frames=4),
            CausalConfig(2, window_frames=4, sink_frames=1),
        )
    )
    assert torch.equal(plain[:, :4], window[:, :4])
    assert relative(window[:, 4:], plain[:, 4:]) > 1e-3
    assert relative(sinks[:, 4:], window[:, 4:]) > 1e-3


def test_defect_05_teacher_forcing_is_asked_for_and_not_guessed_from_the_length() -> None:
    """Twice the frames are twice the frames: without a mask, all see all."""
    net, x, text = random_net(1), latents(2, 1, 6), texts(3, 1)
    everything = FrameMask(((True,) * 6,) * 6)
    with torch.no_grad():
        assert relative(net(x, torch.tensor([0.5]), text), net(x, torch.tensor([0.5]), text, mask=everything)) < 1e-6


def test_defect_06_time_embedding_is_exact_between_table_entries() -> None:
    """Noise levels closer than a table's spacing are different, and sigma 0 is time 0."""
    net = random_net(1)
    with torch.no_grad():
        near = [net._time(torch.tensor([s]))[0] for s in (0.0, 1e-4, 2e-4, 0.5, 0.50001)]
        wave = torch.cat([torch.ones(MICRO.freq_dim // 2), torch.zeros(MICRO.freq_dim // 2)])  # cos 0, sin 0
        assert torch.allclose(near[0][0, 0], net.time_embedding(wave), atol=1e-6)
    for a, b in itertools.pairwise(near):
        assert not torch.equal(a, b)


def test_defect_09_a_bidirectional_critic_gets_one_time_a_sample() -> None:
    class Recorder(torch.nn.Module):
        def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
            self.sigma = sigma
            return torch.zeros_like(x)

    critic, x0, sigma = Recorder(), latents(1, 2, 3), torch.tensor([0.3, 0.6])
    critic_loss(Rollout(x0), ScoreNet(critic, "critic"), conditioning(3, 2), sigma, latents(2, 2, 3))
    assert torch.equal(critic.sigma, sigma)


def test_defect_09_frames_channels_and_places_are_not_scrambled() -> None:
    """A net without blocks maps each patch alone: touching one latent changes its own frame and patch, every channel."""
    net = random_net(1)
    net.blocks = torch.nn.ModuleList()
    x, text, sigma = latents(2, 2, 3), texts(3, 2), torch.full((2,), 0.5)
    with torch.no_grad():
        base = net(x, sigma, text)
        for b, f, c, h, w in ((0, 0, 0, 0, 0), (1, 2, 1, 3, 4), (1, 1, 2, 2, 5)):
            touched = x.clone()
            touched[b, f, c, h, w] += 1
            changed = (net(touched, sigma, text) - base).abs() > 1e-7
            expected = torch.zeros_like(changed)
            expected[b, f, :, h // 2 * 2 : h // 2 * 2 + 2, w // 2 * 2 : w // 2 * 2 + 2] = True
            assert torch.equal(changed, expected)


def test_defect_09_patches_are_the_convolution_they_stand_for() -> None:
    net, x = random_net(1), latents(2, 2, 3)
    expected = net.patch_embedding(x.transpose(1, 2)).flatten(2).transpose(1, 2)
    assert relative(net._patchify(x), expected) < 1e-6


def test_defect_12_every_block_is_a_unit_of_its_own() -> None:
    with torch.device("meta"):
        net = WanTransformer(PRESETS["1.3b"])
    units = net.fsdp_units()
    assert units == list(net.blocks)
    assert len(units) == 30
    rest = sum(p.numel() for p in net.parameters()) - sum(p.numel() for unit in units for p in unit.parameters())
    assert rest < 0.05 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("checkpointing", list(Checkpointing))
def test_defect_12_no_value_is_read_back_from_the_device(checkpointing: Checkpointing) -> None:
    """Fake tensors have no values, so any `.item()` in a pass, cached and rolling ones included, would raise."""
    with FakeTensorMode():
        net = WanTransformer(MICRO, Backend.PLAIN, checkpointing)
        causal = CausalConfig(2, window_frames=4, sink_frames=1)
        cache = causal.new_cache(net, VideoShape(2, 8, 4, 6), torch.float32, CPU)
        text, sigma = torch.empty(2, 5, 12), torch.empty(2, 2)
        for _ in range(3):
            part = torch.empty(2, 2, 3, 4, 6)
            net(part, sigma, text, cache=cache).sum().backward()
            with torch.no_grad():
                net(part, sigma, text, cache=cache, write_cache=True)
        whole = torch.empty(2, 8, 3, 4, 6)
        assert net(whole, torch.empty(2), text, mask=causal.mask(8)).shape == whole.shape
        with pytest.raises(DataDependentOutputException):  # what a read-back would give
            whole.sum().item()
