"""Asked to stop: by a scheduler that wants the machine back, or by a person.

The step that runs is finished, a checkpoint is written, and the program ends with code 75 ("try
again later"), so that a job script knows that the run can go on. All ranks stop at the same step.
While there is nothing to save yet, the program ends at once with the same code (`ending_at_once`).
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from unicl_fast.distributed import ending_at_once
from unicl_fast.distributed.ending_at_once import WATCHED
from unicl_fast.distributed.exit_codes import EXIT_INTERRUPTED as EXIT_INTERRUPTED
from unicl_fast.system.stages import WaitingForRanks

if TYPE_CHECKING:
    from unicl_fast.distributed.ranks import Ranks


class Interrupted(Exception):  # noqa: N818 - as KeyboardInterrupt, it is no error
    """The run was asked to stop, and has stopped where it can go on."""


class Interruption:
    """Watches for SIGTERM, SIGUSR1 and SIGINT while it is entered; a second SIGINT ends at once.

    Outside the main thread, where Python lets nobody watch signals, it sees none.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        """The first signal that came, "" for none."""
        self._num_interrupts = 0
        self._before: dict[signal.Signals, Any] = {}
        self._pending: Any = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._note)
                for number in WATCHED
                if signal.getsignal(number) is not signal.SIG_IGN  # nohup, a shell's background
            }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        ending_at_once.allow()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pending is not None and kind in (None, Interrupted):
            with WaitingForRanks():  # all have asked; none must leave before it is answered
                self._pending[0].wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts == 2:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name

    def has_come(self, ranks: Ranks) -> bool:
        """Whether to stop after this step; the same answer on all ranks.

        Call it once a step, on all ranks. Among several it tells what was known a step earlier, so
        that asking the others costs no waiting.
        """
        ending_at_once.forbid()  # a step is done: there is something to save
        if ranks.world_size == 1:
            return bool(self.signal_name)
        import torch
        import torch.distributed as dist

        answer = False
        if self._pending is not None:
            work, flag = self._pending
            with WaitingForRanks():
                work.wait()
            answer = bool(flag)
        flag = torch.tensor(int(bool(self.signal_name)))
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=ranks.host_group, async_op=True)
        self._pending = work, flag
        return answer
