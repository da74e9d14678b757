"""The loss in Triton: interpreted on the CPU, compiled for three GPUs, run where there is one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled_kernels import SHARED_BYTES, TYPES, check_fit, compile_ahead
from hypothesis import given
from hypothesis import strategies as st
from interpreted_kernels import Compute, call_on, loss_and_gradients, loss_of_two_ranks
from property_tests import examples
from torch.nn import functional as F

from unicl_fast.objectives import loss as loss_module
from unicl_fast.objectives.loss import reference_loss, unified_contrastive_loss
from unicl_fast.objectives.positives import Membership

triton = pytest.importorskip("triton")


def unit_rows(n: int, d: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=1)


def assert_equals_the_dense_form(
    compute: Compute,
    images: torch.Tensor,
    texts: torch.Tensor,
    class_ids: Any,
    scale: float,
    **arguments: Any,
) -> None:
    """Loss and gradients of both features and the scale, within rounding of the largest."""
    call = loss_and_gradients, images, texts, class_ids, scale
    found = compute(*call, form="triton", **arguments)
    exact = loss_and_gradients(images, texts, class_ids, scale, form="dense", **arguments)
    for ours, dense in zip(found, exact, strict=True):
        largest = max(1, scale, float(dense.abs().max()))
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12 * largest)


def check_a_random_batch(compute: Compute, seed: int) -> None:
    random = np.random.default_rng(seed)
    b, u, d = random.integers(1, 50), random.integers(1, 50), random.integers(1, 40)
    classes = torch.from_numpy(random.integers(0, random.integers(1, 12), b + u))
    counts = {
        "none": None,
        "many": torch.from_numpy(random.integers(1, 50, u)),
        "with padding": torch.from_numpy(np.append(random.integers(0, 3, u - 1), 2)),
    }[random.choice(["none", "many", "with padding"])]
    assert_equals_the_dense_form(
        compute,
        unit_rows(b, d, seed=seed),
        unit_rows(u, d, seed=seed + 1),
        classes[:b] + 2**62,
        float(random.choice([0.1, 10.0, 100.0])),
        text_class_ids=classes[b:] + 2**62,
        text_counts=counts,
        directions=str(random.choice(["both", "i2t", "t2i"])),
    )


@given(seed=st.integers(0, 1_000_000))
@examples(60)
def test_any_shape_and_classes(compute: Compute, seed: int) -> None:
    check_a_random_batch(compute, seed)


@pytest.mark.parametrize("n", [1, 37])
def test_equals_the_formula_of_the_paper(compute: Compute, n: int) -> None:
    images, texts = unit_rows(n, 20, seed=1), unit_rows(n, 20, seed=2)
    class_ids = torch.arange(n) % 5
    loss, *_ = compute(loss_and_gradients, images, texts, class_ids, 20.0, form="triton")
    expected = reference_loss(images, texts, class_ids, 20.0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)


def test_several_labels_a_sample(compute: Compute) -> None:
    random = np.random.default_rng(0)

    def membership(n: int) -> Membership:
        samples, labels = (random.random((n, 5)) < 0.3).nonzero()
        weights = torch.from_numpy(random.random(len(samples)))
        return Membership(torch.from_numpy(samples), torch.from_numpy(labels), weights)

    assert_equals_the_dense_form(
        compute,
        unit_rows(21, 8, seed=1),
        unit_rows(35, 8, seed=2),
        membership(21),
        50.0,
        text_class_ids=membership(35),
        text_counts=torch.from_numpy(random.integers(0, 4, 35)),
    )


@pytest.mark.parametrize("others", [0, 50])
def test_two_views_without_the_image_itself(compute: Compute, others: int) -> None:
    """45 views, and those of other ranks: more than one tile of the gradient in both directions."""
    views, more = unit_rows(45, 6, seed=1), unit_rows(others, 6, seed=2)
    class_ids = torch.arange(45 + others) // 2 % 9
    assert_equals_the_dense_form(
        compute,
        views,
        torch.cat([views, more]),
        class_ids[:45],
        30.0,
        text_class_ids=class_ids,
        exclude_self=True,
    )


def test_without_any_positive_the_loss_is_zero_and_its_gradient_finite(compute: Compute) -> None:
    for n in (1, 2):
        views = unit_rows(n, 4, seed=1).float()
        call = loss_and_gradients, views, views, torch.arange(n), 10.0
        loss, *gradients = compute(*call, exclude_self=True, form="triton")
        assert loss.item() == 0
        assert all((gradient == 0).all() for gradient in gradients)


def test_logits_beyond_the_range_of_exp_in_one_batch(compute: Compute) -> None:
    """fp32 at scale 100: a row of -100 and a row of +100, so that no common shift would do."""
    u = torch.eye(2).repeat(12, 1)
    arguments = {"text_class_ids": torch.arange(24) % 8}
    call = torch.cat([u, -u]), u, torch.arange(48) % 8, 100.0
    found = compute(loss_and_gradients, *call, form="triton", **arguments)
    exact = loss_and_gradients(*call, form="dense", **arguments)
    for ours, dense in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"),
    [
        (torch.float32, 1e-6, 1e-5),
        # logits are not rounded, as those of the tiled form are; their gradients are
        (torch.bfloat16, 1e-6, 0.005),
        (torch.float16, 1e-6, 1e-3),
    ],
)
def test_narrow_types_accumulate_in_fp32(
    compute: Compute, dtype: torch.dtype, tolerance: float, gradient_tolerance: float
) -> None:
    """Against fp64 on the same rounded features, at scale 100: pairs that resemble each other."""
    assert_close_to_fp64(compute, 50, 24, dtype, tolerance, gradient_tolerance)


def assert_close_to_fp64(
    compute: Compute,
    n: int,
    d: int,
    dtype: torch.dtype,
    tolerance: float,
    gradient_tolerance: float,
) -> None:
    class_ids = torch.arange(n) % 7
    classes = unit_rows(7, d, seed=3)[class_ids]
    images, texts = (
        F.normalize(classes + unit_rows(n, d, seed=seed), dim=1).to(dtype) for seed in (1, 2)
    )
    arguments = {"text_counts": torch.arange(n) % 3}
    loss, *gradients = compute(
        loss_and_gradients, images, texts, class_ids, 100.0, form="triton", **arguments
    )
    wide = images.double(), texts.double()
    exact_loss, *exact = loss_and_gradients(*wide, class_ids, 100.0, form="dense", **arguments)
    result = torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in (loss, *gradients)] == [result, dtype, dtype, result]
    assert loss.item() == pytest.approx(exact_loss.item(), rel=tolerance)
    for ours, theirs in zip(gradients, exact, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < gradient_tolerance


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"),
    [
        (torch.float64, 1e-13, 1e-11),
        (torch.float32, 1e-6, 1e-4),
        (torch.bfloat16, 1e-5, 0.01),
    ],
)
def test_many_blocks_on_a_gpu(
    dtype: torch.dtype, tolerance: float, gradient_tolerance: float
) -> None:
    """More logits than one tile of the gradient holds; neither side is a multiple of a block."""
    compute = functools.partial(call_on, "cuda")
    assert_close_to_fp64(compute, 4500, 520, dtype, tolerance, gradient_tolerance)


def test_features_may_lie_in_memory_as_they_like(compute: Compute) -> None:
    assert_equals_the_dense_form(
        compute,
        unit_rows(20, 16, seed=1).T.contiguous().T,
        unit_rows(20, 40, seed=2)[:, 3:35:2],
        torch.arange(20) // 2,
        10.0,
    )


def test_rows_of_features_begin_at_16_bytes() -> None:
    from unicl_fast.objectives.loss_triton import _aligned

    features = torch.ones(3, 9, dtype=torch.bfloat16)
    assert _aligned(features).stride() == (16, 1)
    assert _aligned(features).sum() == features.sum()
    assert _aligned(whole := torch.ones(3, 32)) is whole


def test_a_block_of_padding_texts_changes_nothing(compute: Compute) -> None:
    counts = F.pad(torch.tensor([2, 1, 3]), (0, 40))
    assert_equals_the_dense_form(
        compute,
        unit_rows(6, 8, seed=1),
        unit_rows(43, 8, seed=2),
        torch.arange(6) % 3,
        10.0,
        text_class_ids=torch.arange(43) % 3,
        text_counts=counts,
    )


def test_columns_of_two_ranks_are_joined(compute: Compute) -> None:
    images, texts = unit_rows(34, 8, seed=1), unit_rows(19, 8, seed=2)
    classes = torch.arange(34) % 6
    arguments = {"text_class_ids": torch.arange(19) % 6, "text_counts": torch.arange(19) % 4}
    call = images, texts, classes, 40.0
    found = compute(loss_of_two_ranks, *call, form="triton", **arguments)
    exact = loss_and_gradients(*call, form="dense", **arguments)
    for ours, dense in zip(found, exact[:3], strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-13)


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
