"""The flow schedule: inverses, published step lists, exact ends, and the distribution of score noise levels."""

from __future__ import annotations

import pytest
import torch

from model.schedule import (
    ScheduleConfig,
    mix,
    score_sigma,
    shift_sigma,
    step_sigmas,
    uniform_sigmas,
    unshift_sigma,
    velocity_to_x0,
)
from tests.nets import latents


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_shift_and_its_inverse(shift: float) -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = shift_sigma(u, shift)
    assert torch.allclose(unshift_sigma(sigma, shift), u, atol=1e-12)
    assert sigma[0] == 0
    assert sigma[-1] == 1
    assert bool((sigma.diff() > 0).all())
    assert torch.allclose(sigma, shift / (shift + (1 / u - 1)), atol=1e-12)  # SD3's other form of it


def test_published_step_lists() -> None:
    assert step_sigmas([1000, 750, 500, 250], warp=True, shift=5.0) == pytest.approx((1.0, 15 / 16, 5 / 6, 5 / 8))
    assert step_sigmas([1000, 757, 522], warp=False, shift=5.0) == pytest.approx((1.0, 0.757, 0.522))  # CausVid's
    assert ScheduleConfig().sigmas() == pytest.approx((1.0, 15 / 16, 5 / 6, 5 / 8))
    assert uniform_sigmas(4, 1.0) == pytest.approx((1.0, 0.75, 0.5, 0.25))
    assert uniform_sigmas(4, 5.0) == pytest.approx(ScheduleConfig().sigmas())


@pytest.mark.parametrize("steps", [[], [1000, 1000], [250, 500], [1001, 500], [1000, 0], [500, -1]])
def test_bad_step_lists_are_one_line(steps: list[float]) -> None:
    with pytest.raises(ValueError, match=r"strictly decrease within \(0, 1000\]") as error:
        step_sigmas(steps, warp=True, shift=5.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"denoising_step_list": [500.0, 750.0]}, {"timestep_shift": 0.0}, {"score_timestep_shift": -1.0},
        {"min_sigma": 0.5, "max_sigma": 0.5}, {"max_sigma": 1.5}, {"min_score_timestep": 1000.0},
        {"max_score_timestep": 20.0, "min_sigma": 0.02}, {"max_score_timestep": 19.0, "min_sigma": 0.02},
    ],
    ids=lambda bad: next(iter(bad)),
)  # fmt: skip
def test_bad_schedules_name_the_key(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="denoising" if "denoising_step_list" in bad else next(iter(bad))) as error:
        ScheduleConfig(**bad)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_defect_06_x0_and_velocity_are_exact_at_every_sigma() -> None:
    """No table, nothing divided: sigma 0 returns the sample itself, sigma 1 pure noise, and x0 comes back from both."""
    x0, noise = latents(1, 4, 3), latents(2, 4, 3)
    for sigma in (torch.tensor([0.0, 1.0, 0.5, 0.9375]), torch.linspace(0, 1, 12).reshape(4, 3)):
        x = mix(x0, noise, sigma)
        assert torch.allclose(velocity_to_x0(x, noise - x0, sigma), x0, atol=1e-6)
    sigma = torch.tensor([0.0, 1.0, 0.0, 1.0])
    x = mix(x0, noise, sigma)
    assert torch.equal(x[0::2], x0[0::2])
    assert torch.equal(x[1::2], noise[1::2])
    assert torch.equal(velocity_to_x0(x, noise, sigma)[0::2], x[0::2])


def test_mix_is_per_frame_in_fp32_and_keeps_the_dtype() -> None:
    x0, noise = latents(1, 2, 3), latents(2, 2, 3)
    sigma = torch.tensor([[0.0, 0.3, 1.0], [0.2, 0.2, 0.7]])
    x = mix(x0, noise, sigma)
    for b in range(2):
        for f in range(3):
            s = float(sigma[b, f])
            assert torch.allclose(x[b, f], (1 - s) * x0[b, f] + s * noise[b, f], atol=1e-6)
    half = mix(x0.bfloat16(), noise, sigma)
    assert half.dtype is torch.bfloat16
    assert torch.equal(half, mix(x0.bfloat16().float(), noise, sigma).bfloat16())
    assert velocity_to_x0(half, noise, sigma).dtype is torch.float32


@pytest.mark.parametrize(
    ("shift", "low", "high"),
    [(5.0, 0.0, 1.0), (8.0, 0.0, 1.0), (5.0, 0.625, 0.8333), (1.0, 0.02, 0.98), (5.0, 0.0, 0.5)],
)
def test_defect_07_score_sigma_has_the_shifted_density_cut_to_its_bounds(shift: float, low: float, high: float) -> None:
    """Kolmogorov-Smirnov against the closed form: P(sigma <= s) is (u(s) - u(low)) / (u(high) - u(low)), u the inverse
    shift. Low sigma is reached when the bounds allow it."""
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(3))
    sigma, _ = score_sigma(u, shift=shift, low=low, high=high).double().sort()
    assert low - 1e-6 <= float(sigma[0])
    assert float(sigma[-1]) <= high + 1e-6
    a, b = unshift_sigma(low, shift), unshift_sigma(high, shift)
    cdf = (unshift_sigma(sigma, shift) - a) / (b - a)
    empirical = (torch.arange(len(sigma), dtype=torch.float64) + 0.5) / len(sigma)
    assert float((cdf - empirical).abs().max()) < 1.63 / len(sigma) ** 0.5  # the 1 % level
    if low == 0:
        assert float(sigma[0]) < 0.01


def test_defect_06_scores_and_noising_share_one_exact_sigma() -> None:
    """Each schedule names its own shift; the level drawn is the level noised to, with no table in between."""
    u = torch.tensor([0.123456, 0.5])
    config = ScheduleConfig(timestep_shift=5.0, score_timestep_shift=8.0, min_sigma=0.0, max_sigma=1.0)
    sigma = config.score_sigma(u)
    assert torch.allclose(sigma, shift_sigma(u, 8.0))
    data, noise = torch.zeros(2, 1, 1), torch.ones(2, 1, 1)
    assert torch.equal(mix(data, noise, sigma).flatten(), sigma)


def test_score_sigma_is_clamped_and_bounded_by_the_exit_step() -> None:
    u = torch.linspace(0, 1, 1001)
    free = ScheduleConfig(min_sigma=0.02, max_sigma=0.98)
    assert torch.allclose(free.score_sigma(u), shift_sigma(u, 5.0).clamp(0.02, 0.98))
    assert torch.equal(free.score_sigma(u, 0.9, 0.5), free.score_sigma(u))  # no ts_schedule: the exit step is no bound

    low = ScheduleConfig(ts_schedule=True).score_sigma(u, 0.9, 0.5)
    assert float(low.min()) == pytest.approx(0.5, abs=1e-6)
    assert float(low.max()) == pytest.approx(0.98)
    both = ScheduleConfig(ts_schedule=True, ts_schedule_max=True).score_sigma(u, 0.9, 0.5)
    assert float(both.min()) == pytest.approx(0.5, abs=1e-6)
    assert float(both.max()) == pytest.approx(0.9, abs=1e-6)
    unknown = ScheduleConfig(ts_schedule=True, ts_schedule_max=True).score_sigma(u)  # blocks left at different steps
    assert torch.equal(unknown, free.score_sigma(u))
    floor = ScheduleConfig(min_score_timestep=300.0).score_sigma(u)
    assert float(floor.min()) == pytest.approx(0.3, abs=1e-6)
