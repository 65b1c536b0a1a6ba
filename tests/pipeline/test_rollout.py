"""The Self-Forcing rollout: what inference gives, with the gradient of each block's own exit step and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from model.attention.checkpointing import Checkpointing
from model.schedule import mix
from model.score import ScoreNet
from model.types import Conditioning, Evaluations, Rollout
from model.wan.block import Attention
from model.wan.transformer import WanTransformer
from pipeline.bidirectional_training import backward_simulation, diffusion_forcing_input, noised_data
from pipeline.causal import CausalConfig, VideoShape
from pipeline.causal_inference import generate, stream
from pipeline.diffusion_forcing import per_frame
from pipeline.self_forcing_training import RolloutPlan, rollout_lengths, self_forcing_rollout
from tests.nets import KeyedNoise, conditioning, gradients, latents, random_net, relative, texts

SIGMAS = (1.0, 0.9375, 0.625)
LAST = len(SIGMAS) - 1
CPU = torch.device("cpu")

CASES: dict[str, tuple[CausalConfig, int, int]] = {  # causal, given frames, frames to generate
    "full": (CausalConfig(2), 0, 6),
    "context_noise": (CausalConfig(2, context_noise=100), 0, 6),
    "first_frame": (CausalConfig(2, independent_first_frame=True), 0, 5),
    "image_to_video": (CausalConfig(2, independent_first_frame=True, context_noise=50), 1, 6),
    "continued": (CausalConfig(2), 4, 4),
    "window": (CausalConfig(2, window_frames=5), 0, 10),
    "window_sinks": (CausalConfig(2, window_frames=4, sink_frames=1, context_noise=30), 0, 8),
    "window_given": (CausalConfig(2, window_frames=4, sink_frames=2), 2, 6),
}


class Case(NamedTuple):
    """What is rolled out: how its frames are split into blocks, noise [B, F, C, H, W], text and given frames."""

    causal: CausalConfig
    noise: Tensor
    condition: Conditioning


def setup(name: str, batch: int = 2) -> Case:
    causal, given_frames, frames = CASES[name]
    initial = latents(8, batch, given_frames) if given_frames else None
    return Case(causal, latents(2, batch, frames), conditioning(3, batch, initial))


def blocks_of(name: str) -> tuple[int, ...]:
    causal, given_frames, frames = CASES[name]
    return causal.split(given_frames, frames)[1]


def run(
    net: WanTransformer,
    case: Case,
    exits: Sequence[int],
    *,
    score_frames: int | None = None,
    with_gradient: bool = True,
    evaluations: Evaluations | None = None,
    reencode: Callable[[Tensor], Tensor] | None = None,
    context_gradient: bool = False,
) -> Rollout:
    """The rollout of a case.

    net: the student.
    case: what is rolled out.
    exits: the step at which each block leaves.
    score_frames: how many of the last frames are judged; None judges all.
    with_gradient: whether judged frames carry gradient.
    evaluations: counts the student's passes.
    reencode: makes an image latent of the first judged frame of a longer rollout.
    context_gradient: self-gradient forcing.
    """
    causal, noise, condition = case
    total = condition.initial_frames + noise.shape[1]
    cache = causal.new_cache(net, VideoShape.of(noise, condition.initial_frames), torch.float32, CPU)
    return self_forcing_rollout(
        ScoreNet(net, "student", evaluations), noise, condition,
        RolloutPlan(causal, SIGMAS, tuple(exits), total if score_frames is None else score_frames, context_gradient), KeyedNoise(5, noise.shape[0]), cache,
        with_gradient=with_gradient, reencode=reencode,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_exit_at_the_last_step_is_inference_bit_for_bit(name: str) -> None:
    causal, noise, condition = case = setup(name)
    net = random_net(1)
    exits = [LAST] * len(blocks_of(name))
    x0 = run(net, case, exits, with_gradient=True).x0
    cache = causal.new_cache(net, VideoShape.of(noise, condition.initial_frames), torch.float32, CPU)
    sampled = generate(ScoreNet(net, "student"), noise, condition, SIGMAS, causal, KeyedNoise(5, 2), cache)
    assert x0.requires_grad
    assert not sampled.requires_grad
    assert torch.equal(x0.detach(), sampled)

    cache.reset()
    parts = list(stream(ScoreNet(net, "student"), noise, condition, SIGMAS, causal, KeyedNoise(5, 2), cache))
    assert [part.shape[1] for part in parts] == list(blocks_of(name))
    assert torch.equal(torch.cat(parts, 1), sampled[:, condition.initial_frames :])


@contextmanager
def context_without_gradient(net: WanTransformer, tokens: int) -> Iterator[None]:
    """Within it the self-attention keys and values of a pass's first `tokens` tokens carry no gradient."""

    def wrap(attention: Attention) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def key_value(h: Tensor) -> tuple[Tensor, Tensor]:
            pair = Attention.key_value(attention, h)
            k, v = (torch.cat([t[:, :tokens].detach(), t[:, tokens:]], 1) for t in pair)
            return k, v

        return key_value

    attentions = [module for name, module in net.named_modules() if name.endswith("self_attn")]
    for attention in attentions:
        assert isinstance(attention, Attention)
        attention.key_value = wrap(attention)  # type: ignore[method-assign, assignment]
    yield
    for attention in attentions:
        del attention.key_value


def brute_force(
    net: WanTransformer, case: Case, exits: Sequence[int], *, context_gradient: bool = False
) -> list[Tensor]:
    """x0 of each generated block with the gradient of its exit step, without a cache.

    Every step of every block is a masked pass over all frames so far. The finished frames are in it as the cache pass
    would see them; with context_gradient the gradient goes through their keys and values, too.
    """
    causal, noise, condition = case
    through = nullcontext() if context_gradient else None
    source, batch = KeyedNoise(5, noise.shape[0]), noise.shape[0]
    seen = [] if condition.initial is None else [condition.initial]
    times = [torch.zeros(batch, condition.initial_frames)]
    out = []
    for index, (part, exit_step) in enumerate(zip(noise.split(blocks_of_noise(case), 1), exits, strict=True)):
        start, size = sum(t.shape[1] for t in seen), part.shape[1]

        def predict(x: Tensor, sigma: float, start: int = start, size: int = size) -> Tensor:
            video, time = torch.cat([*seen, x], 1), torch.cat([*times, torch.full((batch, size), sigma)], 1)
            with through or context_without_gradient(net, start * 6):
                velocity = net(video, time, condition.prompt["text"], mask=causal.mask(start + size))[:, start:]
            return x - sigma * velocity

        x = part
        with torch.no_grad():
            for step in range(exit_step):
                fresh = source.normal(f"renoise.b{index}.s{step}", tuple(x.shape[1:]))
                x = mix(predict(x, SIGMAS[step]), fresh, torch.full((batch,), SIGMAS[step + 1]))
        x0 = predict(x, SIGMAS[exit_step])
        out.append(x0)
        level, context = causal.context_sigma, x0.detach()
        if level > 0:
            draw = source.normal(f"context_noise.b{index}", tuple(context.shape[1:]))
            context = mix(context, draw, torch.full((batch,), level))
        seen.append(context)
        times.append(torch.full((batch, size), level))
    return out


def blocks_of_noise(case: Case) -> list[int]:
    return list(case.causal.split(case.condition.initial_frames, case.noise.shape[1])[1])


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    scale = max(float(g.norm()) for g in expected.values())
    for name, want in expected.items():
        error = float((actual[name] - want).norm())
        assert error <= tolerance * max(float(want.norm()), 1e-2 * scale), name


@pytest.mark.parametrize("checkpointing", [Checkpointing.none, Checkpointing.full], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", CASES)
def test_defect_01_gradient_is_each_blocks_own_exit_step(name: str, checkpointing: Checkpointing) -> None:
    _, noise, condition = case = setup(name)
    exits = [(0, 2, 1, 2, 0)[i] for i in range(len(blocks_of(name)))]
    weight = latents(6, 2, noise.shape[1])
    net = random_net(1)
    expected_x0 = torch.cat(brute_force(net, case, exits), 1)
    (expected_x0 * weight).sum().backward()
    expected = gradients(net)

    net = random_net(1, checkpointing=checkpointing)
    x0 = run(net, case, exits).x0[:, condition.initial_frames :]
    assert relative(x0, expected_x0) < 5e-6
    (x0 * weight).sum().backward()
    assert_same_gradients(gradients(net), expected)


@pytest.mark.parametrize("checkpointing", [Checkpointing.none, Checkpointing.full], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", CASES)
def test_self_gradient_forcing_reaches_the_context_that_later_blocks_looked_at(
    name: str, checkpointing: Checkpointing
) -> None:
    """arXiv 2607.20368: the rollout's numbers to the bit, and the gradient of brute force through keys and values."""
    _, noise, condition = case = setup(name)
    exits = [(0, 2, 1, 2, 0)[i] for i in range(len(blocks_of(name)))]
    weight = latents(6, 2, noise.shape[1])
    net = random_net(1)
    expected_x0 = torch.cat(brute_force(net, case, exits, context_gradient=True), 1)
    (expected_x0 * weight).sum().backward()
    expected = gradients(net)

    net = random_net(1, checkpointing=checkpointing)
    evaluations = Evaluations()
    x0 = run(net, case, exits, context_gradient=True, evaluations=evaluations).x0
    assert torch.equal(x0.detach(), run(net, case, exits).x0.detach())
    (x0[:, condition.initial_frames :] * weight).sum().backward()
    assert_same_gradients(gradients(net), expected)

    plain = Evaluations()
    run(net, case, exits, evaluations=plain)
    generated = noise.shape[1] + condition.initial_frames - blocks_of(name)[-1] + noise.shape[1]
    assert evaluations.total_frames - plain.total_frames == 2 * generated  # one more pass, over a batch of 2


def test_self_gradient_forcing_of_a_longer_rollout_judges_its_window() -> None:
    """Only the window's blocks are replayed, and their gradient goes through all of their context."""
    case = Case(CausalConfig(2), latents(2, 2, 8), conditioning(3, 2))
    exits, weight = [1, 0, 2, 1], latents(6, 2, 4)
    net = random_net(1)
    expected_x0 = torch.cat(brute_force(net, case, exits, context_gradient=True), 1)[:, 5:]
    (expected_x0 * weight[:, 1:]).sum().backward()
    expected = gradients(net)
    net = random_net(1)
    rollout = run(net, case, exits, score_frames=4, context_gradient=True)
    assert relative(rollout.x0[:, 1:], expected_x0) < 5e-6
    (rollout.x0[:, 1:] * weight[:, 1:]).sum().backward()
    assert_same_gradients(gradients(net), expected)


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_defect_01_no_gradient_leaks_between_blocks(chosen: int) -> None:
    """The loss of one block alone: its gradient in weights is that block's brute force, in others' noise exactly zero."""
    case = setup("full")
    part = slice(2 * chosen, 2 * chosen + 2)
    net = random_net(1)
    brute_force(net, case, [0, 0, 0])[chosen].square().sum().backward()
    expected = gradients(net)

    net = random_net(1)
    noise = case.noise.clone().requires_grad_()
    run(net, case._replace(noise=noise), [0, 0, 0]).x0[:, part].square().sum().backward()
    assert_same_gradients(gradients(net), expected)
    assert noise.grad is not None
    in_block = torch.zeros(6, dtype=torch.bool)
    in_block[part] = True
    assert float(noise.grad[:, in_block].norm()) > 0
    assert bool((noise.grad[:, ~in_block] == 0).all())


def test_defect_07_every_step_of_the_list_can_be_trained() -> None:
    """Each exit step has its own gradient, the last one too; and a rollout without gradient has none."""
    case = setup("full")
    found = []
    for exit_step in range(len(SIGMAS)):
        net = random_net(1)
        run(net, case, [exit_step] * 3).x0.square().sum().backward()
        found.append(torch.cat([g.flatten() for g in gradients(net).values()]))
    assert all(relative(a, b) > 1e-2 for a in found for b in found if a is not b)
    assert not run(random_net(1), case, [LAST] * 3, with_gradient=False).x0.requires_grad
    with torch.no_grad():
        assert not run(random_net(1), case, [LAST] * 3).x0.requires_grad


def test_defect_07_context_noise_is_added_and_not_only_told() -> None:
    """At inference and in training alike the cached block is noised; its time alone would give other numbers."""
    causal, noise, condition = setup("context_noise")
    net = random_net(1)
    cache = causal.new_cache(net, VideoShape(2, 6, 4, 6), torch.float32, CPU)
    source = KeyedNoise(5, 2)
    noised = generate(ScoreNet(net, "s"), noise, condition, SIGMAS, causal, source, cache)
    assert [role for role in source.roles if role.startswith("context")] == ["context_noise.b0", "context_noise.b1"]

    class Quiet(KeyedNoise):
        def normal(self, role: str, shape: tuple[int, ...]) -> Tensor:
            return super().normal(role, shape) * (0 if role.startswith("context") else 1)

    cache.reset()
    assert relative(generate(ScoreNet(net, "s"), noise, condition, SIGMAS, causal, Quiet(5, 2), cache), noised) > 1e-3


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("exits", [(0, 0, 0, 0, 0), (2, 0, 1, 2, 0), (2, 2, 2, 2, 2)], ids=str)
def test_defect_08_defect_12_evaluations_are_the_minimum(name: str, exits: tuple[int, ...]) -> None:
    """Steps up to each block's exit and no further, one cache pass for each block but the last, one for each given one."""
    causal, noise, condition = case = setup(name)
    blocks = blocks_of(name)
    exits = exits[: len(blocks)]
    given_blocks = causal.split(condition.initial_frames, noise.shape[1])[0]
    evaluations = Evaluations()
    run(random_net(1), case, exits, evaluations=evaluations)
    assert evaluations.calls == {"student": sum(e + 1 for e in exits) + len(blocks) - 1 + len(given_blocks)}
    steps = sum(size * (e + 1) for size, e in zip(blocks, exits, strict=True))
    assert evaluations.frames == {"student": 2 * (steps + sum(blocks[:-1]) + sum(given_blocks))}

    sampling = Evaluations()
    cache = causal.new_cache(random_net(1), VideoShape.of(noise, condition.initial_frames), torch.float32, CPU)
    generate(ScoreNet(random_net(1), "s", sampling), noise, condition, SIGMAS, causal, KeyedNoise(5, 2), cache)
    assert sampling.calls == {"s": len(blocks) * len(SIGMAS) + len(blocks) - 1 + len(given_blocks)}


def test_sigma_from_and_to_are_the_exit_steps_when_all_share_one() -> None:
    case = setup("full")
    levels = (*SIGMAS, 0.0)
    for exit_step in range(len(SIGMAS)):
        out = run(random_net(1), case, [exit_step] * 3)
        assert (out.sigma_from, out.sigma_to) == (levels[exit_step], levels[exit_step + 1])
        assert out.exit_steps == (exit_step,) * 3
        assert out.frame_mask is None
    mixed = run(random_net(1), case, [0, 1, 0])
    assert mixed.sigma_from is None
    assert mixed.sigma_to is None
    with pytest.raises(ValueError, match="2 exit steps for 3 blocks"):
        run(random_net(1), case, [0, 1])


@pytest.mark.parametrize("name", ["image_to_video", "continued", "window_given"])
def test_given_frames_come_first_unchanged_and_unjudged(name: str) -> None:
    _, _, condition = case = setup(name)
    exits = [1] * len(blocks_of(name))
    out = run(random_net(1), case, exits)
    assert condition.initial is not None
    assert torch.equal(out.x0[:, : condition.initial_frames], condition.initial)
    assert out.frame_mask is not None
    assert out.frame_mask.tolist() == [frame >= condition.initial_frames for frame in range(out.x0.shape[1])]
    changed = Conditioning(condition.prompt["text"], condition.initial + 1)
    other = run(random_net(1), case._replace(condition=changed), exits)
    assert relative(other.x0[:, -2:], out.x0[:, -2:]) > 1e-3


@pytest.mark.parametrize("checkpointing", [Checkpointing.none, Checkpointing.full], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["full", "window", "window_sinks", "continued"])
def test_long_rollout_is_judged_and_trained_in_its_last_window_only(name: str, checkpointing: Checkpointing) -> None:
    _, noise, condition = case = setup(name)
    blocks, window = blocks_of(name), 4
    total = condition.initial_frames + noise.shape[1]
    exits = [(1, 2, 0, 1, 2)[i] for i in range(len(blocks))]
    calls = []

    def reencode(video: Tensor) -> Tensor:
        calls.append(video.shape)
        assert not video.requires_grad
        return video[:, -1:].mean(1, keepdim=True) + 7

    net = random_net(1, checkpointing=checkpointing)
    out = run(net, case, exits, score_frames=window, reencode=reencode)
    plain = run(net, case, exits).x0.detach()
    start = total - window
    assert calls == [(2, start + 1, *noise.shape[2:])]
    assert out.x0.shape[1] == window
    assert out.frame_mask is not None
    assert out.frame_mask.tolist() == [False, True, True, True]
    assert torch.equal(out.x0[:, 1:].detach(), plain[:, start + 1 :])
    assert torch.equal(out.x0[:, :1].detach(), plain[:, start : start + 1] + 7)

    weight = latents(6, 2, window)
    (out.x0 * weight).sum().backward()
    actual = gradients(net)
    net = random_net(1)
    ends = list(accumulate(blocks, initial=condition.initial_frames))[1:]
    parts = [x0 if end > start else x0.detach() for x0, end in zip(brute_force(net, case, exits), ends, strict=True)]
    expected = torch.cat(parts, 1)[:, -window:]
    (expected * weight)[:, 1:].sum().backward()  # the replaced frame carries no gradient
    assert_same_gradients(actual, gradients(net))


def test_long_rollout_spends_no_gradient_outside_its_window() -> None:
    noise = latents(2, 2, 10).requires_grad_()
    out = run(random_net(1), setup("full")._replace(noise=noise), [0] * 5, score_frames=4)
    out.x0.square().sum().backward()
    assert noise.grad is not None
    assert bool((noise.grad[:, :6] == 0).all())
    assert float(noise.grad[:, 6:].norm()) > 0


def test_rollout_lengths() -> None:
    assert rollout_lengths(21, 27, 3) == [21, 24, 27]
    assert rollout_lengths(21, 21, 3) == [21]
    for longest in (18, 22):
        with pytest.raises(
            ValueError, match=f"num_training_frames {longest} must be 21 plus a multiple of the block of 3"
        ):
            rollout_lengths(21, longest, 3)


def test_initial_frames_that_end_within_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="3 initial latent frames do not end at a block: use 4 or 2"):
        CausalConfig(2).split(3, 3)
    assert CausalConfig(2, independent_first_frame=True).split(3, 4) == ((1, 2), (2, 2))


# rollouts without a cache


def test_backward_simulation_is_the_students_own_steps_with_gradient_at_the_exit() -> None:
    noise, condition = latents(2, 2, 4), conditioning(3, 2)
    net = random_net(1)
    out = backward_simulation(ScoreNet(net, "s"), noise, condition, SIGMAS, 1, KeyedNoise(5, 2), with_gradient=True)
    with torch.no_grad():
        first = noise - net(noise, torch.ones(2), condition.prompt["text"])
        fresh = KeyedNoise(5, 2).normal("renoise.b0.s0", tuple(noise.shape[1:]))
    x = mix(first, fresh, torch.full((2,), SIGMAS[1]))
    expected = x - SIGMAS[1] * net(x, torch.full((2,), SIGMAS[1]), condition.prompt["text"])
    assert relative(out.x0, expected) < 1e-6
    assert (out.sigma_from, out.sigma_to, out.exit_steps) == (SIGMAS[1], SIGMAS[2], (1,))
    ours, theirs = (torch.autograd.grad(x0.square().sum(), list(net.parameters())) for x0 in (out.x0, expected))
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))


def test_noised_data_reaches_every_step_the_last_one_included() -> None:
    data, condition, net = latents(2, 2, 4), conditioning(3, 2), random_net(1)
    for exit_step, sigma in enumerate(SIGMAS):
        out = noised_data(ScoreNet(net, "s"), data, condition, SIGMAS, exit_step, KeyedNoise(5, 2), with_gradient=True)
        x = mix(data, KeyedNoise(5, 2).normal("input_noise", tuple(data.shape[1:])), torch.full((2,), sigma))
        assert relative(out.x0, x - sigma * net(x, torch.full((2,), sigma), condition.prompt["text"])) < 1e-6
        assert out.sigma_to == (*SIGMAS, 0.0)[exit_step + 1]
        assert out.x0.requires_grad


def test_diffusion_forcing_input_has_one_level_a_block() -> None:
    causal, data, condition, net = CausalConfig(2), latents(2, 2, 6), conditioning(3, 2), random_net(1)
    steps = torch.tensor([[0, 2, 1], [1, 1, 0]])
    out = diffusion_forcing_input(
        ScoreNet(net, "s"), data, condition, torch.tensor(SIGMAS)[steps], causal, KeyedNoise(5, 2), with_gradient=False
    )
    sigma = torch.tensor(SIGMAS)[steps].repeat_interleave(2, 1)
    assert torch.equal(per_frame(torch.tensor(SIGMAS)[steps], (2, 2, 2)), sigma)
    x = mix(data, KeyedNoise(5, 2).normal("input_noise", tuple(data.shape[1:])), sigma)
    with torch.no_grad():
        expected = x - sigma[..., None, None, None] * net(x, sigma, texts(3, 2), mask=causal.mask(6))
    assert relative(out.x0, expected) < 1e-6
    assert not out.x0.requires_grad


def test_teacher_forcing_input_looks_back_at_clean_blocks() -> None:
    """Each block alone, after the clean blocks before it, has the same x0."""
    causal, data, condition, net = CausalConfig(2), latents(2, 2, 6), conditioning(3, 2), random_net(1)
    steps = torch.tensor([[0, 2, 1], [1, 1, 0]])
    out = diffusion_forcing_input(
        ScoreNet(net, "s"), data, condition, torch.tensor(SIGMAS)[steps], causal, KeyedNoise(5, 2), with_gradient=False,
        clean_context=True,
    )  # fmt: skip
    sigma = torch.tensor(SIGMAS)[steps].repeat_interleave(2, 1)
    x = mix(data, KeyedNoise(5, 2).normal("input_noise", tuple(data.shape[1:])), sigma)
    for start in (0, 2, 4):
        part = slice(start, start + 2)
        seen = torch.cat([data[:, :start], x[:, part]], 1)
        times = torch.cat([torch.zeros(2, start), sigma[:, part]], 1)
        with torch.no_grad():
            velocity = net(seen, times, texts(3, 2), mask=causal.mask(start + 2))[:, start:]
        assert relative(out.x0[:, part], x[:, part] - sigma[:, part, None, None, None] * velocity) < 5e-6
