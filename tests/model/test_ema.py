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
