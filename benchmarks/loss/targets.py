"""Milliseconds of TargetM, and of functions of common libraries that find equal rows.

Half of the rows are captions, half have labels, and a third of the texts occurs more than once.
Rows begin alike, as captions do, which slows sorting down but not hashing. All run on one thread.
"""

from __future__ import annotations

import functools
import timeit
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from unicl_fast.objectives.targets import ImageLabels, map_targets

from ..harness import Figures, printed, ratio_of, seconds_of, take_turns
from ..input.contenders import INSTALL

try:
    import pandas
except ImportError:
    pandas = None

Rows = npt.NDArray[np.uint16]
_ROWS_OF_A_TURN = 1 << 19
_CLASSES = 1000
_LABELS_OF_AN_IMAGE = 4
_CONTEXT, _START, _END = 77, 49406, 49407


def measure_targets(sizes: Sequence[int], *, rounds: int) -> Figures:
    """Times all at each number of rows; RuntimeError if they group the rows differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if pandas is None:
        print(f"pandas is left out: it is not installed ({INSTALL})")
    figures: Figures = {}
    for size in sizes:
        calls = max(1, _ROWS_OF_A_TURN // size)  # one call is too short to be timed
        works = {
            name: functools.partial(timeit.timeit, work, number=calls)
            for name, work in make_contestants(*make_batch(size)).items()
        }
        turns = take_turns(works, rounds=rounds)
        of_size = {
            f"{name}, ms": seconds_of(taken, scale=1e3 / calls) for name, taken in turns.items()
        }
        of_size |= {
            f"times {name}": ratio_of(turns, name, "map_targets")
            for name in turns
            if name != "map_targets"
        }
        figures |= printed({f"{size:,} rows, {name}": figure for name, figure in of_size.items()})
    torch.set_num_threads(threads)
    return figures


def make_contestants(rows: Rows, labels: npt.NDArray[np.int64]) -> dict[str, Callable[[], object]]:
    """Functions that find equal rows, ours first; all of them group these rows alike."""
    tensor = torch.from_numpy(rows.astype(np.int16))  # torch cannot sort uint16
    void_rows = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))

    def number_bytes() -> list[int]:
        numbers = {row: number for number, row in enumerate(dict.fromkeys(map(bytes, rows)))}
        return [numbers[bytes(row)] for row in rows]

    def factorize() -> Any:
        # one object per row, pandas' fastest input: columns take three times as long
        return pandas.factorize(np.fromiter(map(bytes, rows), dtype=object, count=len(rows)))

    # what is timed, and the same with the number of each row's group
    others: dict[str, tuple[Callable[[], object], Callable[[], Any]]] = {
        "np.unique(axis=0)": (
            lambda: np.unique(rows, axis=0),
            lambda: np.unique(rows, axis=0, return_inverse=True)[1],
        ),
        "torch.unique(dim=0)": (
            lambda: torch.unique(tensor, dim=0),
            lambda: torch.unique(tensor, dim=0, return_inverse=True)[1],
        ),
        "np.unique of void rows": (
            lambda: np.unique(void_rows, return_index=True, return_inverse=True),
            lambda: np.unique(void_rows, return_inverse=True)[1],
        ),
        "dict of bytes": (lambda: dict.fromkeys(map(bytes, rows)), number_bytes),
    }
    if pandas is not None:
        others["pandas.factorize of bytes"] = (factorize, lambda: factorize()[0])
    _compare(rows, labels, {name: find_groups for name, (_, find_groups) in others.items()})
    several = _several_labels(labels)
    return {
        "map_targets": lambda: map_targets(rows, labels),
        **{name: work for name, (work, _) in others.items()},
        "map_targets of several labels": lambda: map_targets(rows, labels, image_labels=several),
    }


def _compare(
    rows: Rows, labels: npt.NDArray[np.int64], others: dict[str, Callable[[], Any]]
) -> None:
    """Raises RuntimeError unless all functions find the same groups of equal rows."""
    ours = map_targets(rows, labels)
    if not np.array_equal(ours.tokens[ours.text_index], rows):
        raise RuntimeError("map_targets gives rows that are not those it was given")
    for name, find_groups in others.items():
        groups = np.asarray(find_groups()).reshape(-1)
        pairs = np.unique(np.stack([groups, ours.text_index], axis=1), axis=0)
        if not len(pairs) == len(ours.tokens) == groups.max() + 1:
            raise RuntimeError(f"map_targets and {name} group the rows differently")


def _several_labels(labels: npt.NDArray[np.int64]) -> ImageLabels:
    classes = np.random.default_rng(1).integers(0, _CLASSES, (len(labels), _LABELS_OF_AN_IMAGE))
    classes[:, 0] = np.where(labels >= 0, labels, classes[:, 0])
    starts = np.arange(len(labels) + 1) * _LABELS_OF_AN_IMAGE
    return ImageLabels(classes=classes.reshape(-1), starts=starts)


def make_batch(batch_size: int) -> tuple[Rows, npt.NDArray[np.int64]]:
    """Rows as a tokenizer makes them (start, Zipf-distributed words, end, padding), and labels."""
    random = np.random.default_rng(0)
    shape = (batch_size * 3 // 4, _CONTEXT)
    pool = np.minimum(random.zipf(1.2, shape) + 319, 49405).astype(np.uint16)
    lengths = random.integers(8, 40, (len(pool), 1))
    positions = np.arange(_CONTEXT)
    pool[:, 0] = _START
    pool[positions == lengths - 1] = _END
    pool[positions >= lengths] = 0
    choice = random.integers(0, len(pool), batch_size)
    return pool[choice], np.where(choice % 2 == 0, choice % _CLASSES, -1)
