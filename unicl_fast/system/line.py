"""Lines about work: what takes long is named once. What can be counted has a `bar` as well."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

from unicl_fast.system.phases import Phase

_SOON = 1.5  # seconds that work lasts before it is named
_LOOK_SECONDS = 0.25


@contextlib.contextmanager
def line(work: str | Callable[[], Phase], *, shown: bool = True) -> Iterator[None]:
    """Writes `WORK ...` to stderr if the work in this context takes about two seconds; on rank 0.

    If `work` returns the present phase, each phase that takes as long is named, but no name twice.
    Without `shown` nothing is written.
    """
    if not shown or os.environ.get("RANK", "0") != "0":
        yield
        return
    ended = threading.Event()

    def look() -> None:
        written, last, since = {""}, Phase(""), 0.0
        while True:
            now = time.monotonic()
            if (present := work() if callable(work) else Phase(work)) != last:
                last, since = present, now
            if last.name not in written and now - since >= _SOON:
                from unicl_fast.system.bar import write_line  # above bars; --help needs none

                written.add(last.name)
                write_line(f"{last.name} ...")
            if ended.wait(_LOOK_SECONDS):
                return

    thread = threading.Thread(target=look, name="line", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
