"""A fault in one process of a program; Python imports this first where it lies on PYTHONPATH.

UNICL_FAULT=KIND:RANK chooses kind and rank (none for a process alone), UNICL_FAULT_WHEN the file
whose appearance brings it about.
"""

import os
import sys
import threading
import time


def _fail(kind: str) -> None:
    if kind == "segfault":
        import ctypes

        ctypes.string_at(0)
    elif kind == "abort":
        os.abort()
    elif kind == "exit":
        os._exit(3)
    elif kind == "data":  # the thread that reads images never comes back
        dataset = sys.modules["unicl_fast.dataset.reader"].PackedDataset
        dataset.image_bytes = lambda *_, **__: time.sleep(3600)


def _wait(kind: str, path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.02)
    _fail(kind)


_kind, _, _rank = os.environ.get("UNICL_FAULT", "").partition(":")
if _kind and os.environ.get("RANK", "") == _rank:
    threading.Thread(
        target=_wait, args=(_kind, os.environ["UNICL_FAULT_WHEN"]), daemon=True
    ).start()
