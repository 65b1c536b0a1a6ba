"""Losses and schedule functions compute in fp32 whatever their inputs' dtype, and what they log holds no graph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.consistency import adjacent, consistency_loss
from model.decoupled_dmd import decoupled_dmd_loss
from model.diffusion import flow_matching_loss
from model.discriminator import Discriminator
from model.dmd import critic_loss, dmd_loss, kl_gradient, matching_loss
from model.f_distill import Divergence, RatioBins, RatioClip, RatioWeighting, density_ratio, f_distill_loss, f_weights
from model.gan import Adversarial, NoisedSamples, Penalty, discriminator_loss, gan_loss, gradient_penalty, with_term
from model.ladd import ladd_sigma
from model.ode_regression import ode_regression_loss
from model.path import EDM, VP, Flow, Path
from model.phased import noised_on, phase_start, phased_critic_loss, phased_dmd_loss
from model.query import Guidance, ScoreQuery
from model.reward import reward_weights
from model.schedule import ScheduleConfig, mix, score_sigma, shift_sigma, unshift_sigma, velocity_to_x0
from model.score import ScoreNet
from model.sid import sid_loss
from model.types import Conditioning, LossOutput, Rollout
from tests.precision import SHAPE, Case, Outputs, answering, check_graphs, check_precision, rough, whole

B, F = SHAPE[:2]
SIGMA = torch.tensor([0.25, 0.5, 0.75])  # mixtures of whole numbers at these levels need no rounding in bf16
LEVEL = torch.tensor([0.3008, 0.6016, 0.9023]).bfloat16().float()
UNIFORM = torch.tensor([0.1001, 0.4004, 0.8984]).bfloat16().float()
TEXT, NEGATIVE = torch.ones(B, 1, 1), torch.zeros(B, 1, 1)
MASK = torch.tensor([False, True])


def given_by(output: LossOutput, **seen: Tensor) -> Outputs:
    gradient = {} if output.kl_gradient is None else {"kl_gradient": output.kl_gradient}
    return {f"logged {name}": x for name, x in output.metrics.items()} | {"loss": output.loss} | gradient | seen


def by_name(function: Any, *names: str, **options: Any) -> Any:
    """The function as a case runs it: its one result is `out`."""
    return lambda **inputs: {"out": function(*(inputs[name] for name in names), **options)}


def two_scores(x0: Tensor, noise: Tensor, fake: Tensor, real: Tensor, loss: Any = dmd_loss, **how: Any) -> Outputs:
    (fake_score, fake_net), (real_score, real_net) = answering(fake), answering(real)
    guidance = Guidance({"text": NEGATIVE}, real=3.0)
    query = ScoreQuery(Rollout(x0, frame_mask=MASK), real_score, fake_score, Conditioning(TEXT), guidance, SIGMA, noise)
    return given_by(loss(query, **how), seen=fake_net.seen[0], seen_by_teacher=real_net.seen[0])


def decoupled(cfg_noise: Tensor, **inputs: Tensor) -> Outputs:
    return two_scores(**inputs, loss=decoupled_dmd_loss, cfg_sigma=SIGMA.flip(0), cfg_noise=cfg_noise)


def phased(x_start: Tensor, **inputs: Tensor) -> Outputs:
    return two_scores(**inputs, loss=phased_dmd_loss, x_start=x_start, start=0.0)


def phased_critic(x_start: Tensor, noise: Tensor, answer: Tensor, slope: Tensor, start: float = 0.0) -> Outputs:
    score, net = answering(answer)
    net.slope.data = slope.float()
    sigma = SIGMA if start == 0 else LEVEL
    return given_by(phased_critic_loss(x_start, start, score, Conditioning(TEXT), sigma, noise), seen=net.seen[0])


def critic(x0: Tensor, noise: Tensor, answer: Tensor, x0_target: bool = False) -> Outputs:
    score, net = answering(answer)
    rollout = Rollout(x0, frame_mask=MASK)
    output = critic_loss(rollout, score, Conditioning(TEXT), SIGMA, noise, x0_target=x0_target)
    return given_by(output, seen=net.seen[0])


def flow(x0: Tensor, noise: Tensor, sigma: Tensor, answer: Tensor, weight: Tensor | None = None, **how: Any) -> Outputs:
    return given_by(flow_matching_loss(lambda x, s: answer, x0, noise, sigma, weight=weight, **how))


def consistent(clean: Tensor, noise: Tensor, student: Tensor, average: Tensor, teacher: Tensor) -> Outputs:
    seen: list[Tensor] = []

    def averaged(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return average

    levels = SIGMA, torch.tensor([0.0, 0.3, 0.6])
    output = consistency_loss(lambda x, s: student, averaged, lambda x, s: teacher, clean, noise, *levels)
    return given_by(output, seen=seen[0])


class Heads(nn.Module):
    """The mean of each feature, scaled by what is trained."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5], dtype=dtype))

    def forward(self, features: list[Tensor]) -> Tensor:
        return torch.stack([self.scale * feature.flatten(1).mean(1) for feature in features], 1).flatten(1)


def judged(answer: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Discriminator, Any]:
    backbone, net = answering(answer)
    return Discriminator(backbone, Heads(dtype), [0]), net


def noised(x0: Tensor, noise: Tensor) -> NoisedSamples:
    return NoisedSamples.of(Rollout(x0, frame_mask=MASK), Conditioning(TEXT), SIGMA, noise)


def student_gan(x0: Tensor, noise: Tensor, real: Tensor, answer: Tensor, kind: Adversarial) -> Outputs:
    return given_by(gan_loss(noised(x0, noise), judged(answer)[0], kind=kind, real=noised(real, noise)))


def judge_gan(x0: Tensor, real: Tensor, noise: Tensor, step: Tensor, answer: Tensor) -> Outputs:
    judge, net = judged(answer)
    penalty = Penalty(r1=0.5, r2=0.25, step=0.5)
    output = discriminator_loss(
        noised(x0, noise), noised(real, noise), judge, penalty=penalty, real_step=step, fake_step=step
    )
    return given_by(output, seen=net.seen[0])


def moved(x0: Tensor, noise: Tensor, direction: Tensor, answer: Tensor) -> Outputs:
    """What the judge sees when R1 has moved the sample."""
    judge, net = judged(answer)
    gradient_penalty(judge, noised(x0, noise), torch.zeros(B, 1), direction, Penalty(r1=1.0))
    return {"seen": net.seen[0]}


def weighting(divergence: Divergence = Divergence.js) -> RatioWeighting:
    return RatioWeighting(divergence, total=lambda x: x, bins=RatioBins())


def binned(r: Tensor, sigma: Tensor) -> Outputs:
    bins = RatioBins()
    return {"out": bins.normalised(r, sigma, lambda x: x).float(), "means": bins.means}


def f_distilled(x0: Tensor, noise: Tensor, fake: Tensor, real: Tensor, answer: Tensor) -> Outputs:
    def loss(query: ScoreQuery) -> LossOutput:
        return f_distill_loss(query, judged(answer)[0], weighting(), gan_weight=0.5)

    return two_scores(x0, noise, fake, real, loss=loss)


def together(main: Tensor, term: Tensor) -> Outputs:
    return given_by(with_term(LossOutput(main.float().sum()), LossOutput(term.float().sum()), 0.5))


def through(path: Path) -> Any:
    def run(x: Tensor, sigma: Tensor, answer: Tensor) -> Outputs:
        seen, time = path.inputs(x, sigma)
        return {"seen": seen, "time": time, "velocity": path.velocity(answer, x, sigma)}

    return run


def pinned(x: Tensor, sigma: Tensor, initial: Tensor, answer: Tensor) -> Outputs:
    score, net = answering(answer, flat=True)
    score = ScoreNet(net, "pinned", pins_initial=True)
    condition = Conditioning(TEXT, initial)
    return {"out": score.velocity(x, sigma, condition), "seen": net.seen[0], "finished": score.finished(x, condition)}


def logits(answer: Tensor, x: Tensor) -> Outputs:
    return {"out": judged(answer)[0].logits(x, SIGMA, Conditioning(TEXT))}


LEVELS_OF_BINS = rough(12, 63).sigmoid().bfloat16().float()
IN_NEXT_BIN = torch.tensor([0.69921875])  # 10 times it is 7 in bf16
ROUGH = {"x": rough(1, *SHAPE), "noise": rough(2, *SHAPE), "sigma": LEVEL}
WHOLE = {"x0": whole(3, *SHAPE), "noise": whole(4, *SHAPE)}
SCORES = {"fake": rough(5, *SHAPE), "real": rough(6, *SHAPE)}
ANSWER = {"answer": rough(7, *SHAPE)}
SEEN = {"seen": "x0", "seen_by_teacher": "x0"}

FUNCTIONS = {
    "mix": Case(by_name(mix, "x", "noise", "sigma"), ROUGH, like={"out": "x"}),
    "velocity_to_x0": Case(by_name(velocity_to_x0, "x", "noise", "sigma"), ROUGH),
    "noised_on": Case(by_name(lambda x, n, s: noised_on(x, 0.25, n, s), "x", "noise", "sigma"), ROUGH, like={"out": "x"}),
    "phase_start": Case(
        by_name(lambda x, n: phase_start(Rollout(x), 0.3, n), "x", "noise"),
        {name: ROUGH[name] for name in ("x", "noise")}, like={"out": "x"},
    ),
    "shift_sigma": Case(by_name(shift_sigma, "u", shift=5.0), {"u": UNIFORM}, widens="u"),
    "unshift_sigma": Case(by_name(unshift_sigma, "u", shift=5.0), {"u": UNIFORM}, widens="u"),
    "score_sigma": Case(by_name(score_sigma, "u", shift=5.0, low=0.1, high=0.9), {"u": UNIFORM}),
    "ScheduleConfig.score_sigma": Case(by_name(ScheduleConfig().score_sigma, "u"), {"u": UNIFORM}),
    "ScheduleConfig.training_sigma": Case(by_name(ScheduleConfig().training_sigma, "u"), {"u": UNIFORM}),
    "ladd_sigma": Case(by_name(ladd_sigma, "normal", mean=0.3, std=0.7), {"normal": rough(8, 9)}),
    "kl_gradient": Case(
        by_name(kl_gradient, "x0", "fake", "real"), {"x0": rough(9, *SHAPE), **SCORES}
    ),
    "density_ratio": Case(by_name(density_ratio, "logits", clip=RatioClip()), {"logits": rough(10, B, 4)}),
    "f_weights": Case(
        lambda logits, sigma: dict(zip(("weight", "ratio"), f_weights(logits, sigma, weighting()), strict=True)),
        {"logits": rough(10, B, 4), "sigma": LEVEL},
    ),
    "RatioBins": Case(binned, {"r": rough(11, 64).abs(), "sigma": torch.cat([LEVELS_OF_BINS, IN_NEXT_BIN])}),
    "reward_weights": Case(by_name(reward_weights, "r", beta=0.7, total=lambda x: x), {"r": rough(13, 8)}),
    "ScoreNet.velocity, pinned": Case(
        pinned, {"x": rough(14, *SHAPE), "sigma": LEVEL, "initial": rough(15, B, 1, *SHAPE[2:]), **ANSWER},
        like={"seen": "x", "finished": "x"},
    ),
    "ScoreNet.velocity": Case(
        lambda x, answer: {"out": answering(answer, flat=True)[0].velocity(x, SIGMA, TEXT)},
        {"x": rough(14, *SHAPE), **ANSWER},
    ),
    "Discriminator.logits": Case(logits, {**ANSWER, "x": rough(14, *SHAPE)}, widens=("x", "answer")),
    "gradient_penalty": Case(moved, {**WHOLE, "direction": rough(16, *SHAPE), **ANSWER}, like={"seen": "x0"}),
    "path flow": Case(
        through(Flow()), {"x": ROUGH["x"], "sigma": LEVEL, **ANSWER}, like={"seen": "x", "time": "sigma"},
        widens=("sigma", "answer"),
    ),
    **{
        f"path {name}": Case(
            through(path), {"x": ROUGH["x"], "sigma": LEVEL, **ANSWER}, like={"seen": "x"},
            widens=("x", "sigma", "answer"),
        )
        for name, path in {"eps": VP.scaled_linear(), "v": VP.scaled_linear(prediction="v"), "EDM": EDM()}.items()
    },
}  # fmt: skip

LOSSES = {
    "matching_loss": Case(
        lambda x, gradient, weight: {"loss": matching_loss(x, gradient, MASK, weight)},
        {"x": rough(17, *SHAPE), "gradient": rough(18, *SHAPE), "weight": UNIFORM},
        widens=("gradient", "weight"), leaves=("x", "gradient", "weight"), reaches=("x",),
    ),
    "dmd_loss": Case(two_scores, {**WHOLE, **SCORES}, like=SEEN, leaves=("x0", "fake", "real"), reaches=("x0",)),
    "decoupled_dmd_loss": Case(
        decoupled, {**WHOLE, **SCORES, "cfg_noise": whole(19, *SHAPE)}, like=SEEN,
        leaves=("x0", "fake", "real"), reaches=("x0",),
    ),
    "phased_dmd_loss": Case(
        phased, {**WHOLE, **SCORES, "x_start": whole(20, *SHAPE)},
        like={"seen": "x_start", "seen_by_teacher": "x_start"},
        leaves=("x0", "x_start", "fake", "real"), reaches=("x_start",),
    ),
    "sid_loss": Case(
        lambda **inputs: two_scores(**inputs, loss=sid_loss), {**WHOLE, **SCORES},
        leaves=("x0",), reaches=("x0",), live=("loss", "seen", "seen_by_teacher"),
    ),
    "phased_critic_loss": Case(
        phased_critic,
        {"x_start": WHOLE["x0"], "noise": WHOLE["noise"], **ANSWER, "slope": torch.tensor([0.5])},
        like={"seen": "x_start"}, leaves=("x_start", "answer"), reaches=("answer",),
    ),
    **{
        f"critic_loss {target}": Case(
            lambda target=target, **inputs: critic(**inputs, x0_target=target == "x0"), {**WHOLE, **ANSWER},
            like={"seen": "x0"}, leaves=("x0", "answer"), reaches=("answer",),
        )
        for target in ("velocity", "x0")
    },
    **{
        f"flow_matching_loss {target}": Case(
            lambda target=target, **inputs: flow(**inputs, x0_target=target == "x0"),
            {"x0": rough(21, *SHAPE) if target == "velocity" else WHOLE["x0"], "noise": WHOLE["noise"],
             "sigma": SIGMA, **ANSWER, "weight": UNIFORM},
            leaves=("answer",), reaches=("answer",),
        )
        for target in ("velocity", "x0")
    },
    "consistency_loss": Case(
        consistent,
        {"clean": WHOLE["x0"], "noise": WHOLE["noise"], "student": rough(22, *SHAPE), "average": rough(23, *SHAPE),
         "teacher": rough(24, *SHAPE)},
        like={"seen": "clean"}, leaves=("student", "average", "teacher"), reaches=("student",),
    ),
    "ode_regression_loss": Case(
        lambda x0, clean, sigma: given_by(ode_regression_loss(x0, clean, sigma)),
        {"x0": rough(25, *SHAPE), "clean": rough(26, *SHAPE), "sigma": torch.tensor([[0.0, 0.5]]).expand(B, F)},
        leaves=("x0",), reaches=("x0",),
    ),
    **{
        f"gan_loss {kind.value}": Case(
            lambda kind=kind, **inputs: student_gan(**inputs, kind=kind), {**WHOLE, "real": whole(27, *SHAPE), **ANSWER},
            leaves=("x0", "real"), reaches=("x0",), widens=("x0", "noise", "real", "answer"),
        )
        for kind in Adversarial
    },
    "discriminator_loss": Case(
        judge_gan, {**WHOLE, "real": whole(27, *SHAPE), "step": whole(28, *SHAPE), **ANSWER},
        like={"seen": "x0"}, leaves=("x0", "answer"), reaches=("answer",), widens=("x0", "noise", "real", "answer"),
    ),
    "f_distill_loss": Case(
        f_distilled, {**WHOLE, **SCORES, **ANSWER}, like=SEEN, leaves=("x0",), reaches=("x0",),
        widens=("x0", "noise", "fake", "real", "answer"),
    ),
    "with_term": Case(
        together, {"main": rough(29, 4), "term": rough(30, 4)}, leaves=("main", "term"), reaches=("main", "term")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FUNCTIONS, *LOSSES])
def test_inputs_of_any_dtype_give_what_they_give_in_fp32(name: str) -> None:
    check_precision((FUNCTIONS | LOSSES)[name])


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_logged_or_judged_holds_no_graph(name: str) -> None:
    check_graphs(LOSSES[name])


def test_ratios_and_detached_rollouts_hold_no_graph() -> None:
    assert not density_ratio(rough(1, B, 4).requires_grad_(), RatioClip()).requires_grad
    assert not Rollout(rough(1, *SHAPE).requires_grad_()).detach().x0.requires_grad
    assert not reward_weights(rough(1, B).requires_grad_(), 1.0, lambda x: x).requires_grad


def test_heads_in_bf16_give_logits_in_fp32() -> None:
    judge, _ = judged(rough(7, *SHAPE), torch.bfloat16)
    assert judge.logits(rough(1, *SHAPE), SIGMA, Conditioning(TEXT)).dtype is torch.float32


def test_levels_and_means_of_ratios_are_fp32_whatever_the_default() -> None:
    r = rough(11, B).abs()
    torch.set_default_dtype(torch.float64)
    try:
        levels = adjacent(torch.tensor([0, 1]), (1.0, 0.7))
        made = RatioBins()
        kept = made.means.dtype
        made.normalised(r, LEVEL, lambda x: x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [level.dtype for level in levels] == [torch.float32] * 2
    assert (kept, made.means.dtype) == (torch.float32, torch.float32)


def test_sid_takes_its_normaliser_for_a_constant() -> None:
    """x_sigma = (1 - s) x0 + .., the networks' velocity falls by 1/2 a unit of x, so that x0 by them is linear in x0."""
    x0 = WHOLE["x0"].clone().requires_grad_()
    loss = two_scores(x0, WHOLE["noise"], **SCORES, loss=sid_loss)["loss"]
    s = SIGMA.reshape(-1, 1, 1, 1, 1)
    x = mix(x0, WHOLE["noise"], SIGMA)
    fake, real = (x - s * (SCORES[name] + 0.5 * x + shift) for name, shift in (("fake", 1.0), ("real", 3.0)))
    scale = torch.tensor((x0 - real).abs().flatten(1).mean(1).tolist()).reshape(-1, 1, 1, 1, 1)
    expected = ((real - fake) * ((real - x0) - (real - fake)) / scale)[:, MASK].mean()
    (actual,), (by_hand,) = torch.autograd.grad(loss, x0), torch.autograd.grad(expected, x0)
    torch.testing.assert_close(actual, by_hand)


def test_a_judge_gives_no_gradient_to_frames_that_no_loss_judges() -> None:
    x0 = WHOLE["x0"].clone().requires_grad_()
    loss = student_gan(x0, WHOLE["noise"], WHOLE["x0"], **ANSWER, kind=Adversarial.softplus)["loss"]
    (gradient,) = torch.autograd.grad(loss, x0)
    assert not gradient[:, ~MASK].any()
    assert gradient[:, MASK].all()


def test_the_gap_of_the_scores_is_that_of_the_judged_frames() -> None:
    """mean |fake x0 - real x0|, x0 = x - sigma v, with the networks' own answers; the teacher's guided by 3."""
    output = two_scores(**WHOLE, **SCORES)
    guided = SCORES["real"] + 3.0 * TEXT[..., None, None]  # uncond + 3 (cond - uncond), which differ by the text's 1
    gap = SIGMA.reshape(-1, 1, 1, 1, 1) * (SCORES["fake"] + TEXT[..., None, None] - guided)
    assert output["logged score_gap"].item() == pytest.approx(gap[:, MASK].abs().mean().item(), rel=1e-5)
    assert output["logged score_gap"].item() != pytest.approx(gap.abs().mean().item(), rel=1e-3)


def test_tables_of_betas_are_made_in_fp64() -> None:
    """A table of fp32 betas would be off by 1e-5 at its end: it is the product of what the numbers are in Python."""
    roots = [0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5) for i in range(1000)]
    linear = [0.0001 + i / 999 * (0.02 - 0.0001) for i in range(1000)]
    for path, betas in ((VP.scaled_linear(), [r**2 for r in roots]), (VP.of_scheduler({}), linear)):
        product = math.prod(1 - beta for beta in betas)
        assert path.alphas_cumprod[-1] == pytest.approx(product, rel=1e-10)
    rounded = torch.tensor(linear).bfloat16()
    assert VP.of_betas(rounded).alphas_cumprod == VP.of_betas(rounded.double()).alphas_cumprod
