"""ScoreDistillationTrainer: student and critic in turn, around any rollout and any objective.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch

from configs.sections import CriticLoss, ObjectiveKind, RolloutKind
from model.dmd import Guidance, critic_loss, dmd_loss
from model.sid import sid_loss
from model.types import Conditioning, LossOutput, Rollout
from model.wan.kv_cache import KVCache
from model.wan.transformer import WanTransformer
from pipeline.bidirectional_training import backward_simulation, diffusion_forcing_input, noised_data
from pipeline.self_forcing_training import RolloutPlan, rollout_lengths, self_forcing_rollout
from trainer.base import MicroBatch, Trainer
from trainer.build import build_frozen, build_trained, sharing
from trainer.sampling import cache_dtype
from utils.metrics import luma, saturation
from utils.parallel.parallelize import frozen

Sample = tuple[Rollout, Conditioning]  # what the student made, and what it was conditioned on


class ScoreDistillationTrainer(Trainer):
    """DMD and its relatives. The student's samples come from the configured rollout, its gradient from the objective,
    and the critic follows the student by flow matching on those samples."""

    headline = (
        "student/loss", "student/grad_norm", "student/dmd_gradient_norm", "student/luma",
        "student/saturation", "critic/loss", "critic/grad_norm",
        "samples_per_second", "peak_memory_gib", "network_evaluations",
    )  # fmt: skip

    def build(self) -> None:
        config = self.config
        assert config.teacher is not None and config.critic is not None
        shared = sharing(config)
        self.teacher = build_frozen(config, config.teacher, "teacher", self.evaluations, self.device, self.mesh, shared)
        base = {name: cast(WanTransformer, self.teacher.net) for name in shared}
        steps = config.training.max_steps
        self.networks = {
            "student": build_trained(
                config, config.student, "student", config.generator_training,
                config.training.generator_updates(steps), self.evaluations, self.device, self.mesh, with_ema=True,
                base=base.get("student"),
            ),
            "critic": build_trained(
                config, config.critic, "critic", config.critic_training,
                config.training.critic_updates(steps), self.evaluations, self.device, self.mesh, with_ema=False,
                base=base.get("critic"),
            ),
        }  # fmt: skip
        self.sigmas = config.schedule.sigmas()
        self._cache: KVCache | None = None

    def training_step(self) -> dict[str, float]:
        training = self.config.training
        metrics: dict[str, float] = {}
        shared: list[Sample] = []
        batch: list[MicroBatch] = []
        if training.trains_generator(self.step):
            batch = self.batch("generator")
            metrics |= self._train_generator(batch, shared)
        if training.trains_critic(self.step):
            reuse = bool(shared) and self.config.rollout.reuse_rollout
            metrics |= self._train_critic(batch if reuse else self.batch("critic"), shared if reuse else [])
        return metrics

    def _train_generator(self, batch: list[MicroBatch], made: list[Sample]) -> dict[str, float]:
        student, critic = self.networks["student"], self.networks["critic"]

        def loss_of(micro: MicroBatch) -> LossOutput:
            rollout, conditioning = self.rollout(micro, with_gradient=True)
            made.append((rollout.detach(), conditioning))
            output = self.objective(micro, rollout, conditioning)
            return self._with_looks(output, rollout)

        with frozen(critic.net, critic.optimizer.parameters):
            return self.update(student, batch, loss_of)

    def _train_critic(self, batch: list[MicroBatch], made: list[Sample]) -> dict[str, float]:
        reused: Iterator[Sample] = iter(made)

        def loss_of(micro: MicroBatch) -> LossOutput:
            rollout, conditioning = next(reused) if made else self.rollout(micro, with_gradient=False)
            sigma = self._score_sigma(micro, "critic_sigma", rollout)
            noise = micro.noise.normal("critic_noise", tuple(rollout.x0.shape[1:]))
            x0_target = self.config.objective.critic_loss is CriticLoss.x0
            return critic_loss(rollout, self.networks["critic"].score, conditioning, sigma, noise, x0_target=x0_target)

        return self.update(self.networks["critic"], batch, loss_of)

    def objective(self, micro: MicroBatch, rollout: Rollout, conditioning: Conditioning) -> LossOutput:
        """The student's loss on its rollout."""
        config = self.config.objective
        guidance = Guidance(
            self.task.negative(conditioning.batch), config.real_guidance_scale, config.fake_guidance_scale
        )
        sigma = self._score_sigma(micro, "score_sigma", rollout)
        noise = micro.noise.normal("score_noise", tuple(rollout.x0.shape[1:]))
        fake = self.networks["critic"].score
        match config.kind:
            case ObjectiveKind.dmd:
                return dmd_loss(rollout, self.teacher, fake, conditioning, guidance, sigma, noise)
            case ObjectiveKind.sid:
                return sid_loss(
                    rollout, self.teacher, fake, conditioning, guidance, sigma, noise, alpha=config.sid_alpha
                )

    def rollout(self, micro: MicroBatch, *, with_gradient: bool) -> Sample:
        """The student's sample for a micro-batch, with what it is conditioned on."""
        config, student, noise = self.config, self.networks["student"].score, micro.noise
        shape = self.task.latent_shape
        if config.rollout.kind in (RolloutKind.noised_data, RolloutKind.diffusion_forcing):
            clips = self.task.real(micro.positions)
            latents, conditioning = clips.latents, clips.given.with_text(self.task.conditioning(clips.captions).text)
        else:
            conditioning = self.task.conditions(micro.positions)
        with torch.set_grad_enabled(with_gradient), self.networks["student"].engine.rollout():
            match config.rollout.kind:
                case RolloutKind.self_forcing:
                    made = self._self_forcing(micro, conditioning, with_gradient)
                case RolloutKind.backward_simulation:
                    made = backward_simulation(
                        student, noise.normal("noise", shape), conditioning, self.sigmas, self._exit_steps(micro, 1)[0],
                        noise, with_gradient=with_gradient,
                    )  # fmt: skip
                case RolloutKind.noised_data:
                    made = noised_data(
                        student, latents, conditioning, self.sigmas, self._exit_steps(micro, 1)[0], noise,
                        with_gradient=with_gradient,
                    )  # fmt: skip
                case RolloutKind.diffusion_forcing:
                    blocks = len(config.causal.blocks(shape[0]))
                    steps = (noise.uniform("input_step", (blocks,)) * len(self.sigmas)).long()
                    made = diffusion_forcing_input(
                        student,
                        latents,
                        conditioning,
                        self.sigmas,
                        steps,
                        config.causal,
                        noise,
                        with_gradient=with_gradient,
                    )
        return made, conditioning.frames(made.start, made.x0.shape[1])

    def _self_forcing(self, micro: MicroBatch, conditioning: Conditioning, with_gradient: bool) -> Rollout:
        config, shape = self.config, self.task.latent_shape
        longest = config.rollout.num_training_frames or shape[0]
        lengths = rollout_lengths(shape[0], longest, config.causal.num_frame_per_block)
        frames = lengths[micro.noise.shared_randint("rollout_length", len(lengths), 1)[0]]
        given = conditioning.initial_frames
        _, blocks = config.causal.split(given, frames - given)
        plan = RolloutPlan(self._exit_steps(micro, len(blocks)), shape[0])
        noise = micro.noise.normal("noise", (frames - given, *shape[1:]))
        return self_forcing_rollout(
            self.networks["student"].score, noise, conditioning, self.sigmas, config.causal, plan, micro.noise,
            self._empty_cache(conditioning.batch, longest), with_gradient=with_gradient, reencode=self.task.reencode,
        )  # fmt: skip

    def _exit_steps(self, micro: MicroBatch, blocks: int) -> tuple[int, ...]:
        # The same on every rank: ranks leaving at different steps would deadlock sharded networks.
        last = len(self.sigmas) - 1
        if self.config.rollout.last_step_only:
            return (last,) * blocks
        if self.config.rollout.same_step_across_blocks:
            return tuple(micro.noise.shared_randint("exit_step", last + 1, 1)) * blocks
        return tuple(micro.noise.shared_randint("exit_step", last + 1, blocks))

    def _empty_cache(self, batch: int, frames: int) -> KVCache:
        """One cache for the whole run: a new one a rollout would double its memory."""
        student = self.networks["student"]
        if self._cache is None or self._cache.shape.batch != batch:
            height, width = self.task.latent_shape[2:]
            dtype = cache_dtype(student.score)
            self._cache = self.config.causal.new_cache(student.net, batch, frames, height, width, dtype, self.device)
        self._cache.reset()
        return self._cache

    def _score_sigma(self, micro: MicroBatch, role: str, rollout: Rollout) -> torch.Tensor:
        return self.config.schedule.score_sigma(micro.noise.uniform(role), rollout.sigma_from, rollout.sigma_to)

    @torch.no_grad()
    def _with_looks(self, output: LossOutput, rollout: Rollout) -> LossOutput:
        pixels = self.task.glimpse(rollout.x0.detach())
        if pixels is not None:
            output.metrics |= {"luma": luma(pixels).mean(), "saturation": saturation(pixels).mean()}
        return output
