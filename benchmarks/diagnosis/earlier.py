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

from unicl_fast.system.untrusted_files import read_file
from unicl_fast.system.wording import config_diff, markdown_table

from .model import Cost, Measured, rate_text

WHOLE = "all together"
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
class Comparison:
    """The differences of a run from an earlier one."""

    changes: dict[str, tuple[Cost | None, Cost | None]]
    """Every stage before and now, all of them together last; None where it is not part of the
    run."""
    is_regression: bool
    verdict: str
    warnings: list[str]
    """Reasons why the two rates may differ though nothing was changed."""

    def table(self) -> str:
        """Every stage before and now, as Markdown."""
        rows = []
        for name, (old, new) in self.changes.items():
            rate = cpu = "-"
            if old is not None and new is not None:
                rate = f"{old.wall / new.wall - 1:+.1%}" if old.wall and new.wall else "-"
                cpu = f"{new.cpu / old.cpu - 1:+.1%}" if old.cpu else "-"
            rows.append([name, rate_text(old), rate_text(new), rate, cpu])
        head = ["stage", "images/s before", "images/s now", "rate", "CPU time"]
        return markdown_table(head, rows)


def _costs(measured: Measured) -> dict[str, Cost]:
    """The stages, and all together on all ranks."""
    ranks, whole = measured.world_size, measured.whole
    rounds = tuple(one / ranks for one in whole.rounds)
    return {
        **{stage.name: stage.cost for stage in measured.stages},
        "loader only": measured.loader,
        "step only": measured.step,
        WHOLE: Cost(wall=whole.wall / ranks, cpu=whole.cpu, rounds=rounds),
    }


def read_report(path: Path) -> KeptReport:
    """Reads a report; ValueError where the file holds none."""
    try:
        return as_kept(read_file(path))
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
    than `tolerance`, a part of the rate. Of three rounds each, chance does that once in twenty
    without it.
    """
    before, after = _costs(old.measured), _costs(new.measured)
    names = sorted({**after, **before}, key=WHOLE.__eq__)  # it is the last row
    whole, now = before[WHOLE], after[WHOLE]
    gap = 1 - whole.spread[1] / now.spread[0]
    change = whole.wall / now.wall - 1
    speed = f"{abs(change):.1%} {'slower' if change < 0 else 'faster'}"
    rates = f"{rate_text(now)} images/s, and {rate_text(whole)} in {name}"
    if gap > tolerance:
        verdict = (
            f"REGRESSION: the run is {speed}: {rates}. Even its fastest round is {gap:.1%} below "
            f"the slowest one before, and --tolerance is {tolerance:.1%}."
        )
    elif change < -tolerance:
        verdict = (
            f"No sure regression: the run is {speed}: {rates}. But the rounds of the two do not "
            f"lie more than the tolerance of {tolerance:.1%} apart; measure longer (--seconds), "
            "on a quieter machine."
        )
    else:
        verdict = f"No regression: the run is {speed}: {rates}."
    return Comparison(
        changes={one: (before.get(one), after.get(one)) for one in names},
        is_regression=gap > tolerance,
        verdict=verdict,
        warnings=list(_warnings(old, new, name)),
    )


def _warnings(old: KeptReport, new: KeptReport, name: str) -> Iterator[str]:
    both = (old, new)
    pairs = {
        "comes from another machine": [
            {key: value for key, value in one.machine.items() if key not in _NO_MACHINE}
            for one in both
        ],
        "has other settings": [
            one.config | {"data": one.config.get("data", {}) | {"cache_folder": ""}} for one in both
        ],
        "has another number of ranks": [{"nproc": one.measured.world_size} for one in both],
    }
    for what, (then, now) in pairs.items():
        if differences := list(config_diff(then, now)):
            more = len(differences) - _NAMED_DIFFERENCES
            rest = f"; and {more} more" if more > 0 else ""
            yield f"{name} {what}: {'; '.join(differences[:_NAMED_DIFFERENCES])}{rest}."
    for one, when in zip(both, (name, "this run"), strict=True):
        if one.measured.is_busy:
            taken, cores = one.measured.others_cores, one.measured.cores
            yield f"Other processes took {taken:.1f} of {cores:g} cores during {when}."
