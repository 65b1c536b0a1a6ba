"""The average of a student's weights: how much of it is old, and that this is said."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from model.ema import EMA, EMAConfig


@pytest.mark.parametrize(
    ("config", "updates"),
    [
        (EMAConfig(0.99), 4),
        (EMAConfig(0.99), 99),
        (EMAConfig(0.9, start=20), 23),
        (EMAConfig(0.5, start=3, every=4), 7),
        (EMAConfig(0.9, every=2), 5),
    ],
)
def test_the_share_that_is_said_to_be_old_is_the_share_that_is_old(config: EMAConfig, updates: int) -> None:
    """A student that is 0 until the average begins and 1 from then on: what the average lacks of 1 is its old part."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    assert config.decay is not None
    average = EMA(net, config.decay, config.start, config.every)
    for update in range(1, updates + 1):
        with torch.no_grad():
            net.weight.fill_(float(update > config.start))
        average.update(update)
    lag = config.lag(updates)
    assert lag is not None
    said = re.search(r"so (\d+)% of it", lag)
    assert said
    assert int(said[1]) == round(100 * (1 - average.shadow["weight"].item()))
    assert "\n" not in lag


@pytest.mark.parametrize(
    ("config", "updates"),
    [
        (EMAConfig(None), 3),
        (EMAConfig(0.99), 0),
        (EMAConfig(0.99), 100),
        (EMAConfig(0.99, start=200), 200),
        (EMAConfig(0.9, every=2), 20),
        (EMAConfig(0.0), 1),
    ],
)
def test_an_average_that_is_a_copy_or_has_followed_long_enough_does_not_lag(config: EMAConfig, updates: int) -> None:
    assert config.lag(updates) is None


@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("every", range(1, 6))
def test_the_average_is_a_copy_until_it_starts_and_then_its_closed_form(start: int, every: int) -> None:
    """Weights w_n after update n: w_n up to `start`, then of w_start and the w_n at multiples of `every`."""
    decay, weights = 0.5, [float(3**n) for n in range(13)]
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, weights[0])
    average = EMA(net, decay, start, every)
    for update in range(1, 13):
        nn.init.constant_(net.weight, weights[update])
        average.update(update)
        followed = [n for n in range(start + 1, update + 1) if n % every == 0]
        expected = weights[min(start, update)] * decay ** len(followed)
        expected += sum(0.5 * decay**age * weights[n] for age, n in enumerate(reversed(followed)))
        assert average.shadow["weight"].item() == pytest.approx(expected, rel=1e-6)
        if update <= start:
            assert average.shadow["weight"].item() == weights[update]  # a copy, to the bit
