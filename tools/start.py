"""The programs' entry points: Ctrl-C ends them with a sentence while they are still being imported.

A KeyboardInterrupt in the middle of an import is a traceback, and some libraries make another
error of it. Nothing is to be cleaned up yet.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable


def _program(module: str) -> Callable[[], None]:
    def start() -> None:
        usual = signal.getsignal(signal.SIGINT)
        if usual is signal.default_int_handler:  # and not ignored, as behind nohup
            signal.signal(signal.SIGINT, _end)
        program = importlib.import_module(f"unicl_fast.tools.{module}")
        signal.signal(signal.SIGINT, usual)
        program.main()

    return start


def _end(*_: object) -> None:
    name = os.path.basename(sys.argv[0])
    os.write(2, f"\n{name}: stopped by Ctrl-C\n".encode(errors="replace"))
    os._exit(130)  # program.EXIT_ABORTED, whose import takes a while


pack = _program("pack.__main__")
pretrain = _program("pretrain")
evaluate = _program("evaluate.__main__")
ledger = _program("ledger")
convert = _program("convert.__main__")
bench = _program("bench")
doctor = _program("doctor.__main__")
