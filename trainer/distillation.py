"""ScoreDistillationTrainer: student and critic in turn, around any rollout and any objective.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch

from configs.rollout import (
    BackwardSimulationConfig,
    DiffusionForcingConfig,
    ExitStepConfig,
    NoisedDataConfig,
    SelfForcingConfig,
    TeacherForcingConfig,
)
from configs.sizes import schedule_at
from model.gan_config import Features
from model.ida import Alignment
from model.objective import Objective, Weights, objective_of
from model.score import ScoreNet
from model.types import Conditioning, LossOutput, Rollout
from pipeline.bidirectional_training import backward_simulation, diffusion_forcing_input, noised_data
from pipeline.self_forcing_training import RolloutPlan, rollout_lengths, self_forcing_rollout
from trainer.adversary import Adversary
from trainer.base import Trainer
from trainer.caption_dropout import with_dropout
from trainer.guard import Guard
from trainer.losses import Losses, Sample
from trainer.micro_batch import MicroBatch
from trainer.networks import Trained
from trainer.rollout_cache import RolloutCache
from utils import distributed
from utils.metrics import luma, saturation
from utils.parallel.parallelize import frozen


class ScoreDistillationTrainer(Trainer):
    """DMD and its relatives. The student's samples come from the configured rollout, its gradient from the objective;
    the critic follows the student by flow matching on those samples, and a discriminator judges them."""

    headline = (
        "student/loss", "student/grad_norm", "student/dmd_gradient_norm", "student/luma",
        "student/saturation", "critic/loss", "critic/grad_norm",
        "samples_per_second", "peak_memory_gib", "network_evaluations",
    )  # fmt: skip

    def build(self) -> None:
        config = self.config
        training, steps = config.training, config.training.max_steps
        self.teacher = None if config.teacher is None else self.make.teacher()
        updates = {"student": training.generator_updates(steps)}
        if config.critic is not None:
            updates["critic"] = training.critic_updates(steps)
        self.networks = {name: self.make.trained(name, count, teacher=self.teacher) for name, count in updates.items()}
        critic = self.networks["critic"].score if "critic" in self.networks else None
        objective = objective_of(config.objective, self._total)
        self.losses = Losses(
            config, self.task, self.teacher, critic, self._adversary(critic, objective), objective, self._total,
            self.task.reward(config.objective.reward),
        )  # fmt: skip
        self.guard = Guard(config.guard)
        self.extras = {"objective": self.losses, "guard": self.guard}
        self.alignment: Alignment | None = None
        if config.objective.critic_keep is not None:
            pair = self.networks["critic"], self.networks["student"]
            self.alignment = Alignment(
                pair[0].net, pair[1].net, config.objective.critic_keep, *(trained.optimizer.named for trained in pair)
            )
        self.sigmas = config.schedule.sigmas()
        self.cache = RolloutCache(config, self.networks["student"].score, self.device)

    def _adversary(self, critic: ScoreNet | None, objective: Objective) -> Adversary | None:
        config, gan = self.config, self.config.objective.gan
        if gan is None:
            return None
        on_teacher = gan.features is Features.teacher
        backbone, network = (self.teacher, config.teacher) if on_teacher else (critic, config.critic)
        assert backbone is not None
        assert network is not None
        updates = config.training.critic_updates(config.training.max_steps)
        adversary = Adversary(
            config, backbone, network.geometry(), self.task, self.device, updates, objective, self.mesh.sequence
        )
        self.heads = {adversary.heads.name: adversary.heads}
        return adversary

    def _total(self, tensor: torch.Tensor) -> torch.Tensor:
        return distributed.all_reduce_(tensor.clone()) / self.mesh.sequence

    def training_step(self) -> dict[str, float]:
        training = self.config.training
        metrics: dict[str, float] = {}
        batch: list[MicroBatch] = []
        made: list[Sample] = []
        if training.trains_generator(self.step):
            batch = self.batch("generator")
            metrics, made = self._train_generator(batch)
        if training.trains_critic(self.step):
            reuse = bool(made) and self.config.rollout.reuse_rollout
            metrics |= self._train_critic(batch if reuse else self.batch("critic"), made if reuse else [])
        return metrics

    def _train_generator(self, batch: list[MicroBatch]) -> tuple[dict[str, float], list[Sample]]:
        """One update of the student: what to log, and its samples, detached."""
        made: list[Sample] = []
        weights: list[Weights | None] = [None] * len(batch)
        if self.losses.weighs and len(batch) > 1:  # all samples must be seen before the first one's loss
            weights = [*self.losses.weights([self.sample_of(micro, with_gradient=False) for micro in batch])]
        with ExitStack() as others:
            for other in self._beside_student():
                others.enter_context(frozen(other.net, other.optimizer.parameters))
            update = self.begin_update(self.networks["student"])
            for micro, known in zip(update.over(batch), weights, strict=True):
                sample = self.sample_of(micro, with_gradient=True)
                output = self.losses.student_loss(sample, known)
                update.backward(self._with_appearance(output, sample.rollout))
                made.append(replace(sample, rollout=sample.rollout.detach()))
            metrics = update.step()
        self.ended = self.ended or self.guard.check(metrics)
        if self.alignment is not None:
            self.alignment.update()
        return metrics, made

    def _train_critic(self, batch: list[MicroBatch], made: list[Sample]) -> dict[str, float]:
        """One update of the critic and the discriminator, on the student's samples `made`, or on new ones."""
        trained, *beside = self._beside_student()
        update = self.begin_update(trained, beside)
        for number, micro in enumerate(update.over(batch)):
            sample = made[number] if made else self.sample_of(micro, with_gradient=False)
            update.backward(self.losses.critic_loss(sample))
        return update.step()

    def _beside_student(self) -> list[Trained]:
        """What is trained beside the student: the critic, then the discriminator, those of them that the run has."""
        return [*(net for name, net in self.networks.items() if name != "student"), *self.heads.values()]

    def sample_of(self, micro: MicroBatch, *, with_gradient: bool) -> Sample:
        rollout, conditioning = self.rollout(micro, with_gradient=with_gradient)
        return Sample(rollout, conditioning, micro.positions, micro.noise)

    def rollout(self, micro: MicroBatch, *, with_gradient: bool) -> tuple[Rollout, Conditioning]:
        """The student's sample for a micro-batch, with what it is conditioned on."""
        config, student, noise = self.config, self.networks["student"].score, micro.noise
        shape, sigmas = micro.shape, schedule_at(config, micro.shape).sigmas()
        if config.rollout.from_data:
            clips = self.task.real(micro.positions, shape)
            latents, conditioning = clips.latents, self.task.conditioning(clips.captions, clips.visual)
        else:
            conditioning = self.task.conditions(micro.positions, shape)
        conditioning = with_dropout(conditioning, self.task, noise, config.rollout.caption_dropout)
        with torch.set_grad_enabled(with_gradient), self.networks["student"].engine.rollout():
            match config.rollout:
                case SelfForcingConfig() as section:
                    made = self._self_forcing(section, micro, conditioning, with_gradient)
                case BackwardSimulationConfig() as section:
                    made = backward_simulation(
                        student, student.path.start_noise(noise.normal("noise", shape)), conditioning, sigmas,
                        self._exit_steps(section, micro, 1)[0],
                        noise, with_gradient=with_gradient,
                    )  # fmt: skip
                case NoisedDataConfig() as section:
                    made = noised_data(
                        student, latents, conditioning, sigmas, self._exit_steps(section, micro, 1)[0], noise,
                        with_gradient=with_gradient,
                    )  # fmt: skip
                case DiffusionForcingConfig() | TeacherForcingConfig():
                    blocks = len(config.causal.blocks(shape[0]))
                    steps = (noise.uniform("input_step", (blocks,)) * len(self.sigmas)).long()
                    levels = torch.tensor(sigmas, device=latents.device)[steps]
                    made = diffusion_forcing_input(
                        student,
                        latents,
                        conditioning,
                        levels,
                        config.causal,
                        noise,
                        with_gradient=with_gradient,
                        clean_context=isinstance(config.rollout, TeacherForcingConfig),
                    )
                case other:
                    raise NotImplementedError(f"rollout.kind {other.kind}: ScoreDistillationTrainer makes none")
        return made, conditioning.frames(made.start, made.x0.shape[1])

    def _self_forcing(
        self, section: SelfForcingConfig, micro: MicroBatch, conditioning: Conditioning, with_gradient: bool
    ) -> Rollout:
        config, shape, student = self.config, micro.shape, self.networks["student"].score
        longest = section.longest(shape[0])
        lengths = rollout_lengths(shape[0], longest, config.causal.num_frame_per_block)
        frames = lengths[micro.noise.shared_randint("rollout_length", len(lengths), 1)[0]]
        initial = conditioning.initial_frames
        _, blocks = config.causal.split(initial, frames - initial)
        plan = RolloutPlan(
            config.causal,
            schedule_at(config, shape).sigmas(),
            self._exit_steps(section, micro, len(blocks)),
            shape[0],
            section.self_gradient,
        )
        return self_forcing_rollout(
            student,
            student.path.start_noise(micro.noise.normal("noise", (frames - initial, *shape[1:]))),
            conditioning,
            plan,
            micro.noise,
            self.cache.empty(conditioning.batch, longest, *shape[2:]),
            with_gradient=with_gradient,
            reencode=self.task.reencode,
        )

    def _exit_steps(self, section: ExitStepConfig, micro: MicroBatch, blocks: int) -> tuple[int, ...]:
        # The same on every rank: ranks leaving at different steps would deadlock sharded networks.
        last = len(self.sigmas) - 1
        if section.last_step_only:
            return (last,) * blocks
        if isinstance(section, SelfForcingConfig) and not section.same_step_across_blocks:
            return tuple(micro.noise.shared_randint("exit_step", last + 1, blocks))
        return tuple(micro.noise.shared_randint("exit_step", last + 1, 1)) * blocks

    @torch.no_grad()
    def _with_appearance(self, output: LossOutput, rollout: Rollout) -> LossOutput:
        seen = self.task.glimpse(rollout.x0.detach())
        if seen is not None:
            values = {"luma": luma(seen.pixels), "saturation": saturation(seen.pixels), "clipped": seen.clipped}
            output.metrics |= {name: value.mean() for name, value in values.items()}
        return output
