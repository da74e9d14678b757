"""The loss in Triton, beyond what it computes: compiled for three GPUs, and where it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_kernels import SHARED_BYTES, TYPES, check_fit, compile_ahead

from unicl_fast.objectives import loss as loss_module
from unicl_fast.objectives.loss import unified_contrastive_loss

triton = pytest.importorskip("triton")


def test_rows_of_features_begin_at_16_bytes() -> None:
    from unicl_fast.objectives.loss_triton import _aligned

    features = torch.ones(3, 9, dtype=torch.bfloat16)
    assert _aligned(features).stride() == (16, 1)
    assert _aligned(features).sum() == features.sum()
    assert _aligned(whole := torch.ones(3, 32)) is whole


def test_kernels_that_are_not_interpreted_refuse_the_cpu() -> None:
    features = torch.ones(4, 4)
    with pytest.raises(ValueError, match="on a CUDA device, not on cpu; use form .* auto"):
        unified_contrastive_loss(features, features, torch.arange(4), 1.0, form="triton")


def test_fp32_is_not_tf32_unless_torch_may_use_it() -> None:
    from unicl_fast.objectives.loss_triton import _precision

    assert [_precision(t) for t in (torch.float32, torch.bfloat16)] == ["tf32x3", "ieee"]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert [_precision(t) for t in (torch.float32, torch.float64)] == ["tf32", "ieee"]
    finally:
        torch.set_float32_matmul_precision(before)


def test_auto_takes_triton_for_many_logits_on_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def form(num_logits: int, device: str, *, has_triton: bool) -> str:
        monkeypatch.setattr(loss_module, "_gpu_takes_triton", lambda index: has_triton)
        return loss_module._fastest_form(num_logits, torch.device(device))

    assert form(64 * 65_536, "cuda:0", has_triton=True) == "triton"
    assert form(64 * 65_536, "cuda:0", has_triton=False) == "tiled"
    assert form(512 * 512, "cuda:0", has_triton=True) == "dense"
    assert form(64 * 65_536, "cpu", has_triton=True) == "tiled"


@pytest.mark.parametrize(
    ("capability", "dtype", "options"),
    [
        pytest.param(80, torch.float32, {}, marks=pytest.mark.slow),
        (90, torch.bfloat16, {}),
        pytest.param(100, torch.bfloat16, {}, marks=pytest.mark.slow),
        *(
            pytest.param(capability, dtype, options, marks=[pytest.mark.slow, pytest.mark.long])
            for capability in SHARED_BYTES
            for dtype, options in [
                (torch.bfloat16, {}),
                (torch.bfloat16, {"counted": False, "exclude_self": True}),
                (torch.bfloat16, {"counted": False, "with_columns": False}),
                (torch.float32, {}),
                (torch.float32, {"counted": False, "exclude_self": True}),
                (torch.float32, {"precision": "tf32"}),
                (torch.float64, {}),
            ]
            if (capability, dtype, options)
            not in [(80, torch.float32, {}), (90, torch.bfloat16, {})]
        ),
    ],
)
def test_compiled_kernels_fit_and_spill_no_register(
    capability: int, dtype: torch.dtype, options: dict, tmp_path: Path
) -> None:
    """Compiled ahead of time with the blocks that would run, which needs no GPU."""
    from unicl_fast.objectives import loss_triton

    for kernel in (loss_triton._sum_exps, loss_triton._logit_gradients):
        check_fit(compile_loss(kernel, capability, dtype, folder=tmp_path, **options), tmp_path)


def compile_loss(
    kernel: Any,
    capability: int,
    dtype: torch.dtype,
    *,
    folder: Path,
    counted: bool = True,
    exclude_self: bool = False,
    with_columns: bool = True,
    precision: str | None = None,
) -> Any:
    """What a launch with such features would compile."""
    from unicl_fast.objectives.loss_triton import BLOCKS, _precision

    blocks, names = BLOCKS[dtype]._asdict(), set(kernel.arg_names)
    constants = {
        "exclude_self": exclude_self,
        "precision": precision or _precision(dtype),
        **{name: blocks[name] for name in ("height", "width", "depth")},
        **({} if counted else {"counts": None}),
        **({} if with_columns else dict.fromkeys({"by_columns", "of_columns"} & names)),
    }
    wide = TYPES[torch.promote_types(dtype, torch.float32)]
    features = dict.fromkeys(("images", "texts", "gradient"), f"*{TYPES[dtype]}")
    sizes = dict.fromkeys(("b", "u", "d", "offset"), "i32")
    types = dict.fromkeys(kernel.arg_names, f"*{wide}") | features | sizes
    return compile_ahead(
        kernel,
        capability,
        types=types,
        constants=constants,
        multiples_of_16=("d",),
        options={name: blocks[name] for name in ("num_warps", "num_stages")},
        folder=folder,
    )
