"""The stages of `unicl-bench gpu`: the tests, and the other programs on the GPU.

Images and texts are random without `--data`: a step's time does not depend on what they show.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from unicl_fast.config import DeviceName

from ..harness import Stage

TESTS = ("objectives", "models", "training", "checkpoints", "pipelines")
_CHECKOUT = Path(__file__).resolve().parents[2]
_LARGE = "swin_base_patch4_window7_224"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuStage:
    """One stage: what it measures, what it needs, and the program that measures it."""

    about: str
    program: str
    """`tests`, or a program of `unicl-bench`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped."""
    needs_data: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tests(Stage):
    """The tests that need a GPU, in a process of their own."""

    device: DeviceName = "cuda"

    def run(self) -> None:
        """Counts results; RuntimeError unless some pass and none fails."""
        there = [
            str(path)
            for folder in TESTS
            for path in sorted((_CHECKOUT / "tests" / folder).rglob("test_*.py"))
            if "mark.gpu" in path.read_text(encoding="utf-8")  # others may import what is not here
        ]
        if not there:
            raise RuntimeError(f"{_CHECKOUT} holds no tests for a GPU: start from a checkout")
        if self.device == "cpu":
            there = ["--collect-only", f"{_CHECKOUT}/benchmarks"]  # shows that pytest starts
        command = [sys.executable, str(Path(__file__).parent), "pytest", "-m", "gpu", "-q", "-rfE"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", *there]
        found = subprocess.run(
            command, cwd=_CHECKOUT, stdout=subprocess.PIPE, text=True, check=False
        ).stdout
        print(found)
        summary = re.findall(r"(\d+) (passed|failed|skipped|errors?)", found[-500:])
        counts = {name: int(count) for count, name in summary}
        self.write_result({}, "pytest", **counts)
        lines = re.findall(r"^(?:FAILED|ERROR) .*", found, flags=re.MULTILINE)
        if lines or (self.device == "cuda" and not counts.get("passed")):
            raise RuntimeError(f"of the tests {counts}: {'; '.join(lines)[:1000]}")


def _step(about: str, part: str, *needs: str, **options: Any) -> GpuStage:
    options = {"parts": (part,), "batch_size": 256, **options}
    return GpuStage(about=about, program="step", options=options, needs=needs)


_TEST_PACKAGES = ("pytest", "pytest_timeout", "hypothesis", "beartype", "jaxtyping")
STAGES = {
    "tests": GpuStage(about="pytest -m gpu", program="tests", needs=_TEST_PACKAGES),
    "step": _step("a step of Swin-T, its parts", "profile"),
    "step-64": _step("the same, 64 images", "profile", batch_size=64),
    "step-512": _step("the same, 512 images", "profile", batch_size=512),
    "switches": _step("precision, compilation, checkpointing, layouts", "switches"),
    "large": _step("a step of Swin-B, its parts", "profile", image_encoder=_LARGE),
    "open-clip": _step(
        "open_clip's step of ViT-B/32", "open-clip", "open_clip",
        image_encoder="vit_base_patch32_224",
    ),
    "loss": GpuStage(
        about="the loss by itself", program="loss", options={"parts": ("loss",)},
        needs=("open_clip",),
    ),
    "text": GpuStage(
        about="layouts of texts", program="loss", options={"parts": ("text",), "batch_size": 256}
    ),
    "run": GpuStage(
        about="what limits a run of Swin-T", program="run",
        options={"options": ("--preset", "swin-tiny"), "seconds": 120.0, "apply": True},
        needs=("nvidia.dali", "tyro", "msgspec", "xxhash", "ftfy", "regex"), needs_data=True,
    ),
}  # fmt: skip
PROGRAMS: dict[str, type[Any]] = {"tests": Tests}
"""Programs that are stages only."""
TINY: dict[str, Any] = {
    **{"batch_size": 2, "image_encoder": "test_vit", "image_size": 160, "sizes": (64,)},
    **{"rounds": 1, "memory": False, "device": "cpu"},
}
"""Options of a dry run, as far as a program has them."""
