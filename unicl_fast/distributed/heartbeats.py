"""Ranks tell each other what they are doing, so that the one that hangs can be named.

One datagram to each other rank every few seconds, sent and read without waiting: what a hung rank,
a stopped process or a lost machine does can hold nobody up, and there is no server that all depend
on. Lost ones do not matter. (The group's own store would not do: a client waits for its answer
without a limit when the process that holds it is stopped.)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from unicl_fast.distributed.ranks import Ranks, gather_objects
from unicl_fast.system.stages import Stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last that was heard of another rank."""

    stage: Stage
    age_seconds: float
    """How long it had been in that stage."""
    left_seconds: float
    """How much longer that stage may last; negative when it should have ended."""
    heard: float
    """When it came, on this rank's monotonic clock."""


@dataclass(frozen=True, slots=True)
class _Address:
    host_name: str
    ip: str
    port: int

    def seen_from(self, other: _Address) -> tuple[str, int]:
        if self.host_name == other.host_name:
            return "127.0.0.1", self.port
        # a machine that finds its own name in /etc/hosts may think it is 127.0.1.1
        return (self.host_name if self.ip.startswith("127.") else self.ip), self.port


class Heartbeats:
    """This rank's line to all others."""

    def __init__(self, ranks: Ranks) -> None:
        """Opens a port and exchanges addresses; all ranks come here together.

        A rank that gets no port says so, and neither hears nor is heard.
        """
        self.heard: dict[int, Heartbeat] = {}
        self._rank = ranks.rank
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        mine: _Address | None = None
        try:
            self._socket.bind(("", 0))
            mine = _Address(
                host_name=socket.gethostname(),
                ip=_own_ip(os.environ.get("MASTER_ADDR", "127.0.0.1")),
                port=self._socket.getsockname()[1],
            )
        except OSError as error:
            logger.error("no heartbeats: %s; if a rank hangs, it may go unnamed", error)
        # others on the network may send what they like: rank 0's word tells ours
        words: Sequence[tuple[str, _Address | None]]
        words = gather_objects((secrets.token_hex(8), mine), ranks)
        self._token = words[0][0]
        self._targets: dict[int, tuple[str, int]] = {}
        for rank, (_, address) in enumerate(words):
            if rank != self._rank and address is not None and mine is not None:
                host, port = address.seen_from(mine)
                # a name is looked up now: later it might take long; unknown, it is not told
                with contextlib.suppress(OSError):
                    self._targets[rank] = socket.gethostbyname(host), port

    def send(self, stage: Stage, *, age_seconds: float, left_seconds: float) -> None:
        """Tells all others; what cannot be sent now is not sent."""
        content = [self._token, self._rank, list(stage), age_seconds, left_seconds]
        datagram = json.dumps(content).encode()
        for target in self._targets.values():
            with contextlib.suppress(OSError):
                self._socket.sendto(datagram, target)

    def receive(self) -> None:
        """Reads what has come since the last time into `heard`."""
        while True:
            try:
                datagram = self._socket.recv(4096)
            except OSError:  # nothing more; or an error of an earlier sending, which is of no use
                return
            with contextlib.suppress(ValueError, TypeError):
                token, rank, stage, age_seconds, left_seconds = json.loads(datagram)
                if token == self._token:
                    self.heard[int(rank)] = Heartbeat(
                        Stage(*stage), float(age_seconds), float(left_seconds), time.monotonic()
                    )

    def close(self) -> None:
        self._socket.close()


def _own_ip(reached: str) -> str:
    """The address that this machine has on the network where `reached` is. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((reached, 9))
        except OSError:
            return "127.0.0.1"
        ip: str = probe.getsockname()[0]
        return ip
