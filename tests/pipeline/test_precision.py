"""Samplers and rollouts compute in fp32 whatever the noise's dtype, and what they leave behind holds no graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.score import ScoreNet
from model.types import Conditioning, Rollout
from pipeline.bidirectional_inference import euler_trajectory, from_clip, unipc_trajectory
from pipeline.bidirectional_training import backward_simulation, noised_data
from pipeline.causal import CausalConfig, VideoShape
from pipeline.causal_inference import Branch, causal_trajectory
from pipeline.denoise import ExitPass, context_input, denoise_block, write_context
from tests.nets import KeyedNoise, conditioning, latents, random_net
from tests.precision import SHAPE, Answer, Case, Outputs, answering, check_precision, rough, whole

B, F = SHAPE[:2]
TEXT, NEGATIVE = torch.ones(B, 1, 1), {"text": torch.zeros(B, 1, 1)}
STEPS = (1.0, 0.75, 0.5)
ANSWER = rough(1, *SHAPE)


def score() -> tuple[ScoreNet, Answer]:
    return answering(ANSWER)


def states(trajectory: Iterable[Tensor]) -> Outputs:
    return {f"state {index}": x for index, x in enumerate(trajectory)}


def many_steps(sampler: Any) -> Any:
    return lambda noise: states(sampler(score()[0], noise, TEXT, NEGATIVE, STEPS, 3.0))


def rollout_of(kind: Any, steps: tuple[float, ...] = STEPS, **inputs: Tensor) -> Outputs:
    student, net = score()
    (start,) = inputs.values()
    rollout = kind(student, start, Conditioning(TEXT), steps, 1, KeyedNoise(2, B), with_gradient=False)
    return {"x0": rollout.x0, "seen": net.seen[-1]}


def causal_states(noise: Tensor) -> Outputs:
    """A causal teacher's trajectories, which its own cached passes make: (block, level) -> x."""
    net, causal = random_net(3), CausalConfig(num_frame_per_block=1)
    teacher, condition = ScoreNet(net, "teacher"), conditioning(4, 1)
    cache = causal.new_cache(net, VideoShape.of(noise), torch.float32, noise.device)
    branches = [Branch(condition, cache)]
    blocks = causal_trajectory(teacher, noise, branches, STEPS, 1.0, causal, KeyedNoise(5, 1))
    return {f"block {b} state {i}": x for b, block in enumerate(blocks) for i, x in enumerate(block)}


NOISE = {"noise": rough(6, *SHAPE)}

CASES = {
    "euler": Case(many_steps(euler_trajectory), NOISE),
    "unipc": Case(many_steps(unipc_trajectory), NOISE),
    "causal_trajectory": Case(causal_states, {"noise": latents(7, 1, 2).bfloat16().float()}),
    "backward_simulation": Case(lambda **inputs: rollout_of(backward_simulation, **inputs), NOISE),
    "noised_data": Case(
        lambda latents: {"seen": rollout_of(noised_data, latents=latents)["seen"]},
        {"latents": rough(8, *SHAPE)}, like={"seen": "latents"},
    ),
    "from_clip": Case(
        lambda clip, noise: {"x": from_clip(clip, noise, STEPS, 0.7)[0]}, {"clip": rough(9, *SHAPE), **NOISE},
        like={"x": "clip"},
    ),
    "context_input": Case(
        lambda x0: {"x": context_input(x0, sigma=0.3, block=0, source=KeyedNoise(10, B))}, {"x0": rough(11, *SHAPE)},
        like={"x": "x0"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_noise_of_any_dtype_gives_what_it_gives_in_fp32(name: str) -> None:
    check_precision(CASES[name])


def test_one_noise_level_for_all_samples_is_fp32_whatever_the_latents() -> None:
    """0.3 is not a number of bf16: a student of bf16 latents is told the level that they were noised to."""
    student, _ = score()
    told: list[Tensor] = []

    def call(x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        told.append(sigma)
        return x

    noised_data(
        student.through(call),
        ANSWER.bfloat16(),
        Conditioning(TEXT),
        (1.0, 0.3),
        1,
        KeyedNoise(2, B),
        with_gradient=False,
    )
    assert torch.equal(told[0], torch.full((B,), 0.3))


def test_levels_are_fp32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        noised, _ = from_clip(ANSWER, ANSWER, STEPS, 0.7)
        student, _ = score()
        told: list[Tensor] = []
        student = student.through(lambda x, sigma, text: told.append(sigma) or x)
        denoise_block(student, ANSWER, TEXT, (1.0, 0.3), ExitPass(0), block=0, source=KeyedNoise(2, B), cache=None)
        trajectory = euler_trajectory(student, ANSWER, TEXT, NEGATIVE, STEPS, 1.0)
        next(trajectory), next(trajectory)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {noised.dtype, *(sigma.dtype for sigma in told)} == {torch.float32}
    assert len(told) == 2


def test_a_context_is_written_without_a_graph() -> None:
    student, net = score()
    x0 = ANSWER.clone().requires_grad_()
    write_context(student, x0, TEXT, sigma=0.0, block=0, source=KeyedNoise(2, B), cache=None)  # type: ignore[arg-type]
    assert not net.seen[0].requires_grad


def run_noised_data(initial: Tensor | None, clean: Tensor) -> tuple[Rollout, Tensor]:
    student, net = score()
    condition = Conditioning(TEXT, initial)
    return noised_data(student, clean, condition, STEPS, 2, KeyedNoise(2, B), with_gradient=True), net.seen[0]


def test_noised_data_judges_the_frames_that_are_not_given() -> None:
    clean = whole(12, *SHAPE)
    free, seen = run_noised_data(None, clean)
    assert free.frame_mask is None
    forced, _ = run_noised_data(clean[:, :1], clean)
    assert forced.frame_mask is not None
    assert forced.frame_mask.tolist() == [False] + [True] * (F - 1)
    assert (free.sigma_from, free.sigma_to, free.exit_steps) == (0.5, 0.0, (2,))
    noise = KeyedNoise(2, B).normal("input_noise", SHAPE[1:])
    assert torch.equal(seen, 0.5 * clean + 0.5 * noise)
    torch.testing.assert_close(free.x0, seen - 0.5 * (ANSWER + 0.5 * seen + 1.0))
