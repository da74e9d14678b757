"""Ends a rank that hangs, and says which rank hangs in what: a thread that reads `stages`.

A hung collective, a storage that no longer answers or a thread that is stuck would hold a whole job
for hours without a word. Every stage that is marked has `run.timeout_seconds` to end or to give a
sign of progress. A rank that waits in a collective is not judged while another one works on within
its own limit (rank 0 may be saving); so the guilty one speaks first. What the others were doing
stands in everybody's message (`heartbeats`).

Time in which the process itself is stopped (Ctrl-Z, a scheduler that suspends the job) does not
count. What holds Python's global lock for ever (a page of a memory-mapped file that never comes)
stops this thread too: then it is the other ranks that notice.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

from unicl_fast.distributed.exit_codes import EXIT_HUNG
from unicl_fast.distributed.heartbeats import Heartbeat, Heartbeats
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.system import stages
from unicl_fast.system.stages import Stage

# Beyond all that stages may last: the watchdog's message comes first, and is the better one.
_GROUP_TIMEOUTS = 10
_NO_LIMIT_SECONDS = 365 * 24 * 3600.0

_ADVICE = {
    "waiting for the next batch": "the storage of data.train is stuck, or a thread that reads or "
    "decodes",
    "checkpoint": "the storage of the run folder is stuck or slow",
    "reading the loss": "the device does not finish: a kernel hangs, or a collective waits",
    "meeting the other ranks": "not all ranks have come: see whether each was started and whether "
    "MASTER_ADDR and MASTER_PORT can be reached",
}


def group_timeout(limit_seconds: float) -> float:
    """The time limit for torch's collectives that leaves the first word to the watchdog."""
    return min(_GROUP_TIMEOUTS * limit_seconds or _NO_LIMIT_SECONDS, _NO_LIMIT_SECONDS)


class Watchdog:
    """Watches the stages of this process while it is entered."""

    def __init__(
        self,
        *,
        limit_seconds: float,
        rank: int = 0,
        world_size: int = 1,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """Nothing is watched before it is entered.

        Args:
            limit_seconds: how long a stage may last; 0 watches nothing.
            rank: this process among its peers, as far as it is known before they have met.
            world_size: number of ranks.
            end: what ends the process, given the exit code.
        """
        self._limit = limit_seconds
        self._rank, self._world_size = rank, world_size
        self._end = end
        self._interval = min(1.0, limit_seconds / 20)
        self._beat_every = min(10.0, limit_seconds / 20)
        self._silence = max(2.0, 3 * self._beat_every)
        self._heartbeats: Heartbeats | None = None
        self._stage, self._age = stages.now(), 0.0
        self._beat_due = self._ticked = time.monotonic()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._limit > 0:
            self._thread = threading.Thread(target=self._watch, name="unicl-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            if self._heartbeats is not None:
                self._heartbeats.close()

    def meet(self, ranks: Ranks) -> None:
        """From here on ranks tell each other what they do; all come here together."""
        if self._thread is not None and ranks.world_size > 1:
            self._heartbeats = Heartbeats(ranks)

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            self._tick(time.monotonic())

    def _tick(self, now: float) -> None:
        # when this thread itself was held up, the process was stopped, and has not hung so long
        passed = min(now - self._ticked, 3 * self._interval)
        self._ticked = now
        stage = stages.now()
        self._age = self._age + passed if stage is self._stage else 0.0
        self._stage = stage
        left = self._limit * stage.patience - self._age
        if self._heartbeats is not None:
            self._heartbeats.receive()
            if now >= self._beat_due or left < 0:
                self._beat_due = now + self._beat_every
                self._heartbeats.send(stage, age_seconds=self._age, left_seconds=left)
        if left < 0 and not (stage.waits_for_ranks and self._another_works(now)):
            os.write(2, f"\nunicl_fast: {self._describe(now)}\n".encode())
            faulthandler.dump_traceback(2)
            self._end(EXIT_HUNG)

    def _heard(self) -> dict[int, Heartbeat]:
        return {} if self._heartbeats is None else self._heartbeats.heard

    def _another_works(self, now: float) -> bool:
        return any(
            now - beat.heard < self._silence
            and beat.left_seconds > 0
            and not beat.stage.waits_for_ranks
            for beat in self._heard().values()
        )

    def _describe(self, now: float) -> str:
        """Who hangs in what, what the others do, and what to do."""
        stage = self._stage
        allowed = f"run.timeout_seconds={self._limit:g}"
        if stage.patience != 1:
            allowed = f"{stage.patience:g} times {allowed}"
        of_ranks = f" of {self._world_size}" if self._world_size > 1 else ""
        sentences = [
            f"rank {self._rank}{of_ranks} HANGS: {name_of(stage)} has lasted {self._age:.0f} s, "
            f"and {allowed} allows no more."
        ]
        if self._world_size > 1:
            sentences += describe_others(
                self._heard(),
                rank=self._rank,
                world_size=self._world_size,
                blame=stage.waits_for_ranks,
                now=now,
                silence=self._silence,
            )
        advice = next((text for name, text in _ADVICE.items() if stage.name.startswith(name)), "")
        if advice and not stage.name.endswith(": waiting for other ranks"):
            sentences.append(f"Probably {advice}.")
        sentences.append(
            "Go on with --resume auto; if this may take so long, raise run.timeout_seconds (0: no "
            f"limit). Ending with code {EXIT_HUNG}; what its threads were doing:"
        )
        return " ".join(sentences)


def name_of(stage: Stage) -> str:
    """A stage as messages name it."""
    return f"'{stage.name}'" + ("" if stage.step is None else f" in step {stage.step}")


def describe_others(
    heard: dict[int, Heartbeat],
    *,
    rank: int,
    world_size: int,
    blame: bool,
    now: float,
    silence: float,
) -> list[str]:
    """Sentences on what the other ranks were last known to do; the suspects first.

    Args:
        heard: the last of each rank that was ever heard.
        rank: who speaks.
        world_size: number of ranks.
        blame: whether it is another rank's fault, since the speaker waits in a collective.
        now: on the clock of `heard`.
        silence: seconds after which a rank without a word is taken for stopped or lost.
    """
    silent: list[str] = []
    working: list[str] = []
    waiting: dict[str, list[int]] = {}
    unheard: list[int] = []
    for other in range(world_size):
        if other == rank:
            continue
        beat = heard.get(other)
        if beat is None:
            unheard.append(other)
        elif now - beat.heard > silence:
            silent.append(
                f"rank {other} has given no sign of life for {now - beat.heard:.0f} s and was then "
                f"in {name_of(beat.stage)}"
            )
        elif beat.stage.waits_for_ranks:
            waiting.setdefault(name_of(beat.stage), []).append(other)
        else:
            seconds = beat.age_seconds + now - beat.heard
            working.append(f"rank {other} is in {name_of(beat.stage)} for {seconds:.0f} s")
    sentences = []
    first = "LOOK THERE FIRST: " if blame else ""
    if silent:
        sentences.append(
            f"{first}{_some(silent)} (the process is stopped, frozen or gone, or its machine or "
            "network)."
        )
    if working:
        sentences.append(f"{'' if silent else first}{_some(working)}.")
    for name, others in waiting.items():
        sentences.append(f"In {name}: {_names(others)}.")
    if unheard:
        sentences.append(f"Nothing was heard of {_names(unheard)}.")
    return sentences


def _some(descriptions: list[str], *, most: int = 8) -> str:
    shown = "; ".join(descriptions[:most])
    left = len(descriptions) - most
    return f"{shown}; and {left} more ranks" if left > 0 else shown


def _names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
