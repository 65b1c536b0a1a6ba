"""Paths: how a family's network sees the one time variable of this code, and what its prediction says as a velocity.

Inside this code x_s = (1 - s) x0 + s eps at noise level s in [0, 1], and velocity is eps - x0. A family's network was
trained on a process of its own, x_t = a x0 + b eps, with a time and a prediction of its own. The two are the same up to
scale: s = b / (a + b) and x_s = x_t / (a + b). So the change is exact, and losses, rollouts and samplers know only s.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from model.types import at_least_fp32

Prediction = Literal["eps", "v"]

ROUNDING = 1e-6  # by how much a step list in fp32 may miss the ends of a path


class Path(Protocol):
    """What a family's network is fed and how its prediction is read. Paths inherit what is written out here.

    Arithmetic is in fp32, or in fp64 where the arguments are.
    """

    @property
    def start(self) -> float:
        """The noise level at which generation starts: the greatest that the network knows."""
        ...

    @property
    def least(self) -> float:
        """The least noise level that the network knows; 0 where it knows all."""
        ...

    def inputs(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The network's x [B, F, C, H, W] and time, for x at noise level sigma [B] or [B, F].

        The network's x has x's dtype. Its time has sigma's shape, in fp32 at least.
        """
        ...

    def velocity(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Velocity eps - x0 [B, F, C, H, W] in fp32 at least.

        prediction: [B, F, C, H, W], what the network says of `inputs(x, sigma)`.
        x: [B, F, C, H, W] at noise level sigma, as this code has it.
        sigma: [B] or [B, F], in [0, 1].
        """
        ...

    def start_noise(self, eps: Tensor) -> Tensor:
        """What generation starts from, for standard normal eps: start * eps, in eps's dtype. The data's share
        (1 - start) x0 is left out; samplers of these families leave it out too."""
        return self.start * eps

    def known(self, sigma: Tensor) -> Tensor:
        """Noise levels of any shape, moved to the nearest that the network knows."""
        return sigma.clamp(self.least, self.start)

    def check_steps(self, sigmas: Sequence[float]) -> None:
        """Raises ValueError for a step list (noise levels, falling) that leaves the levels that the network knows."""
        first, last = sigmas[0], sigmas[-1]
        if first > self.start + ROUNDING:
            allowed = math.floor(self.start * 1e4) / 1e4
            raise ValueError(
                f"the step list begins at sigma {first:.6g} and this network knows none above {self.start:.6g}: begin "
                f"at {allowed:.4f} or below"
            )
        if last < self.least - ROUNDING:
            allowed = math.ceil(self.least * 1e4) / 1e4
            raise ValueError(
                f"the step list ends at sigma {last:.6g} and this network knows none below {self.least:.6g}: end at "
                f"{allowed:.4f} or above"
            )


@dataclass(frozen=True)
class Flow(Path):
    """Rectified flow (arXiv 2209.03003), this code's own process: x, time and prediction are handed on as they are."""

    @property
    def start(self) -> float:
        return 1.0

    @property
    def least(self) -> float:
        return 0.0

    def inputs(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return x, sigma

    def velocity(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return at_least_fp32(prediction)

    def start_noise(self, eps: Tensor) -> Tensor:
        return eps

    def known(self, sigma: Tensor) -> Tensor:
        return sigma


@dataclass(frozen=True)
class VP(Path):
    """Variance preserving diffusion in discrete time (DDPM, arXiv 2006.11239; Stable Diffusion): a^2 + b^2 = 1.

    alphas_cumprod: a^2 at each timestep, falling, each in (0, 1). Of a v-prediction the last may be 0 (zero terminal
        SNR, arXiv 2305.08891).
    prediction: what the network says: `eps`, or `v` = a eps - b x0 (arXiv 2202.00512).

    At any s, a = (1 - s) / h and b = s / h with h = sqrt((1 - s)^2 + s^2) in [0.7, 1]: no table is read. So

        velocity = (eps - x_s) / (1 - s)                       of an eps-prediction
        velocity = (v + (2 s - 1) x_s / h) / h                 of a v-prediction

    Both are exact. The second divides by nothing small, at s = 1 neither. The first is exact at s = 0; towards s = 1 it
    magnifies the network's error by 1 / (1 - s), because eps says ever less of x0 there (16 times at Stable Diffusion's
    start), and at s = 1 it is infinite.

    Time is the index of the timestep in [0, N - 1]. A level of `levels`, rounded to sigma's dtype, gives its integer
    exactly. Between two levels the index is linear in log(b / a). Beyond the table it is that of the nearer end.

    Raises ValueError for a table or a prediction that is none.
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)
    prediction: Prediction = "eps"
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # the table's noise levels: a copy to the device at each call would make it wait

    def __post_init__(self) -> None:
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction must be eps or v, got {self.prediction}")
        table = self.alphas_cumprod
        if len(table) < 2 or not all(1 > a > b >= 0 for a, b in itertools.pairwise(table)):
            ends = f"{table[0]:.6g} .. {table[-1]:.6g}" if table else "none"
            raise ValueError(f"alphas_cumprod must be two numbers or more that fall within [0, 1), got {ends}")
        if table[-1] == 0 and self.prediction == "eps":
            raise ValueError("alphas_cumprod ends at 0, where eps says nothing of x0: only a v-prediction can do that")

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000, prediction: Prediction = "eps"
    ) -> VP:
        """Betas whose square roots are evenly spaced between those of the ends; the defaults are Stable Diffusion's."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        return cls.of_betas(betas, prediction)

    @classmethod
    def of_betas(cls, betas: Tensor, prediction: Prediction = "eps") -> VP:
        """alphas_cumprod = the running product of 1 - betas [N], in fp64."""
        return cls(tuple((1 - betas.double()).cumprod(0).tolist()), prediction)

    @classmethod
    def of_scheduler(cls, config: Mapping[str, Any]) -> VP:
        """From the scheduler_config.json of a Diffusers folder, as read: schedules `scaled_linear` and `linear`.

        Raises ValueError for other tables and other predictions, and names the key.
        """
        schedule, said = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
        predictions: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}
        if said not in predictions:
            raise ValueError(f"prediction_type {said} is not known here: only {' and '.join(predictions)} are")
        if config.get("trained_betas") is not None:
            schedule = "trained_betas"
        for key, plain in (("rescale_betas_zero_snr", False), ("snr_shift_scale", 1.0)):
            if config.get(key, plain) != plain:
                raise ValueError(f"{key} {config[key]} is not known here: give VP the resulting alphas_cumprod")
        first, last = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        steps = config.get("num_train_timesteps", 1000)
        match schedule:
            case "scaled_linear":
                return cls.scaled_linear(first, last, steps, predictions[said])
            case "linear":
                return cls.of_betas(torch.linspace(first, last, steps, dtype=torch.float64), predictions[said])
        raise ValueError(f"beta_schedule {schedule} is not known here: give VP the resulting alphas_cumprod")

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise level of each timestep, rising: b / (a + b)."""
        return tuple(_level(a2) for a2 in self.alphas_cumprod)

    @property
    def start(self) -> float:
        return _level(self.alphas_cumprod[-1])

    @property
    def least(self) -> float:
        return _level(self.alphas_cumprod[0])

    def inputs(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (at_least_fp32(x) / _norm(_over(sigma, x))).to(x.dtype), self.timestep(sigma)

    def velocity(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        s, x, said = _over(sigma, x), at_least_fp32(x), at_least_fp32(prediction)
        match self.prediction:
            case "eps":
                return (said - x) / (1 - s)
            case "v":
                h = _norm(s)
                return (said + (2 * s - 1) / h * x) / h

    def timestep(self, sigma: Tensor) -> Tensor:
        """Index of the timestep in [0, N - 1], fp32 at least, of noise levels sigma of any shape."""
        sigma = at_least_fp32(sigma)
        levels = self._table(sigma)
        last = len(levels) - 1
        s = sigma.clamp(levels[0], levels[-1])
        index = torch.searchsorted(levels, s.detach().contiguous(), right=True) - 1
        below, above = levels[index], levels[(index + 1).clamp(max=last)]
        share = _log_ratio(s, below) / _log_ratio(above, below)  # 0 / 0 at the last level, which has none above it
        return torch.where(index == last, index.to(s.dtype), index + share)

    def _table(self, like: Tensor) -> Tensor:
        key = like.device, like.dtype
        if key not in self._tables:
            self._tables[key] = torch.tensor(self.levels, dtype=torch.float64).to(like.dtype).to(like.device)
        return self._tables[key]


@dataclass(frozen=True)
class EDM(Path):
    """EDM (arXiv 2206.00364): a = 1 and b = q = s / (1 - s), and a network F behind the preconditioning of table 1,

        D(x_q; q) = c_skip x_q + c_out F(c_in x_q; c_noise),   c_noise = ln(q) / 4,
        c_skip = d^2 / (q^2 + d^2),   c_out = q d / sqrt(q^2 + d^2),   c_in = 1 / sqrt(q^2 + d^2).

    The network here is the plain F: the path does the preconditioning. In terms of s and x_s = (1 - s) x_q, with
    T = sqrt((1 - s)^2 d^2 + s^2), both q and the difference x_s - D that a velocity divides by s cancel:

        c_in x_q = x_s / T,   velocity = ((s - (1 - s) d^2) x_s / T - d F) / T.

    Both are exact at every s in [0, 1], and nothing small is divided by. Time ln(q) / 4 needs 0 < s < 1.

    sigma_data: d, the data's standard deviation.
    sigma_min, sigma_max: the least and the greatest q.

    Raises ValueError unless 0 < sigma_min < sigma_max and sigma_data > 0, all finite.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive and finite, got {self.sigma_data}")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 < min < max, got {self.sigma_min} and {self.sigma_max}"
            )

    @property
    def start(self) -> float:
        return self.sigma_max / (1 + self.sigma_max)

    @property
    def least(self) -> float:
        return self.sigma_min / (1 + self.sigma_min)

    def inputs(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        s = at_least_fp32(sigma)
        scaled = at_least_fp32(x) / _norm(_over(sigma, x), self.sigma_data)
        return scaled.to(x.dtype), (s.log() - (-s).log1p()) / 4

    def velocity(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        s, d = _over(sigma, x), self.sigma_data
        norm = _norm(s, d)
        seen = at_least_fp32(x) / norm
        return ((s - (1 - s) * d**2) * seen - d * at_least_fp32(prediction)) / norm


def _over(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma [B] or [B, F] shaped as `expand_like` does it, in fp64 where it is that: `expand_like` rounds to fp32."""
    return at_least_fp32(sigma).reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def _level(alpha_cumprod: float) -> float:
    """s = b / (a + b) of a^2."""
    a, b = math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)
    return b / (a + b)


def _norm(s: Tensor, scale: float = 1.0) -> Tensor:
    """sqrt((1 - s)^2 scale^2 + s^2): the standard deviation of x_s where that of x0 is scale."""
    return (((1 - s) * scale) ** 2 + s**2).sqrt()


def _log_ratio(s: Tensor, below: Tensor) -> Tensor:
    """log(s / (1 - s)) - log(l / (1 - l)) for l = below <= s: exactly 0 where they are equal."""
    return ((s - below) / (below * (1 - s))).log1p()
