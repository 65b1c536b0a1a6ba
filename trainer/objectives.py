"""What a run trains its student and its critic on: the config's kind, put together from the losses in model/.

B batch  F latent frames
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor

from configs.objective import CriticLoss, ObjectiveKind
from configs.schema import RunConfig
from configs.sizes import shift_factor
from model.decoupled_dmd import decoupled_dmd_loss
from model.dmd import critic_loss, dmd_loss
from model.f_distill import RatioBins, RatioWeighting, f_distill_loss, f_weights
from model.gan import NoisedSamples, with_term
from model.phased import phase_start, phased_critic_loss, phased_dmd_loss
from model.query import Guidance, ScoreQuery
from model.reward import reward_weights
from model.schedule import TIMESTEPS
from model.score import ScoreNet
from model.sid import sid_loss
from model.types import Conditioning, LossOutput, Rollout, Total
from tasks.task import Reward, Task
from trainer.adversary import NAME, Adversary
from utils.random import Noise


@dataclass(frozen=True)
class Sample:
    """What the student made at these positions, and what it was conditioned on. noise: where its draws come from."""

    rollout: Rollout
    conditioning: Conditioning
    positions: range
    noise: Noise


@dataclass(frozen=True)
class Weights:
    """weight [B] of each sample's loss; ratio [B] that it comes from, in f-distill."""

    weight: Tensor
    ratio: Tensor | None = None


class Objective:
    """The losses of student, critic and discriminator, with the draws they need.

    config: the whole run's config.
    task: prompts, negative prompts and real samples.
    teacher, critic: the scores, None where the kind has none.
    adversary: the discriminator, None without one.
    total: sums a tensor over the batches that run at a time.
    reward: what weighs samples, None for none.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        teacher: ScoreNet | None,
        critic: ScoreNet | None,
        adversary: Adversary | None,
        total: Total,
        reward: Reward | None = None,
    ) -> None:
        self.run, self.config, self.task = config, config.objective, task
        self.teacher, self.critic, self.adversary, self.total, self.reward = teacher, critic, adversary, total, reward
        momentum = self.config.f_distill.bin_momentum
        uses = self.config.kind is ObjectiveKind.f_distill and momentum is not None
        self.bins = RatioBins(momentum) if uses and momentum is not None else None
        self.weighting = RatioWeighting(self.config.f_distill.divergence, total, self.bins)
        self.start = config.schedule.min_score_timestep / TIMESTEPS  # of a phase

    # -------------------------------------------------------------------------------------------------------- student

    @property
    def weighs(self) -> bool:
        """Whether a sample's loss has a weight that depends on the rest of the global batch."""
        return self.config.reward is not None or self.config.kind is ObjectiveKind.f_distill

    @torch.no_grad()
    def weights(self, samples: Sequence[Sample]) -> list[Weights]:
        """Of the samples of a rank's micro-batches, each sample's weight, of mean 1 over all of them and all ranks."""
        sizes = [sample.conditioning.batch for sample in samples]
        if self.config.reward is not None:
            assert self.reward is not None
            values = [self.reward(s.rollout.x0.detach(), self.task.prompts(s.positions)) for s in samples]
            weight = reward_weights(
                torch.cat(values).to(samples[0].rollout.x0.device), self.config.reward.beta, self.total
            )
            return [Weights(part) for part in weight.split(sizes)]
        assert self.adversary is not None
        draws = [self._score_draw(sample, "score") for sample in samples]
        logits = [
            NoisedSamples.of(sample.rollout, sample.conditioning, *draw).logits(self.adversary.judge)
            for sample, draw in zip(samples, draws, strict=True)
        ]
        sigma = torch.cat([sigma for sigma, _ in draws])
        weight, ratio = f_weights(torch.cat(logits), sigma, self.weighting)
        return [Weights(*parts) for parts in zip(weight.split(sizes), ratio.split(sizes), strict=True)]

    def student_loss(self, sample: Sample, weights: Weights | None = None) -> LossOutput:
        """The student's loss on its sample, with gradient into it. weights: of the samples, None where they are the
        whole of what this rank runs before its update, and weigh themselves."""
        kind, adversary = self.config.kind, self.adversary
        if kind in (ObjectiveKind.gan, ObjectiveKind.ladd):
            assert adversary is not None
            return adversary.term(sample.rollout, sample.conditioning, sample.positions, sample.noise)
        draw = self._score_draw(sample, "score")
        output = self._distribution_loss(sample, *draw, weights)
        if adversary is None or kind is ObjectiveKind.f_distill:
            return output
        at = draw if adversary.config.same_draw else None
        term = adversary.term(sample.rollout, sample.conditioning, sample.positions, sample.noise, at)
        return with_term(output, term, adversary.config.weight)

    def _distribution_loss(self, sample: Sample, sigma: Tensor, eps: Tensor, weights: Weights | None) -> LossOutput:
        config, rollout = self.config, sample.rollout
        assert self.teacher is not None
        assert self.critic is not None
        if config.reward is not None:
            weights = weights or self.weights([sample])[0]
        query = ScoreQuery(
            rollout, self.teacher, self.critic, sample.conditioning, self._guidance(sample), sigma, eps,
            weight=None if weights is None else weights.weight,
        )  # fmt: skip
        match config.kind:
            case ObjectiveKind.dmd:
                return dmd_loss(query)
            case ObjectiveKind.decoupled_dmd:
                return decoupled_dmd_loss(query, *self._score_draw(sample, "cfg", config.cfg_score_shift))
            case ObjectiveKind.phased_dmd:
                x_start = phase_start(rollout, self.start, self._eps(sample, "phase_noise"))
                return phased_dmd_loss(query, x_start, self.start)
            case ObjectiveKind.f_distill:
                assert self.adversary is not None
                gan_weight, ratio = self.adversary.config.weight, None if weights is None else weights.ratio
                return f_distill_loss(query, self.adversary.judge, self.weighting, gan_weight=gan_weight, ratio=ratio)
            case ObjectiveKind.sid:
                return sid_loss(query, alpha=config.sid_alpha)
            case ObjectiveKind.gan | ObjectiveKind.ladd:
                raise AssertionError("a discriminator alone has no scores")
            case _:
                assert_never(config.kind)

    def _guidance(self, sample: Sample) -> Guidance:
        config, negative = self.config, self.task.negative(sample.conditioning.batch)
        return Guidance(negative, config.real_guidance_scale, config.fake_guidance_scale, config.guidance_rescale)

    # --------------------------------------------------------------------------------------------------------- critic

    def critic_loss(self, sample: Sample) -> LossOutput:
        """What the critic, and the discriminator beside it, are trained on: the student's sample, detached."""
        rollout, conditioning, adversary = sample.rollout, sample.conditioning, self.adversary
        output: LossOutput | None = None
        if self.config.kind not in (ObjectiveKind.gan, ObjectiveKind.ladd):
            assert self.critic is not None
            draw = self._score_draw(sample, "critic")
            if self.config.kind is ObjectiveKind.phased_dmd:
                x_start = phase_start(rollout, self.start, self._eps(sample, "critic_phase_noise"))
                output = phased_critic_loss(
                    x_start, self.start, self.critic, conditioning, *draw, frame_mask=rollout.frame_mask
                )
            else:
                x0_target = self.config.critic_loss is CriticLoss.x0
                output = critic_loss(rollout, self.critic, conditioning, *draw, x0_target=x0_target)
        if adversary is None:
            assert output is not None
            return output
        adversarial = adversary.loss(rollout, conditioning, sample.positions, sample.noise)
        if output is None:
            return adversarial
        adversarial.metrics = {f"{NAME}_{name}": value for name, value in adversarial.metrics.items()}
        return with_term(output, adversarial, adversary.config.discriminator_weight)

    # ---------------------------------------------------------------------------------------------------------- draws

    def _score_draw(self, sample: Sample, role: str, shift: float | None = None) -> tuple[Tensor, Tensor]:
        """A noise level [B] within the schedule's bounds, and noise like the sample's."""
        schedule = self.run.schedule if shift is None else replace(self.run.schedule, score_timestep_shift=shift)
        exits = sample.rollout.sigma_from, sample.rollout.sigma_to
        schedule = schedule.scaled(shift_factor(self.run, sample.rollout.x0.shape[1:]))
        sigma = schedule.score_sigma(sample.noise.uniform(f"{role}_sigma"), *exits)
        return self.run.student.path.known(sigma), self._eps(sample, f"{role}_noise")

    @staticmethod
    def _eps(sample: Sample, role: str) -> Tensor:
        return sample.noise.normal(role, tuple(sample.rollout.x0.shape[1:]))

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint must hold of it."""
        return {} if self.bins is None else {"ratio_means": self.bins.means.tolist()}

    def load(self, state: dict[str, list[float]]) -> None:
        if self.bins is not None and "ratio_means" in state:
            self.bins.load({"means": torch.tensor(state["ratio_means"])})
