"""DiffusionTrainer: flow matching of a bidirectional teacher, or of a causal network (diffusion or teacher forcing).

B batch  F latent frames
"""

from __future__ import annotations

from torch import Tensor

from configs.sections import DiffusionMode
from configs.sizes import schedule_at
from model.diffusion import flow_matching_loss
from model.schedule import TIMESTEPS, mix, shift_sigma
from model.types import Conditioning, LossOutput
from pipeline.diffusion_forcing import CleanContext, per_frame, teacher_forced_velocity
from trainer.base import Trainer
from trainer.caption_dropout import check_dropped_text, dropped
from trainer.micro_batch import MicroBatch


class DiffusionTrainer(Trainer):
    """Trains `student` on the task's real data."""

    def build(self) -> None:
        self.networks = {"student": self.make.trained("student", self.config.training.max_steps)}

    def _resume(self) -> None:
        super()._resume()
        check_dropped_text(self.config, self.task)  # which depends on the run that goes on

    def training_step(self) -> dict[str, float]:
        update = self.begin_update(self.networks["student"])
        for micro in update.over(self.batch("diffusion")):
            update.backward(self.loss(micro))
        return update.step()

    def loss(self, micro: MicroBatch) -> LossOutput:
        """Flow matching at the mode's noise levels."""
        config = self.config.diffusion
        clips = self.task.real(micro.positions, micro.shape)
        latents = clips.latents
        prompts, instead = clips.captions, self.config.dropped_text
        if instead is not None:
            gone = dropped(micro.noise, config.caption_dropout).tolist()
            prompts = [instead if drop else text for text, drop in zip(prompts, gone, strict=True)]
        conditioning = self.task.conditioning(prompts, clips.visual)
        noise = micro.noise.normal("noise", tuple(latents.shape[1:]))
        match config.mode:
            case DiffusionMode.bidirectional:
                return self._bidirectional(micro, latents, noise, conditioning)
            case DiffusionMode.diffusion_forcing:
                return self._diffusion_forcing(micro, latents, noise, conditioning)
            case DiffusionMode.teacher_forcing:
                return self._teacher_forcing(micro, latents, noise, conditioning)

    def _bidirectional(
        self, micro: MicroBatch, latents: Tensor, noise: Tensor, conditioning: Conditioning
    ) -> LossOutput:
        score = self.networks["student"].score
        sigma = score.path.known(schedule_at(self.config, micro.shape).training_sigma(micro.noise.uniform("sigma")))
        weight = _weight(conditioning, latents)
        return flow_matching_loss(lambda x, s: score.velocity(x, s, conditioning), latents, noise, sigma, weight=weight)

    def _block_sigmas(self, micro: MicroBatch, frames: int) -> Tensor:
        blocks = self.config.causal.blocks(frames)
        u = micro.noise.uniform("sigma", (len(blocks),))
        return per_frame(shift_sigma(u, schedule_at(self.config, micro.shape).timestep_shift), blocks)

    def _diffusion_forcing(
        self, micro: MicroBatch, latents: Tensor, noise: Tensor, conditioning: Conditioning
    ) -> LossOutput:
        frames = latents.shape[1]
        sigma_BF, causal = self._block_sigmas(micro, frames), self.config.causal
        blocks = causal.blocks(frames)
        clean = (
            per_frame(micro.noise.uniform("clean", (len(blocks),)), blocks) < self.config.diffusion.clean_block_share
        )
        made = clean[:, conditioning.initial_frames :]
        made &= ~made.all(dim=1, keepdim=True)  # a sample with nothing left to learn from is noised after all
        clean[:, : conditioning.initial_frames] = True
        sigma_BF = sigma_BF.masked_fill(clean, 0.0)
        score, mask = self.networks["student"].score, causal.mask(frames)
        return flow_matching_loss(
            lambda x, s: score.velocity(x, s, conditioning, mask=mask),
            latents,
            noise,
            sigma_BF,
            weight=(~clean).float(),
        )

    def _teacher_forcing(
        self, micro: MicroBatch, latents: Tensor, noise: Tensor, conditioning: Conditioning
    ) -> LossOutput:
        frames, score = latents.shape[1], self.networks["student"].score
        most = self.config.diffusion.clean_noise_max / TIMESTEPS
        clean_sigma_BF = micro.noise.uniform("clean_sigma")[:, None].expand(-1, frames) * most
        sigma_BF = self._block_sigmas(micro, frames)
        for times in (clean_sigma_BF, sigma_BF):
            times[:, : conditioning.initial_frames] = 0.0
        clean = mix(latents, micro.noise.normal("clean_noise", tuple(latents.shape[1:])), clean_sigma_BF)

        def predict(x: Tensor, sigma_BF: Tensor) -> Tensor:
            context = CleanContext(clean, clean_sigma_BF)
            return teacher_forced_velocity(score, x, sigma_BF, context, conditioning, self.config.causal)

        return flow_matching_loss(predict, latents, noise, sigma_BF, weight=_weight(conditioning, latents))


def _weight(conditioning: Conditioning, latents: Tensor) -> Tensor | None:
    """[B, F], 0 for the given frames of latents [B, F, C, H, W]; None where there are none."""
    judged = conditioning.judged(latents.shape[1])
    return None if judged is None else judged.float().expand(latents.shape[:2])
