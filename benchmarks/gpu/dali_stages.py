"""Part B: what needs DALI on the GPU."""

from __future__ import annotations

from .measure import Bench
from .stages import PART_A, GpuStage, run_tests


def run_pipeline_tests(bench: Bench) -> None:
    """Runs the tests of the loader that need a GPU."""
    run_tests(bench, "tests/pipelines")


_DALI = ("nvidia.dali",)
PART_B = {
    "dali-tests": GpuStage(
        part="B1",
        about="pytest -m gpu tests/pipelines",
        run=run_pipeline_tests,
        needs=(*_DALI, *PART_A["tests"].needs),
    ),
}
