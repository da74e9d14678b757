"""Processes that tests start."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable


def run_python(*arguments: object, timeout: float = 290, **environment: str) -> str:
    """What Python prints that is called with these arguments; it must not fail."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def run_in_child(function: Callable[[], object], *, forget: str) -> None:
    """Calls a function in a fork, where modules whose names begin with `forget` are imported anew.

    It has all else that was imported, and its changes end with it.
    """
    child = os.fork()
    if not child:
        try:
            for module in [name for name in sys.modules if name.startswith(forget)]:
                del sys.modules[module]
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, "the child failed: its traceback is in stderr"
