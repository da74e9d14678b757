"""Features and labels for tests of the losses, and how much memory an operation takes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unicl_fast.objectives.loss_tiled import LARGEST_TILE
from unicl_fast.objectives.positives import Membership

CAPTION_KEY = 2**62
D = 8


def rows(n: int, d: int = D, *, seed: int = 0, unit: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return F.normalize(features, dim=1) if unit else features


def assert_equal(
    found: list[torch.Tensor], expected: list[torch.Tensor], *, rtol: float = 1e-10
) -> None:
    """A loss and its gradients: relative to each number, or to the largest where it is near 0."""
    for ours, theirs in zip(found, expected, strict=True):
        largest = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12 * max(1, largest))


def random_membership(random: np.random.Generator, n: int, *, weighted: bool) -> Membership:
    """Up to 3 of 5 labels a sample (some have none), in no order; weights 1 or others."""
    matrix = random.random((n, 5)) * (random.random((n, 5)) < 0.3)
    samples, labels = matrix.nonzero()
    if not len(samples):
        return random_membership(random, n, weighted=weighted)
    order = random.permutation(len(samples))
    weights = matrix[samples, labels] if weighted else np.ones(len(samples))
    return Membership(
        torch.from_numpy(samples[order]),
        torch.from_numpy(labels[order] * (CAPTION_KEY // 4) - 3),
        torch.from_numpy(weights[order]),
    )


def random_classes(random: np.random.Generator, n: int) -> torch.Tensor:
    """One of the same 5 labels for each of n texts."""
    return torch.from_numpy(random.integers(0, 5, n) * (CAPTION_KEY // 4) - 3)


def pair_weights(of_images: Membership, of_texts: torch.Tensor, num_images: int) -> np.ndarray:
    """The weight of each image in each text's class, [images texts]."""
    weights = np.zeros((num_images, len(of_texts)))
    for sample, label, weight in zip(*(one.tolist() for one in of_images), strict=True):
        weights[sample] += weight * (of_texts.numpy() == label)
    return weights


def tiles_of(side: int) -> Any:
    """A fixture of a module's tests: tiles of so many rows and columns.

    So small batches have several tiles, and ragged ones.
    """

    @pytest.fixture(autouse=True, scope="module")
    def small_tiles() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(LARGEST_TILE, "cpu", side * side)
            yield

    return small_tiles


class LargestTensor(TorchDispatchMode):
    """Remembers the most memory that the result of an operation lies in."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.num_bytes = max(self.num_bytes, value.untyped_storage().nbytes())
        return result
