"""Counts the samples that were lost and doubled; the table of `unicl-bench resume`."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

from unicl_fast.system.wording import markdown_table

from .chain import Step

DATA = {"one": "one set", "mix": "mix"}
HOW = {"same": "same ranks and workers", "ranks": "other ranks", "workers": "other workers"}


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """Faults of a run that was killed and resumed."""

    lost: int
    """Samples that an epoch did not show, over the epochs that ended."""
    doubled: int
    """Draws of samples that their epoch had shown before."""
    out_of_order: int
    """Steps whose samples are not those of the unbroken run."""
    steps: int


def count(steps: Sequence[Step], unbroken: Sequence[Step], epoch_size: int) -> Counts:
    """Counts the faults of the steps that were trained on.

    The order within a global batch does not matter. An epoch has ended once all ranks are in a
    later one, so what only one of them is to show yet is not lost.
    """
    shown: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for step in steps:
        for epoch, ids in step:
            shown[epoch].update(ids)
    ended = range(min(epoch for epoch, _ in steps[-1])) if steps else ()
    pairs = zip(steps, unbroken, strict=False)  # a run that cannot be resumed is shorter
    return Counts(
        lost=sum(epoch_size - len(shown[epoch]) for epoch in ended),
        doubled=sum(seen.total() - len(seen) for seen in shown.values()),
        out_of_order=sum(_samples(one) != _samples(other) for one, other in pairs),
        steps=len(steps),
    )


def _samples(step: Step) -> list[int]:
    return sorted(one for _, ids in step for one in ids)


def table(result: Mapping[str, Any]) -> str:
    """Two rows for each loader, and the messages of those that could not be resumed."""
    rows, failures = [], dict[str, dict[str, None]]()
    for name, facts in result["contenders"].items():
        for data, words in DATA.items():
            cells = []
            for how in HOW:
                chain = facts["chains"][f"{data}, {how}"]
                cells.append(_cell(chain))
                if chain["failure"]:
                    failures.setdefault(chain["failure"], {})[name] = None
            rows.append([name, facts["state"] or "none", words, *cells])
    rows += [[name, f"left out: {why}", *[""] * 4] for name, why in result["left_out"].items()]
    head = ["", "state", "data", *HOW.values()]
    said = "A cell: samples lost, samples doubled, steps out of order of the run's steps."
    messages = [f"- {', '.join(names)}: `{shorten(why, 99)}`" for why, names in failures.items()]
    return "\n\n".join([said, markdown_table(head, rows), "\n".join(messages)]).strip()


def _cell(chain: Mapping[str, Any]) -> str:
    if chain["failure"]:
        return f"error at resume {len(chain['kills'])}"
    figures = (f"{chain[name]:,}" for name in ("lost", "doubled", "out_of_order"))
    return f"{', '.join(figures)} of {chain['steps']}"
