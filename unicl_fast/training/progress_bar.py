"""The progress bar of a run, which log lines, warnings and other bars take turns with."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from unicl_fast.system.progress import ForgivingStderr


class ProgressBar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """Steps done, and the numbers of the last line of metrics."""

    def __init__(self, *, done: int, total: int, hidden: bool) -> None:
        """Shows `done` of `total` steps; a hidden bar writes nothing."""
        super().__init__(
            total=total,
            initial=done,
            desc="train",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            # a log file wants a line now and then, a terminal a live image
            mininterval=0.2 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
            file=ForgivingStderr(),
            disable=hidden,
        )
        # tqdm's own clock may be set back: the bar would stand still until it has caught up
        self._time = time.monotonic
        self.start_t = self.last_print_t = self._time()

    def show(self, values: Mapping[str, float]) -> None:
        """Takes over a line of metrics, to be shown with the next step; tqdm cuts what is wide."""
        facts = [
            f"loss {values.get('loss', math.nan):.3f}",
            f"{values['images_per_second']:,.0f} images/s",
            f"{datetime.timedelta(seconds=round(values['eta_seconds']))} left",
            f"data wait {values['data_wait_fraction']:.0%}",
            *([f"mfu {values['mfu']:.0%}"] if "mfu" in values else []),
        ]
        self.set_postfix_str(", ".join(facts), refresh=False)

    @classmethod
    def write(
        cls, s: str, file: TextIO | None = None, end: str = "\n", nolock: bool = False
    ) -> None:
        """Writes a line above the bars; for stderr in the same way as they."""
        forgiving = ForgivingStderr() if file is sys.stderr else file
        super().write(s, file=forgiving, end=end, nolock=nolock)


@contextlib.contextmanager
def progress_bar(*, done: int, total: int, hidden: bool) -> Iterator[ProgressBar]:
    """Shows a bar, and leads log and warnings for the console past it; a hidden one does not."""
    # tqdm 4.66 makes its list of bars with the first one, only for that one's class
    tqdm(disable=True)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(ProgressBar(done=done, total=total, hidden=hidden))
        if not hidden:
            if _log_is_shown():  # tqdm would show one that only goes to a file
                stack.enter_context(logging_redirect_tqdm(tqdm_class=ProgressBar))
            stack.callback(setattr, warnings, "showwarning", warnings.showwarning)
            warnings.showwarning = _show_warning
        yield bar


def _log_is_shown() -> bool:
    """Whether lines of the log appear on the console: by a handler, or for want of any."""
    handlers = logging.getLogger().handlers
    console = (sys.stdout, sys.stderr)
    return not handlers or any(getattr(one, "stream", None) in console for one in handlers)


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
