"""Keyed numbers have the distributions they claim, and are the same on host and device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from unicl_fast.system.keyed_random import (
    fold_key,
    fold_key_tensor,
    random_betas,
    random_units,
    uniform_tensor,
)

KEY = np.uint64(fold_key(3, 1))
COUNTERS = np.arange(20_000)


def test_units_are_uniform_and_equal_the_tensor_twin():
    units = random_units(KEY, COUNTERS)
    assert stats.kstest(units, "uniform").pvalue > 1e-3
    twin = uniform_tensor(int(KEY), torch.from_numpy(COUNTERS))
    assert (twin.numpy() == units).all()
    assert int(fold_key_tensor(fold_key(3), torch.tensor([1]))) % 2**64 == int(KEY)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_betas_follow_their_distribution(alpha):
    alphas = np.full(len(COUNTERS), alpha)
    drawn = random_betas(KEY, COUNTERS, alphas)
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert (random_betas(KEY, COUNTERS[100:], alphas[100:]) == drawn[100:]).all()


def test_a_tiny_alpha_gives_no_nan():
    drawn = random_betas(KEY, COUNTERS, np.full(len(COUNTERS), 1e-3))
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert 0.45 < (drawn > 0.5).mean() < 0.55
