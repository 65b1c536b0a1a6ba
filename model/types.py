"""The values that rollouts, objectives and trainers hand to each other. No logic beyond slicing.

B batch  F latent frames  C channels  H W latent size  L text tokens  D text width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from utils.distributed import Reduction

LatentSize = tuple[int, int, int]  # latent frames, height, width
Prompt = Mapping[str, Tensor]  # an encoded prompt by the names that the network's arguments have, batch first
PromptShapes = Mapping[str, tuple[int, ...]]  # of its tensors, without the batch
Total = Callable[[Tensor], Tensor]  # sums a tensor over the ranks that hold different samples: a collective


@dataclass(frozen=True)
class Conditioning:
    """What a sample is conditioned on.

    prompt: what the prompt became, tensors by the names of the network's arguments, batch first: for Wan `text`
        [B, L, D], zeros after each prompt's length. A bare tensor is taken for the text.
    initial: [B, Fi, C, H, W] clean latents that the video starts with (image-to-video, continuation), or None.
    channels: [B, F, Cc, H, W] that the network sees beside the latents of every frame of the video, the given ones
    included (Wan's image-to-video networks: 4 of the mask, then the latents of the given frames), or None.
    image: [B, Li, Di] tokens of an image encoder (CLIP in Wan2.1), or None.
    """

    prompt: Prompt
    initial: Tensor | None = None
    channels: Tensor | None = None
    image: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", as_prompt(self.prompt))

    @classmethod
    def of(cls, condition: Tensor | Conditioning) -> Conditioning:
        """A bare text [B, L, D] is conditioning on nothing else."""
        return cls({"text": condition}) if isinstance(condition, Tensor) else condition

    @property
    def batch(self) -> int:
        return next(iter(self.prompt.values())).shape[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.prompt.values())).device

    @property
    def initial_frames(self) -> int:
        return 0 if self.initial is None else self.initial.shape[1]

    def judged(self, frames: int) -> Tensor | None:
        """[F] bool, of a video's frames those that are not given, which a loss may judge; None means all."""
        if self.initial is None:
            return None
        return torch.arange(frames, device=self.initial.device) >= self.initial_frames

    @property
    def beside_prompt(self) -> dict[str, Tensor]:
        """What a network takes beside the prompt, by the names of its arguments."""
        arguments = {"channels": self.channels, "image": self.image}
        return {name: value for name, value in arguments.items() if value is not None}

    def frames(self, start: int, count: int) -> Conditioning:
        """That of frames start .. start + count of the video alone."""
        part = slice(start, start + count)
        initial = None if start >= self.initial_frames or self.initial is None else self.initial[:, part]
        return replace(self, initial=initial, channels=None if self.channels is None else self.channels[:, part])

    def with_prompt(self, prompt: Prompt) -> Conditioning:
        """The same but for the prompt: guidance's negative branch sees the same image."""
        return replace(self, prompt=prompt)

    def and_for(self, prompt: Prompt) -> Conditioning:
        """Conditioning of twice the batch: this, then this with another prompt."""
        return Conditioning.joined([self, self.with_prompt(prompt)])

    @classmethod
    def joined(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Of one batch after the other; all of them have the same fields."""
        prompt = {name: torch.cat([part.prompt[name] for part in parts]) for name in parts[0].prompt}
        columns = ([getattr(part, name) for part in parts] for name in ("initial", "channels", "image"))
        return cls(prompt, *(None if column[0] is None else torch.cat(column) for column in columns))


def as_prompt(prompt: Prompt | Tensor) -> Prompt:
    """A bare tensor is the text of a prompt."""
    return {"text": prompt} if isinstance(prompt, Tensor) else prompt


@dataclass(frozen=True)
class VisualConditioning:
    """What videos are given beside their prompts: the fields of `Conditioning`. Nothing by default."""

    initial: Tensor | None = None
    channels: Tensor | None = None
    image: Tensor | None = None

    def with_prompt(self, prompt: Prompt) -> Conditioning:
        """Together with an encoded prompt."""
        return Conditioning(prompt, self.initial, self.channels, self.image)


@dataclass(frozen=True)
class Rollout:
    """A student's sample and where it left its step list.

    x0: [B, F, C, H, W], with gradient where the rollout had one; given initial frames come first.
    sigma_from: noise level of the exit step, in [0, 1]; None when blocks left at different steps.
    sigma_to: noise level that the exit step leads to (0 after the last step); None likewise.
    frame_mask: [F] bool, the frames that a loss may judge; None means all.
    exit_steps: the exit step of each block, for logs.
    start: the frame of the whole video at which x0 starts; more than 0 where only the last window is judged.
    """

    x0: Tensor
    sigma_from: float | None = None
    sigma_to: float | None = None
    frame_mask: Tensor | None = None
    exit_steps: tuple[int, ...] = ()
    start: int = 0

    def detach(self) -> Rollout:
        return replace(self, x0=self.x0.detach())


@dataclass
class LossOutput:
    """What a loss gives.

    loss: a scalar with gradient, the mean over the samples.
    metrics: detached scalars for the log.
    kl_gradient: [B, F, C, H, W], of distribution matching.
    reduced: how metrics that are no means over the samples come together, over micro-batches and over ranks.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    kl_gradient: Tensor | None = None
    reduced: dict[str, Reduction] = field(default_factory=dict)


class NoiseSource(Protocol):
    """Where a rollout's draws come from: a keyed generator in training, given tensors in a replay."""

    def normal(self, role: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal [B, *shape]; the same role gives the same numbers again."""


@dataclass
class Evaluations:
    """Network evaluations, counted where they happen: calls and latent frames by network name."""

    calls: dict[str, int] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, *, frames: int) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        self.frames[name] = self.frames.get(name, 0) + frames

    @property
    def total_frames(self) -> int:
        return sum(self.frames.values())

    def state(self) -> dict[str, dict[str, int]]:
        return {"calls": dict(self.calls), "frames": dict(self.frames)}

    def load(self, state: dict[str, dict[str, int]]) -> None:
        self.calls, self.frames = dict(state["calls"]), dict(state["frames"])


def expand_like(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma [B] or [B, F] shaped so that it broadcasts over x [B, F, ...], in fp32."""
    return sigma.to(torch.float32).reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
