"""Signals while there is nothing to lose: the program ends at once, with the code for "try again".

Importing torch, opening data, building the model, compiling and decoding the first batch take
seconds to minutes. A scheduler that wants the machine back in that time must not be told of a fault
(143), nor be kept waiting. Python runs signal handlers only when its main thread comes back from
whatever it is in; so here a thread reads which signals have come, and ends the process itself.
Imports nothing heavy: it stands before everything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from unicl_fast.distributed.exit_codes import EXIT_ABORTED, EXIT_INTERRUPTED

WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

AT_NO_RISK = "no step is at risk; go on with --resume auto"
"""The rest of the sentence on which signal has stopped a program."""

_SECONDS_TO_UNWIND = 10.0

_ending = threading.Lock()

_forbidden = False


def forbid() -> None:
    """From here on there is something to save; handlers of one's own are to be in place by now."""
    global _forbidden
    _forbidden = True


def allow() -> None:
    """All is saved again; to be called before those handlers go."""
    global _forbidden
    _forbidden = False


@contextlib.contextmanager
def ending_at_once(program: str) -> Iterator[None]:
    """While it is entered and not forbidden, a watched signal ends the process with 75.

    A second Ctrl-C ends it with 130 in any case, 10 seconds after it came: a main thread
    that waits in a collective would not hear it. Signals that are ignored stay ignored.

    Args:
        program: its name, for the message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    allow()
    wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def end(number: int, frame: FrameType | None) -> None:
        # Mostly the listener is first. But a signal that comes just before another handler takes
        # this one's place, and `forbid` follows, would be heard by neither.
        if not _forbidden:
            _end(program, signal.Signals(number).name)

    handlers = {
        number: signal.signal(number, end)
        for number in WATCHED
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    left = threading.Event()
    listener = threading.Thread(
        target=_listen, args=(program, reading, left), name="unicl-signals", daemon=True
    )
    listener.start()
    try:
        yield
    finally:
        left.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        os.write(writing, b"\0")
        listener.join()
        os.close(reading)
        os.close(writing)
        allow()


def _listen(program: str, reading: int, left: threading.Event) -> None:
    num_interrupts = 0
    while not left.is_set():
        for number in os.read(reading, 64):
            if number not in WATCHED:
                continue
            if not _forbidden:
                _end(program, signal.Signals(number).name)
            num_interrupts += number == signal.SIGINT
            if num_interrupts == 2 and not left.wait(_SECONDS_TO_UNWIND):
                os._exit(EXIT_ABORTED)


def _end(program: str, signal_name: str) -> None:
    if not _ending.acquire(blocking=False):
        return  # the other thread is at it
    if os.environ.get("RANK", "0") == "0":  # one sentence is enough
        os.write(2, f"{program}: stopped by {signal_name}; {AT_NO_RISK}\n".encode())
    os._exit(EXIT_INTERRUPTED)
