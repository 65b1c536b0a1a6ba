"""ConsistencyTrainer: a few-step causal start without stored trajectories (Causal Forcing++, arXiv 2605.15141).

B batch  F latent frames
"""

from __future__ import annotations

from torch import Tensor

from configs.sizes import schedule_at
from model.consistency import adjacent, consistency_loss
from model.schedule import uniform_sigmas
from model.score import ScoreNet
from model.types import LossOutput
from pipeline.diffusion_forcing import CleanContext, per_frame, teacher_forced_velocity
from trainer.base import Trainer
from trainer.caption_dropout import with_dropout
from trainer.micro_batch import MicroBatch


class ConsistencyTrainer(Trainer):
    """The student's x0 at a noise level of the teacher's grid is drawn to its average's x0 one teacher step further.

    All three look back at clean frames, as in teacher forcing: the teacher is a causal network.
    """

    teacher: ScoreNet

    def build(self) -> None:
        self.teacher = self.make.teacher()
        self.networks = {"student": self.make.trained("student", self.config.training.max_steps, teacher=self.teacher)}

    def training_step(self) -> dict[str, float]:
        update = self.begin_update(self.networks["student"])
        for micro in update.over(self.batch("consistency")):
            update.backward(self.loss(micro))
        return update.step()

    def loss(self, micro: MicroBatch) -> LossOutput:
        """A level of the grid for each block."""
        config, student = self.config, self.networks["student"]
        clips = self.task.real(micro.positions, micro.shape)
        conditioning = self.task.conditioning(clips.captions, clips.visual)
        conditioning = with_dropout(conditioning, self.task, micro.noise, config.consistency.caption_dropout)
        clean, frames = clips.latents, clips.latents.shape[1]
        blocks = config.causal.blocks(frames)
        levels = uniform_sigmas(config.consistency.steps, schedule_at(config, micro.shape).timestep_shift)
        index = (micro.noise.uniform("level", (len(blocks),)) * len(levels)).long()
        sigma, sigma_next = (per_frame(level, blocks) for level in adjacent(index, levels))
        context = CleanContext(clean, sigma.new_zeros(sigma.shape))
        for level in (sigma, sigma_next):
            level[:, : conditioning.initial_frames] = 0.0
        negative = self.task.negative(conditioning.batch)

        def student_velocity(x: Tensor, level: Tensor) -> Tensor:
            return teacher_forced_velocity(student.score, x, level, context, conditioning, config.causal)

        def average_velocity(x: Tensor, level: Tensor) -> Tensor:
            assert student.ema is not None
            with student.ema.applied():
                return student_velocity(x, level)

        def teacher_velocity(x: Tensor, level: Tensor) -> Tensor:
            return teacher_forced_velocity(
                self.teacher, x, level, context, conditioning, config.causal,
                negative=negative, guidance=config.consistency.guidance,
            )  # fmt: skip

        noise = micro.noise.normal("noise", tuple(clean.shape[1:]))
        return consistency_loss(
            student_velocity, average_velocity, teacher_velocity, clean, noise, sigma, sigma_next,
            huber=config.consistency.huber,
        )  # fmt: skip
