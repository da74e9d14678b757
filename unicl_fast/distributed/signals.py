"""Exit codes, and how SIGTERM, SIGUSR1 and Ctrl-C stop a training program.

All ranks finish the current step, write a checkpoint and end with 75, so that a job script knows
that the run can be resumed. Before the end of the first step they end at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from unicl_fast.system.program import EXIT_ABORTED

if TYPE_CHECKING:
    from unicl_fast.distributed.ranks import PendingMaximum, Ranks

EXIT_FAULT = 1  # A fault: a disk, a device, a loss that is not finite, a lost rank
EXIT_WRONG_INPUT = 2  # wrong input or usage: the same command would fail again
EXIT_HUNG = 70
"""EX_SOFTWARE of sysexits.h: a phase exceeded its limit. (124 is that of timeout(1).)"""
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request, and can be resumed

AT_NO_RISK = "no step is at risk; resume with --resume auto"

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SECONDS_TO_UNWIND = 10.0

_is_deferred = _saves = False
_exiting = threading.Lock()


def defer_signals(deferred: bool, *, saves: bool = False) -> None:
    """Sets whether signals are left to other handlers, which are installed already.

    If such a handler `saves` work first, this process says so when a signal comes.
    """
    global _is_deferred, _saves
    _is_deferred, _saves = deferred, saves


@contextlib.contextmanager
def exit_immediately_on_signals(program: str) -> Iterator[None]:
    """In this context, a stop signal ends the process with 75 unless signals are deferred.

    A second Ctrl-C always ends it with 130, 10 seconds later. Ignored signals stay ignored.

    Python runs signal handlers only when the main thread returns from a call, such as a collective;
    so a thread reads the signals, and ends the process itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    defer_signals(False)
    wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def end(number: int, frame: FrameType | None) -> None:
        # Usually the listener is first. But it would miss a signal that comes just before another
        # handler replaces this one and signals are deferred.
        if not _is_deferred:
            _exit(program, number)

    handlers = handle_stop_signals(end)
    left = threading.Event()
    arguments = program, reading, left
    listener = threading.Thread(None, _listen, "unicl-signals", arguments, daemon=True)
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
        defer_signals(False)


def handle_stop_signals(handler: Any) -> dict[signal.Signals, Any]:
    """Replaces the handlers of stop signals, except ignored ones (nohup); returns the old ones."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # Python allows it only in the main thread
    return {
        number: signal.signal(number, handler)
        for number in STOP_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }


def _listen(program: str, reading: int, left: threading.Event) -> None:
    """Reads signals until a 0 comes."""
    num_signals = num_interrupts = 0
    while True:
        for number in os.read(reading, 64):
            if number == 0:
                return
            if number not in STOP_SIGNALS:
                continue
            if not _is_deferred:
                _exit(program, number)
            num_signals += 1
            num_interrupts += number == signal.SIGINT
            if _saves and num_interrupts == 2:
                _say(program, "ended by a second Ctrl-C, unsaved; checkpoints are from before")
            elif _saves and num_signals == 1:
                name, again = signal.Signals(number).name, "again" if num_interrupts else "twice"
                how = f"finishing this step, then saving (Ctrl-C {again} ends it at once, unsaved)"
                _say(program, f"{name} came: {how}")
            if num_interrupts == 2 and not left.wait(_SECONDS_TO_UNWIND):
                os._exit(EXIT_ABORTED)


def _exit(program: str, number: int) -> None:
    if not _exiting.acquire(blocking=False):
        return  # the other thread is doing it
    _say(program, f"stopped by {signal.Signals(number).name}; {AT_NO_RISK}")
    os._exit(EXIT_INTERRUPTED)


def _say(program: str, text: str) -> None:
    """Writes a line, on rank 0, without Python's locks, which the main thread can hold."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"\n{program}: {text}\n".encode())


class Interrupted(Exception):  # noqa: N818 - as KeyboardInterrupt, it is no error
    """The run has stopped on request, and can be resumed."""


class Interruption:
    """Notices stop signals in its context; a second Ctrl-C raises KeyboardInterrupt.

    It notices nothing outside the main thread, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        """The first signal that came, "" for none."""
        self._num_interrupts = 0
        self._before: dict[signal.Signals, Any] = {}
        self._pending: PendingMaximum | None = None

    def __enter__(self) -> Interruption:
        self._before = handle_stop_signals(self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        defer_signals(False)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pending is not None and kind in (None, Interrupted):
            self._pending.wait()  # all ranks have asked; none must leave before the answer

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts == 2:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name

    def has_come(self, ranks: Ranks) -> bool:
        """Returns whether to stop after this step; call it once a step, on all ranks.

        The answer is the same on all ranks. With several it is a step old, so that nobody waits.
        """
        defer_signals(True, saves=True)  # a step is done: there is work to save
        if ranks.world_size == 1:
            return bool(self.signal_name)
        from unicl_fast.distributed.ranks import PendingMaximum  # imports torch

        answer = self._pending is not None and bool(self._pending.wait())
        self._pending = PendingMaximum(int(bool(self.signal_name)), ranks)
        return answer
