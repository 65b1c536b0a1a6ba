"""What a run trains its networks on: the objective of its config, beside a discriminator's term and a reward.

B batch  F latent frames
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.schema import RunConfig
from configs.sizes import shift_factor_of
from model.gan import with_term
from model.objective import Objective, Role, Weights
from model.path import Path
from model.query import Guidance, ScoreQuery
from model.reward import reward_weights
from model.schedule import TIMESTEPS
from model.score import ScoreNet
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


class SampleDraws:
    """The draws of a sample's losses, keyed by name (see `model.objective.Draws`)."""

    def __init__(self, run: RunConfig, path: Path, sample: Sample) -> None:
        self.run, self.path, self.sample = run, path, sample

    def score(self, name: str, shift: float | None = None) -> tuple[Tensor, Tensor]:
        schedule = self.run.schedule if shift is None else replace(self.run.schedule, score_timestep_shift=shift)
        rollout = self.sample.rollout
        schedule = schedule.scaled(shift_factor_of(self.run, rollout.x0.shape[1:]))
        sigma = schedule.score_sigma(self.sample.noise.uniform(f"{name}_sigma"), rollout.sigma_from, rollout.sigma_to)
        return self.path.known(sigma), self.normal(f"{name}_noise")

    def normal(self, name: str) -> Tensor:
        return self.sample.noise.normal(name, tuple(self.sample.rollout.x0.shape[1:]))


class Losses:
    """The losses of student, critic and discriminator on the student's samples.

    config: the whole run's.
    task: prompts, negative prompts and real samples.
    teacher, critic: the scores, None where the objective needs none.
    adversary: the discriminator, None without one.
    objective: the config's.
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
        objective: Objective,
        total: Total,
        reward: Reward | None = None,
    ) -> None:
        self.run, self.config, self.task = config, config.objective, task
        self.teacher, self.critic, self.adversary, self.total, self.reward = teacher, critic, adversary, total, reward
        self.objective = objective
        self.path = config.student.path
        self.asks_scores = Role.critic in self.objective.roles

    # -------------------------------------------------------------------------------------------------------- student

    @property
    def weighs(self) -> bool:
        """Whether a sample's loss has a weight that depends on the rest of the global batch."""
        return self.config.reward is not None or self.objective.weighs

    @torch.no_grad()
    def weights(self, samples: Sequence[Sample]) -> list[Weights]:
        """The weights of the samples of a rank's micro-batches, of mean 1 over all of them and all ranks."""
        if self.config.reward is None:
            return self.objective.weights([self._query(sample, "score") for sample in samples])
        assert self.reward is not None
        values = [self.reward(s.rollout.x0.detach(), self.task.prompts(s.positions)) for s in samples]
        weight = reward_weights(torch.cat(values).to(samples[0].rollout.x0.device), self.config.reward.beta, self.total)
        return [Weights(part) for part in weight.split([sample.conditioning.batch for sample in samples])]

    def student_loss(self, sample: Sample, weights: Weights | None = None) -> LossOutput:
        """The student's loss on its sample, with gradient into it.

        weights: the samples' weights; None where the samples are the whole of what this rank runs before its update,
        and weigh themselves.
        """
        if not self.asks_scores:
            return self._term(sample)
        if self.config.reward is not None:
            weights = weights or self.weights([sample])[0]
        query = self._query(sample, "score")
        if weights is not None:
            query = replace(query, weight=weights.weight, ratio=weights.ratio)
        output = self.objective.student_loss(query, self._draws(sample))
        if self.adversary is None or Role.discriminator in self.objective.roles:  # then the term is in the loss
            return output
        at = (query.sigma, query.noise) if self.adversary.config.same_draw else None
        return with_term(output, self._term(sample, at), self.adversary.config.weight)

    def _term(self, sample: Sample, at: tuple[Tensor, Tensor] | None = None) -> LossOutput:
        """The discriminator's term of the student's loss. at: noise level and noise in place of a draw of its own."""
        assert self.adversary is not None
        return self.adversary.term(sample.rollout, sample.conditioning, sample.positions, sample.noise, at)

    def _draws(self, sample: Sample) -> SampleDraws:
        return SampleDraws(self.run, self.path, sample)

    def _query(self, sample: Sample, draw: str) -> ScoreQuery:
        """What the scores are asked about a sample, at the draw of this name."""
        assert self.teacher is not None
        assert self.critic is not None
        sigma, eps = self._draws(sample).score(draw)
        return ScoreQuery(
            sample.rollout, self.teacher, self.critic, sample.conditioning, self._guidance(sample), sigma, eps,
            judge=None if self.adversary is None else self.adversary.judge,
            least=self.run.schedule.min_score_timestep / TIMESTEPS,
        )  # fmt: skip

    def _guidance(self, sample: Sample) -> Guidance:
        config, negative = self.config, self.task.negative(sample.conditioning.batch)
        return Guidance(negative, config.real_guidance_scale, config.fake_guidance_scale, config.guidance_rescale)

    # --------------------------------------------------------------------------------------------------------- critic

    def critic_loss(self, sample: Sample) -> LossOutput:
        """What the critic, and the discriminator beside it, are trained on: the student's sample, detached."""
        output: LossOutput | None = None
        if self.asks_scores:
            output = self.objective.critic_loss(self._query(sample, "critic"), self._draws(sample))
        if self.adversary is None:
            assert output is not None
            return output
        adversarial = self.adversary.loss(sample.rollout, sample.conditioning, sample.positions, sample.noise)
        if output is None:
            return adversarial
        adversarial.metrics = {f"{NAME}_{name}": value for name, value in adversarial.metrics.items()}
        adversarial.reduced = {f"{NAME}_{name}": kind for name, kind in adversarial.reduced.items()}
        return with_term(output, adversarial, self.adversary.config.discriminator_weight)

    # ---------------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint must hold of the objective."""
        return self.objective.state()

    def load(self, state: dict[str, list[float]]) -> None:
        self.objective.load(state)
