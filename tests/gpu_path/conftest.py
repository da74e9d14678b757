"""Checks of the GPU's path on a machine without a GPU."""

import ctypes

import pytest
from fake_gpu import build_stand_in

from unicl_fast.models.compilation import has_compiler


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not has_compiler():
        pytest.skip("the stand-in for a GPU needs a C++ compiler; none found")
    return build_stand_in(tmp_path_factory.mktemp("stand-in"))
