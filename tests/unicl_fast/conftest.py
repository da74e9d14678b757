"""What several of the library's tests train on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import real_pictures


@pytest.fixture(scope="session")
def images(shared_data: Path) -> torch.Tensor:
    """Twelve photographs, uint8 [12 32 32 3]."""
    return real_pictures(shared_data, 12)
