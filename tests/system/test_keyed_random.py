"""Keyed numbers have the distributions they claim, and are the same on host and device."""

import numpy as np
import torch
from scipy import stats

from unicl_fast.system.keyed_random import fold_key, fold_key_tensor, random_units, uniform_tensor

KEY = np.uint64(fold_key(3, 1))
COUNTERS = np.arange(20_000)


def test_units_are_uniform_and_equal_the_tensor_twin():
    units = random_units(KEY, COUNTERS)
    assert stats.kstest(units, "uniform").pvalue > 1e-3
    twin = uniform_tensor(int(KEY), torch.from_numpy(COUNTERS))
    assert (twin.numpy() == units).all()
    assert int(fold_key_tensor(fold_key(3), torch.tensor([1]))) % 2**64 == int(KEY)
