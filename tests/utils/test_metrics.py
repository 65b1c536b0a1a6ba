"""Metrics against closed forms, and the toy judge against videos whose faults are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from utils.metrics import (
    Moments,
    binomial_error,
    clipped_share,
    few_samples,
    frechet_between,
    frechet_distance,
    luma,
    saturation,
)
from worlds.toy import ToyWorld, ToyWorldConfig
from worlds.toy_judge import METRICS, ToyJudge, centred, displacement

WORLD = ToyWorld(ToyWorldConfig())
CAPTIONS = WORLD.captions * 10


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> ToyJudge:
    return ToyJudge(WORLD, tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def real() -> Tensor:
    return WORLD.real_videos_for(CAPTIONS, seed=5)


def _with_moments(mean: Tensor, covariance: Tensor, count: int) -> Tensor:
    """Samples whose mean and unbiased covariance are exactly these."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T
    return x @ whiten @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_two_known_gaussians() -> None:
    a = _with_moments(torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double(), 50)
    b = _with_moments(torch.tensor([4.0, -2.0]).double(), torch.diag(torch.tensor([1.0, 16.0])).double(), 80)
    assert frechet_distance(a, b) == pytest.approx(25 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-9)


def test_frechet_distance_when_covariances_do_not_commute() -> None:
    cov_a = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    cov_b = torch.tensor([[1.0, -0.5], [-0.5, 2.0]]).double()
    mean = torch.zeros(2).double()
    # 2 x 2: Tr sqrt(M) = sqrt(Tr M + 2 sqrt(det M)) for M = C_a C_b
    product = cov_a @ cov_b
    root = math.sqrt(product.trace().item() + 2 * math.sqrt(torch.linalg.det(product).item()))
    expected = (cov_a.trace() + cov_b.trace()).item() - 2 * root
    a, b = _with_moments(mean, cov_a, 40), _with_moments(mean, cov_b, 40)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("samples", "dimensions", "few"), [(16, 64, True), (159, 16, True), (160, 16, False)])
def test_few_samples_of_one_law_lie_apart_and_are_said_to(samples: int, dimensions: int, few: bool) -> None:
    sets = Moments(), Moments()
    for part in sets:
        part.add(torch.randn(samples, dimensions))
    apart = frechet_between(*sets) / dimensions  # of a total variance of 1 a dimension
    assert apart > (1 if samples < dimensions else 0)
    assert apart < (2 if samples < dimensions else 0.1)
    line = few_samples(*sets)
    assert bool(line) == few
    assert not few or f"of {samples} samples in {dimensions} dimensions" in line


def test_frechet_distance_of_degenerate_features_is_that_of_their_means() -> None:
    flat = torch.zeros(10, 5)
    assert frechet_distance(flat, flat + 2) == pytest.approx(5 * 4)
    with pytest.raises(ValueError, match=r"got \[1, 5\]"):
        frechet_distance(flat[:1], flat)
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(flat / 0, flat)


def test_colour_measures_per_video() -> None:
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5], [0, 0, 0]])
    video = colours[:, None, :, None, None].expand(-1, 2, -1, 4, 4)
    assert luma(video).tolist() == pytest.approx([0.2126, 0.7152, 0.0722, 0.5, 0])
    assert saturation(video).tolist() == pytest.approx([1, 1, 1, 0, 0])
    assert luma(video[:, :, :1]).tolist() == pytest.approx([1, 0, 0, 0.5, 0])


def test_clipped_share_counts_values_beyond_the_range_only() -> None:
    video = torch.zeros(1, 1, 1, 2, 4)
    video[0, 0, 0, 0] = torch.tensor([-0.5, 1.5, 1.0, 1.001])
    assert clipped_share(video).tolist() == [2 / 8]
    assert binomial_error(0.5, 200) == pytest.approx(0.0353553, rel=1e-5)


def test_displacement_of_a_known_path_across_the_edge() -> None:
    blob = torch.zeros(1, 1, 1, 16, 16)
    blob[..., 3:6, 12:15] = 1
    path = [(0, 0), (2, 1), (4, 1), (6, -4)]  # (x, y): over the right edge
    video = torch.cat([blob.roll((y, x), (-2, -1)) for x, y in path], dim=1)
    expected = torch.tensor([[2.0, 1], [2, 0], [2, -5]]).double()
    assert torch.allclose(displacement(video)[0], expected, atol=1e-6)
    assert torch.allclose(displacement(video + 0.3)[0], expected, atol=1e-6)  # a uniform background is no ink
    still = centred(video)
    assert all(torch.equal(still[:, i], still[:, 0]) for i in range(4))
    assert still[0, 0, 0, 7:10, 7:10].sum() == 9


def test_real_videos_score_as_real(judge: ToyJudge, real: Tensor) -> None:
    row = judge.evaluate(real, CAPTIONS)
    assert judge.accuracy > 0.95
    assert row["digit_right"] > 0.95
    assert row["direction_right"] == 1
    assert row["prompt_right"] == row["digit_right"]
    assert row["prompt_right_se"] == pytest.approx(binomial_error(row["prompt_right"], 400))
    assert abs(row["appearance_fd"] - row["appearance_fd_floor"]) < 4 * row["appearance_fd_floor_sd"]
    assert row["motion_error"] < 0.01
    assert row["jitter"] < 0.01
    assert row["flicker"] < 1e-3
    assert row["clipped"] == 0
    assert row["intensity"] == pytest.approx(row["intensity_real"], rel=0.02)
    assert row["diversity"] == pytest.approx(1, abs=0.07)
    assert row["appearance_drift"] == pytest.approx(row["appearance_drift_real"], rel=0.1)
    assert row["motion"] == pytest.approx(row["motion_real"], rel=0.02)
    assert row["intensity_drift"] < 1e-3
    assert METRICS.keys() <= row.keys()


def test_wrong_captions_are_noticed_attribute_by_attribute(judge: ToyJudge, real: Tensor) -> None:
    told = [WORLD.parse(caption) for caption in CAPTIONS]
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    row = judge.evaluate(real, [WORLD.caption(digit, opposite[direction]) for digit, direction in told])
    assert row["direction_right"] == 0
    assert row["prompt_right"] == 0
    assert row["digit_right"] > 0.95
    row = judge.evaluate(real, [WORLD.caption((digit + 1) % 10, direction) for digit, direction in told])
    assert row["direction_right"] == 1
    assert row["digit_right"] < 0.05


def test_faults_move_their_own_measures(judge: ToyJudge, real: Tensor) -> None:
    clean = judge.evaluate(real, CAPTIONS)
    dim = judge.evaluate(WORLD.encode(WORLD.decode(real) * 0.7), CAPTIONS)
    assert dim["intensity"] == pytest.approx(0.7 * clean["intensity"], rel=1e-3)
    assert dim["appearance_fd"] > 5 * clean["appearance_fd"]
    assert dim["jitter"] < 0.01
    still = judge.evaluate(real[:, :1].expand(-1, 9, -1, -1, -1), CAPTIONS)
    assert still["direction_right"] == 0
    assert still["motion_error"] == pytest.approx(0.75, abs=1e-3)
    assert still["digit_right"] > 0.9
    assert still["motion"] == 0 == still["appearance_drift"]
    half = judge.evaluate(real[:, [0, 0, 1, 1, 2, 2, 3, 3, 4]], CAPTIONS)  # half the speed, in jerks
    assert half["motion_error"] == pytest.approx(0.375, abs=0.01)
    assert half["jitter"] == pytest.approx(0.375, abs=0.01)
    blink = judge.evaluate(
        WORLD.encode(WORLD.decode(real) * (torch.arange(9) % 2).view(9, 1, 1, 1).add(1) / 2), CAPTIONS
    )
    assert blink["flicker"] == pytest.approx(0.5, rel=0.03)
    assert blink["intensity_drift"] < 1e-3
    fading = judge.evaluate(WORLD.encode(WORLD.decode(real) * torch.linspace(1, 0.6, 9).view(9, 1, 1, 1)), CAPTIONS)
    assert fading["intensity_drift"] == pytest.approx(0.4, rel=0.03)
    assert fading["appearance_drift"] > 20 > clean["appearance_drift"]


def test_repeating_one_video_a_caption_has_no_diversity(judge: ToyJudge, real: Tensor) -> None:
    assert judge.evaluate(real[:40].repeat(10, 1, 1, 1, 1), CAPTIONS)["diversity"] == pytest.approx(0, abs=1e-3)
    assert math.isnan(judge.evaluate(real[:40], CAPTIONS[:40])["diversity"])


def test_one_judge_measures_videos_of_any_length(judge: ToyJudge) -> None:
    long_world = ToyWorld(ToyWorldConfig(frames=40))  # once round the torus and on
    row = judge.evaluate(long_world.real_videos_for(CAPTIONS, seed=5), CAPTIONS)
    assert row["direction_right"] == 1
    assert row["digit_right"] > 0.95
    assert row["jitter"] < 0.01


def test_the_judge_is_trained_once_and_leaves_the_random_state_alone(tmp_path: Path, judge: ToyJudge) -> None:
    before = torch.get_rng_state()
    fresh = ToyJudge(WORLD, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    written = fresh.path.stat().st_mtime_ns
    again = ToyJudge(WORLD, tmp_path)
    assert again.path.stat().st_mtime_ns == written
    assert again.accuracy == fresh.accuracy
    videos, captions = WORLD.real_videos_for(CAPTIONS[:80], 3), CAPTIONS[:80]
    assert again.evaluate(videos, captions) == fresh.evaluate(videos, captions)
    assert [file.name for file in tmp_path.iterdir()] == [judge.path.name]


def test_the_reward_of_a_sample_with_nan_is_nan(judge: ToyJudge, real: Tensor) -> None:
    """An update on it is then skipped and counted; what is beside it keeps its reward."""
    clean = judge.adherence(real[:6], CAPTIONS[:6])
    assert bool(((clean >= 0) & (clean <= 1)).all())
    assert float(clean.max()) > 0.5
    spoilt = real[:6].clone()
    spoilt[1], spoilt[4, 3, 0, 2, 2] = math.nan, math.nan
    found = judge.adherence(spoilt, CAPTIONS[:6])
    assert found.isnan().tolist() == [False, True, False, False, True, False]
    assert torch.allclose(found[[0, 2, 3, 5]], clean[[0, 2, 3, 5]], atol=1e-6)


def test_the_judge_refuses_what_it_cannot_measure(judge: ToyJudge, real: Tensor) -> None:
    with pytest.raises(ValueError, match="F >= 2, 4, 8, 8"):
        judge.evaluate(real[:, :1], CAPTIONS)
    with pytest.raises(ValueError, match="one caption each; got 400 and 2"):
        judge.evaluate(real, CAPTIONS[:2])
    with pytest.raises(ValueError, match="diverged"):
        judge.evaluate(real * math.nan, CAPTIONS)
