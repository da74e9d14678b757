"""Counts visits of samples pass by pass, with one bit a sample.

A pass over a source of N samples is N visits of it one after another. It is complete and right when
no sample came twice: then each came once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.ledger.format import LedgerSource
from unicl_fast.system.kernels import kernel

_MOST_EXAMPLES = 10
_TWICE, _LOST, _UNKNOWN = 0, 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceProof:
    """What the passes over one source came to."""

    name: str
    num_samples: int
    draws: int
    scheduled_twice: int
    """Visits of a sample that the same pass had visited before."""
    lost: int
    """Samples that a complete pass did not visit."""
    unknown: int
    """Visits of samples that the source does not have."""

    @property
    def complete_passes(self) -> int:
        return self.draws // self.num_samples

    @property
    def holds(self) -> bool:
        return not (self.scheduled_twice or self.lost or self.unknown)


class Passes:
    """The passes over all sources of a run, fed with visits in their order."""

    def __init__(self, sources: Sequence[LedgerSource]) -> None:
        """Takes one bit a sample."""
        self._sources = list(sources)
        self._sizes = np.array([source.num_samples for source in sources], dtype=np.int64)
        words = (self._sizes + 63) // 64
        self._first_words = np.concatenate([[0], np.cumsum(words)]).astype(np.int64)
        self._seen = np.zeros(self._first_words[-1], dtype=np.uint64)
        self._draws = np.zeros(len(self._sizes), dtype=np.int64)
        self._counts = np.zeros((len(self._sizes), 3), dtype=np.int64)
        # kind, source, pass, sample, number of the visit in the whole run (-1 for lost ones)
        self._examples = np.zeros((_MOST_EXAMPLES, 5), dtype=np.int64)
        self._num_examples = 0

    def visit(self, first: int, source_ids: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        """Counts visits; `first` is the number of the first of them in the run (step * n + slot).

        Args:
            first: numbers them in what is told of them.
            source_ids: int64 of any shape, in the order of the visits.
            ids: int64 of the same shape, rows of those sources.
        """
        if source_ids.size and not 0 <= source_ids.min() <= source_ids.max() < len(self._sizes):
            raise ValueError(f"visits of source {source_ids.max()} of {len(self._sizes)}")
        self._num_examples = _visit(
            first,
            source_ids.reshape(-1),
            ids.reshape(-1),
            self._sizes,
            self._first_words,
            self._seen,
            self._draws,
            self._counts,
            self._examples,
            self._num_examples,
        )

    def results(self) -> list[SourceProof]:
        return [
            SourceProof(
                name=source.name,
                num_samples=source.num_samples,
                draws=int(self._draws[number]),
                scheduled_twice=int(self._counts[number, _TWICE]),
                lost=int(self._counts[number, _LOST]),
                unknown=int(self._counts[number, _UNKNOWN]),
            )
            for number, source in enumerate(self._sources)
        ]

    def examples(self, *, global_batch_size: int) -> list[str]:
        """The first faults, in words."""
        told = []
        for kind, source, one_pass, sample, visit in self._examples[: self._num_examples].tolist():
            name = self._sources[source].name
            where = f"step {visit // global_batch_size}, slot {visit % global_batch_size}"
            told.append(
                {
                    _TWICE: f"pass {one_pass} of {name} schedules sample {sample} again at {where}",
                    _LOST: f"pass {one_pass} of {name} did not schedule sample {sample}",
                    _UNKNOWN: f"{where}: {name} has no sample {sample}",
                }[kind]
            )
        return told


@kernel
def _visit(
    first: Any,
    source_ids: Any,
    ids: Any,
    sizes: Any,
    first_words: Any,
    seen: Any,
    draws: Any,
    counts: Any,
    examples: Any,
    num_examples: Any,
) -> Any:
    one = np.uint64(1)
    for i in range(ids.size):
        source, sample = source_ids[i], ids[i]
        one_pass = draws[source] // sizes[source]
        kind = -1
        if sample < 0 or sample >= sizes[source]:
            kind = _UNKNOWN
        else:
            word = first_words[source] + (sample >> 6)
            bit = one << np.uint64(sample & 63)
            if seen[word] & bit:
                kind = _TWICE
            seen[word] |= bit
        if kind >= 0:
            counts[source, kind] += 1
            if num_examples < len(examples):
                examples[num_examples] = np.array([kind, source, one_pass, sample, first + i])
                num_examples += 1
        draws[source] += 1
        if draws[source] % sizes[source] == 0:
            # a pass is over: whoever was not seen in it is lost
            for sample in range(sizes[source]):
                word = first_words[source] + (sample >> 6)
                if not seen[word] & (one << np.uint64(sample & 63)):
                    counts[source, _LOST] += 1
                    if num_examples < len(examples):
                        examples[num_examples] = np.array([_LOST, source, one_pass, sample, -1])
                        num_examples += 1
            seen[first_words[source] : first_words[source + 1]] = 0
    return num_examples
