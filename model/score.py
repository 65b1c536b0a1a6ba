"""ScoreNet: a network seen as a velocity and an x0 predictor, and the one classifier-free-guidance convention.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from model.path import Flow, Path
from model.schedule import velocity_to_x0
from model.types import Conditioning, Evaluations, Prompt, expand_like

Condition = Conditioning | Tensor


class ScoreNet:
    """x0 prediction of a network, with its evaluations counted and its precision set at the call.

    Every method takes conditioning, or an encoded text [B, L, D] alone.

    net: callable `(x_BFCHW, time [B] | [B, F], **mode) -> prediction [B, F, C, H, W]`: x, time and prediction
        of its path, sigma and velocity by default. Where the conditioning has them, mode holds `channels` and `image`.
    name: under which its evaluations are counted.
    evaluations: the count, which several networks may share; None for one of its own.
    compute_dtype: bf16 runs the network under autocast; None leaves it in its own precision. The autocast context
        is entered anew at each call: its weight cache, filled without gradient by a rollout's early steps, would
        otherwise cut the exit step off from the weights.
    batch_guidance: whether one call makes the passes with and without prompt, so that sharded weights are gathered
        once; two calls need half the activations.
    pins_initial: the network is shown given frames clean, each frame with its own time (Wan2.2 TI2V-5B): conditioning's
        initial frames take the place of x's, at sigma 0, and the velocity in them is the one that leads to them, so
        losses and samplers need not know. Other networks see what x holds in those frames.
    adapter: of a network that plays several roles, the one that makes it this one (model/lora.py).
    path: the process that the network was trained on (model/path.py). Given frames are pinned before it.
    """

    def __init__(
        self,
        net: nn.Module,
        name: str,
        evaluations: Evaluations | None = None,
        compute_dtype: torch.dtype | None = None,
        batch_guidance: bool = True,
        pins_initial: bool = False,
        adapter: str | None = None,
        path: Path = Flow(),
    ) -> None:
        self.net = net
        self.call: Callable[..., Any] = net
        self.name = name
        self.evaluations = evaluations if evaluations is not None else Evaluations()
        self.compute_dtype = compute_dtype
        self.batch_guidance = batch_guidance
        self.pins_initial = pins_initial
        self.adapter = adapter
        self.path = path

    def through(self, call: Callable[..., Any]) -> ScoreNet:
        """The same network, counted alike, its passes made by `call`, which takes and gives what the net does."""
        other = copy(self)
        other.call = call
        return other

    def velocity(self, x: Tensor, sigma: Tensor, condition: Condition, **mode: Any) -> Tensor:
        """Velocity [B, F, C, H, W] in fp32 at x [B, F, C, H, W], sigma [B] or [B, F]."""
        self.evaluations.add(self.name, frames=x.shape[0] * x.shape[1])
        return self._run(x, sigma, condition, **mode)

    def features(self, x: Tensor, sigma: Tensor, condition: Condition, blocks: Sequence[int]) -> list[Tensor]:
        """What these blocks (rising from 0) put out, each [B, F, d, h, w] in the net's precision: one evaluation."""
        self.evaluations.add(self.name, frames=x.shape[0] * x.shape[1])
        out: list[Tensor] = self._call(x, sigma, Conditioning.of(condition), features=blocks)
        return out

    def _run(self, x: Tensor, sigma: Tensor, condition: Condition, **mode: Any) -> Tensor:
        conditioning = Conditioning.of(condition)
        velocity = self.path.velocity(self._call(x, sigma, conditioning, **mode), x, sigma).float()
        initial = conditioning.initial if self.pins_initial else None
        return velocity if initial is None else _leading_to(initial, x, sigma, velocity)

    def _call(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, **mode: Any) -> Any:
        if self.pins_initial and conditioning.initial is not None:
            x, sigma = _pinned(x, sigma, conditioning.initial)
        if self.adapter is not None:
            mode["adapter"] = self.adapter
        x, time = self.path.inputs(x, sigma)
        with torch.autocast(x.device.type, self.compute_dtype, enabled=self.compute_dtype is not None):
            return self.call(x, time, **conditioning.prompt, **conditioning.beside_prompt, **mode)

    def x0(self, x: Tensor, sigma: Tensor, condition: Condition, **mode: Any) -> Tensor:
        """Conditional x0 [B, F, C, H, W], fp32."""
        return velocity_to_x0(x, self.velocity(x, sigma, condition, **mode), sigma)

    def x0_again(self, x: Tensor, sigma: Tensor, condition: Condition, **mode: Any) -> Tensor:
        """x0 of evaluations that were made, and counted, before: a replay gives them their gradient."""
        return velocity_to_x0(x, self._run(x, sigma, condition, **mode), sigma)

    def guided_velocity(
        self, x: Tensor, sigma: Tensor, condition: Condition, negative: Prompt, guidance: float, **mode: Any
    ) -> Tensor:
        """Velocity uncond + w (cond - uncond) (arXiv 2207.12598), fp32, in one batched call, or in two.

        x: [B, F, C, H, W].
        sigma: [B] or [B, F], noise levels in [0, 1].
        condition: conditioning of the branch with the prompt.
        negative: the negative prompt, in place of the prompt; all other conditioning is both branches'.
        guidance: w; 1 is the plain conditional network and costs one evaluation, not two.
        """
        if guidance == 1.0:
            return self.velocity(x, sigma, condition, **mode)
        cond, uncond = self.branches(x, sigma, condition, negative, **mode)
        return uncond + guidance * (cond - uncond)

    def branches(
        self, x: Tensor, sigma: Tensor, condition: Condition, negative: Prompt, **mode: Any
    ) -> tuple[Tensor, Tensor]:
        """Velocities with the prompt and with the negative one in its place, in one batched call or two."""
        conditioning = Conditioning.of(condition)
        if self.batch_guidance:
            both = self.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), conditioning.and_for(negative), **mode)
            cond, uncond = both.chunk(2)
            return cond, uncond
        cond = self.velocity(x, sigma, conditioning, **mode)
        return cond, self.velocity(x, sigma, conditioning.with_prompt(negative), **mode)

    def guided_x0(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        negative: Prompt,
        guidance: float,
        rescale: float = 0.0,
        **mode: Any,
    ) -> Tensor:
        """x0 of `guided_velocity`, fp32; guiding x0 or velocity is the same, x0 being affine in it.

        x: [B, F, C, H, W].
        sigma: [B] or [B, F], noise levels in [0, 1].
        condition: conditioning of the branch with the prompt.
        negative: the negative prompt, in place of the prompt.
        guidance: w.
        rescale: phi in [0, 1] of `rescaled`, which keeps strong guidance from raising contrast; 0 for none.
        """
        if guidance == 1.0 or rescale == 0.0:
            return velocity_to_x0(x, self.guided_velocity(x, sigma, condition, negative, guidance, **mode), sigma)
        velocities = self.branches(x, sigma, condition, negative, **mode)
        cond, uncond = (velocity_to_x0(x, velocity, sigma) for velocity in velocities)
        return rescaled(uncond + guidance * (cond - uncond), cond, rescale)

    def finished(self, x: Tensor, condition: Condition) -> Tensor:
        """A sample [B, F, C, H, W] with the given frames, where they were pinned, free of the solver's rounding."""
        initial = Conditioning.of(condition).initial if self.pins_initial else None
        return x if initial is None else torch.cat([initial.to(x.dtype), x[:, initial.shape[1] :]], 1)


def rescaled(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """phi T std(T_c) / std(T) + (1 - phi) T, each std over all elements of a sample (arXiv 2305.08891, eq. 15, 16).

    guided, cond: x0 predictions T and T_c [B, ...]. Raises ValueError for phi outside [0, 1].
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"guidance rescale must be in [0, 1] (0 = none), got {phi}")
    ratio = cond.flatten(1).std(1) / guided.flatten(1).std(1)
    return guided * (phi * ratio + 1 - phi).reshape(-1, *(1,) * (guided.ndim - 1))


def _pinned(x: Tensor, sigma: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """x with the given frames [B, Fi, C, H, W] in its first ones, and the time of each frame [B, F], theirs 0."""
    frames = initial.shape[1]
    per_frame = (sigma if sigma.ndim == 2 else sigma[:, None]).expand(x.shape[:2])
    times = torch.cat([torch.zeros_like(per_frame[:, :frames]), per_frame[:, frames:]], 1)
    return torch.cat([initial.to(x.dtype), x[:, frames:]], 1), times


def _leading_to(initial: Tensor, x: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
    """Velocity whose x0 is the given one in the first frames, where x is at sigma: (x - x0) / sigma, 0 at sigma 0."""
    frames = initial.shape[1]
    level = expand_like(sigma if sigma.ndim == 1 else sigma[:, :frames], initial)
    exact = (x[:, :frames].float() - initial.float()) / torch.where(level > 0, level, torch.inf)
    return torch.cat([exact, velocity[:, frames:]], 1)
