"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported, here and in the programs that tests start: their tensors are too small
# for two threads, which on a busy machine wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

_CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real pictures and captions; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("UNICL_TEST_DATA", _CHECKOUT.parent / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.skip(f"no test data at {folder}; set UNICL_TEST_DATA to the folder that holds it")
    return folder


# Timed out by us, not by hypothesis: first calls compile and the machine may be busy.
settings.register_profile("unicl_fast", deadline=None, derandomize=True)
settings.load_profile("unicl_fast")
