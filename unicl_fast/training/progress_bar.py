"""The progress bar of a run: one whole line, whatever the terminal's width and whatever is logged.

Log lines, lines of evaluations and other bars take turns with it, since all go through tqdm.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from unicl_fast.system.progress import ForgivingStderr

_LEAST_BAR = 4
_SECONDS_BETWEEN = 0.2


class ProgressBar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """Steps done, and the numbers of the last line of metrics as far as there is room for them."""

    def __init__(self, *, done: int, total: int, hidden: bool) -> None:
        """Shows `done` of `total` steps; a hidden bar writes nothing."""
        self._facts: list[str] = []
        self._ends_at = math.nan
        super().__init__(
            total=total,
            initial=done,
            desc="train",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            # a log file wants a line now and then, a terminal a live image
            mininterval=_SECONDS_BETWEEN if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
            file=ForgivingStderr(),
            disable=hidden,
        )

    def show(self, values: Mapping[str, float]) -> None:
        """Takes over a line of metrics, to be shown with the next step."""
        self._ends_at = time.monotonic() + values["eta_seconds"]
        self._facts = [
            f"loss {values.get('loss', math.nan):.3f}",
            f"{values['images_per_second']:,.0f} images/s",
            f"data wait {values['data_wait_fraction']:.0%}",
            *([f"mfu {values['mfu']:.0%}"] if "mfu" in values else []),
        ]

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """Writes a line above the bars; for stderr by the same way as they."""
        file = ForgivingStderr() if file is sys.stderr else file
        super().write(s, file=file, end=end, nolock=nolock)

    @property
    def format_dict(self) -> dict[str, Any]:
        """The fields of the line; where it is short, the less important numbers are left out."""
        values: dict[str, Any] = super().format_dict
        facts = list(self._facts)
        if math.isfinite(self._ends_at):
            left = max(0, round(self._ends_at - time.monotonic()))
            facts.insert(2, f"{datetime.timedelta(seconds=left)} left")
        room = math.inf
        if values["ncols"]:
            others = f"{values['prefix']} 100%|| {self.total}/{self.total}"
            room = values["ncols"] - len(others) - _LEAST_BAR
        shown = []
        for fact in facts:
            room -= len(fact) + len(", ")
            if room < 0:
                break
            shown.append(fact)
        return values | {"postfix": ", ".join(shown)}


@contextlib.contextmanager
def progress_bar(*, done: int, total: int, hidden: bool) -> Iterator[ProgressBar]:
    """Shows a bar, and leads log and warnings for the console past it; a hidden one does not."""
    # tqdm 4.66 makes its list of bars with the first one, for that one's class alone
    tqdm(disable=True)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(ProgressBar(done=done, total=total, hidden=hidden))
        if not hidden:
            if _log_is_shown():  # tqdm would show one that goes to a file alone
                stack.enter_context(logging_redirect_tqdm(tqdm_class=ProgressBar))
            stack.callback(setattr, warnings, "showwarning", warnings.showwarning)
            warnings.showwarning = _show_warning
        yield bar


def _log_is_shown() -> bool:
    """Whether lines of the log appear on the console: by a handler, or for want of any."""
    handlers = logging.getLogger().handlers
    return not handlers or any(
        isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
        for handler in handlers
    )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    write_line(warnings.formatwarning(message, category, filename, lineno, line).rstrip("\n"))


def write_line(text: str) -> None:
    """Writes a line to stderr, above the bars that are shown there."""
    ProgressBar.write(text, file=sys.stderr)
