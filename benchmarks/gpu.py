"""`unicl-bench gpu`: the first minute on a GPU, the tests for it, and the step and the loss on it.

    unicl-bench gpu --out REPORT [--stages first tests step loss]

`first` measures bare rates and checks our kernels. A GPU, `pip install -e '.[cuda13,dev]'` and no
network are enough. Each part runs in its own process, because a kernel that crashes takes the
device away from its process, and a stage ends after nine minutes.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.models.window_trial import attention_and_gradients
from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.objectives.operands import LossForm
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.tools.diagnose.measuring import describe_machine

from . import harness
from .harness import Figures, Program, printed, rate_of, summarise, take_turns
from .step.parts import build_trainer, random_batch, step_config

StageName = Literal["first", "tests", "step", "loss"]
MINUTES = 9.0  # the longest time of a stage
MARKS = {"bf16 product, TFLOP/s": 798.0, "copy, GB/s read and written": 3000.0}
"""Usual rates of an H100 (SXM), as measured."""
_LOSS_TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 5e-2}
"""Allowed difference of a loss from fp64 on features that fit well, whose loss is nearly 0."""
_SWIN_TINY = ((56, 3), (28, 6), (14, 12), (7, 24))
"""Side of the map and heads of each of its stages."""
_ROUNDING, _TIMES_THEIRS = 8e-3, 1.5
"""Allowed error of windows in bf16: part of the norm, or times the error of timm's in bf16."""
_TESTS = str(Path(__file__).resolve().parents[1] / "tests")
_BENCH = (sys.executable, "-m", "unicl_fast.tools.bench")
_CHECK = harness.module_command("gpu")
_NO_GPU = (
    "no CUDA device works here. Run this on a machine where nvidia-smi lists a GPU; if it does so "
    "here, unicl-doctor says what is wrong with torch or the driver. Without a GPU, `make test` "
    "runs our kernels interpreted, and `unicl-bench step --device cpu` times the step"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Program):
    """Checks and measures a GPU, in stages of less than nine minutes."""

    out: Path
    """Folder for the logs, the results of step and loss, and gpu.json, the summary of each call."""
    stages: tuple[StageName, ...] = ("first",)
    """first: bare rates and our kernels, a minute or two; tests: pytest -m gpu; step, loss: the
    programs of these names with --device cuda."""

    def run(self) -> None:
        """Runs the stages; ValueError without a GPU, RuntimeError if any part fails."""
        if not torch.cuda.is_available():
            raise ValueError(_NO_GPU)
        make_folder(self.out)
        torch.cuda.init()  # so that the report names the GPU
        machine, parts = describe_machine("timm", "triton"), dict[str, str]()
        for stage in self.stages:
            deadline = time.monotonic() + 60 * MINUTES
            for name, command in commands_of(stage, self.out).items():
                print(f"{name} ...", flush=True)
                parts[name] = _run_part(name, command, self.out, deadline)
                # after each part: a machine that is taken away leaves its results
                text = json.dumps({"machine": machine, "parts": parts}, indent=1) + "\n"
                (self.out / "gpu.json").write_text(text, encoding="utf-8")
        if failed := [name for name, end in parts.items() if end != "done"]:
            raise RuntimeError(f"{', '.join(failed)}: not done; see the logs in {self.out}")


def commands_of(stage: StageName, out: Path) -> Mapping[str, tuple[str, ...]]:
    """The commands of a stage by the name of their log."""
    on_gpu = ("--device", "cuda", "--batch-size", "256", "--json")
    if stage == "first":
        parts = {name: (*_CHECK, name, "cuda") for name in CHECKS}
        if sanitizer := shutil.which("compute-sanitizer"):
            parts["sanitizer"] = (sanitizer, "--error-exitcode", "1", *parts["windows"])
        return {f"first-{name}": command for name, command in parts.items()}
    if stage == "tests":
        return {stage: (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", _TESTS)}
    parts = {"step": ("profile", "switches"), "loss": ("loss", "text")}
    return {stage: (*_BENCH, stage, *on_gpu, str(out / f"{stage}.json"), "--parts", *parts[stage])}


def _run_part(name: str, command: tuple[str, ...], out: Path, deadline: float) -> str:
    """Runs a command, prints the end of its log, and returns how it ended."""
    log, seconds = out / f"{name}.log", max(1.0, deadline - time.monotonic())
    ended = harness.run_apart(command, log, seconds=seconds)
    print(harness.end_of(log), flush=True)
    if ended.code is None:
        return "cut off after nine minutes"
    return "done" if ended.code == 0 else f"ended with code {ended.code}"


def measure_rates(device: torch.device) -> Figures:
    """The rates of a bf16 product and of a copy, and on a GPU their ratio to an H100's."""
    is_gpu = device.type == "cuda"
    side, size = (8192, 1 << 30) if is_gpu else (256, 1 << 20)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, product = torch.empty_like(source), torch.empty_like(left)
    works: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(left, right, out=product),
        "copy": lambda: target.copy_(source),
    }
    turns = take_turns(works, rounds=5, warm_up=3, device_type=device.type)
    counts = {"product": 2 * side**3 / 1e12, "copy": 2 * size / 1e9}
    figures: Figures = {}
    for (name, mark), work in zip(MARKS.items(), works, strict=True):
        figures[name] = rate_of(turns[work], counts[work])
        if is_gpu:
            ratios = [one / mark for one in figures[name]["all"]]
            figures[f"{name}: times the mark of {mark:,.0f}"] = summarise(ratios)
    return figures


def check_windows(device: torch.device) -> Figures:
    """Errors of our window attention against timm's in fp32, as parts of the allowed error.

    Each is repeated in memory that holds NaN, so that an element that a kernel leaves unwritten
    shows, and must give the same bits. On a CPU timm's stands in for ours.
    """
    from timm.models.swin_transformer import SwinTransformerBlock

    # fills new tensors with NaN, until the process of this check ends
    torch.use_deterministic_algorithms(True, warn_only=True)
    is_gpu = device.type == "cuda"
    figures: Figures = {}
    for (side, heads), shift in itertools.product(_SWIN_TINY, (0, 3)):
        if shift and side == 7:  # one window, which timm does not shift
            continue
        torch.manual_seed(0)
        block = SwinTransformerBlock(32 * heads, (side, side), heads, shift_size=shift)
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
        block = block.to(device)
        x, grad = torch.randn(2, 4, side, side, 32 * heads, device=device)
        attend = functools.partial(_attend, x=x, grad=grad)
        exact, theirs, ours = attend(block, autocast=False), attend(block), copy.deepcopy(block)
        if is_gpu:
            from unicl_fast.models.window_attention import fuse  # imports triton

            fuse(ours)
        first, *again = [attend(ours) for _ in range(20 if is_gpu else 2)]
        name = f"map of {side}, {heads} heads, shift {shift}"
        if not all(map(torch.equal, itertools.chain(*again), itertools.cycle(first))):
            raise RuntimeError(f"{name}: the kernels do not give the same bits again")
        errors = []
        for our, their, right in zip(first, theirs, exact, strict=True):
            allowed = max(_TIMES_THEIRS * _gap(their, right), _ROUNDING * float(right.norm()))
            errors.append(_gap(our, right) / allowed)
        figures[f"{name}: error, of the allowed"] = summarise(errors)
        if not max(errors) <= 1:
            raise RuntimeError(f"{name}: errors are {max(errors):.3g} times the allowed ones")
    return figures


def _attend(block: Any, *, x: Tensor, grad: Tensor, autocast: bool = True) -> list[Tensor]:
    return list(attention_and_gradients(block, x, grad, autocast=autocast).values())


def _gap(one: Tensor, exact: Tensor) -> float:
    return float((one.double() - exact.double()).norm())


def check_loss(device: torch.device) -> Figures:
    """The loss of pairs that fit well less its value in fp64, in each form, with its sign.

    The loss cannot be negative, but tensor cores that truncate make it so.
    """
    is_gpu = device.type == "cuda"
    forms: list[LossForm] = ["dense", "tiled", "triton"] if is_gpu else ["dense", "tiled"]
    count = 4096 if is_gpu else 64
    features = torch.randn(count, 512, generator=torch.Generator().manual_seed(0))
    features, ids = F.normalize(features, dim=1), torch.arange(count, device=device)
    figures: Figures = {}
    wrong = []
    for scale, form, precision in itertools.product((14.3, 100.0), forms, _LOSS_TOLERANCE):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        inputs = features.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        exact = unified_contrastive_loss(inputs.double(), inputs.double(), ids, scale, form="dense")
        gap = float(unified_contrastive_loss(inputs, inputs, ids, scale, form=form) - exact)
        name = f"{form} in {precision}, scale {scale:g}: off by"
        figures[name] = summarise([gap])
        wrong += [f"{name} {gap:.4f}"] * (not abs(gap) <= _LOSS_TOLERANCE[precision])
    if wrong:
        raise RuntimeError(f"losses are wrong: {'; '.join(wrong)}")
    return figures


def measure_ways(device: torch.device) -> Figures:
    """Images/s of Swin-T's step by kernel and compilation; the host must not wait for the GPU."""
    is_gpu = device.type == "cuda"
    encoder, side = ("swin_tiny_patch4_window7_224", 224) if is_gpu else ("test_vit", 160)
    batch_size = 64 if is_gpu else 4
    batch = random_batch(batch_size, pixels=side, num_texts=batch_size)
    figures: Figures = {}
    losses: dict[str, float] = {}
    ways = itertools.product(("timm", "triton"), ("off", "blocks")) if is_gpu else [("timm", "off")]
    for attention, compiled in ways:
        name = f"{attention}, compile={compiled}"
        config = step_config(
            encoder, image_size=side, batch_size=batch_size, device=device.type,
            precision="bf16", window_attention=attention, compile=compiled,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer, there = build_trainer(config, batch)
        losses[name] = float(trainer.train_step(there)[0])
        for _ in range(2):
            trainer.train_step(there)
        if is_gpu:
            torch.cuda.set_sync_debug_mode("error")
            trainer.train_step(there)
            torch.cuda.set_sync_debug_mode("default")
        step = functools.partial(trainer.train_step, there)
        turns = take_turns({name: step}, rounds=3, device_type=device.type)
        figures[f"{name}, images/s"] = rate_of(turns[name], batch_size)
    first = next(iter(losses.values()))
    if not all(math.isclose(loss, first, rel_tol=0.03) for loss in losses.values()):
        raise RuntimeError(f"the first losses differ: {losses}")
    return figures


CHECKS: dict[str, Callable[[torch.device], Figures]] = {
    "rates": measure_rates, "windows": check_windows, "loss": check_loss, "ways": measure_ways,
}  # fmt: skip
"""The checks of the stage `first`; each raises RuntimeError if a result is wrong."""


if __name__ == "__main__":  # one check, in the process of `unicl-bench gpu` for it
    printed(CHECKS[sys.argv[1]](torch.device(sys.argv[2])))
