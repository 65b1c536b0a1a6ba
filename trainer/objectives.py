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
from model.dmd import Guidance, critic_loss, dmd_loss
from model.f_distill import RatioBins, f_distill_loss, f_weights
from model.gan import judged, with_term
from model.phased import phase_start, phased_critic_loss, phased_dmd_loss
from model.reward import reward_weights
from model.schedule import TIMESTEPS, mix
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
    """teacher, critic: the scores, None where the kind has none. adversary: the discriminator, None without one.
    reward: what weighs samples, None for none. total: sums a tensor over the batches that run at a time."""

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
            return [Weights(one) for one in weight.split(sizes)]
        assert self.adversary is not None
        draws = [self._score_draw(sample, "score") for sample in samples]
        logits = [
            self.adversary.judge.logits(mix(judged(s.rollout), eps, sigma), sigma, s.conditioning)
            for s, (sigma, eps) in zip(samples, draws, strict=True)
        ]
        sigma = torch.cat([sigma for sigma, _ in draws])
        divergence = self.config.f_distill.divergence
        weight, ratio = f_weights(torch.cat(logits), sigma, divergence, self.total, self.bins)
        return [Weights(*one) for one in zip(weight.split(sizes), ratio.split(sizes), strict=True)]

    def student_loss(self, sample: Sample, weights: Weights | None = None) -> LossOutput:
        """The student's loss on its sample, with gradient into it. weights: of the samples, null where they are the
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
        config, rollout, given = self.config, sample.rollout, sample.conditioning
        real, fake = self.teacher, self.critic
        assert real is not None and fake is not None
        negative = self.task.negative(given.batch)
        guidance = Guidance(negative, config.real_guidance_scale, config.fake_guidance_scale, config.guidance_rescale)
        if config.reward is not None:
            weights = weights or self.weights([sample])[0]
        weight = None if weights is None else weights.weight
        match config.kind:
            case ObjectiveKind.dmd:
                return dmd_loss(rollout, real, fake, given, guidance, sigma, eps, weight=weight)
            case ObjectiveKind.decoupled_dmd:
                shift = config.cfg_score_shift
                cfg = self._score_draw(sample, "cfg", shift)
                return decoupled_dmd_loss(rollout, real, fake, given, guidance, sigma, eps, *cfg, weight=weight)
            case ObjectiveKind.phased_dmd:
                x_start = phase_start(rollout, self.start, self._eps(sample, "phase_noise"))
                return phased_dmd_loss(
                    rollout, x_start, self.start, real, fake, given, guidance, sigma, eps, weight=weight
                )
            case ObjectiveKind.f_distill:
                assert self.adversary is not None
                known = None if weights is None or weights.ratio is None else (weights.weight, weights.ratio)
                return f_distill_loss(
                    rollout, real, fake, self.adversary.judge, given, guidance, sigma, eps,
                    divergence=config.f_distill.divergence, total=self.total, bins=self.bins,
                    gan_weight=self.adversary.config.weight, weights=known,
                )  # fmt: skip
            case ObjectiveKind.sid:
                return sid_loss(rollout, real, fake, given, guidance, sigma, eps, alpha=config.sid_alpha)
            case ObjectiveKind.gan | ObjectiveKind.ladd:
                raise AssertionError("a discriminator alone has no scores")
            case _:
                assert_never(config.kind)

    # --------------------------------------------------------------------------------------------------------- critic

    def critic_loss(self, sample: Sample) -> LossOutput:
        """What the critic, and the discriminator beside it, are trained on: the student's sample, detached."""
        rollout, given, adversary = sample.rollout, sample.conditioning, self.adversary
        output: LossOutput | None = None
        if self.config.kind not in (ObjectiveKind.gan, ObjectiveKind.ladd):
            assert self.critic is not None
            draw = self._score_draw(sample, "critic")
            if self.config.kind is ObjectiveKind.phased_dmd:
                x_start = phase_start(rollout, self.start, self._eps(sample, "critic_phase_noise"))
                output = phased_critic_loss(
                    x_start, self.start, self.critic, given, *draw, frame_mask=rollout.frame_mask
                )
            else:
                x0_target = self.config.critic_loss is CriticLoss.x0
                output = critic_loss(rollout, self.critic, given, *draw, x0_target=x0_target)
        if adversary is None:
            assert output is not None
            return output
        judged = adversary.loss(rollout, given, sample.positions, sample.noise)
        if output is None:
            return judged
        judged.metrics = {f"{NAME}_{name}": value for name, value in judged.metrics.items()}
        return with_term(output, judged, adversary.config.discriminator_weight)

    # ---------------------------------------------------------------------------------------------------------- draws

    def _score_draw(self, sample: Sample, role: str, shift: float | None = None) -> tuple[Tensor, Tensor]:
        """A noise level [B] within the schedule's bounds, and noise like the sample's."""
        schedule = self.run.schedule if shift is None else replace(self.run.schedule, score_timestep_shift=shift)
        exits = sample.rollout.sigma_from, sample.rollout.sigma_to
        schedule = schedule.scaled(shift_factor(self.run, sample.rollout.x0.shape[1:]))
        sigma = schedule.score_sigma(sample.noise.uniform(f"{role}_sigma"), *exits)
        return sigma, self._eps(sample, f"{role}_noise")

    @staticmethod
    def _eps(sample: Sample, role: str) -> Tensor:
        return sample.noise.normal(role, tuple(sample.rollout.x0.shape[1:]))

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint must hold of it."""
        return {} if self.bins is None else {"ratio_means": self.bins.means.tolist()}

    def load(self, state: dict[str, list[float]]) -> None:
        if self.bins is not None and "ratio_means" in state:
            self.bins.load({"means": torch.tensor(state["ratio_means"])})
