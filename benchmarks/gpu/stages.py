"""Part A: the card, the tests, the loss, the training step. Needs neither DALI nor a network.

Images and texts are random: a step's time does not depend on what they show. Each stage takes a
`Bench` and gives it figures; `bench.is_tiny` is a dry run on a CPU, with small models and sizes and
figures that mean nothing.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from unicl_fast.batch import Batch
from unicl_fast.models.efficiency import compile_encoders, fuse_window_attention
from unicl_fast.training.trainer import Trainer

from ..loss.losses import Contestant, Inputs, gaps_of, loss_work, make_inputs
from ..loss.texts import layout_works
from ..step.parts import StepInParts, build_trainer, compare, random_batch, step_config
from .measure import Bench

TESTS = ("tests/objectives", "tests/models", "tests/training", "tests/checkpoints")
_CHECKOUT = Path(__file__).resolve().parents[2]
_SWITCHES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "checkpointing": {"activation_checkpointing": True},
    "padded texts": {"text_layout": "padded"},
    "no channels_last": {"channels_last": False},
    "no fused optimizer": {"fused_optimizer": False},
    "timm's window attention": {"window_attention": "timm"},
    "fp32": {"precision": "fp32"},
    "fp32 with TF32": {"precision": "fp32", "tf32": "on"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuStage:
    """One stage: what it measures, what it needs, and how."""

    part: str
    """Its number in docs and report, such as A4."""
    about: str
    run: Callable[..., None]
    """Takes the `Bench`, and, with `needs_data`, the packed data set."""
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped."""
    needs_data: bool = False


def measure_machine(bench: Bench) -> None:
    """The card, the versions, one matrix product and one copy."""
    bench.note("python", platform.python_version())
    for package in ("torch", "triton", "timm", "numba", "numpy", "nvidia-dali-cuda120"):
        with contextlib.suppress(PackageNotFoundError):
            bench.note(package, version(package))
    if bench.device.type == "cuda":
        bench.note("card", torch.cuda.get_device_name())
        bench.note("CUDA", str(torch.version.cuda))
        bench.note("memory", torch.cuda.get_device_properties(0).total_memory / 1e9, "GB")
        query = ("nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv")
        with contextlib.suppress(OSError):
            found = subprocess.run(query, capture_output=True, text=True, check=False)
            bench.note("nvidia-smi", " ".join(found.stdout.split("\n")).strip())
    product_seconds(bench)
    size = 1 << (10 if bench.is_tiny else 30)
    source, target = (torch.ones(size, device=bench.device) for _ in range(2))
    bench.time("copy of 4 GB", lambda: target.copy_(source), count=8e-9 * size, unit="GB/s")


def product_seconds(bench: Bench) -> float:
    """Times a product of two bf16 matrices of 8192 x 8192; returns seconds per operation."""
    n = 64 if bench.is_tiny else 8192
    left, right = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    rate = {"count": 2e-12 * n**3, "unit": "TFLOP/s"}
    seconds = bench.time("product of 8192^3, bf16", lambda: left @ right, **rate, repeat=10)
    return seconds / (2 * n**3)


def run_tests(bench: Bench, *folders: str) -> None:
    """Runs the tests that need a GPU, in a process of its own, and counts results."""
    there = [
        str(path)
        for folder in folders or TESTS
        for path in sorted((_CHECKOUT / folder).rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")  # others may import what is not here
    ]
    if not there:
        raise RuntimeError(f"{_CHECKOUT} holds no tests for a GPU: start from a checkout")
    if bench.is_tiny:
        there = ["--collect-only", f"{_CHECKOUT}/benchmarks"]  # shows that pytest starts
    command = [sys.executable, str(Path(__file__).parent), "pytest", "-m", "gpu", "-q", "-rfE"]
    found = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--continue-on-collection-errors", *there],
        cwd=_CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    log = bench.file.with_suffix(".log")
    log.write_text(found.stdout + found.stderr, encoding="utf-8")
    bench.note("log", log.name)
    summary = re.findall(r"(\d+) (passed|failed|skipped)", found.stdout[-500:])
    counts = {name: int(count) for count, name in summary}
    for name in ("passed", "failed", "skipped"):
        bench.note(name, counts.get(name, 0), "tests")
    for line in re.findall(r"^(?:FAILED|ERROR) .*", found.stdout, flags=re.MULTILINE):
        bench.note(line[:200], "failed")
    if not bench.is_tiny and not counts.get("passed"):
        raise RuntimeError(f"no test passed: {(found.stderr or found.stdout)[-300:]}")


def measure_steps(bench: Bench) -> None:
    """Steps of Swin-T by local batch: rate, memory, part of the product's rate; a trace."""
    seconds_an_operation = product_seconds(bench)
    for size in bench.first_if_tiny(64, 256, 512):
        name = f"swin-tiny, bf16, {size}"
        with bench.running_out_of_memory(name):
            step, trainer, batch = build_step(bench, size)
            seconds = bench.time(name, step, count=batch.batch_size, unit="images/s")
            operations = sum(StepInParts(trainer, batch).count_operations().values())
            bench.note(f"{name}, operations of a step", operations / 1e9, "GFLOP")
            used = 100 * operations * seconds_an_operation / seconds
            bench.note(f"{name}, of the product's rate", used, "%")
            if size == 256 or bench.is_tiny:
                _write_trace(bench, step)
        step = trainer = batch = None  # type: ignore[assignment]  # frees the memory


def _write_trace(bench: Bench, step: Callable[[], object]) -> None:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
    file = bench.file.with_suffix(".trace.json.gz")
    profiler.export_chrome_trace(str(file))
    bench.note("trace of a step", file.name)


def measure_switches(bench: Bench) -> None:
    """Steps of Swin-T with checkpointing, TF32, another layout of texts, or compiled."""
    for name, changes in _SWITCHES.items():
        _time_step(bench, name, 256, **changes)
    for way in ("blocks", "encoders"):
        name = f"compiled: {way}"
        with bench.running_out_of_memory(name):
            _measure_compiled(bench, name, 256, way)


def _time_step(bench: Bench, name: str, size: int, **changes: Any) -> None:
    with bench.running_out_of_memory(name):
        step, _, batch = build_step(bench, size, **changes)
        bench.time(name, step, count=batch.batch_size, unit="images/s")


def _measure_compiled(bench: Bench, name: str, size: int, way: Any) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    step, trainer, batch = build_step(bench, size, compile=way)
    if bench.is_tiny:  # without a compiler's minutes
        compile_encoders(trainer.model, way, backend="eager")
    counters.clear()
    bench.time(name, step, count=batch.batch_size, unit="images/s", warm_up=3)
    before, pixels = counters["stats"]["unique_graphs"], batch.images.shape[1]
    bench.note(f"{name}, graphs", before, "graphs")
    for number in range(1 if bench.is_tiny else 10):
        num_texts = max(1, batch.batch_size - 23 * number)
        other = make_batch(bench, size, pixels=pixels, num_texts=num_texts, longest=20 + 5 * number)
        trainer.train_step(other)
    more = counters["stats"]["unique_graphs"] - before
    bench.note(f"{name}, more graphs over ten sizes of texts", more, "graphs")


def measure_large(bench: Bench) -> None:
    """Swin-B at local batches that may not fit, plain and with checkpointing."""
    encoder = "swin_base_patch4_window7_224"
    for size in bench.first_if_tiny(256, 512):
        name = f"swin-base, bf16, {size}"
        _time_step(bench, name, size, encoder=encoder)
        _time_step(
            bench, f"{name}, checkpointing", size, encoder=encoder, activation_checkpointing=True
        )


def measure_texts(bench: Bench) -> None:
    """The text encoder by layout of captions, and the parts of a training step."""
    _, trainer, batch = build_step(bench, 256)
    width, layers = (64, 1) if bench.is_tiny else (512, 12)
    lengths = torch.from_numpy(batch.text_lengths).to(bench.device)
    works = layout_works(batch.tokens, lengths, width=width, layers=layers)
    named = {f"text encoder, {name}": work for name, work in works.items()}
    bench.take_turns(named, count=len(batch.tokens), unit="texts/s")
    step = StepInParts(trainer, batch)
    compare(step)

    def take() -> Tensor:
        step.take()
        return trainer.model.logit_scale

    bench.time("step, part after part", take, count=batch.batch_size, unit="images/s", repeat=1)
    taken = [step.take() for _ in range(1 if bench.is_tiny else 5)]
    whole = sum(sum(parts.values()) for parts in taken)
    for part in taken[0]:
        bench.note(part, 100 * sum(parts[part] for parts in taken) / whole, "%")


def compare_losses(bench: Bench) -> None:
    """Each form of the loss on the device against the dense form in fp64: value and gradients."""
    images, num_texts = (24, 18) if bench.is_tiny else (3000, 2200)  # some images share a text
    for name, contestant in _loss_forms(bench, num_texts).items():
        value, gradients = gaps_of(contestant, images, bench.device)
        bench.note(f"{name}, value", value, "relative error")
        bench.note(f"{name}, gradients", gradients, "relative error")


def measure_losses(bench: Bench) -> None:
    """The loss on its own, forward and backward, on all sizes that one GPU may meet."""
    sizes = ((4, 32), (8, 16)) if bench.is_tiny else ((512, 32_768), (4096, 32_768), (64, 65_536))
    for b, u in sizes:
        for name, contestant in _loss_forms(bench, u).items():
            _time_loss(bench, f"{b:,} x {u:,}, {name}", b, contestant, loss_work)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            name = f"{b:,} x {u:,}, open_clip's formula {name}"
            _time_loss(bench, name, b, Contestant(None, dtype, u), _local_clip_work)


def _time_loss(
    bench: Bench,
    name: str,
    size: int,
    contestant: Contestant,
    make_work: Callable[[Contestant, Inputs], Callable[[], Tensor]],
) -> None:
    with bench.running_out_of_memory(name):
        work = make_work(contestant, make_inputs(size, contestant, bench.device))
        bench.time(name, work, repeat=10)


def _loss_forms(bench: Bench, num_texts: int) -> dict[str, Contestant]:
    forms = {
        "dense fp32": Contestant("dense", torch.float32, num_texts),
        "tiled fp32": Contestant("tiled", torch.float32, num_texts),
        "tiled bf16": Contestant("tiled", torch.bfloat16, num_texts),
    }
    if _has_triton(bench):
        forms["triton fp32"] = Contestant("triton", torch.float32, num_texts)
        forms["triton bf16"] = Contestant("triton", torch.bfloat16, num_texts)
    return forms


def _has_triton(bench: Bench) -> bool:
    return bench.device.type == "cuda" and find_spec("triton") is not None


def _local_clip_work(contestant: Contestant, inputs: Inputs) -> Callable[[], Tensor]:
    """ClipLoss with local loss: a rank's images with all texts, and its texts with all images.

    These are two products of the size of our one.
    """
    images, texts, scale, class_ids = inputs
    all_images = texts.detach().flip(0)

    def work() -> Tensor:
        images.grad = texts.grad = scale.grad = None
        rows = scale * images @ texts.T
        columns = scale * texts[: len(images)] @ all_images.T
        loss = (F.cross_entropy(rows, class_ids) + F.cross_entropy(columns, class_ids)) / 2
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        return loss.detach()

    return work


def measure_windows(bench: Bench) -> None:
    """Window attention of Swin-T's four widths, forward and backward: timm's, and our kernels."""
    size = 4 if bench.is_tiny else 256
    generator = torch.Generator().manual_seed(0)
    for width, side in bench.first_if_tiny((96, 56), (192, 28), (384, 14), (768, 7)):
        block = SwinTransformerBlock(width, (side, side), width // 32, window_size=7, shift_size=3)
        block.to(bench.device)
        shape = size, side, side, width
        x, grad = (torch.randn(shape, generator=generator).to(bench.device) for _ in range(2))
        works = {"timm": functools.partial(_attend_in_windows, block, x, grad)}
        if _has_triton(bench):
            fused = copy.deepcopy(block)
            fuse_window_attention(fused)
            works["triton"] = functools.partial(_attend_in_windows, fused, x, grad)
            _note_gaps(bench, f"windows of {width} values", works)
        named = {f"windows of {width} values, {name}": work for name, work in works.items()}
        seconds = bench.take_turns(named, count=size, unit="images/s")
        if "triton" in works:
            timms, ours = seconds.values()
            bench.note(f"windows of {width} values, of timm's time", 100 * ours / timms, "%")


def _attend_in_windows(block: SwinTransformerBlock, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output in bf16, and gradients of x and the weights."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        mixed = block._attn(x)
    weights = block.attn.parameters()
    return [mixed.detach(), *torch.autograd.grad(mixed, [x, *weights], grad.to(mixed.dtype))]


def _note_gaps(bench: Bench, name: str, works: Mapping[str, Callable[[], list[Tensor]]]) -> None:
    """Writes how far our results are from timm's; both have the rounding of bf16."""
    timms, ours = (work() for work in works.values())
    gaps = [
        float((our.float() - their.float()).norm() / their.float().norm())
        for our, their in zip(ours, timms, strict=True)
    ]
    bench.note(f"{name}, result", gaps[0], "relative error")
    bench.note(f"{name}, gradients", max(gaps[1:]), "relative error")


def compare_with_open_clip(bench: Bench) -> None:
    """Our step and open_clip's on the same architecture and data, in turns."""
    from ..step.open_clip import open_clip_step, open_clip_twin

    for encoder in bench.first_if_tiny("vit_base_patch32_224", "vit_base_patch16_224"):
        size = 256
        _, trainer, batch = build_step(bench, size, encoder=encoder, precision="fp32")
        theirs, images, texts = open_clip_twin(trainer.model, batch, rounding=1e-3)
        del trainer
        works = {
            f"{encoder}, ours": build_step(bench, size, encoder=encoder)[0],
            f"{encoder}, open_clip": open_clip_step(theirs, images, texts),
        }
        if not bench.is_tiny:
            name = f"{encoder}, ours compiled: blocks"
            works[name] = build_step(bench, size, encoder=encoder, compile="blocks")[0]
        with bench.running_out_of_memory(encoder):
            bench.take_turns(works, count=batch.batch_size, unit="images/s")
        del theirs, works, batch


def build_step(
    bench: Bench,
    size: int,
    *,
    encoder: str = "swin_tiny_patch4_window7_224",
    **efficiency: Any,
) -> tuple[Callable[[], object], Trainer, Batch]:
    """Returns a training step on a batch that lies on the device, its trainer, and the batch."""
    efficiency = {"precision": "bf16", "compile": "off"} | efficiency
    pixels, text = 224, {}
    if bench.is_tiny:
        is_eager = efficiency["compile"] == "off"
        small = "unicl_swin6_small" if is_eager else "unicl_convnet7_small"
        encoder, pixels = ("test_vit", 160) if "vit" in encoder else (small, 32)
        text = {"text_width": 64, "text_heads": 2, "text_layers": 1, "embed_dim": 16}
    batch = make_batch(bench, size, pixels=pixels)
    config = step_config(
        encoder, image_size=pixels, batch_size=batch.batch_size, text=text, **efficiency
    )
    trainer, batch = build_trainer(config, batch, device=bench.device)
    return lambda: trainer.train_step(batch), trainer, batch


def make_batch(
    bench: Bench, size: int, *, pixels: int, num_texts: int = 0, longest: int = 40
) -> Batch:
    """A batch on the device: random images, texts of 8 to `longest` tokens."""
    size = 4 if bench.is_tiny else size
    num_texts = min(num_texts, size) or size
    batch = random_batch(size, pixels=pixels, num_texts=num_texts, longest=longest)
    return batch.to(bench.device)


def _stage(part: str, about: str, run: Callable[..., None], *needs: str) -> GpuStage:
    return GpuStage(part=part, about=about, run=run, needs=needs)


_TEST_PACKAGES = ("pytest", "pytest_timeout", "hypothesis", "beartype", "jaxtyping")
PART_A = {
    "machine": _stage("A1", "card, product, copy", measure_machine),
    "tests": _stage("A2", "pytest -m gpu", run_tests, *_TEST_PACKAGES),
    "parity": _stage("A3", "the loss against fp64", compare_losses),
    "step": _stage("A4", "training steps, Swin-T", measure_steps),
    "switches": _stage("A5", "compile, checkpointing, TF32", measure_switches),
    "large": _stage("A6", "training steps, Swin-B", measure_large),
    "text": _stage("A7", "layouts of texts; parts of a step", measure_texts),
    "loss": _stage("A8", "the loss on its own", measure_losses),
    "open-clip": _stage("A9", "open_clip's step", compare_with_open_clip, "open_clip"),
    "windows": _stage("A10", "window attention on its own", measure_windows),
}
