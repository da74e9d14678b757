"""A run compared with the report of an earlier one.

`compare` says whether a run became slower. Rates of two days differ by more than the rounds of one
day show, so a regression has to be larger than the spread of both and a tolerance on top of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from unicl_fast.system.wording import config_diff, markdown_table

from .model import Cost, Measured, rate_text

WHOLE = "all together"
_MUCH = 0.1
"""Part of the cores that other processes may take without a warning."""
_NAMED_DIFFERENCES = 4
# differs in every run, and changes no rate
_NO_MACHINE = ("load_average", "commit", "date")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptReport:
    """A report of `unicl-bench run`, as far as another one is compared with it."""

    measured: Measured
    config: dict[str, dict[str, Any]]
    machine: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A stage before and now; None where it is not part of the run."""

    name: str
    old: Cost | None
    new: Cost | None

    @property
    def rate(self) -> float | None:
        """The change of the rate, 0.1 for a tenth more; None where it is unknown."""
        if self.old is None or self.new is None or not self.old.wall or not self.new.wall:
            return None
        return self.old.wall / self.new.wall - 1

    @property
    def cpu(self) -> float | None:
        """The change of the CPU time of an image."""
        if self.old is None or self.new is None or not self.old.cpu:
            return None
        return self.new.cpu / self.old.cpu - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The differences of a run from an earlier one."""

    changes: list[Change]
    is_regression: bool
    verdict: str
    warnings: list[str]
    """Reasons why the two rates may differ though nothing was changed."""

    def table(self) -> str:
        """Every stage before and now, as Markdown."""
        rows = [
            [
                *(one.name, rate_text(one.old), rate_text(one.new)),
                *("-" if part is None else f"{part:+.1%}" for part in (one.rate, one.cpu)),
            ]
            for one in self.changes
        ]
        head = ["stage", "images/s before", "images/s now", "rate", "CPU time"]
        return markdown_table(head, rows)


def _costs(measured: Measured) -> dict[str, Cost]:
    """The stages, and all together on all ranks."""
    ranks, whole = measured.world_size, measured.whole
    all_ranks = Cost(
        wall=whole.wall / ranks, cpu=whole.cpu, rounds=tuple(one / ranks for one in whole.rounds)
    )
    parts = {"the loader alone": measured.loader, "the step alone": measured.step}
    return {stage.name: stage.cost for stage in measured.stages} | parts | {WHOLE: all_ranks}


def read_report(path: Path) -> KeptReport:
    """Reads a report; ValueError where the file holds none."""
    try:
        return as_kept(path.read_bytes())
    except ValueError as error:  # msgspec's are
        raise ValueError(
            f"--against: {path} is no report of `unicl-bench run` ({error}); give the report.json "
            "in the folder of an earlier --out, or the file of an earlier --json"
        ) from error


def as_kept(text: bytes | str) -> KeptReport:
    """The part of a report's JSON that is compared. Raises ValueError as `read_report` does."""
    found = msgspec.json.decode(text, type=KeptReport)
    whole = found.measured.whole
    if min(whole.wall, *whole.spread) <= 0 or found.measured.world_size < 1:
        raise ValueError("its run took no time")
    return found


def compare(old: KeptReport, new: KeptReport, *, name: str, tolerance: float) -> Comparison:
    """Compares a run with an earlier one; `name` is that of the earlier one's file.

    It is a regression if the fastest of its rounds is slower than the slowest round before by more
    than `tolerance`, a part of the rate. So what the rounds' spread explains is none. Of three
    rounds each, chance alone puts all new ones below all old ones once in twenty, and the tolerance
    comes on top of that.
    """
    before, after = _costs(old.measured), _costs(new.measured)
    names = [*after, *(one for one in before if one not in after)]
    changes = [Change(name=one, old=before.get(one), new=after.get(one)) for one in names]
    changes.sort(key=lambda change: change.name == WHOLE)  # the last row
    slowest, fastest = 1 / before[WHOLE].spread[1], 1 / after[WHOLE].spread[0]
    gap = 1 - fastest / slowest
    change = before[WHOLE].wall / after[WHOLE].wall - 1
    is_regression = gap > tolerance
    speed = f"{abs(change):.1%} {'slower' if change < 0 else 'faster'}"
    now, then = rate_text(after[WHOLE]), rate_text(before[WHOLE])
    rates = f"{now} images/s, and {then} in {name}"
    if is_regression:
        verdict = (
            f"REGRESSION: the run is {speed}: {rates}. Even its fastest round is {gap:.1%} below "
            f"the slowest one before, and --tolerance is {tolerance:.1%}."
        )
    elif change < -tolerance:
        verdict = (
            f"No regression that can be told: the run is {speed}: {rates}. But the rounds of the "
            f"two do not lie more than the tolerance of {tolerance:.1%} apart; measure longer "
            "(--seconds), on a quieter machine."
        )
    else:
        verdict = f"No regression: the run is {speed}: {rates}."
    return Comparison(
        changes=changes,
        is_regression=is_regression,
        verdict=verdict,
        warnings=list(_warnings(old, new, name)),
    )


def _warnings(old: KeptReport, new: KeptReport, name: str) -> Iterator[str]:
    machines = [
        {key: value for key, value in one.machine.items() if key not in _NO_MACHINE}
        for one in (old, new)
    ]
    configs = [
        one.config | {"data": one.config.get("data", {}) | {"cache_folder": ""}}
        for one in (old, new)
    ]
    ranks = [{"nproc": one.measured.world_size} for one in (old, new)]
    pairs = {
        "comes from another machine": machines,
        "has other settings": configs,
        "has another number of ranks": ranks,
    }
    for what, pair in pairs.items():
        if differences := list(config_diff(pair[0], pair[1])):
            more = len(differences) - _NAMED_DIFFERENCES
            rest = f"; and {more} more" if more > 0 else ""
            yield f"{name} {what}: {'; '.join(differences[:_NAMED_DIFFERENCES])}{rest}."
    for one, when in ((old, name), (new, "this run")):
        taken, cores = one.measured.others_cores, one.measured.cores * one.measured.world_size
        taken *= one.measured.world_size
        if taken > _MUCH * cores:
            yield f"Other processes took {taken:.1f} of {cores:g} cores during {when}."
