"""Paths on Gaussian data: the exact network of each family, seen through its path, is the oracle of this code.

For x0 ~ N(m, d^2) and x_s = (1 - s) x0 + s eps, with tau(s)^2 = (1 - s)^2 d^2 + s^2:
E[x0 | x] = m + (1 - s) d^2 / tau^2 (x - (1 - s) m),   score = -(x - (1 - s) m) / tau^2,   v = (x - E[x0 | x]) / s,
flow map Phi(x, s, r) = (1 - r) m + tau(r) / tau(s) (x - (1 - s) m).
The networks here know none of this: each has the closed form of its own process, and is given x and time alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.path import EDM, VP, Flow, Path
from model.schedule import velocity_to_x0
from model.score import ScoreNet
from model.types import Conditioning
from pipeline.bidirectional_inference import euler_sample

MEAN, STD = 1.0, 0.5
SHAPE = (2, 3, 2, 2, 2)  # batch, frames, channels, height, width
TEXT = torch.zeros(2, 1, 1)
SD, SD_V = VP.scaled_linear(), VP.scaled_linear(prediction="v")
EDM_UNLIKE = EDM(0.7)  # preconditioned for other data than it is given
ZERO_SNR = VP((0.999, 0.9, 0.5, 0.1, 0.0), "v")

Net = Callable[[Tensor, Tensor], Tensor]  # (the family's x, its time, which broadcasts over x) -> its prediction


def over(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma [B] or [B, F], so that it broadcasts over x [B, F, ...]."""
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def posterior(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """E[x0 | x] for x = a x0 + b eps."""
    return MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (x - a * MEAN)


def exact_flow(x: Tensor, time: Tensor) -> Tensor:
    return (x - posterior(x, 1 - time, time)) / time


def exact_vp(path: VP) -> Net:
    """It reads a and b off its table, between timesteps by log(b / a)."""
    table = torch.tensor(path.alphas_cumprod, dtype=torch.float64)
    log_ratio = ((1 - table) / table).log() / 2

    def net(x: Tensor, time: Tensor) -> Tensor:
        below = time.double().floor().long().clamp(max=len(table) - 2)
        ratio = torch.lerp(log_ratio[below], log_ratio[below + 1], time.double() - below).exp()
        a = (1 + ratio**2).rsqrt()
        b = ratio * a
        x0 = posterior(x, a, b)
        eps = (x - a * x0) / b
        return eps if path.prediction == "eps" else a * eps - b * x0

    return net


def exact_edm(path: EDM) -> Net:
    """The F whose D, by table 1 of the paper, is the posterior mean."""
    d = path.sigma_data

    def net(x: Tensor, time: Tensor) -> Tensor:
        q = (4 * time).exp()
        total = q**2 + d**2
        x_q = x * total.sqrt()
        return (posterior(x_q, torch.ones_like(q), q) - d**2 / total * x_q) / (q * d / total.sqrt())

    return net


PATHS: dict[str, tuple[Path, Net]] = {
    "flow": (Flow(), exact_flow),
    "vp_eps": (SD, exact_vp(SD)),
    "vp_v": (SD_V, exact_vp(SD_V)),
    "edm": (EDM(STD), exact_edm(EDM(STD))),
    "edm_unlike": (EDM_UNLIKE, exact_edm(EDM_UNLIKE)),
}
each_path = pytest.mark.parametrize(("path", "net"), PATHS.values(), ids=PATHS)


def tau(s: Tensor | float) -> Tensor:
    s = torch.as_tensor(s, dtype=torch.float64)
    return ((1 - s) ** 2 * STD**2 + s**2).sqrt()


def flow_map(x: Tensor, s: Tensor | float, r: float) -> Tensor:
    return (1 - r) * MEAN + tau(r) / tau(s) * (x - (1 - s) * MEAN)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def through(path: Path, net: Net, x: Tensor, sigma: Tensor) -> Tensor:
    """Velocity of the family's network at x and sigma of this code."""
    seen, time = path.inputs(x, sigma)
    assert time.shape == sigma.shape and seen.dtype == x.dtype
    return path.velocity(net(seen, over(time, x)), x, sigma)


def levels(path: Path, count: int) -> Tensor:
    """From the path's start to its least level, or near 0 where it knows all."""
    return torch.linspace(path.start, max(path.least, 1e-3), count, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- the oracle, through


@each_path
@pytest.mark.parametrize("per_frame", [False, True])
def test_the_exact_network_of_a_family_is_the_oracle_here(path: Path, net: Net, per_frame: bool) -> None:
    x = 2 * normal(0)
    for pair in levels(path, 12).reshape(6, 2):
        sigma = torch.stack([pair, pair.flip(0), pair.mean().expand(2)], 1) if per_frame else pair
        s = over(sigma, x)
        velocity = through(path, net, x, sigma)
        x0, eps = x - s * velocity, x + (1 - s) * velocity
        expected = posterior(x, 1 - s, s)
        assert torch.allclose(x0, expected, rtol=0, atol=1e-10)
        assert torch.allclose(velocity, (x - expected) / s, rtol=1e-10, atol=1e-10)
        assert torch.allclose(-eps / s, -(x - (1 - s) * MEAN) / tau(s) ** 2, rtol=1e-10, atol=1e-10)


@each_path
def test_pinned_numbers_of_the_oracle(path: Path, net: Net) -> None:
    """m = 1, d = .5, s = .8, x = 0."""
    x = torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
    velocity = through(path, net, x, torch.tensor([0.8], dtype=torch.float64))
    assert velocity.item() == pytest.approx(-1.230769, abs=1e-6)
    assert (x - 0.8 * velocity).item() == pytest.approx(0.984615, abs=1e-6)


@each_path
def test_euler_converges_to_the_flow_map(path: Path, net: Net) -> None:
    """Its error halves where the steps are doubled."""
    errors = []
    for steps in (50, 100, 200):
        grid = levels(path, steps + 1)
        x = start = (1 - path.start) * (MEAN + STD * normal(1)) + path.start * normal(2)
        for sigma, target in itertools.pairwise(grid):
            x = x + (target - sigma) * through(path, net, x, sigma.expand(2))
        errors.append(float((x - flow_map(start, grid[0], float(grid[-1]))).abs().max()))
    assert errors[0] < 0.04
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2) and errors[1] / errors[2] == pytest.approx(2, abs=0.1)


@each_path
def test_the_consistency_function_is_constant_along_the_paths_flow(path: Path, net: Net) -> None:
    """dPhi/dx v + dPhi/ds = 0 at r = 0, so it is a fixed point of consistency training."""
    x = normal(3)
    for s in levels(path, 6):
        velocity = through(path, net, x, s.expand(2))
        spread = (s - (1 - s) * STD**2) / tau(s) * (x - (1 - s) * MEAN)  # tau'(s) (x - (1 - s) m)
        along = STD / tau(s) * (velocity + MEAN) - STD / tau(s) ** 2 * spread
        assert float(along.abs().max()) < 1e-10


@each_path
def test_the_flow_map_takes_the_start_to_the_data(path: Path, net: Net) -> None:
    """Exactly what was noised to the start; pure start noise but for the data's share in it, 1 - start. Phi is affine:
    its value at 0 and its slope are mean and deviation."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    center = (1 - path.start) * MEAN
    mean = flow_map(zero + center, path.start, 0.0)
    slope = flow_map(tau(path.start) * one + center, path.start, 0.0) - mean
    assert mean.item() == pytest.approx(MEAN, abs=1e-12) and slope.item() == pytest.approx(STD, abs=1e-12)
    mean = flow_map(path.start_noise(zero), path.start, 0.0)
    slope = flow_map(path.start_noise(one), path.start, 0.0) - mean
    assert MEAN - mean.item() == pytest.approx(STD / float(tau(path.start)) * center, abs=1e-12)
    assert STD - slope.item() == pytest.approx(STD * (1 - path.start / float(tau(path.start))), abs=1e-12)
    assert abs(mean.item() - MEAN) < 0.04 and abs(slope.item() - STD) < 1e-3


# --------------------------------------------------------------------------------------------------- each by itself


def test_flow_hands_everything_on() -> None:
    path, x, sigma = Flow(), normal(0), torch.tensor([0.3, 0.8])
    assert path.inputs(x, sigma) == (x, sigma)
    assert path.inputs(x, sigma)[0] is x and path.inputs(x, sigma)[1] is sigma
    prediction = x.float()
    assert path.velocity(prediction, x, sigma) is prediction
    assert path.start_noise(x) is x
    assert (path.start, path.least) == (1.0, 0.0)
    assert path == Flow()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("path", [SD, ZERO_SNR], ids=["sd", "zero_snr"])
def test_levels_of_the_table_are_whole_timesteps(path: VP, dtype: torch.dtype) -> None:
    table = torch.tensor(path.alphas_cumprod, dtype=torch.float64)
    a, b = table.sqrt(), (1 - table).sqrt()
    level, index = b / (a + b), torch.arange(len(table)).to(dtype)
    assert path.levels == pytest.approx(level.tolist(), abs=1e-15)
    time = path.timestep(torch.tensor(path.levels, dtype=torch.float64).to(dtype))
    assert time.dtype == dtype
    assert torch.equal(time, index)
    assert torch.allclose(path.timestep(level.to(dtype)), index, rtol=0, atol=1e-9)
    mixed = torch.tensor(path.levels, dtype=torch.float64).to(dtype).flip(0).reshape(-1, 5)
    assert torch.equal(path.timestep(mixed), index.flip(0).reshape(-1, 5))  # in whichever order and shape


def test_between_timesteps_the_index_is_linear_in_the_log_ratio() -> None:
    table = torch.tensor(SD.alphas_cumprod, dtype=torch.float64)
    log_ratio = ((1 - table) / table).log() / 2
    for index in (0, 1, 17, 500, 998):
        for share in (1e-6, 0.25, 0.5, 0.999):
            s = torch.lerp(log_ratio[index], log_ratio[index + 1], share).sigmoid()
            assert SD.timestep(s).item() == pytest.approx(index + share, abs=1e-9)
            assert SD.timestep(s.float()).item() == pytest.approx(index + share, abs=1e-3)  # as fine as fp32's s
    ends = torch.tensor([[0.0, 1e-4], [0.95, 1.0]])
    assert SD.timestep(ends).tolist() == [[0, 0], [999, 999]]
    assert SD.timestep(ends.half()).dtype is torch.float32


@pytest.mark.parametrize("path", [SD, SD_V, ZERO_SNR], ids=["eps", "v", "zero_snr"])
def test_vp_is_table_a_and_b(path: VP) -> None:
    """x_t = a x0 + b eps at every timestep, and the exact prediction gives eps - x0; at zero SNR, where s is 1, too."""
    x0, eps = normal(4), normal(5)
    for index in {0, 1, len(path.alphas_cumprod) // 2, len(path.alphas_cumprod) - 1}:
        a, b = path.alphas_cumprod[index] ** 0.5, (1 - path.alphas_cumprod[index]) ** 0.5
        sigma = torch.full((2,), b / (a + b), dtype=torch.float64)
        x = (1 - b / (a + b)) * x0 + b / (a + b) * eps
        seen, time = path.inputs(x, sigma)
        assert torch.allclose(seen, a * x0 + b * eps, rtol=0, atol=1e-12)
        assert time.tolist() == [index, index]
        said = eps if path.prediction == "eps" else a * eps - b * x0
        assert torch.allclose(path.velocity(said, x, sigma), eps - x0, rtol=0, atol=1e-11)


def test_edm_is_table_1_in_other_letters() -> None:
    path, x, said = EDM(0.7), normal(6), normal(7)
    for q in (0.002, 0.1, 0.821, 7.0, 80.0):
        sigma = torch.full((2,), q / (1 + q), dtype=torch.float64)
        total = q**2 + 0.7**2
        x_q = x * (1 + q)
        seen, time = path.inputs(x, sigma)
        assert torch.allclose(seen, x_q / math.sqrt(total), rtol=1e-12, atol=0)
        assert time.tolist() == pytest.approx([math.log(q) / 4] * 2, abs=1e-12)
        denoised = 0.7**2 / total * x_q + q * 0.7 / math.sqrt(total) * said
        eps = (x_q - denoised) / q
        assert torch.allclose(path.velocity(said, x, sigma), eps - denoised, atol=1e-10)


@pytest.mark.parametrize("name", ["vp_v", "edm", "edm_unlike"])
@pytest.mark.parametrize("s", [1e-6, 1e-3, 0.5, 0.98, 1 - 1e-6])
def test_fp32_loses_nothing_at_either_end(name: str, s: float) -> None:
    """Where a prediction says something of x0 at every level, velocity in fp32 is that of fp64 up to fp32's rounding."""
    path = PATHS[name][0]
    x, said, sigma = normal(8).float(), normal(9).float(), torch.full((2,), s)
    exact = path.velocity(said.double(), x.double(), sigma.double())
    assert torch.allclose(path.velocity(said, x, sigma).double(), exact, rtol=0, atol=5e-6)
    seen, exact_seen = path.inputs(x, sigma)[0], path.inputs(x.double(), sigma.double())[0]
    assert torch.allclose(seen.double(), exact_seen, rtol=1e-6, atol=1e-6)


def test_half_precision_is_converted_in_fp32() -> None:
    x, sigma = normal(8).bfloat16(), torch.tensor([0.3, 0.9])
    for path, _ in PATHS.values():
        seen, time = path.inputs(x, sigma)
        assert seen.dtype is torch.bfloat16 and time.dtype is torch.float32
        velocity = path.velocity(x, x, sigma)
        assert velocity.dtype is torch.float32
        assert torch.equal(velocity, path.velocity(x.float(), x.float(), sigma))


def test_numbers_of_published_levels() -> None:
    for q, s in ((0.821, 0.4509), (1.1, 0.5238), (1.526, 0.6041), (80.0, 0.9877)):
        assert EDM(0.5, 0.002, q).start == pytest.approx(s, abs=5e-5)
    assert EDM().start == 80 / 81 and EDM().least == pytest.approx(0.002 / 1.002)
    assert SD.start == pytest.approx(0.936, abs=5e-4)
    assert SD.start / (1 - SD.start) == pytest.approx(14.6, abs=0.05)
    assert SD.alphas_cumprod[0] == pytest.approx(1 - 0.00085)
    assert ZERO_SNR.start == 1.0
    assert torch.equal(SD.start_noise(torch.ones(2)), torch.full((2,), SD.start))


def test_schedulers_of_diffusers() -> None:
    stable = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    assert VP.of_scheduler({**stable, "steps_offset": 1}) == SD
    assert VP.of_scheduler({**stable, "prediction_type": "v_prediction", "rescale_betas_zero_snr": False}) == SD_V
    plain = VP.of_scheduler({"num_train_timesteps": 3, "beta_start": 0.1, "beta_end": 0.3, "trained_betas": None})
    assert plain.alphas_cumprod == pytest.approx((0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7))
    for key, value in {
        "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "rescale_betas_zero_snr": True,
        "snr_shift_scale": 3.0,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{key} {value} is not known here") as error:
            VP.of_scheduler({**stable, key: value})
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="beta_schedule trained_betas is not known here"):
        VP.of_scheduler({**stable, "trained_betas": [0.1]})


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("path", "sigmas", "said"),
    [
        (SD, (1.0, 0.5), "begins at sigma 1 and this network knows none above 0.935958: begin at 0.9359 or below"),
        (SD, (0.9, 0.001), "ends at sigma 0.001 and this network knows none below 0.0283405: end at 0.0284 or above"),
        (EDM(), (0.99,), "begins at sigma 0.99 and this network knows none above 0.987654: begin at 0.9876 or below"),
        (EDM(), (0.9, 0.0019), "ends at sigma 0.0019 and this network knows none below 0.00199601: end at 0.0020 or"),
    ],
)
def test_a_step_list_that_leaves_the_path_is_one_line(path: Path, sigmas: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        path.check_steps(sigmas)
    assert "\n" not in str(error.value)


@each_path
def test_a_step_list_may_go_from_end_to_end(path: Path, net: Net) -> None:
    path.check_steps((path.start, 0.5, max(path.least, 1e-3)))
    path.check_steps(torch.tensor([path.start, max(path.least, 1e-3)]).tolist())  # rounded to fp32


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: VP((0.9, 0.5), "x0"), "prediction must be eps or v, got x0"),  # type: ignore[arg-type]
        (lambda: VP((0.5, 0.9)), r"fall within \[0, 1\), got 0.5 .. 0.9"),
        (lambda: VP((1.0, 0.9)), r"fall within \[0, 1\), got 1 .. 0.9"),
        (lambda: VP(()), "two numbers or more that fall within"),
        (lambda: VP((0.9, 0.0)), "only a v-prediction can do that"),
        (lambda: EDM(0.0), "sigma_data must be positive and finite, got 0.0"),
        (lambda: EDM(0.5, 2.0, 1.0), "must satisfy 0 < min < max, got 2.0 and 1.0"),
    ],
)
def test_a_path_that_is_none_is_one_line(make: Callable[[], Path], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------- ScoreNet


class Recorded(nn.Module):
    """A family's exact network behind ScoreNet's call."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.exact = net
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor, text: Tensor, **mode: Any) -> Any:
        self.seen.append((x, time))
        return [x, time] if "features" in mode else self.exact(x, over(time, x)).to(x.dtype)


@each_path
def test_a_score_network_goes_through_its_path(path: Path, net: Net) -> None:
    x, sigma = normal(10).float(), torch.tensor([0.2, 0.9])
    score = ScoreNet(Recorded(net), "teacher", path=path)
    expected = posterior(x.double(), 1 - over(sigma, x).double(), over(sigma, x).double())
    assert torch.allclose(score.x0(x, sigma, TEXT).double(), expected, atol=2e-4)
    other = score.through(score.net)  # what a copy of it is asked goes the same way
    assert torch.equal(other.x0(x, sigma, TEXT), score.x0(x, sigma, TEXT))
    seen, time = score.features(x, sigma, TEXT, (0,))
    assert torch.equal(seen, path.inputs(x, sigma)[0]) and torch.equal(time, path.inputs(x, sigma)[1])


@each_path
def test_the_sampler_takes_start_noise_to_the_data(path: Path, net: Net) -> None:
    grid = levels(path, 201).tolist()
    path.check_steps(grid)
    noise = path.start_noise(normal(11).float())
    out = euler_sample(ScoreNet(Recorded(net), "teacher", path=path), noise, TEXT, TEXT, grid, 1.0)
    assert torch.allclose(out.double(), flow_map(noise.double(), path.start, 0.0), atol=0.02)


@pytest.mark.parametrize("name", ["vp_eps", "vp_v"])
def test_given_frames_are_pinned_before_the_path(name: str) -> None:
    """The network sees them clean, which every path leaves as they are at sigma 0, and at its first timestep."""
    path, net = PATHS[name]
    x, initial, sigma = normal(12).float(), normal(13).float()[:, :1], torch.tensor([0.4, 0.8])
    score = ScoreNet(recorded := Recorded(net), "teacher", pins_initial=True, path=path)
    x0 = velocity_to_x0(x, score.velocity(x, sigma, Conditioning(TEXT, initial)), sigma)
    seen, time = recorded.seen[0]
    assert torch.equal(seen[:, :1], initial) and time[:, 0].tolist() == [0.0, 0.0]
    assert torch.allclose(x0[:, :1], initial, atol=1e-6)
    free = ScoreNet(Recorded(net), "teacher", path=path).x0(x, sigma, TEXT)
    assert torch.allclose(x0[:, 1:], free[:, 1:], atol=1e-5)
