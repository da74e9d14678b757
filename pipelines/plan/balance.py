"""Epochs that take no more than a given number of samples of a class: `data.balance`.

A sample counts for one class: with several labels the rarest, so a common class that others bring
along may have more. With `data.balance_concepts` what its captions name counts as further classes.

MetaCLIP's rule (Xu et al., arXiv 2309.16671) keeps a sample of a class of n with the probability
min(1, t / n). Here a class of n > t gives exactly t samples to every epoch, in turns: its samples
stand in a keyed order, epoch e takes those from e t on, and begins again behind the last. So no
sample comes twice in an epoch, each comes once in n / t epochs, and which ones an epoch holds is a
function of its number: nothing is drawn and no epoch is stored. order.py shuffles the epoch.

Unlike the closed formulas there, this takes a table of 8 bytes a sample.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.arrays import positions_of_ranges
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.system.kernels import kernel
from unicl_fast.system.keyed_random import random_bits

from .concepts import Concepts, find_named
from .order import Int64Array, permute_kernel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Balance:
    """The samples of a source by class, and how many of each class an epoch holds."""

    members: Int64Array
    """[N] the samples, class by class."""
    first_members: Int64Array
    """[k + 1] where those of each class begin, and the end."""
    first_draws: Int64Array
    """[k + 1] the same of the draws of an epoch."""

    @property
    def num_draws(self) -> int:
        """Draws of an epoch."""
        return int(self.first_draws[-1])

    @property
    def num_capped(self) -> int:
        """Classes that an epoch does not hold whole."""
        return int((np.diff(self.first_draws) < np.diff(self.first_members)).sum())

    def samples(self, epochs: Int64Array, positions: Int64Array, *, key: int) -> Int64Array:
        """The samples [b] of draws, by their epochs [b] and positions in an epoch [b].

        `key` has 64 bits, as from `fold_key`: it orders the samples of each capped class.
        """
        tables = self.members, self.first_members, self.first_draws
        found: Int64Array = _samples(epochs, positions, *tables, np.uint64(key))
        return found


def balance_dataset(
    dataset: PackedDataset, most: int, concepts: Concepts | None, *, num_samples: int | None = None
) -> Balance:
    """Limits the samples of each class, and of each concept that captions name, to `most`.

    `num_samples` of the data set are taken, the first ones; None takes all.
    """
    samples, named = dataset.samples[:num_samples], None
    if concepts is not None:
        named = find_named(samples, dataset.captions, dataset.tokens, concepts)
    return balance_classes(samples, dataset.labels, most, named)


def balance_classes(
    samples: NDArray[Any],
    labels: NDArray[np.int32],
    most: int,
    named: tuple[Int64Array, Int64Array] | None = None,
) -> Balance:
    """Limits the samples of each class in an epoch to `most`.

    A sample of several labels is counted for each, and belongs to the rarest of them: a class whose
    samples are all its own has `most` of them in an epoch, others in proportion, so that the
    samples of rare classes stay. Samples without a label are all in every epoch.

    Args:
        samples: structured [N] with labels_start and labels_count.
        labels: flat; a sample's labels are a range of it.
        most: samples of a class, at least 1.
        named: what `find_named` found in the captions: classes too, none of them a label.
    """
    counts = samples["labels_count"].astype(np.int64)
    of_entry = labels[positions_of_ranges(samples["labels_start"], counts)].astype(np.int64)
    if named is not None:
        of_sample = np.repeat(np.tile(np.arange(len(samples)), 2), np.append(counts, named[0]))
        of_entry = np.append(of_entry, named[1] + of_entry.max(initial=-1) + 1)
        of_entry = of_entry[np.argsort(of_sample, kind="stable")]
        counts = counts + named[0]
    ends = np.cumsum(counts)
    sizes = np.bincount(of_entry, minlength=1)
    unlabelled = len(sizes)
    rarest = np.full(len(samples), unlabelled, dtype=np.int64)
    if len(of_entry):
        labelled = counts > 0
        by_size = sizes[of_entry] * unlabelled + of_entry  # of equally rare ones the first
        starts = (ends - counts)[labelled]
        rarest[labelled] = np.minimum.reduceat(by_size, starts) % unlabelled
    members = np.argsort(rarest, kind="stable")
    classes, num_members = np.unique(rarest, return_counts=True)
    of_class = np.append(sizes, 0)[classes]
    draws = np.where(
        of_class > most, -(-num_members * most // np.maximum(of_class, 1)), num_members
    )
    return Balance(
        members=members,
        first_members=np.concatenate([[0], np.cumsum(num_members)]),
        first_draws=np.concatenate([[0], np.cumsum(draws)]),
    )


@kernel
def _samples(
    epochs: Any, positions: Any, members: Any, first_members: Any, first_draws: Any, key: Any
) -> Any:
    found = np.empty(positions.size, np.int64)
    for i in range(positions.size):
        one = np.searchsorted(first_draws, positions[i], side="right") - 1
        place = positions[i] - first_draws[one]
        draws = first_draws[one + 1] - first_draws[one]
        size = first_members[one + 1] - first_members[one]
        if draws < size:
            turn = np.empty(1, np.int64)
            turn[0] = (epochs[i] % size * draws + place) % size
            half_bits = 3
            while np.int64(1) << (2 * half_bits) < size:
                half_bits += 1
            # the class's own first sample tells its order from those of the others
            of_class = random_bits(key, members[first_members[one]])
            place = permute_kernel(turn, np.uint64(size), np.uint64(half_bits), of_class)[0]
        found[i] = members[first_members[one] + place]
    return found
