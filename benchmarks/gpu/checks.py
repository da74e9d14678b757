"""The first minute on a GPU: its bare rates, whether our kernels are right on it, and steps.

Each check has a process of its own, since a kernel that crashes leaves no device to its process.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.config import DeviceName
from unicl_fast.models.window_trial import attention_and_gradients
from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.objectives.operands import LossForm
from unicl_fast.system.machine import choose_device

from ..harness import Figures, Stage, printed, rate_of, summarise, take_turns
from ..step.parts import build_trainer, random_batch, step_config

Check = Literal["machine", "rates", "windows", "loss", "ways"]
PRODUCT_MARK, COPY_MARK = 798.0, 3000.0
"""TFLOP/s of a large bf16 product and GB/s of a copy, as measured on H100s (SXM)."""
_LOSS_TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 5e-2}
"""Difference of a loss from fp64 on features that fit well, where the loss is nearly 0."""
_SCALES = (14.3, 100.0)
_ROUNDING, _TIMES_THEIRS = 8e-3, 1.5
"""The error that windows may have in bf16: of the norm, or times that of timm's in bf16."""
_REPEATS = 20
_SWIN_TINY = ((56, 3), (28, 6), (14, 12), (7, 24))
"""Side of the map and heads of each of its stages."""
_AGREE = 0.03


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checks(Stage):
    """A check of the GPU, of its kernels, or of a step on it."""

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
            "windows": lambda: check_windows(device),
            "loss": lambda: check_loss(device),
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


def check_windows(device: torch.device) -> Figures:
    """Errors of our attention in windows against timm in fp32, as parts of timm's own in bf16.

    Each is repeated with memory that holds NaN where a kernel would have to write, and must give
    the same bits. On a CPU timm's stands in for ours.
    """
    from timm.models.swin_transformer import SwinTransformerBlock

    figures: Figures = {}
    for (side, heads), shift in itertools.product(_SWIN_TINY, (0, 3)):
        if shift and side == 7:  # one window, which timm does not shift
            continue
        torch.manual_seed(0)
        block = SwinTransformerBlock(32 * heads, (side, side), heads, shift_size=shift)
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
        block = block.to(device)
        x, grad = torch.randn(2, 4, side, side, 32 * heads, device=device)
        exact = _attend(block, x, grad, autocast=False)
        theirs = _attend(block, x, grad)
        ours = copy.deepcopy(block)
        if device.type == "cuda":
            from unicl_fast.models.window_attention import fuse  # imports triton

            fuse(ours)
        with poisoned_memory():
            found = [
                _attend(ours, x, grad) for _ in range(_REPEATS if device.type == "cuda" else 2)
            ]
        name = f"map of {side}, {heads} heads, shift {shift}"
        if any(
            not torch.equal(a, b)
            for again in found[1:]
            for a, b in zip(again, found[0], strict=True)
        ):
            raise RuntimeError(f"{name}: the kernels do not give the same bits again")
        errors = []
        for our, their, right in zip(found[0], theirs, exact, strict=True):
            allowed = max(_TIMES_THEIRS * _gap(their, right), _ROUNDING * float(right.norm()))
            errors.append(_gap(our, right) / allowed)
        figures[f"{name}: error, of what is allowed"] = summarise(errors)
        if not max(errors) <= 1:
            raise RuntimeError(f"{name}: errors are {max(errors):.3g} times what is allowed")
    return figures


def _attend(block: Any, x: Tensor, grad: Tensor, *, autocast: bool = True) -> list[Tensor]:
    return list(attention_and_gradients(block, x, grad, autocast=autocast).values())


def _gap(one: Tensor, exact: Tensor) -> float:
    return float((one.double() - exact.double()).norm())


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills new tensors with NaN during the block, as torch does in its deterministic mode.

    So what a kernel fails to write shows.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_loss(device: torch.device) -> Figures:
    """The loss of pairs that fit well, less its value in fp64: with its sign, in each form.

    The loss cannot be negative, but tensor cores that cut numbers off make it so.
    """
    forms: list[LossForm] = ["dense", "tiled"]
    if device.type == "cuda":
        forms.append("triton")
    count = 4096 if device.type == "cuda" else 64
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(count, 512, generator=generator), dim=1)
    ids = torch.arange(count, device=device)
    figures: Figures = {}
    wrong = []
    for scale, form, precision in itertools.product(_SCALES, forms, _LOSS_TOLERANCE):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        inputs = features.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        exact = unified_contrastive_loss(inputs.double(), inputs.double(), ids, scale, form="dense")
        loss = unified_contrastive_loss(inputs, inputs, ids, scale, form=form)
        gap = float(loss.double() - exact)
        name = f"{form} in {precision}, scale {scale:g}"
        figures[f"{name}: off by"] = summarise([gap])
        if not abs(gap) <= _LOSS_TOLERANCE[precision]:
            wrong.append(f"{name}: {float(loss):.4f}, not {float(exact):.4f}")
    if wrong:
        printed(figures)
        raise RuntimeError(f"losses are wrong: {'; '.join(wrong)}")
    return figures


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
