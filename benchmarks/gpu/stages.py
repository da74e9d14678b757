"""The stages of `unicl-bench gpu`: checks, the tests, and the other programs on the GPU.

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

from ..harness import Stage, summarise
from .checks import Checks

_CHECKOUT = Path(__file__).resolve().parents[2]
_LARGE = "swin_base_patch4_window7_224"
_NEEDS_GPU = re.compile(r"mark\.gpu\b|: Compute\b")
"""In the text of a test: a mark, or the fixture `compute`, one of whose ways is the GPU."""


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
    wrapper: tuple[str, ...] = ()
    """A command in which its process runs; without that program it is skipped."""
    marks: str = ""
    """Images/s on a GPU that others publish for this model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tests(Stage):
    """The tests that need a GPU, in a process of their own."""

    device: DeviceName = "cuda"

    def run(self) -> None:
        """Counts results; RuntimeError unless some pass and none fails."""
        there = [
            str(path)
            for path in sorted((_CHECKOUT / "tests").rglob("test_*.py"))
            if _NEEDS_GPU.search(path.read_text(encoding="utf-8"))  # others may lack packages here
        ]
        if not there:
            raise RuntimeError(f"{_CHECKOUT} holds no tests for a GPU: start from a checkout")
        if self.device == "cpu":
            there.append("--collect-only")
        command = [sys.executable, str(Path(__file__).parent), "pytest", "-m", "gpu", "-q", "-rfE"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", *there]
        found = subprocess.run(
            command, cwd=_CHECKOUT, stdout=subprocess.PIPE, text=True, check=False
        ).stdout
        print(found)
        summary = re.findall(
            r"(\d+)(?:/\d+ tests)? (passed|failed|skipped|errors?|collected)", found[-500:]
        )
        counts = {name: int(count) for count, name in summary}
        figures = {name: summarise([count]) for name, count in counts.items()}
        self.write_result(figures, "pytest", notes=[f"{len(there)} files"])
        lines = re.findall(r"^(?:FAILED|ERROR) .*", found, flags=re.MULTILINE)
        if lines or not counts.get("passed" if self.device == "cuda" else "collected"):
            raise RuntimeError(f"of the tests {counts}: {'; '.join(lines)[:1000]}")


def _step(about: str, part: str, *needs: str, **options: Any) -> GpuStage:
    options = {"parts": (part,), "batch_size": 256, **options}
    return GpuStage(about=about, program="step", options=options, needs=needs)


def _check(
    about: str, part: str, *needs: str, wrapper: tuple[str, ...] = (), **options: Any
) -> GpuStage:
    options = {"part": part, **options}
    return GpuStage(about=about, program="checks", options=options, needs=needs, wrapper=wrapper)


def _model(image_encoder: str, marks: str, batch_size: int = 256) -> GpuStage:
    step = _step(
        f"a step of {image_encoder}", "profile", image_encoder=image_encoder, batch_size=batch_size
    )
    return dataclasses.replace(step, marks=marks)


_TEST_PACKAGES = ("pytest", "pytest_timeout", "hypothesis", "beartype", "jaxtyping")
_INSTALLED = ("tyro", "msgspec", "xxhash", "ftfy", "regex")
COMMANDS: dict[str, dict[str, GpuStage]] = {
    "first": {
        "machine": _check("the device, and the versions that kernels depend on", "machine"),
        "rates": _check("bare rates of the device", "rates"),
        "windows": _check("attention in windows, by our kernels", "windows", "triton"),
        "loss-signs": _check("the loss where pairs fit well, less its value in fp64", "loss"),
        "ways": _check("a step of Swin-T by each kernel and compilation", "ways", rounds=3),
        "sanitizer": _check(
            "attention in windows, under compute-sanitizer", "windows", "triton",
            wrapper=("compute-sanitizer", "--error-exitcode", "1"),
        ),
    },
    "tests": {"tests": GpuStage(about="pytest -m gpu", program="tests", needs=_TEST_PACKAGES)},
    "step": {
        "ways-256": _check("a step of Swin-T by each way, 256 images", "ways", batch_size=256),
        "ways-512": _check("the same, 512 images", "ways", batch_size=512),
        "step": _step("a step of Swin-T, its parts", "profile"),
        "step-64": _step("the same, 64 images", "profile", batch_size=64),
    },
    "loss": {
        "loss": GpuStage(
            about="the loss by itself", program="loss", options={"parts": ("loss",)},
            needs=("open_clip",),
        ),
        "text": GpuStage(
            about="layouts of texts", program="loss",
            options={"parts": ("text",), "batch_size": 256},
        ),
    },
    "efficiency": {
        "switches": _step("precision, compilation, checkpointing, layouts", "switches"),
        "large": _step("a step of Swin-B, its parts", "profile", image_encoder=_LARGE),
    },
    "models": {
        "b-32": _model("vit_base_patch32_clip_224", "639 to 850, LAION's B/32 on an A100"),
        "b-16": _model("vit_base_patch16_clip_224", "396, LAION's B/16 on an A100"),
        "l-14": _model("vit_large_patch14_clip_224", "101, LAION's L/14 on an A100", 128),
        "vit-s": _model("vit_small_patch16_224", "3,638, nvSubquadratic's ViT-5-Small, compiled"),
        "vit-b": _model("vit_base_patch16_224", "2,119, nvSubquadratic's ViT-5-Base, compiled"),
        "open-clip": _step(
            "open_clip's step of ViT-B/32", "open-clip", "open_clip",
            image_encoder="vit_base_patch32_224",
        ),
    },
    "run": {
        "run": GpuStage(
            about="what limits a run of Swin-T", program="run",
            options={"options": ("--preset", "swin-tiny"), "seconds": 120.0, "apply": True},
            needs=("nvidia.dali", *_INSTALLED), needs_data=True,
        ),
    },
}  # fmt: skip
"""The stages by what is asked for at once, which takes less than nine minutes."""
STAGES = {name: stage for stages in COMMANDS.values() for name, stage in stages.items()}
PROGRAMS: dict[str, type[Any]] = {"tests": Tests, "checks": Checks}
"""Programs that are stages only."""
TINY: dict[str, Any] = {
    **{"batch_size": 2, "image_encoder": "test_vit", "image_size": 160, "sizes": (64,)},
    **{"rounds": 1, "memory": False, "device": "cpu"},
}
"""Options of a dry run, as far as a program has them."""
