"""Our Triton kernels as they are compiled for an A100 and an H100, executed without either.

`helpers/ptx.py` runs their PTX. `make test-triton` does so with other versions of Triton, too.
"""

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import ptx
import pytest
import torch
from compiled_kernels import (
    SHARED_BYTES,
    check_fit,
    check_window,
    compile_loss,
    compile_window,
    execute,
)
from torch import Tensor

pytest.importorskip("triton")

SIDE, WINDOW, WIDTH = 14, 7, 32
SCALE = WIDTH**-0.5
TOLERANCES = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
slow, long = pytest.mark.slow, pytest.mark.long


@dataclasses.dataclass
class Launch:
    """A compiled kernel, and what it is called with."""

    compiled: Any
    names: list[str]
    arguments: dict[str, Any]
    """Tensors and numbers by name; tensors of NaN are results."""
    grid: tuple[int, int]

    @functools.cached_property
    def kernel(self) -> ptx.Kernel:
        return ptx.parse(self.compiled.asm["ptx"])

    def run(self, kernel: ptx.Kernel | None = None) -> tuple[dict[str, Tensor], Counter[str]]:
        """Returns the results by name, and the faults."""
        given = [(name, self.arguments[name]) for name in self.names]
        given = {name: one.clone() if isinstance(one, Tensor) else one for name, one in given}
        shared_bytes = self.compiled.metadata.shared
        faults = execute(kernel or self.kernel, given, self.grid, shared_bytes=shared_bytes)
        tensors = {name: one for name, one in given.items() if isinstance(one, Tensor)}
        results = [name for name in tensors if self.arguments[name].isnan().all()]
        return {name: tensors[name] for name in results}, faults


def launch(kernel: Any, compiled: Any, grid: tuple[int, int], **arguments: Any) -> Launch:
    names = [name for name in kernel.arg_names if name in arguments]
    return Launch(compiled, names, arguments, grid)


def assert_close(found: Tensor, exact: Tensor, tolerance: float) -> None:
    assert (found.double() - exact).norm() <= tolerance * exact.norm()


@functools.cache
def windows(dtype: torch.dtype, shift: int) -> dict[str, Tensor]:
    """Operands of the windows of one image, and the attention and gradients in fp64."""
    torch.manual_seed(0)
    qkv, grad = torch.randn(SIDE, SIDE, 3 * WIDTH), torch.randn(SIDE, SIDE, WIDTH)
    table = torch.randn((2 * WINDOW - 1) ** 2, 1)
    qkv, grad = (1.5 * qkv).to(dtype), grad.to(dtype)
    wide, position = qkv.double().requires_grad_(), torch.arange(WINDOW)
    apart = position[:, None] - position[None, :] + WINDOW - 1
    index = apart[:, None, :, None] * (2 * WINDOW - 1) + apart[None, :, None, :]
    bias = table.double()[index.reshape(49, 49), 0].requires_grad_()

    def cut(x: Tensor) -> Tensor:  # [windows tokens channels]
        x = x.roll((-shift, -shift), (0, 1)).unflatten(0, (-1, WINDOW)).unflatten(2, (-1, WINDOW))
        return x.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    line = torch.arange(SIDE)
    region = (line >= SIDE - WINDOW).long() + (line >= SIDE - shift).long() if shift else line * 0
    region = (3 * region[:, None] + region[None, :])[..., None]
    region = region.roll((shift, shift), (0, 1))  # `cut` rolls it back
    regions = cut(region).squeeze(2)
    mask = torch.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)
    query, key, value = cut(wide).split(WIDTH, dim=2)
    scores = query @ key.transpose(1, 2) * SCALE + bias + mask
    mixed = scores.softmax(2) @ value
    grad_qkv, grad_bias = torch.autograd.grad(mixed, [wide, bias], cut(grad.double()))
    places = cut(torch.arange(SIDE * SIDE).view(SIDE, SIDE, 1)).flatten()
    whole = torch.empty(SIDE * SIDE, WIDTH, dtype=torch.float64)
    whole[places] = mixed.detach().flatten(0, 1)
    exact = {"mixed": whole, "grad_qkv": grad_qkv.flatten(0, 1), "bias_sums": grad_bias}
    return {"qkv": qkv, "grad": grad, "table": table, **{f"exact {k}": v for k, v in exact.items()}}


def launch_windows(
    name: str, capability: int, dtype: torch.dtype, *, shift: int, folder: Path
) -> Launch:
    """One head and one program for four windows, which fill all stages."""
    from unicl_fast.models import window_attention

    kernel = getattr(window_attention, name)
    results = {
        "mixed": torch.full((SIDE, SIDE, WIDTH), torch.nan).to(dtype),
        "grad_qkv": torch.full((SIDE, SIDE, 3 * WIDTH), torch.nan).to(dtype),
        "bias_sums": torch.full((49, 49), torch.nan),
    }
    arguments = {**windows(dtype, shift), **results, "scale": SCALE, "num_windows": 4}
    arguments |= {"height": SIDE, "width": SIDE}
    compiled = compile_window(kernel, capability, dtype, shift=shift, folder=folder)
    return launch(kernel, compiled, (1, 1), **arguments)


@pytest.mark.parametrize(
    ("capability", "name", "dtype", "shift"),
    [
        (90, "_forward", torch.bfloat16, 3),
        (90, "_backward", torch.bfloat16, 3),
        pytest.param(90, "_forward", torch.bfloat16, 0, marks=slow),
        pytest.param(90, "_backward", torch.bfloat16, 0, marks=slow),
        pytest.param(80, "_forward", torch.bfloat16, 3, marks=slow),
        pytest.param(80, "_backward", torch.bfloat16, 3, marks=slow),
    ],
)
def test_windows(capability, name, dtype, shift, tmp_path):
    launched = launch_windows(name, capability, dtype, shift=shift, folder=tmp_path)
    check_window(launched.compiled, tmp_path)
    results, faults = launched.run()
    assert not faults
    assert set(results) == {"mixed"} if name == "_forward" else {"grad_qkv", "bias_sums"}
    for key, found in results.items():
        exact = windows(dtype, shift)[f"exact {key}"]
        assert_close(found.view(exact.shape), exact, TOLERANCES[dtype])


B, U, D = 140, 150, 144


def launch_loss(
    name: str, dtype: torch.dtype, *, precision: str, folder: Path, capability: int = 90
) -> tuple[Launch, dict[str, Tensor]]:
    """Ragged tiles in both directions, and the exact results."""
    from unicl_fast.objectives import loss_triton
    from unicl_fast.objectives.loss_tiled import round_to_tf32

    torch.manual_seed(0)
    images, texts = (torch.randn(n, D).div(D**0.5).to(dtype) for n in (B, U))
    if precision == "tf32":
        images, texts = round_to_tf32(images), round_to_tf32(texts)
    factor, counts = torch.tensor([29.0]), torch.randint(1, 5, (U,)).float().log2()
    logits = images.double() @ texts.double().T * factor.double()
    weighted = logits + counts
    row_logs, column_logs = log2_sum_exp(weighted, 1), log2_sum_exp(logits, 0)
    of_rows = torch.stack([row_logs, torch.randn(B)]).float()
    of_columns = torch.stack([column_logs, torch.randn(U)]).float()
    exact = {
        "by_rows": row_logs,
        "by_columns": column_logs,
        "gradient": of_rows[1, :, None] * (weighted - row_logs[:, None]).exp2()
        + of_columns[1] * (logits - column_logs).exp2(),
    }
    height, width, *_ = loss_triton.blocks_for(dtype, capability=capability)
    rows, columns = -(-B // height), -(-U // width)
    results = {
        "by_rows": torch.full((columns, B), torch.nan),
        "by_columns": torch.full((rows, U), torch.nan),
        "gradient": torch.full((B, U), torch.nan).to(dtype),
    }
    operands = {"images": images, "texts": texts, "factor": factor, "counts": counts}
    operands |= {"of_rows": of_rows, "of_columns": of_columns, **results}
    kernel = getattr(loss_triton, name)
    compiled = compile_loss(kernel, capability, dtype, folder=folder, precision=precision)
    sizes = {"b": B, "u": U, "d": D}
    return launch(kernel, compiled, (rows * columns, 1), **operands, **sizes), exact


def log2_sum_exp(logits: Tensor, dim: int) -> Tensor:
    return (logits * np.log(2)).logsumexp(dim) / np.log(2)


@pytest.mark.parametrize(
    ("name", "dtype", "precision", "tolerance"),
    [
        pytest.param("_sum_exps", torch.bfloat16, "ieee", 1e-5, marks=slow),
        pytest.param("_logit_gradients", torch.bfloat16, "ieee", 4e-3, marks=slow),
        ("_sum_exps", torch.float32, "tf32", 1e-5),
        pytest.param("_sum_exps", torch.float32, "tf32x3", 1e-5, marks=slow),
        pytest.param("_logit_gradients", torch.float32, "tf32x3", 1e-4, marks=slow),
    ],
)
def test_loss(name, dtype, precision, tolerance, tmp_path):
    launched, exact = launch_loss(name, dtype, precision=precision, folder=tmp_path)
    results, faults = launched.run()
    assert not faults
    assert set(results) == {"gradient"} if "gradient" in name else {"by_rows", "by_columns"}
    for key, found in results.items():
        whole = found if key == "gradient" else log2_sum_exp(found.double(), 0)
        assert_close(whole, exact[key], tolerance)


def test_a_read_outside_of_a_tensor_is_noticed(tmp_path):
    launched = launch_windows("_forward", 90, torch.bfloat16, shift=3, folder=tmp_path)
    launched.arguments["qkv"] = launched.arguments["qkv"][:-1].clone()
    _, faults = launched.run()
    assert any("outside of tensors" in fault for fault in faults)


@slow
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_a_missing_barrier_fence_or_wait_is_noticed(name, tmp_path):
    """One is removed at a time: 37 of 44 are noticed (Triton 3.9), others have nothing to order."""
    dtype = torch.bfloat16
    launched = launch_windows(name, 90, dtype, shift=3, folder=tmp_path)
    missed, noticed = [], []
    for number, one in enumerate(launched.kernel.code):
        if not one.waits:
            continue
        results, faults = launched.run(launched.kernel.without(number))
        errors = [
            float((found.double().flatten() - exact.flatten()).norm() / exact.norm())
            for key, found in results.items()
            for exact in [windows(dtype, 3)[f"exact {key}"]]
        ]
        is_right = max(errors) <= TOLERANCES[dtype]
        (missed if is_right and not faults else noticed).append(f"{number}: {one.text}")
    print(len(noticed), "noticed; missed:", *missed, sep="\n")
    assert not [one for one in missed if "wait" in one]
    assert len(noticed) >= 4 * len(missed)  # which may be redundant


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WINDOWS = [(dtype, {"shift": shift}) for dtype in (BF16, FP16, FP32) for shift in (0, 3)]
PLAIN = {"counted": False}
LOSSES = [
    *((BF16, {}), (FP32, {}), (FP64, {}), (FP32, {"precision": "tf32"})),
    *((BF16, PLAIN), (FP32, PLAIN)),
    (BF16, PLAIN | {"with_columns": False}),
]


@pytest.mark.parametrize(
    ("capability", "dtype", "options"),
    [
        # a case costs 8 s; those above look at some kernels at each run
        pytest.param(*case, marks=slow if case[1:] in ((BF16, {}), (BF16, {"shift": 3})) else long)
        for case in (
            (capability, *form) for capability in SHARED_BYTES for form in WINDOWS + LOSSES
        )
    ],
)
def test_kernels_fit_and_spill_no_register(capability, dtype, options, tmp_path):
    """Compiled ahead of time with the blocks and windows that would run, which needs no GPU."""
    from unicl_fast.models import window_attention
    from unicl_fast.objectives import loss_triton

    how = {"folder": tmp_path, **options}
    if "shift" in options:
        for name in ("_forward", "_backward", "_sum_table"):
            kernel = getattr(window_attention, name)
            check_window(compile_window(kernel, capability, dtype, **how), tmp_path)
    else:
        for kernel in (loss_triton._sum_exps, loss_triton._logit_gradients):
            check_fit(compile_loss(kernel, capability, dtype, **how), tmp_path)
