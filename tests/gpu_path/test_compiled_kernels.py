"""Our Triton kernels as they are compiled for an A100 and an H100, executed without either.

`helpers/ptx.py` runs their PTX. `make test-triton` does so with other versions of Triton, too.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_kernels import SHARED_BYTES, Launch, as_ptx, check_fit, check_window
from interpreted_kernels import attention_and_gradients, loss_and_gradients
from loss_inputs import rows
from swin_blocks import build_block, check_against_timm

pytest.importorskip("triton")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
slow, long = pytest.mark.slow, pytest.mark.long


def call_here(function: Any, *arguments: Any, **options: Any) -> list[torch.Tensor]:
    return function(*arguments, **options)


@pytest.fixture(autouse=True)
def _a_program_has_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four and more, which fill all stages."""
    from unicl_fast.models import window_attention

    monkeypatch.setattr(window_attention, "PROGRAMS", 1)


@pytest.mark.parametrize(
    ("capability", "size", "window", "shift"),
    [
        (90, (5, 7), (3, 5), 1),  # padded, so it comes rolled
        pytest.param(90, (14, 14), 7, 3, marks=slow),
        pytest.param(80, (14, 14), 7, 3, marks=slow),
        pytest.param(90, (16, 16), 4, 2, marks=slow),  # numbers are multiples of 16
        pytest.param(90, (10, 15), 7, 3, marks=slow),
        *(
            pytest.param(90, *case, marks=long)
            for case in (((12, 18), 6, 3), ((16, 8), 8, 4), ((14, 14), 7, 0))
        ),
    ],
)
def test_windows(capability, size, window, shift, tmp_path):
    block = build_block(size, window=window, shift=shift)
    with as_ptx(tmp_path, capability=capability):
        check_against_timm(call_here, block, size, images=1, dtype=BF16)


B, U, D = 140, 150, 144


def loss_call(dtype: torch.dtype, **options: Any) -> tuple[tuple, dict[str, Any]]:
    """Arguments for ragged tiles in both directions: 30 classes, and texts that count 1 to 4."""
    images, texts = rows(B, D, seed=1).to(dtype), rows(U, D, seed=2).to(dtype)
    classes = {"text_class_ids": torch.arange(U) % 30, "text_counts": torch.arange(U) % 4 + 1}
    return (images, texts, torch.arange(B) % 30, 20.0), classes | options


@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        pytest.param(BF16, "ieee", 4e-3, marks=slow),
        (FP32, "tf32", 1e-4),
        pytest.param(FP32, "tf32x3", 1e-4, marks=slow),
    ],
)
def test_loss(dtype, precision, tolerance, tmp_path, monkeypatch):
    from unicl_fast.objectives import loss_triton

    monkeypatch.setattr(loss_triton, "allows_tf32", lambda: precision == "tf32")
    (images, texts, *rest), options = loss_call(dtype)
    if precision == "tf32":
        images, texts = map(loss_triton.round_to_tf32, (images, texts))
    exact = loss_and_gradients(images.double(), texts.double(), *rest, form="dense", **options)
    with as_ptx(tmp_path):
        found = loss_and_gradients(images, texts, *rest, form="triton", **options)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def launches_of_windows(
    folder: Path, dtype: torch.dtype, *, shift: int, capability: int = 90
) -> list[Launch]:
    """Forward, backward, and the sum of the table's gradient, of the presets' windows."""
    torch.manual_seed(0)
    launches: list[Launch] = []
    block = build_block((14, 14), shift=shift, heads=1).to(dtype)
    x, grad = torch.randn(2, 1, 14, 14, 32).to(dtype)
    with as_ptx(folder, capability=capability, launches=launches):
        attention_and_gradients(block, x, grad, fused=True)
    return launches


@slow
def test_a_read_outside_of_a_tensor_is_noticed(tmp_path):
    launch, *_ = launches_of_windows(tmp_path, BF16, shift=3)
    launch.arguments["qkv"] = launch.arguments["qkv"][:, :-1].clone()
    assert any("outside of tensors" in fault for fault in launch.run())


@slow
@pytest.mark.parametrize("number", [0, 1], ids=["forward", "backward"])
def test_a_missing_barrier_fence_or_wait_is_noticed(number, tmp_path):
    """One is removed at a time: 37 of 44 are noticed (Triton 3.9), others have nothing to order."""
    launch = launches_of_windows(tmp_path, BF16, shift=3)[number]
    whole, faults = launch.run_aside()
    assert not faults
    missed, noticed = [], []
    for place, one in enumerate(launch.kernel.code):
        if not one.waits:
            continue
        found, faults = launch.run_aside(launch.kernel.without(place))
        is_right = all(torch.allclose(found[name], whole[name], 1e-2) for name in whole)
        (missed if is_right and not faults else noticed).append(f"{place}: {one.text}")
    print(len(noticed), "noticed; missed:", *missed, sep="\n")
    assert not [one for one in missed if "wait" in one]
    assert len(noticed) >= 4 * len(missed)  # which may be redundant


PLAIN = {"text_counts": None}
LOSSES = [
    *((BF16, {}), (FP32, {}), (FP64, {}), (FP32, {"allows_tf32": True})),
    *((BF16, PLAIN), (FP32, PLAIN)),
    (BF16, PLAIN | {"directions": "i2t"}),
]
WINDOWS = [(dtype, {"shift": shift}) for dtype in (BF16, FP16, FP32) for shift in (0, 3)]


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
def test_kernels_fit_and_spill_no_register(capability, dtype, options, tmp_path, monkeypatch):
    """Compiled ahead of time with the blocks and windows that would run, which needs no GPU."""
    launches: list[Launch] = []
    if "shift" in options:
        launches = launches_of_windows(tmp_path, dtype, capability=capability, **options)
        for launch in launches:
            check_window(launch.compiled, tmp_path)
    else:
        from unicl_fast.objectives import loss_triton

        call, more = loss_call(dtype, **options)
        allows = more.pop("allows_tf32", False)
        monkeypatch.setattr(loss_triton, "allows_tf32", lambda: allows)
        with as_ptx(tmp_path, capability=capability, launches=launches):
            loss_and_gradients(*call, form="triton", **more)
        for launch in launches:
            check_fit(launch.compiled, tmp_path)
    assert len({launch.compiled.name for launch in launches}) == len(launches) >= 2
