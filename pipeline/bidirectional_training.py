"""Rollouts of a student that sees the whole video, and of one trained on noised data.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.schedule import mix, velocity_to_x0
from model.score import ScoreNet
from model.types import Conditioning, NoiseSource, Rollout
from pipeline.causal import CausalConfig
from pipeline.denoise import ExitPass, denoise_block
from pipeline.diffusion_forcing import CleanContext, per_frame, teacher_forced_velocity


def backward_simulation(
    student: ScoreNet,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    exit_step: int,
    source: NoiseSource,
    *,
    with_gradient: bool,
) -> Rollout:
    """DMD2's simulated input (arXiv 2405.14867, section 4.5): the student's steps from pure noise.

    student: a network that sees the whole video.
    noise: [B, F, C, H, W] at sigmas[0].
    conditioning: the videos' conditioning.
    sigmas: noise levels of the steps, in [0, 1], falling.
    exit_step: index of the step that x0 comes from.
    source: draws fresh noise between steps.
    with_gradient: whether the exit step carries gradient.
    """
    last = ExitPass(exit_step, with_gradient)
    x0 = denoise_block(student, noise, conditioning, sigmas, last, block=0, source=source, cache=None)
    mask = conditioning.judged(x0.shape[1])
    return Rollout(x0, sigmas[exit_step], (*sigmas, 0.0)[exit_step + 1], mask, exit_steps=(exit_step,))


def noised_data(
    student: ScoreNet,
    latents: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    exit_step: int,
    source: NoiseSource,
    *,
    with_gradient: bool,
) -> Rollout:
    """DMD's input: real latents noised to a level of the step list, the last step included.

    student: any few-step network.
    latents: [B, F, C, H, W], clean.
    conditioning: the videos' conditioning.
    sigmas: noise levels of the steps, in [0, 1], falling.
    exit_step: index of the step that x0 comes from.
    source: draws the noise.
    with_gradient: whether x0 carries gradient.
    """
    sigma = torch.full(latents.shape[:1], sigmas[exit_step], device=latents.device)
    x = mix(latents, source.normal("input_noise", tuple(latents.shape[1:])), sigma)
    with torch.set_grad_enabled(with_gradient and torch.is_grad_enabled()):
        x0 = student.x0(x, sigma, conditioning)
    mask = conditioning.judged(x0.shape[1])
    return Rollout(x0, sigmas[exit_step], (*sigmas, 0.0)[exit_step + 1], mask, exit_steps=(exit_step,))


def diffusion_forcing_input(
    student: ScoreNet,
    latents: Tensor,
    conditioning: Conditioning,
    sigma_Bb: Tensor,
    causal: CausalConfig,
    source: NoiseSource,
    *,
    with_gradient: bool,
    clean_context: bool = False,
) -> Rollout:
    """CausVid's input (arXiv 2412.07772, algorithm 1): real latents, each block at a level of its own, through the
    block-causal student. Given frames, which are the latents' own first ones, stay clean.

    student: a causal network.
    latents: [B, F, C, H, W], clean.
    conditioning: the videos' conditioning.
    sigma_Bb: noise level of each sample and block, in [0, 1].
    causal: blocks and window.
    source: draws the noise.
    with_gradient: whether x0 carries gradient.
    clean_context: blocks look back at the clean ones (teacher forcing), as they do at inference, not at the noisy ones.
    """
    sigma_BF = per_frame(sigma_Bb, causal.blocks(latents.shape[1]))
    sigma_BF[:, : conditioning.initial_frames] = 0.0
    x = mix(latents, source.normal("input_noise", tuple(latents.shape[1:])), sigma_BF)
    with torch.set_grad_enabled(with_gradient and torch.is_grad_enabled()):
        if clean_context:
            context = CleanContext(latents, torch.zeros_like(sigma_BF))
            velocity = teacher_forced_velocity(student, x, sigma_BF, context, conditioning, causal)
            x0 = velocity_to_x0(x, velocity, sigma_BF)
        else:
            x0 = student.x0(x, sigma_BF, conditioning, mask=causal.mask(latents.shape[1]))
    return Rollout(x0, frame_mask=conditioning.judged(x0.shape[1]))
