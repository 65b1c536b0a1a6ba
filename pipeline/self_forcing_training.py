"""The Self-Forcing rollout: a student generates as it will at inference, block by block over its own KV cache.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.checkpointing import Checkpointing
from model.attention.kv_cache import KVCache
from model.attention.replay import Trace
from model.family import Network
from model.schedule import velocity_to_x0
from model.score import ScoreNet
from model.types import Conditioning, NoiseSource, Rollout
from pipeline.causal import CausalConfig
from pipeline.causal_inference import cache_initial
from pipeline.denoise import ExitPass, context_input, denoise_block, write_context
from pipeline.diffusion_forcing import CleanContext, per_frame, teacher_forced_velocity
from utils.parallel.deepspeed import is_partitioned

Reencode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RolloutPlan:
    """How a rollout is made: the same on all ranks, drawn before it.

    causal: blocks and window.
    sigmas: noise levels of the steps, in [0, 1], falling.
    exit_steps: index of the step at which each generated block leaves; the trainer draws it (`_exit_steps`).
    score_frames: the last frames of the rollout, which carry gradient and are judged.
    context_gradient: self-gradient forcing, see `self_forcing_rollout`.
    """

    causal: CausalConfig
    sigmas: Sequence[float]
    exit_steps: tuple[int, ...]
    score_frames: int
    context_gradient: bool = False


def rollout_lengths(frames: int, num_training_frames: int, frames_per_block: int) -> list[int]:
    """The lengths that a long rollout may have: from `frames` up to `num_training_frames` in whole blocks."""
    if num_training_frames < frames or (num_training_frames - frames) % frames_per_block:
        raise ValueError(
            f"num_training_frames {num_training_frames} must be {frames} plus a multiple of the block of "
            f"{frames_per_block}"
        )
    return list(range(frames, num_training_frames + 1, frames_per_block))


def self_forcing_rollout(
    student: ScoreNet,
    noise: Tensor,
    conditioning: Conditioning,
    plan: RolloutPlan,
    source: NoiseSource,
    cache: KVCache,
    *,
    with_gradient: bool,
    reencode: Reencode | None = None,
) -> Rollout:
    """Self-Forcing (arXiv 2506.08009, algorithm 1): x0 with the gradient of each block's own exit step.

    With `plan.context_gradient` (self-gradient forcing, arXiv 2607.20368) all gradient comes from one more pass, over
    the finished blocks and what the exit steps saw: in it later blocks' losses reach the keys and values that they
    looked back at.

    student: a causal few-step network.
    noise: [B, F, C, H, W] of the frames to generate.
    conditioning: the whole video's conditioning; its initial frames come before those.
    plan: steps and exit steps, blocks, what is judged.
    source: draws fresh noise between steps, and context noise.
    cache: an empty one that holds all frames but the last block; its keys and values are never differentiated.
    with_gradient: whether the judged frames carry gradient.
    reencode: makes the window's first frame as an image latent [B, 1, C, H, W] from all latents before its second frame
    (a VAE's first frame is coded alone; a frame in mid-video is not). Used when the rollout is longer than the judged
    window, whose first frame is then left out of the loss.
    """
    causal, done = plan.causal, conditioning.initial_frames
    initial, blocks = causal.split(done, noise.shape[1])
    total = done + noise.shape[1]
    _check(plan, len(blocks), total, conditioning)
    # self-gradient forcing gets all of its gradient from one masked pass afterwards
    forced = with_gradient and plan.context_gradient
    replays = with_gradient and not forced and _replays(student)
    trace, exits = Trace(), list[Tensor]()
    cache_initial(student, conditioning, initial, source, cache)
    parts = [] if conditioning.initial is None else [conditioning.initial.to(noise.dtype)]
    for index, (part, exit_step) in enumerate(zip(noise.split(list(blocks), 1), plan.exit_steps, strict=True)):
        condition = conditioning.frames(done, part.shape[1])
        done += part.shape[1]
        # a longer rollout's first judged frame is replaced by its image latent, so it needs no gradient
        judged = done > total - plan.score_frames + int(total > plan.score_frames)
        last = ExitPass(
            exit_step,
            with_gradient=with_gradient and judged and not forced,
            trace=trace if replays and judged else None,
            seen=exits if forced and judged else None,
        )
        x0 = denoise_block(student, part, condition, plan.sigmas, last, block=index, source=source, cache=cache)
        parts.append(x0)
        if index < len(blocks) - 1:  # nothing reads what the last block would write
            sigma = causal.context_sigma
            write_context(student, x0, condition, sigma=sigma, block=index, source=source, cache=cache)
    video = torch.cat(parts, 1)
    if trace.passes:
        video = _replay(student, trace, conditioning, plan, video)
    if exits:
        video = _forced(student, exits, conditioning, plan, source, video)
    return _judged_window(video, plan, conditioning.initial_frames, reencode)


def _check(plan: RolloutPlan, blocks: int, total: int, conditioning: Conditioning) -> None:
    """Raises ValueError for a plan that is not of so many blocks and frames."""
    if len(plan.exit_steps) != blocks:
        raise ValueError(f"{len(plan.exit_steps)} exit steps for {blocks} blocks")
    if plan.score_frames > total:
        raise ValueError(f"{plan.score_frames} frames to judge of {total}")
    if conditioning.channels is not None and plan.score_frames < total:
        raise ValueError("image channels describe a whole video: it cannot be judged by its last window alone")


def _replays(student: ScoreNet) -> bool:
    """With checkpointing the exit passes run without gradient and get it afterwards, all in one pass."""
    return (
        isinstance(student.net, Network)
        and student.net.checkpointing is not Checkpointing.none
        and not is_partitioned(student.net)  # ZeRO-3 gathers weights as blocks are called, and a replay calls none
    )


def _replay(student: ScoreNet, trace: Trace, conditioning: Conditioning, plan: RolloutPlan, video: Tensor) -> Tensor:
    """The video, to the bit, with gradient in the frames of the traced passes, its last ones.

    student: whose passes they are.
    trace: the notes of the exit steps.
    conditioning: the whole video's conditioning.
    plan: whose exit steps they are.
    video: [B, F, C, H, W], without gradient.
    """
    x, sigma = trace.x, trace.sigma
    if len(set(plan.exit_steps)) == 1:
        sigma = sigma[:, 0]
    start = video.shape[1] - x.shape[1]
    return _with_gradient(video, student.x0_again(x, sigma, conditioning.frames(start, x.shape[1]), replay=trace))


def _forced(
    student: ScoreNet,
    exits: Sequence[Tensor],
    conditioning: Conditioning,
    plan: RolloutPlan,
    source: NoiseSource,
    video: Tensor,
) -> Tensor:
    """The video, to the bit, with the gradient of one teacher-forced pass over [finished blocks | exit inputs]: the
    finished blocks, as the cache saw them, are inputs without gradient, and their keys and values have it.

    student: whose rollout it is.
    exits: what the exit steps of the last blocks saw, [B, f, C, H, W] each.
    conditioning: the whole video's conditioning.
    plan: exit steps and blocks.
    source: draws the context noise that the cache saw.
    video: [B, F, C, H, W], without gradient.
    """
    initial = conditioning.initial_frames
    _, blocks = plan.causal.split(initial, video.shape[1] - initial)
    kept = video.shape[1] - blocks[-1]  # nobody looks back at the last block
    done = video.detach()[:, initial:kept].split(list(blocks[:-1]), 1)
    sigma = plan.causal.context_sigma
    context = [context_input(x0, sigma=sigma, block=index, source=source) for index, x0 in enumerate(done)]
    latents = torch.cat([video[:, :initial], *context], 1)
    clean_time = torch.full((kept,), sigma, device=video.device)
    clean_time[:initial] = 0.0
    x = torch.cat(list(exits), 1)
    clean = CleanContext(latents, clean_time.expand(latents.shape[:2]), start=video.shape[1] - x.shape[1])
    levels = [plan.sigmas[step] for step in plan.exit_steps]
    time = per_frame(torch.tensor(levels[-len(exits) :], device=video.device)[None], blocks[-len(exits) :])
    velocity = teacher_forced_velocity(student, x, time.expand(x.shape[:2]), clean, conditioning, plan.causal)
    x0 = velocity_to_x0(x, velocity, time)
    return _with_gradient(video, x0)


def _with_gradient(video: Tensor, x0: Tensor) -> Tensor:
    """The video's numbers with x0's gradient in its last frames, which x0 is up to rounding."""
    before, same = video.split([video.shape[1] - x0.shape[1], x0.shape[1]], 1)
    return torch.cat([before, same + (x0 - x0.detach())], 1)


def _judged_window(video: Tensor, plan: RolloutPlan, initial: int, reencode: Reencode | None) -> Rollout:
    """The frames of a video [B, F, C, H, W] that are judged; those of the `initial` first frames are masked out."""
    start = video.shape[1] - plan.score_frames
    mask = torch.arange(start, video.shape[1], device=video.device) >= initial
    window = video[:, start:]
    if start > 0:
        if reencode is not None:
            with torch.no_grad():
                first = reencode(video[:, : start + 1].detach())
            window = torch.cat([first.to(window.dtype), window[:, 1:]], 1)
        mask[0] = False
    same = len(set(plan.exit_steps)) == 1
    levels = (*plan.sigmas, 0.0)
    exit_step = plan.exit_steps[-1]
    return Rollout(
        x0=window,
        sigma_from=levels[exit_step] if same else None,
        sigma_to=levels[exit_step + 1] if same else None,
        frame_mask=None if bool(mask.all()) else mask,
        exit_steps=plan.exit_steps,
        start=start,
    )
