"""Ends a rank that hangs, and names the phase in which it hangs.

Each rank watches itself. A rank that waits for others has twice the time, so the rank at fault ends
first, and its message names the storage or thread that hangs, which torch's own tools do not know.
If the fault is in a collective, NCCL's flight recorder tells the ranks apart.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable

import torch

from unicl_fast.distributed.ranks import uses_nccl
from unicl_fast.distributed.signals import EXIT_HUNG
from unicl_fast.system.phases import Phase, current_phase
from unicl_fast.system.untrusted_files import open_file

_WAITING = 2.0  # how many times longer a phase can last if it waits for other ranks
# Longer than any phase can last, so that the watchdog's message, which says more, comes first;
# torch ends a collective that exceeds this because the watchdog itself cannot run.
_GROUP_TIMEOUTS = 15
_DUMP_PREFIXES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # torch's own
_DUMP_SECONDS = 20.0
_NO_LIMIT_SECONDS = 365 * 24 * 3600.0

_ADVICE = {
    "waiting for the next batch": "the storage of data.train is stuck, or a thread that reads or "
    "decodes",
    "checkpoint": "the storage of the run folder is stuck or slow",
    "reading the loss": "the device does not finish: a kernel hangs, or a collective waits",
    "meeting the other ranks": "not all ranks have come: see whether each was started and whether "
    "MASTER_ADDR and MASTER_PORT can be reached",
}
_OF_OTHERS = (
    "Another rank may be at fault: one that hangs in its own work has said so by now; one that has "
    "said nothing was stopped, lost or cut off."
)


def group_timeout(limit_seconds: float) -> float:
    """Returns a time limit for torch's collectives that lets the watchdog report first."""
    return min(_GROUP_TIMEOUTS * limit_seconds or _NO_LIMIT_SECONDS, _NO_LIMIT_SECONDS)


class Watchdog:
    """Watches the phases of this process in its context."""

    def __init__(
        self,
        *,
        limit_seconds: float,
        rank: int = 0,
        world_size: int = 1,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """Ends the process with `end` when a phase lasts longer than the limit (0: never)."""
        self._limit = limit_seconds
        self._rank, self._world_size = rank, world_size
        self._end = end
        self._interval = min(1.0, limit_seconds / 20)
        self._phase, self._age = current_phase(), 0.0
        self._ticked = time.monotonic()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._limit > 0:
            self._thread = threading.Thread(target=self._watch, name="unicl-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()

    def _watch(self) -> None:
        try:
            while not self._stopped.wait(self._interval):
                self._tick(time.monotonic())
        except BaseException as error:  # or the thread would die silently
            self._end_process(
                f"rank {self._rank}: THE WATCHDOG CANNOT CONTINUE, and no hang would be noticed "
                f"({type(error).__name__}: {error}). Resume with --resume auto. Ending with code "
                f"{EXIT_HUNG}; stacks of its threads:"
            )

    def _end_process(self, text: str) -> None:
        try:
            os.write(2, f"\nunicl_fast: {text}\n".encode(errors="replace"))
            faulthandler.dump_traceback(2)
            if place := dump_collectives(self._rank):
                text = f"NCCL's last collectives are in {place}; torchfrtrace compares all ranks'"
                os.write(2, f"\nunicl_fast: {text}\n".encode())
        finally:  # also if the message cannot be written
            self._end(EXIT_HUNG)

    def _tick(self, now: float) -> None:
        # if this thread itself was late, the whole process was stopped, which is no hang
        passed = min(now - self._ticked, 3 * self._interval)
        self._ticked = now
        phase = current_phase()
        self._age = self._age + passed if phase is self._phase else 0.0
        self._phase = phase
        times = phase.patience * (_WAITING if phase.waits_for_ranks else 1)
        if self._age > self._limit * times:
            self._end_process(self._describe(times))

    def _describe(self, times: float) -> str:
        """Describes the hang, after `times` the limit, and the remedy."""
        phase = self._phase
        allowed = f"{'' if times == 1 else f'{times:g} times '}run.timeout_seconds={self._limit:g}"
        of_ranks = f" of {self._world_size}" if self._world_size > 1 else ""
        sentences = [
            f"rank {self._rank}{of_ranks} HANGS: {_name(phase)} has lasted {self._age:.0f} s, "
            f"and {allowed} allows no more."
        ]
        advice = next((text for name, text in _ADVICE.items() if phase.name.startswith(name)), "")
        if advice and not phase.name.endswith(": waiting for other ranks"):
            sentences.append(f"Probably {advice}.")
        if phase.waits_for_ranks and self._world_size > 1:
            sentences.append(_OF_OTHERS)
        sentences.append(
            "Resume with --resume auto; if this can take so long, raise run.timeout_seconds (0: no "
            f"limit). Ending with code {EXIT_HUNG}; stacks of its threads:"
        )
        return " ".join(sentences)


def dump_collectives(rank: int) -> str:
    """Writes NCCL's flight recorder (`rendezvous` sets its size) to a file for torchfrtrace.

    Returns the path, a prefix and the rank; empty if there is nothing, or it cannot be written.
    """
    if not uses_nccl():
        return ""
    prefixes = filter(None, map(os.environ.get, _DUMP_PREFIXES))
    user = f"unicl_fast-{os.getuid()}-collectives-rank-"
    path = f"{next(prefixes, os.path.join(tempfile.gettempdir(), user))}{rank}"
    # CUDA's driver can hang too, with the GIL held: then this ends the process for us
    faulthandler.dump_traceback_later(_DUMP_SECONDS, exit=True)
    try:
        content = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
        with open_file(path, "wb") as file:
            file.write(content)
    except Exception:
        return ""
    finally:
        faulthandler.cancel_dump_traceback_later()
    return path


def _name(phase: Phase) -> str:
    return f"'{phase.name}'" + ("" if phase.step is None else f" in step {phase.step}")
