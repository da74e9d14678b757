"""Random numbers as pure functions of a key and a counter: the same on any rank, in any order.

Keys are folded integers; the mixer is SplitMix64's finalizer (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from unicl_fast.system.kernels import kernel

if TYPE_CHECKING:  # programs that only use the kernels need not wait for it
    from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_TO_UNIT = 2.0**-53


@kernel(inline="always")
def mix64(value: Any) -> Any:
    """SplitMix64's bijection of uint64; each input bit flips each output bit half the time."""
    value = np.uint64(value)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX_1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX_2)
    return value ^ (value >> np.uint64(31))


@kernel(inline="always")
def random_bits(key: Any, counter: Any) -> Any:
    """Returns the uint64 number `counter` of the stream `key`."""
    return mix64(mix64(np.uint64(counter) * np.uint64(_GOLDEN) + np.uint64(key)) ^ np.uint64(key))


@kernel(inline="always")
def random_unit(key: Any, counter: Any) -> Any:
    """Returns the float64 number `counter`, in [0, 1), of the stream `key`."""
    return np.float64(random_bits(key, counter) >> np.uint64(11)) * _TO_UNIT


@kernel(inline="always")
def random_below(key: Any, counter: Any, bound: Any) -> Any:
    """Returns an int64 in [0, bound) of the stream `key`; the bias is below bound / 2**53."""
    return np.int64(random_unit(key, counter) * np.float64(bound))


@kernel
def random_units(key: Any, counters: Any) -> Any:
    """Returns `random_unit` of each counter, float64 [n]."""
    drawn = np.empty(counters.size, np.float64)
    for i in range(counters.size):
        drawn[i] = random_unit(key, counters[i])
    return drawn


def fold_key(*parts: int) -> int:
    """Folds integers (seed, purpose, source, epoch, ...) into one 64-bit key; the order matters."""
    key = _GOLDEN
    for part in parts:
        key = int(random_bits(np.uint64(key), np.uint64(part & 0xFFFFFFFFFFFFFFFF)))
    return key


def uniform_tensor(keys: Tensor | int, counters: Tensor) -> Tensor:
    """Computes `random_unit` bit for bit for tensors, on any device, as float64.

    Keys are one key or int64 with the bits of keys; counters are int64, and broadcast with them.
    """
    return _shift_right(fold_key_tensor(keys, counters), 11).double() * _TO_UNIT


def normal_tensor(keys: Tensor, count: int) -> Tensor:
    """`count` standard normal numbers for each of `keys` int64 [b], as float32 [b count].

    Box and Muller's method in fp32 on halves of 64 random bits: 0.1 ms for 1,000 numbers on one
    core. The largest is 5.8.
    """
    import torch  # the kernels do without

    pairs = torch.arange(-(-count // 2), device=keys.device)
    bits = fold_key_tensor(keys.unsqueeze(1), pairs.unsqueeze(0))
    first, second = (bits >> 40) & 0xFFFFFF, (bits >> 8) & 0xFFFFFF
    radius = (-2 * ((first + 1).float() * 2.0**-24).log()).sqrt()
    angle = second.float() * (2 * math.pi * 2.0**-24)
    numbers = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return numbers[:, :count]


def fold_key_tensor(keys: Tensor | int, parts: Tensor) -> Tensor:
    """Returns, for each int64 part, the bits of `fold_key(..., part)` as int64."""
    key = _signed(keys) if isinstance(keys, int) else keys
    return _mix_tensor(_mix_tensor(parts * _signed(_GOLDEN) + key) ^ key)


def _mix_tensor(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _signed(_MIX_1)
    value = (value ^ _shift_right(value, 27)) * _signed(_MIX_2)
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shifts logically: torch's own shift copies the sign bit, so the copies are cleared."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Returns the int64 with the bits of a uint64; torch multiplies both modulo 2**64."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value
