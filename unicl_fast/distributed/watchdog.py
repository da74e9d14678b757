"""Ends a rank that hangs, and says which rank hangs in what.

A rank that waits in a collective is not judged while another one works within its own limit (rank 0
may be saving), so the rank at fault speaks first. Heartbeats carry stages between ranks. torch's
own tools know collectives only, not the storage or thread before one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import secrets
import socket
import struct
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from unicl_fast.distributed.ranks import (
    Ranks,
    from_rank_0,
    gather_integers,
    gather_objects,
    uses_nccl,
)
from unicl_fast.distributed.rendezvous import address_towards_rank_0
from unicl_fast.distributed.signals import EXIT_HUNG
from unicl_fast.system.progress import Stage, current_stage
from unicl_fast.system.untrusted_files import open_file

logger = logging.getLogger(__name__)

# Beyond all that stages may last: the watchdog's message comes first, and is the better one. Torch
# ends what outlasts even that, where the watchdog itself cannot run.
_GROUP_TIMEOUTS = 10
_DUMP_PREFIXES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # torch's own
_DUMP_SECONDS = 20.0
_NO_LIMIT_SECONDS = 365 * 24 * 3600.0
_MOST_SENTENCES = 8
_MOST_FAILED_TICKS = 20
_MOST_DATAGRAMS = 10_000  # read in one tick, so that a flood cannot hold up the thread

_TOKEN_BYTES = 16
# token, rank, step (-1: none), whether it waits for ranks, age and rest in seconds, stage's name
_HEARTBEAT = struct.Struct(f"!{_TOKEN_BYTES}sIq?dd160s")
_BUFFERED_BYTES = 1280  # of a heartbeat in a socket's buffer, with the kernel's own

_ADVICE = {
    "waiting for the next batch": "the storage of data.train is stuck, or a thread that reads or "
    "decodes",
    "checkpoint": "the storage of the run folder is stuck or slow",
    "reading the loss": "the device does not finish: a kernel hangs, or a collective waits",
    "meeting the other ranks": "not all ranks have come: see whether each was started and whether "
    "MASTER_ADDR and MASTER_PORT can be reached",
}


def group_timeout(limit_seconds: float) -> float:
    """Computes a time limit for torch's collectives that lets the watchdog speak first."""
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
        """Ends the process, by `end`, when a stage lasts longer than the limit (0: never)."""
        self._limit = limit_seconds
        self._rank, self._world_size = rank, world_size
        self._end = end
        self._interval = min(1.0, limit_seconds / 20)
        self._beat_every = min(10.0, limit_seconds / 20)
        self._silence = max(2.0, 3 * self._beat_every)
        self._heartbeats: Heartbeats | None = None
        self._stage, self._age = current_stage(), 0.0
        self._ticked = time.monotonic()
        # ranks take turns, so that no socket gets the heartbeats of all at once
        self._beat_due = self._ticked + self._beat_every * rank / world_size
        self._stopped = threading.Event()
        self._num_failed_ticks = 0
        self._logged_errors: set[type[Exception]] = set()
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
            if self._heartbeats is not None:
                self._heartbeats.close()

    def meet(self, ranks: Ranks) -> None:
        """Begins heartbeats between ranks; all ranks call this together."""
        if self._thread is not None and ranks.world_size > 1:
            self._heartbeats = Heartbeats(ranks)

    def _watch(self) -> None:
        try:
            while not self._stopped.wait(self._interval):
                self._tick_or_log(time.monotonic())
        except BaseException as error:  # a thread that died of it would protect nobody, in silence
            self._end_process(
                f"rank {self._rank}: THE WATCHDOG CANNOT CONTINUE, and no hang would be noticed "
                f"({type(error).__name__}: {error}). Resume with --resume auto. Ending with code "
                f"{EXIT_HUNG}; what its threads were doing:"
            )

    def _tick_or_log(self, now: float) -> None:
        """Watches on after an error, but not when every tick ends in one."""
        try:
            self._tick(now)
        except Exception as error:
            self._num_failed_ticks += 1
            if self._num_failed_ticks == _MOST_FAILED_TICKS:
                raise
            self._log_once(error)
        else:
            self._num_failed_ticks = 0

    def _log_once(self, error: Exception) -> None:
        if type(error) not in self._logged_errors:
            self._logged_errors.add(type(error))
            logger.error(
                "THE WATCHDOG FAILED with %s: %s; it continues to watch (please report this)",
                type(error).__name__, error, exc_info=error,
            )  # fmt: skip

    def _end_process(self, text: str) -> None:
        try:
            os.write(2, f"\nunicl_fast: {text}\n".encode(errors="replace"))
            faulthandler.dump_traceback(2)
            if place := dump_collectives(self._rank):
                os.write(2, f"\nunicl_fast: NCCL's last collectives are in {place}\n".encode())
        finally:  # also where nobody reads what is said
            self._end(EXIT_HUNG)

    def _tick(self, now: float) -> None:
        # when this thread itself was held up, the process was stopped, and has not hung so long
        passed = min(now - self._ticked, 3 * self._interval)
        self._ticked = now
        stage = current_stage()
        self._age = self._age + passed if stage is self._stage else 0.0
        self._stage = stage
        left = self._limit * stage.patience - self._age
        try:
            self._exchange_heartbeats(now, left_seconds=left)
        except Exception as error:  # this rank's own stage is judged all the same
            self._log_once(error)
        heard = self._heartbeats.heard if self._heartbeats is not None else {}
        another_works = any(
            now - beat.heard < self._silence
            and beat.left_seconds > 0
            and not beat.stage.waits_for_ranks
            for beat in heard.values()
        )
        if left < 0 and not (stage.waits_for_ranks and another_works):
            self._end_process(self._describe(now))

    def _exchange_heartbeats(self, now: float, *, left_seconds: float) -> None:
        if self._heartbeats is None:
            return
        self._heartbeats.receive()
        if now >= self._beat_due or left_seconds < 0:
            # by whole periods: after a pause of all ranks, each still has its own turn
            self._beat_due += self._beat_every * (1 + (now - self._beat_due) // self._beat_every)
            self._heartbeats.send(self._stage, age_seconds=self._age, left_seconds=left_seconds)

    def _describe(self, now: float) -> str:
        """Says which rank hangs in what, what the others do, and what to do."""
        stage = self._stage
        allowed = f"run.timeout_seconds={self._limit:g}"
        if stage.patience != 1:
            allowed = f"{stage.patience:g} times {allowed}"
        of_ranks = f" of {self._world_size}" if self._world_size > 1 else ""
        sentences = [
            f"rank {self._rank}{of_ranks} HANGS: {_name(stage)} has lasted {self._age:.0f} s, "
            f"and {allowed} allows no more."
        ]
        known = self._heartbeats.heard if self._heartbeats else {}
        heard = {rank: known.get(rank) for rank in range(self._world_size) if rank != self._rank}
        sentences += describe_others(
            heard, now=now, silence=self._silence, blame=stage.waits_for_ranks
        )
        advice = next((text for name, text in _ADVICE.items() if stage.name.startswith(name)), "")
        if advice and not stage.name.endswith(": waiting for other ranks"):
            sentences.append(f"Probably {advice}.")
        sentences.append(
            "Resume with --resume auto; if this may take so long, raise run.timeout_seconds (0: no "
            f"limit). Ending with code {EXIT_HUNG}; what its threads were doing:"
        )
        return " ".join(sentences)


def dump_collectives(rank: int) -> str:
    """Writes NCCL's last collectives, which end with this process, into a file of torchfrtrace's.

    Returns:
        The path: a prefix and the rank. Empty where there are none, or they cannot be written.
    """
    if not uses_nccl():
        return ""
    prefixes = filter(None, map(os.environ.get, _DUMP_PREFIXES))
    user = f"unicl_fast-{os.getuid()}-collectives-rank-"
    path = f"{next(prefixes, os.path.join(tempfile.gettempdir(), user))}{rank}"
    # CUDA's driver may hang too, under Python's lock: then this ends the process in our place
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


def describe_others(
    heard: Mapping[int, Heartbeat | None], *, now: float, silence: float, blame: bool
) -> list[str]:
    """Writes sentences on what the other ranks were last known to do; the suspects first.

    None was never heard; one silent for `silence` seconds is taken for lost. With `blame` the
    speaker waits in a collective, so another rank is at fault.
    """
    silent, working, waiting, unheard = (defaultdict[str, list[int]](list) for _ in range(4))
    for rank, beat in heard.items():
        if beat is None:
            unheard["nothing was heard of"].append(rank)
            continue
        since, name = now - beat.heard, _name(beat.stage)
        if since > silence:
            text = f"{since:.0f} s without a sign of life (stopped, frozen, gone, or cut off), last"
            silent[f"{text} in {name}"].append(rank)
        elif beat.stage.waits_for_ranks:
            waiting[f"in {name}"].append(rank)
        else:
            working[f"for {beat.age_seconds + since:.0f} s in {name}"].append(rank)
    sentences = [
        f"{_ranks(ranks)}: {text}."
        for group in (silent, working, waiting, unheard)
        for text, ranks in list(group.items())[:_MOST_SENTENCES]
    ]
    if blame and (silent or working):
        sentences[0] = f"LOOK THERE FIRST: {sentences[0]}"
    return sentences


def _name(stage: Stage) -> str:
    return f"'{stage.name}'" + ("" if stage.step is None else f" in step {stage.step}")


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last message of another rank."""

    stage: Stage
    age_seconds: float
    """How long it had been in that stage."""
    left_seconds: float
    """How much longer that stage may last; negative when it should have ended."""
    heard: float
    """When the message came, on this rank's monotonic clock."""


def format_heartbeat(
    stage: Stage, *, token: bytes, rank: int, age_seconds: float, left_seconds: float
) -> bytes:
    """Returns the datagram of a heartbeat; a long name of a stage is cut."""
    step = -1 if stage.step is None else stage.step
    name = stage.name.encode(errors="replace")
    return _HEARTBEAT.pack(
        token, rank, step, stage.waits_for_ranks, age_seconds, left_seconds, name
    )


def parse_heartbeat(
    datagram: bytes, *, token: bytes, world_size: int
) -> tuple[int, Heartbeat] | None:
    """Returns the rank and what it says; None for anything else, which anybody may send."""
    if len(datagram) != _HEARTBEAT.size or not secrets.compare_digest(
        datagram[:_TOKEN_BYTES], token
    ):
        return None
    _, rank, step, waits, age_seconds, left_seconds, name = _HEARTBEAT.unpack(datagram)
    if rank >= world_size:
        return None
    stage = Stage(
        name.rstrip(b"\0").decode(errors="ignore"),
        step if step >= 0 else None,
        waits_for_ranks=waits,
    )
    return rank, Heartbeat(stage, age_seconds, left_seconds, time.monotonic())


class Heartbeats:
    """One datagram to each other rank every few seconds, sent and read without waiting.

    (A client of the group's own store waits without a limit when the process behind it is stopped.)
    """

    def __init__(self, ranks: Ranks) -> None:
        """Opens a port, on the loopback interface if all ranks are on one machine; all together.

        A rank that gets no port logs an error, and neither hears nor is heard.
        """
        self.heard: dict[int, Heartbeat] = {}
        self._rank, self._world_size = ranks.rank, ranks.world_size
        host, own_ip = socket.gethostname(), address_towards_rank_0()
        machines = gather_objects([host, own_ip], ranks)
        is_one_machine = all(machine == machines[0] for machine in machines)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        _enlarge_buffer(self._socket, num_heartbeats=ranks.world_size - 1)
        port = 0
        try:
            self._socket.bind(("127.0.0.1" if is_one_machine else "", 0))
            port = self._socket.getsockname()[1]
        except OSError as error:
            logger.error("no heartbeats: %s; if a rank hangs, it may go unnamed", error)
        ports = gather_integers(port, ranks)
        # tells our ranks from others that send to this port
        self._token = bytes.fromhex(from_rank_0(secrets.token_hex(_TOKEN_BYTES), ranks))
        self._targets: list[tuple[str, int]] = []
        for rank, (other_port, (other_host, ip)) in enumerate(zip(ports, machines, strict=True)):
            if rank == self._rank or not port or not other_port:
                continue
            # a machine that finds its own name in /etc/hosts may think it is 127.0.1.1
            name = other_host if ip.startswith("127.") else ip
            # names are looked up now, since later it might take long; unknown ones get no message
            with contextlib.suppress(OSError):
                address = "127.0.0.1" if other_host == host else socket.gethostbyname(name)
                self._targets.append((address, other_port))

    def send(self, stage: Stage, *, age_seconds: float, left_seconds: float) -> None:
        """Sends to all others; what cannot be sent now is not sent."""
        datagram = format_heartbeat(
            stage,
            token=self._token,
            rank=self._rank,
            age_seconds=age_seconds,
            left_seconds=left_seconds,
        )
        for target in self._targets:
            with contextlib.suppress(OSError):
                self._socket.sendto(datagram, target)

    def receive(self) -> None:
        """Reads into `heard` what has come since the last time."""
        for _ in range(_MOST_DATAGRAMS):
            try:
                datagram = self._socket.recv(_HEARTBEAT.size + 1)  # longer ones differ in size too
            except OSError:  # nothing more; or the error of an earlier sending, which is of no use
                return
            found = parse_heartbeat(datagram, token=self._token, world_size=self._world_size)
            if found is not None:
                rank, self.heard[rank] = found

    def close(self) -> None:
        self._socket.close()


def _enlarge_buffer(receiver: socket.socket, *, num_heartbeats: int) -> None:
    """Makes room for a heartbeat of every rank, or says that the kernel allows less."""
    needed = num_heartbeats * _BUFFERED_BYTES
    if receiver.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= needed:
        return
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, needed)
    allowed = receiver.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    if allowed < needed:
        logger.warning(
            "heartbeats of %d other ranks need a receive buffer of %d bytes, and the kernel allows "
            "%d: if many come at once some are lost, and a rank that hangs may go unnamed; set "
            "net.core.rmem_max=%d on every node",
            *(num_heartbeats, needed, allowed, needed),
        )
