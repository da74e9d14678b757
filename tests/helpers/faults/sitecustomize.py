"""Stuck storage in one rank of a program; Python imports this first where it lies on PYTHONPATH.

The thread of rank UNICL_FAULT that reads images never comes back once the file UNICL_FAULT_WHEN is
there.
"""

import os
import sys
import threading
import time


def _hang_when(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.02)
    dataset = sys.modules["unicl_fast.dataset.reader"].PackedDataset
    dataset.image_bytes = dataset.read_images = lambda *_, **__: time.sleep(3600)


if os.environ.get("RANK") == os.environ.get("UNICL_FAULT", ""):
    when = os.environ["UNICL_FAULT_WHEN"]
    threading.Thread(target=_hang_when, args=(when,), daemon=True).start()
