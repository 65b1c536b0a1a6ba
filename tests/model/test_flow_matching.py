"""Flow matching, ODE regression, diffusion and teacher forcing inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.diffusion import flow_matching_loss
from model.ode_regression import ode_regression_loss, pick_stored, store_levels
from model.schedule import uniform_sigmas
from pipeline.diffusion_forcing import per_frame

X0, NOISE = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(1)), torch.ones(2, 3, 1, 2, 2)


def test_perfect_velocity_has_no_loss_and_an_offset_its_square() -> None:
    sigma = torch.tensor([0.3, 0.8])
    assert flow_matching_loss(lambda x, s: NOISE - X0, X0, NOISE, sigma).loss == 0
    off = flow_matching_loss(lambda x, s: NOISE - X0 + 0.5, X0, NOISE, sigma)
    assert off.loss == pytest.approx(0.25)


def test_x0_target_weighs_the_same_error_by_sigma_squared() -> None:
    sigma = torch.tensor([0.3, 0.8])
    off = flow_matching_loss(lambda x, s: NOISE - X0 + 0.5, X0, NOISE, sigma, x0_target=True)
    assert off.loss == pytest.approx(0.25 * (0.09 + 0.64) / 2, rel=1e-5)


def test_frames_of_weight_zero_are_left_out_and_samples_count_alike() -> None:
    error = torch.tensor([[0.0, 1.0, 9.0], [2.0, 9.0, 9.0]])
    weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        return NOISE - X0 + error[:, :, None, None, None]

    loss = flow_matching_loss(predict, X0, NOISE, torch.full((2, 3), 0.5), weight=weight).loss
    assert loss == pytest.approx(((0 + 1) / 2 + 4) / 2)


def test_blocks_share_a_level() -> None:
    assert per_frame(torch.tensor([[1.0, 2.0, 3.0]]), (1, 2, 2)).tolist() == [[1.0, 2.0, 2.0, 3.0, 3.0]]


def test_stored_points_carry_the_levels_they_have() -> None:
    """CausVid's pairs: the nearest level of the sampler is stored under its own name, not the wanted one's."""
    grid = uniform_sigmas(48, 8.0)
    kept = store_levels(grid, (1.0, 0.9375, 0.8333, 0.625))
    assert [abs(grid[i] - w) < 0.03 for i, w in zip(kept, (1.0, 0.9375, 0.8333, 0.625), strict=True)] == [True] * 4
    trajectory = torch.arange(5.0).reshape(1, 5, 1, 1, 1, 1).expand(2, 5, 3, 1, 1, 1)
    index = torch.tensor([[0, 4, 2], [1, 1, 3]])
    x, sigma = pick_stored(trajectory, torch.tensor([1.0, 0.9, 0.8, 0.6, 0.0]), index)
    assert torch.equal(x[..., 0, 0, 0], index.float())
    assert torch.equal(sigma, torch.tensor([[1.0, 0.0, 0.8], [0.9, 0.9, 0.6]]))


def test_clean_frames_do_not_dilute_the_regression() -> None:
    clean = torch.zeros(1, 3, 1, 2, 2)
    x0 = torch.tensor([1.0, 2.0, 100.0]).reshape(1, 3, 1, 1, 1).expand_as(clean)
    assert ode_regression_loss(x0, clean, torch.tensor([[1.0, 0.5, 0.0]])).loss == pytest.approx((1 + 4) / 2)
