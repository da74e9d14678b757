"""Which checkpoint is the best so far: the step whose evaluation gave the highest number.

`checkpoints/best.json` names it, beside the checkpoints and replaced in one go: no link that a copy
or another file system would lose. The checkpoint itself stays in its own folder, where nothing
removes it while it is the best.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from unicl_fast.checkpoints.files import checkpoint_name
from unicl_fast.system.atomic_files import write_text_atomically

_FILE = "best.json"


@dataclass(frozen=True, slots=True)
class Best:
    """A step and what it reached."""

    step: int
    metric: str
    """Key of metrics.jsonl."""
    value: float


def choose_metric(choice: str, evaluations: Iterable[str]) -> str | None:
    """The key of metrics.jsonl that `checkpoint.best` means; None keeps no best.

    Args:
        choice: of the config.
        evaluations: names of the run's evaluations.

    Raises:
        ValueError: no evaluation of this run gives such a number.
    """
    names = list(evaluations)
    if choice == "none" or not (choice or names):
        return None
    if not choice:
        return f"{names[0]}/top1"
    if not any(choice.startswith(f"{name}/") for name in names):
        known = ", ".join(f"{name}/top1" for name in names) or "none: set data.evaluate"
        raise ValueError(
            f"checkpoint.best={choice}: no evaluation of this run gives that number; it has {known}"
        )
    return choice


def read_best(checkpoints_folder: Path) -> Best | None:
    """What best.json names; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = checkpoints_folder / _FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        best = Best(int(values["step"]), str(values["metric"]), float(values["value"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): remove it, and name a checkpoint by its own folder"
        ) from error
    return best


def write_best(checkpoints_folder: Path, best: Best | None) -> None:
    """Replaces best.json, or removes it.

    Raises:
        OSError: it cannot be written; the one from before stays.
    """
    if best is None:
        (checkpoints_folder / _FILE).unlink(missing_ok=True)
    else:
        write_text_atomically(checkpoints_folder / _FILE, json.dumps(asdict(best)) + "\n")


def find_best(
    checkpoints_folder: Path, *, metric: str | None, lines: Iterable[Mapping[str, float]]
) -> Best | None:
    """The best of the checkpoints that are there, by best.json and the run's metrics.

    Both are asked: a run may have been killed between an evaluation and best.json, and metrics may
    have been cut off. Of equal ones the earliest.

    Args:
        checkpoints_folder: of the run.
        metric: key of metrics.jsonl; None takes what best.json says, whatever was measured.
        lines: of metrics.jsonl.
    """
    found = [
        Best(int(line["step"]), metric, float(line[metric]))
        for line in lines
        if metric is not None and metric in line
    ]
    try:
        stored = read_best(checkpoints_folder)
    except ValueError:  # the metrics have to do
        stored = None
    if stored is not None and metric in (None, stored.metric):
        found.append(stored)
    there = [
        best
        for best in found
        if math.isfinite(best.value) and (checkpoints_folder / checkpoint_name(best.step)).is_dir()
    ]
    return max(there, key=lambda best: (best.value, -best.step), default=None)
