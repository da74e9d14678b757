"""Time of the target map, beside what finds equal rows in common libraries.

    unicl-bench targets [--sizes 1024 8192] [--json FILE]

Half of the rows are captions, half have labels; a third of the texts occurs more than once. Rows
begin alike, as captions do, which sorting feels and hashing does not. All must find the same
distinct rows first. The others find the rows only; ours gives classes, too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from unicl_fast.objectives.targets import map_targets
from unicl_fast.system.host_memory import keep_freed_memory

from ..harness import (
    BenchmarkSettings,
    Figures,
    print_figures,
    ratios_of,
    summarise,
    take_turns,
    write_result,
)

try:
    import pandas
except ImportError:
    pandas = None  # type: ignore[assignment]

_ROWS_OF_A_TURN = 1 << 19


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """Time of the target map, beside np.unique, torch.unique and others."""

    sizes: tuple[int, ...] = (1024, 8192, 65536)
    """Rows of a batch."""


def run(settings: Settings) -> None:
    """Compares, measures, prints, and writes the JSON if one is wanted."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as in training; all gain by it
    figures: Figures = {}
    if pandas is None:
        print("pandas is passed over: it is not installed (pip install 'unicl_fast[bench]')")
    for size in settings.sizes:
        contestants = make_contestants(size)
        require_same_groups(size)
        distinct = {name: int(work()) for name, work in contestants.items()}
        if len(set(distinct.values())) > 1:
            raise RuntimeError(f"they find other numbers of distinct rows: {distinct}")
        times = max(1, _ROWS_OF_A_TURN // size)  # one call is too short to be timed alone
        turns = take_turns(
            {name: functools.partial(_repeat, work, times) for name, work in contestants.items()},
            rounds=settings.rounds,
        )
        measured: Figures = {}
        for name, taken in turns.items():
            milliseconds = [turn.wall_seconds * 1e3 / times for turn in taken]
            measured[f"{size:,} rows, {name}, ms"] = summarise(milliseconds)
        for name in list(turns)[1:]:
            ratios = ratios_of(turns, name, "map_targets")
            measured[f"{size:,} rows, times {name}"] = summarise(ratios)
        print_figures(measured)
        figures |= measured
    packages = ["numpy", "numba"] + ["pandas"] * (pandas is not None)
    write_result(settings, figures, *packages)


def make_contestants(size: int) -> dict[str, Callable[[], int]]:
    """Each returns how many distinct rows it found."""
    rows, labels = _make_batch(size)
    tensor = torch.from_numpy(rows.astype(np.int16))  # torch cannot sort uint16
    contestants: dict[str, Callable[[], int]] = {
        "map_targets": lambda: len(map_targets(rows, labels).tokens),
        "np.unique(axis=0)": lambda: len(np.unique(rows, axis=0)),
        "torch.unique(dim=0)": lambda: len(torch.unique(tensor, dim=0)),
        "np.unique of void rows": functools.partial(_unique_void_rows, rows),
        "dict of bytes": lambda: len(dict.fromkeys(map(bytes, rows))),
    }
    if pandas is not None:
        contestants["pandas.factorize of bytes"] = lambda: len(pandas.factorize(_as_bytes(rows))[1])
    return contestants


def require_same_groups(size: int) -> None:
    """Compares which rows are equal by ours and by the others that tell.

    Raises:
        RuntimeError: they group the rows otherwise.
    """
    rows, labels = _make_batch(size)
    tensor = torch.from_numpy(rows.astype(np.int16))
    number_of: dict[bytes, int] = {}
    groups = {
        "np.unique(axis=0)": np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1),
        "torch.unique(dim=0)": torch.unique(tensor, dim=0, return_inverse=True)[1].numpy(),
        "dict of bytes": np.array(
            [number_of.setdefault(bytes(row), len(number_of)) for row in rows]
        ),
    }
    if pandas is not None:
        groups["pandas.factorize of bytes"] = pandas.factorize(_as_bytes(rows))[0]
    ours = map_targets(rows, labels)
    if not np.array_equal(ours.tokens[ours.text_index], rows):
        raise RuntimeError("map_targets gives rows that are not those it was given")
    for name, numbers in groups.items():
        pairs = np.unique(np.stack([numbers, ours.text_index], axis=1), axis=0)
        if not len(pairs) == len(ours.tokens) == numbers.max() + 1:
            raise RuntimeError(f"map_targets and {name} group the rows otherwise")


def _repeat(work: Callable[[], int], times: int) -> None:
    for _ in range(times):
        work()


def _unique_void_rows(rows: npt.NDArray[np.uint16]) -> int:
    as_items = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))
    return len(np.unique(as_items, return_index=True, return_inverse=True)[1])


def _as_bytes(rows: npt.NDArray[np.uint16]) -> npt.NDArray[np.object_]:
    """One object a row; of pandas' ways the fastest: by columns takes three times as long."""
    return np.fromiter(map(bytes, rows), dtype=object, count=len(rows))


def _make_batch(batch_size: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
    """Rows as a tokenizer makes them: start, words by Zipf's law, end, padding."""
    random = np.random.default_rng(0)
    shape = (batch_size * 3 // 4, 77)
    pool = np.minimum(random.zipf(1.2, shape) + 319, 49405).astype(np.uint16)
    lengths = random.integers(8, 40, (len(pool), 1))
    pool[:, 0] = 49406
    pool[np.arange(77) == lengths - 1] = 49407
    pool[np.arange(77) >= lengths] = 0
    choice = random.integers(0, len(pool), batch_size)
    return pool[choice], np.where(choice % 2 == 0, choice % 1000, -1)
