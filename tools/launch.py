"""How programs become ranks, and how they speak: shared by training and evaluation."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # it imports torch, for which --help need not wait
    from unicl_fast.dist import Ranks


def start_ranks(module: str, *, nproc: int, argv: Sequence[str]) -> NoReturn:
    """Replaces this process by torchrun, which starts a program `nproc` times on this machine.

    Args:
        module: what to start, as for `python -m`.
        nproc: number of ranks.
        argv: the program's arguments.
    """
    # without this every rank would start as many threads as the machine has cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # torchrun takes --nproc for its own abbreviation even behind the program's name
    argv = _without_option(argv, "--nproc")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launcher, "-m", module, *argv])


def stop(program: str, error: Exception, *, code: int) -> NoReturn:
    """Ends with the error's sentence; its traceback is there for who asks (UNICL_TRACEBACK=1)."""
    if os.environ.get("UNICL_TRACEBACK"):
        raise error
    print(f"{program}: {error}", file=sys.stderr)
    sys.exit(code)


def _without_option(argv: Sequence[str], name: str) -> list[str]:
    """`argv` without `name VALUE` and `name=VALUE`."""
    kept, skip = [], False
    for word in argv:
        if skip or word == name or word.startswith(f"{name}="):
            skip = word == name
        else:
            kept.append(word)
    return kept


def configure_logging(ranks: Ranks) -> None:
    """Rank 0 speaks; the others only when something is wrong."""
    logging.basicConfig(
        level=logging.INFO if ranks.is_main else logging.ERROR,
        format="%(levelname).1s %(name)s: %(message)s",
    )
    if not ranks.is_main:
        warnings.simplefilter("ignore")
