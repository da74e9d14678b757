"""Processes that tests start."""

import os
import subprocess
import sys


def run_python(*arguments: object, timeout: float = 290, **environment: str) -> str:
    """What Python prints that is called with these arguments; it must not fail."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
