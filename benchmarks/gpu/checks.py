"""The first minute on a GPU: its bare rates, and steps by each kernel and compilation.

Each check has a process of its own, since a kernel that crashes leaves no device to its process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from unicl_fast.config import DeviceName
from unicl_fast.system.gpu_kernels import fault_in_trial
from unicl_fast.system.machine import choose_device

from ..harness import Figures, Stage, printed, rate_of, summarise, take_turns
from ..step.parts import build_trainer, random_batch, step_config

Check = Literal["machine", "rates", "kernels", "ways"]
PRODUCT_MARK, COPY_MARK = 798.0, 3000.0
"""TFLOP/s of a large bf16 product and GB/s of a copy, as measured on H100s (SXM)."""
_AGREE = 0.03


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checks(Stage):
    """A check of the GPU, or of a step on it."""

    part: Check
    device: DeviceName = "cuda"
    batch_size: int = 64
    image_encoder: str = "swin_tiny_patch4_window7_224"
    image_size: int = 224

    def run(self) -> None:
        """Writes figures and notes; RuntimeError where a result is wrong."""
        device = choose_device(self.device)
        notes: list[str] = []
        checks: dict[Check, Callable[[], Figures]] = {
            "machine": lambda: describe(device, notes),
            "rates": lambda: measure_rates(device, rounds=self.rounds),
            "kernels": lambda: try_kernels(device, notes),
            "ways": lambda: self._measure_ways(device, notes),
        }
        figures = printed(checks[self.part]())
        self.write_result(figures, "triton", "timm", notes=notes)
        if wrong := [note for note in notes if note.startswith("WRONG")]:
            raise RuntimeError("; ".join(wrong))

    def _measure_ways(self, device: torch.device, notes: list[str]) -> Figures:
        """Steps by each kernel and compilation; none may wait for the GPU, all losses agree."""
        batch = random_batch(self.batch_size, pixels=self.image_size, num_texts=self.batch_size)
        figures: Figures = {}
        losses: dict[str, float] = {}
        is_gpu = device.type == "cuda"
        ways = (
            itertools.product(("timm", "triton"), ("off", "blocks"))
            if is_gpu
            else [("timm", "off")]
        )
        for attention, compiled in ways:
            name = f"{attention}, compile={compiled}"
            config = step_config(
                self.image_encoder, image_size=self.image_size, batch_size=self.batch_size,
                device=self.device, precision="bf16", window_attention=attention, compile=compiled,
            )  # fmt: skip
            try:
                torch.manual_seed(0)
                trainer, there = build_trainer(config, batch)
                losses[name] = float(trainer.train_step(there)[0])
                for _ in range(2):
                    trainer.train_step(there)
                with without_waits(device):
                    trainer.train_step(there)
            except (RuntimeError, ValueError) as error:
                notes.append(f"WRONG: {name}: {str(error)[:300]}")
                continue
            step = functools.partial(trainer.train_step, there)
            turns = take_turns({name: step}, rounds=self.rounds, device_type=device.type)
            figures[f"{name}, images/s"] = rate_of(turns[name], self.batch_size)
            if is_gpu:
                figures[f"{name}, GB"] = summarise([torch.cuda.max_memory_allocated() / 1e9])
                torch.cuda.reset_peak_memory_stats()
            del trainer, there, step
        first = next(iter(losses.values()), math.nan)
        notes.extend(
            f"WRONG: {name}: the first loss is {loss:.4f}, not {first:.4f}"
            for name, loss in losses.items()
            if not abs(loss - first) <= _AGREE * first
        )
        return figures


def describe(device: torch.device, notes: list[str]) -> Figures:
    """Notes the versions on which kernels depend; the figures are those of the device."""
    versions: dict[str, Any] = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    figures: Figures = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions |= {"device": properties.name, "nccl": torch.cuda.nccl.version()}
        versions["capability"] = f"{properties.major}.{properties.minor}"
        figures["memory, GB"] = summarise([properties.total_memory / 1e9])
        figures["multiprocessors"] = summarise([properties.multi_processor_count])
    for name, command in {
        "driver": ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "ptxas": (_ptxas(), "--version"),
    }.items():
        if (program := shutil.which(command[0])) is not None:
            ended = subprocess.run(
                [program, *command[1:]], capture_output=True, text=True, check=False
            )
            versions[name] = (ended.stdout.strip().splitlines() or ["?"])[-1]
    notes.extend(f"{name} {value}" for name, value in versions.items())
    return figures


def _ptxas() -> str:
    """The assembler that Triton calls."""
    with contextlib.suppress(ImportError, AttributeError):
        from triton import knobs

        return str(knobs.nvidia.ptxas.path)
    return "ptxas"


def measure_rates(device: torch.device, *, rounds: int) -> Figures:
    """The rates of a bf16 product and of a copy, next to their marks."""
    is_gpu = device.type == "cuda"
    side, size = (8192, 1 << 30) if is_gpu else (256, 1 << 20)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, product = torch.empty_like(source), torch.empty_like(left)
    works: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(left, right, out=product),
        "copy": lambda: target.copy_(source),
    }
    turns = take_turns(works, rounds=rounds, warm_up=3, device_type=device.type)
    rates = {
        "bf16 product, TFLOP/s": (rate_of(turns["product"], 2 * side**3 / 1e12), PRODUCT_MARK),
        "copy, GB/s read and written": (rate_of(turns["copy"], 2 * size / 1e9), COPY_MARK),
    }
    figures: Figures = {}
    for name, (rate, mark) in rates.items():
        figures[name] = rate
        if is_gpu:  # a dry run has no GPU to compare
            part = summarise([one / mark for one in rate["all"]])
            figures[f"{name}: times the mark of {mark:,.0f}"] = part
    return figures


def try_kernels(device: torch.device, notes: list[str]) -> Figures:
    """The trials of a run that takes `auto`: our kernels against fp64, in memory that holds NaN."""
    for trial in ("models.window_trial", "objectives.loss_trial"):
        for dtype in ("float32", "bfloat16"):
            fault = fault_in_trial(f"unicl_fast.{trial}", device, dtype)
            notes.append(f"WRONG: {fault}" if fault else f"{trial} in {dtype}: right")
    return {}


@contextlib.contextmanager
def without_waits(device: torch.device) -> Iterator[None]:
    """Refuses (RuntimeError) what makes the host wait for the GPU during the block."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
