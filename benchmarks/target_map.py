"""Time of the target map beside `np.unique`.

    python -m unicl_fast.benchmarks.target_map

Half of the rows are captions, half have labels; a third of the texts occurs more than once. Both
must find the same distinct rows first. Then they take turns.
"""

from __future__ import annotations

import functools
import statistics

import numpy as np
import numpy.typing as npt

from unicl_fast.benchmarks.harness import take_turns
from unicl_fast.targets import map_targets

_ROUNDS = 5


def main() -> None:
    """Prints milliseconds for batches of three sizes."""
    print("rows      map_targets   np.unique(axis=0)   ratio")
    for batch_size in (1024, 8192, 65536):
        rows, labels = _make_batch(batch_size)
        assert len(map_targets(rows, labels).tokens) == len(np.unique(rows, axis=0))
        turns = take_turns(
            {
                "unique": functools.partial(np.unique, rows, axis=0),
                "map_targets": functools.partial(map_targets, rows, labels),
            },
            rounds=_ROUNDS,
        )
        theirs, ours = ([turn.wall_seconds for turn in turns[name]] for name in turns)
        ratio = statistics.median(slow / fast for slow, fast in zip(theirs, ours, strict=True))
        fast, slow = (statistics.median(times) * 1e3 for times in (ours, theirs))
        print(f"{batch_size:<9,} {fast:8.3f} ms {slow:16.2f} ms {ratio:9.0f}")


def _make_batch(batch_size: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
    random = np.random.default_rng(0)
    pool = random.integers(1, 49406, (batch_size * 3 // 4, 77)).astype(np.uint16)
    pool[np.arange(77) >= random.integers(8, 40, (len(pool), 1))] = 0
    choice = random.integers(0, len(pool), batch_size)
    return pool[choice], np.where(choice % 2 == 0, choice % 1000, -1)


if __name__ == "__main__":
    main()
