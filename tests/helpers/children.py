"""A child of the tests' process: it has all that was imported, and its changes end with it."""

import os
import sys
import traceback
from collections.abc import Callable


def run_in_child(function: Callable[[], object], *, forget: str) -> None:
    """Calls a function where modules whose names begin with `forget` are imported anew."""
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
