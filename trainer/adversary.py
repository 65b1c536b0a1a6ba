"""The discriminator of a run: its heads, what they look through, and when they judge what.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs.schema import RunConfig
from configs.sizes import schedule_at
from model.discriminator import Discriminator, ImageHeads, RegisterHead, VideoHeads, tapped_blocks
from model.family import Geometry
from model.gan import Adversarial, NoisedSamples, discriminator_loss, gan_loss
from model.gan_config import GANConfig, Heads
from model.objective import Objective
from model.score import ScoreNet
from model.types import Conditioning, LossOutput, Rollout
from tasks.task import Shape, Task
from trainer.caption_dropout import with_dropout
from trainer.engine import ReplicatedEngine
from trainer.networks import Trained
from utils.errors import ConfigError
from utils.optim import NetworkOptimizer, trainable
from utils.random import Noise, keyed_seed

NAME = "discriminator"


def build_heads(config: GANConfig, geometry: Geometry, blocks: int, size: tuple[int, int]) -> nn.Module:
    """Heads for so many tapped blocks of a network, at latents of this height and width. Raises ConfigError."""
    try:
        match config.heads:
            case Heads.video:
                return VideoHeads(geometry.dim, blocks, geometry.patch_size[1])
            case Heads.image:
                rows, columns = (n // patch for n, patch in zip(size, geometry.patch_size[1:], strict=True))
                if rows != columns:
                    raise ValueError(f"image heads need square images, not {rows}x{columns} tokens: choose video")
                return ImageHeads([(geometry.dim, rows)] * blocks)
            case Heads.register:
                return RegisterHead(geometry.dim, blocks, heads=geometry.num_heads)
    except ValueError as problem:
        raise ConfigError(f"objective.gan.heads: {problem}") from None


class Adversary:
    """Judges the student's samples against the task's real ones, both noised.

    config: the whole run's config; its objective has a gan section.
    backbone: the network whose features it sees.
    geometry: the backbone's geometry.
    task: gives the real samples.
    device: where its heads are.
    updates: how often its heads will be trained.
    objective: says at which noise levels samples are judged.
    sequence: ranks that share a sample.
    """

    def __init__(
        self,
        config: RunConfig,
        backbone: ScoreNet,
        geometry: Geometry,
        task: Task,
        device: torch.device,
        updates: int,
        objective: Objective,
        sequence: int,
    ) -> None:
        gan = config.objective.gan
        assert gan is not None
        self.run, self.config, self.task, self.objective = config, gan, task, objective
        height, width = task.latent_shape[2:]
        blocks = tapped_blocks(geometry.num_layers, gan.depths)
        with torch.random.fork_rng(devices=[]):  # the same on every rank
            torch.default_generator.manual_seed(keyed_seed(config.seed, "weights", NAME))
            heads = build_heads(gan, geometry, len(blocks), (height, width)).to(device)
        self.judge = Discriminator(backbone, heads, blocks)
        training = gan.training
        optimizer = NetworkOptimizer(trainable(heads), training.optimizer, training.lr_schedule, updates)
        self.heads = Trained(NAME, heads, optimizer, ReplicatedEngine(heads, optimizer, sequence), None)

    def sigma(self, noise: Noise, role: str, shape: Shape) -> Tensor:
        """Noise levels [B] at which samples of this shape (F, C, H, W) are judged."""
        sigma = self.objective.judged_at(noise.uniform(role), noise.normal(role, ()), schedule_at(self.run, shape))
        return self.judge.backbone.path.known(sigma)

    def real(self, positions: range, noise: Noise, phase: str, shape: Shape) -> NoisedSamples:
        """Real samples of this shape at these positions, with their own noise."""
        clips = self.task.real(positions, shape)
        conditioning = self.task.conditioning(clips.captions, clips.visual)
        # as the student's samples: a prompt that only those lack would tell them from real ones
        conditioning = with_dropout(conditioning, self.task, noise, self.run.rollout.caption_dropout)
        eps = noise.normal(f"{phase}_real_noise", tuple(clips.latents.shape[1:]))
        return NoisedSamples(clips.latents, conditioning, self.sigma(noise, f"{phase}_real_sigma", shape), eps)

    def draw(self, rollout: Rollout, noise: Noise, phase: str) -> tuple[Tensor, Tensor]:
        """A noise level [B] and noise like the sample's."""
        shape = tuple(rollout.x0.shape[1:])
        return self.sigma(noise, f"{phase}_sigma", shape), noise.normal(f"{phase}_noise", shape)

    def term(
        self,
        rollout: Rollout,
        conditioning: Conditioning,
        positions: range,
        noise: Noise,
        draw: tuple[Tensor, Tensor] | None = None,
    ) -> LossOutput:
        """The student's adversarial loss.

        rollout: the student's sample x0 [B, F, C, H, W].
        conditioning: what the sample is conditioned on.
        positions: those of the real samples that a relativistic loss pairs with it.
        noise: where the draws come from.
        draw: noise level [B] and noise, like x0, to judge at in place of its own draw.
        """
        sigma, eps = self.draw(rollout, noise, "gan") if draw is None else draw
        paired = self.config.loss is Adversarial.relativistic
        real = self.real(positions, noise, "gan", tuple(rollout.x0.shape[1:])) if paired else None
        student = NoisedSamples.of(rollout, conditioning, sigma, eps)
        return gan_loss(student, self.judge, kind=self.config.loss, real=real)

    def loss(self, rollout: Rollout, conditioning: Conditioning, positions: range, noise: Noise) -> LossOutput:
        """The discriminator's own loss, with its penalties."""
        student = NoisedSamples.of(rollout, conditioning, *self.draw(rollout, noise, NAME))
        penalty, shape = self.config.penalty(), tuple(rollout.x0.shape[1:])
        real_step = noise.normal("r1_step", shape) if penalty.r1 else None
        fake_step = noise.normal("r2_step", shape) if penalty.r2 else None
        return discriminator_loss(
            student, self.real(positions, noise, NAME, shape), self.judge,
            kind=self.config.loss, penalty=penalty, real_step=real_step, fake_step=fake_step,
        )  # fmt: skip
