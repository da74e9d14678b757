"""Forms that store no logits against the dense one in fp64: value, gradients, and memory.

The tiles of torch are computed here; those of Triton where its kernels are interpreted, or a GPU.
"""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from fake_ranks import fake_ranks
from hypothesis import given
from hypothesis import strategies as st
from interpreted_kernels import Compute, call_on, loss_and_gradients
from loss_inputs import (
    CAPTION_KEY,
    D,
    LargestTensor,
    pair_weights,
    random_classes,
    random_membership,
    rows,
    tiles_of,
)
from property_tests import examples
from torch.nn import functional as F

from unicl_fast.distributed.ranks import gather_rows
from unicl_fast.objectives import loss_tiled
from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.objectives.loss_sigmoid import sigmoid_contrastive_loss
from unicl_fast.objectives.loss_tiled import LARGEST_TILE, _blocks

small_tiles = tiles_of(7)


@pytest.fixture(
    scope="module", params=["tiled", "interpreted", pytest.param("cuda", marks=pytest.mark.gpu)]
)
def compute(request: pytest.FixtureRequest) -> Compute:
    """Calls a function of `interpreted_kernels` with a form, where that is computed."""
    if request.param == "tiled":
        return functools.partial(call_on, "cpu", form="tiled")
    pytest.importorskip("triton")
    if request.param == "cuda":
        return functools.partial(call_on, "cuda", form="triton")
    pool = request.getfixturevalue("interpreter")
    return lambda *call, **options: pool.submit(*call, form="triton", **options).result()


def assert_equals_the_dense_form(
    compute: Compute, images: torch.Tensor, texts: torch.Tensor, class_ids: Any, scale: float,
    **arguments: Any,
) -> None:  # fmt: skip
    """Loss and gradients of both features and the scale, within rounding of the largest."""
    call = images, texts, class_ids, scale
    found = compute(loss_and_gradients, *call, **arguments)
    exact = loss_and_gradients(*call, form="dense", **arguments)
    for ours, dense in zip(found, exact, strict=True):
        largest = max(1, scale, float(dense.abs().max()))
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12 * largest)


@given(
    structure=st.sampled_from(["one class", "all distinct", "three classes", "keys of captions"]),
    sizes=st.tuples(st.integers(1, 50), st.integers(1, 50), st.integers(1, 40)),
    scale=st.floats(0.01, 100),
    counts=st.sampled_from(["none", "ones", "many", "with padding"]),
    directions=st.sampled_from(["both", "i2t", "t2i"]),
    unit=st.booleans(),
    duplicates=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 10_000),
)
@examples(80)
def test_any_class_structure(
    compute, structure, sizes, scale, counts,
    directions, unit, duplicates, weighted, seed,
):  # fmt: skip
    random = np.random.default_rng(seed)
    b, u, d = sizes
    values = {
        "one class": np.zeros(b + u, np.int64),
        "all distinct": random.permutation(max(b, u)).repeat(2)[: b + u],
        "three classes": random.choice([-1, 0, 2**63 - 1], b + u),
        "keys of captions": CAPTION_KEY + random.integers(0, b + u, b + u),
    }[structure]
    class_ids = torch.from_numpy(random.permutation(values))
    text_counts = {
        "none": None,
        "ones": torch.ones(u, dtype=torch.int64),
        "many": torch.from_numpy(random.integers(1, 50, u)),
        "with padding": torch.from_numpy(np.append(random.integers(0, 3, u - 1), 2)),
    }[counts]
    images, texts = rows(b, d, seed=seed, unit=unit), rows(u, d, seed=seed + 1, unit=unit)
    if duplicates:
        images, texts = images[: b // 2 + 1].repeat(2, 1)[:b], texts[:1].repeat(u, 1)
    options = {"text_counts": text_counts, "directions": directions}
    if weighted:
        options["weights"] = tuple(torch.from_numpy(random.random(n) + 0.1) for n in (b, u))
    assert_equals_the_dense_form(
        compute, images, texts, class_ids[:b], scale, text_class_ids=class_ids[b:], **options
    )


@given(
    sizes=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    weighted=st.booleans(),
    counted=st.booleans(),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 10_000),
)
@examples(50)
def test_several_labels_an_image(compute, sizes, weighted, counted, scale, seed):
    """Both forms, and the rule itself: weights over the sum of the row."""
    random = np.random.default_rng(seed)
    b, u = sizes
    of_images, of_texts = random_membership(random, b, weighted=weighted), random_classes(random, u)
    counts = torch.from_numpy(random.integers(1, 4, u)) if counted else None
    images, texts = rows(b, seed=seed), rows(u, seed=seed + 1)
    call, options = (images, texts, of_images, scale), {"text_counts": counts}
    assert_equals_the_dense_form(compute, *call, text_class_ids=of_texts, **options)

    m = np.ones(u) if counts is None else counts.numpy()
    logits = scale * images.numpy() @ texts.numpy().T
    weights = pair_weights(of_images, of_texts, b) * m
    log_softmax = logits - np.logaddexp.reduce(logits + np.log(m), axis=1, keepdims=True)
    row_sums = weights.sum(axis=1)
    means = (weights * log_softmax).sum(axis=1) / np.where(row_sums > 0, row_sums, 1)
    ours, *_ = compute(
        loss_and_gradients, *call, text_class_ids=of_texts, directions="i2t", **options
    )
    assert ours.item() == pytest.approx(-means.mean(), rel=1e-10, abs=1e-12)


def test_without_any_positive_the_loss_is_zero_and_its_gradient_finite(compute):
    for n in (1, 2):
        images, texts = rows(n, seed=1).float(), rows(n, seed=2).float()
        call = loss_and_gradients, images, texts, torch.arange(n), 10.0
        loss, *gradients = compute(*call, text_class_ids=torch.arange(n) + n)
        assert loss.item() == 0
        assert all((gradient == 0).all() for gradient in gradients)


def test_logits_beyond_the_range_of_exp_in_one_batch(compute):
    """fp32 at scale 100: a row of -100 and a row of +100, so that no common shift would do."""
    u = torch.eye(2).repeat(12, 1)
    arguments = {"text_class_ids": torch.arange(24) % 8}
    call = torch.cat([u, -u]), u, torch.arange(48) % 8, 100.0
    exact = loss_and_gradients(*call, form="dense", **arguments)
    for ours, dense in zip(compute(loss_and_gradients, *call, **arguments), exact, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)


def test_features_may_lie_in_memory_as_they_like(compute):
    images, texts = rows(20, 16, seed=1).T.contiguous().T, rows(20, 40, seed=2)[:, 3:35:2]
    assert_equals_the_dense_form(compute, images, texts, torch.arange(20) // 2, 10.0)


def assert_close_to_fp64(
    compute: Compute, n: int, d: int, dtype: torch.dtype, scale: float, tolerances: Any
) -> None:
    """Against fp64 on the same rounded features: pairs that resemble each other, 7 classes."""
    class_ids = torch.arange(n) % 7
    classes = rows(7, d, seed=3)[class_ids]
    images, texts = (
        F.normalize(classes + rows(n, d, seed=seed), dim=1).to(dtype) for seed in (1, 2)
    )
    arguments = {"text_counts": torch.arange(n) % 3}
    call = images, texts, class_ids, scale
    loss, *gradients = compute(loss_and_gradients, *call, **arguments)
    wide = images.double(), texts.double()
    exact_loss, *exact = loss_and_gradients(*wide, *call[2:], form="dense", **arguments)
    result = torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in (loss, *gradients)] == [result, dtype, dtype, result]
    assert loss.item() == pytest.approx(exact_loss.item(), rel=tolerances[0])
    for ours, theirs in zip(gradients, exact, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < tolerances[1]


@pytest.mark.parametrize(
    ("form", "dtype", "scale", "tolerances"),
    [
        ("dense", torch.bfloat16, 100.0, (1e-5, 4e-3)),
        ("dense", torch.float16, 100.0, (1e-5, 1e-3)),
        ("tiled", torch.float32, 100.0, (1e-6, 1e-5)),
        # cosines are rounded to 8 bits, and the scale multiplies what is lost
        ("tiled", torch.bfloat16, 15.0, (1e-3, 0.02)),
        ("tiled", torch.bfloat16, 100.0, (2e-3, 0.05)),
        ("tiled", torch.float16, 100.0, (1e-5, 1e-3)),
        ("triton", torch.float32, 100.0, (1e-6, 1e-5)),
        # logits are not rounded, as those of the tiled form are; their gradients are
        ("triton", torch.bfloat16, 100.0, (1e-6, 0.005)),
        ("triton", torch.float16, 100.0, (1e-6, 1e-3)),
    ],
)
def test_narrow_types_accumulate_in_fp32(request, form, dtype, scale, tolerances):
    if form == "triton":
        pool = request.getfixturevalue("interpreter")
        assert_close_to_fp64(
            lambda *call, **options: pool.submit(*call, form=form, **options).result(),
            *(50, 24, dtype, scale, tolerances),
        )
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(LARGEST_TILE, "cpu", 100 * 100)
            compute = functools.partial(call_on, "cpu", form=form)
            assert_close_to_fp64(compute, 500, 64, dtype, scale, tolerances)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerances"),
    [
        (torch.float64, (1e-13, 1e-11)),
        (torch.float32, (1e-6, 1e-4)),
        (torch.bfloat16, (1e-5, 0.01)),
    ],
)
def test_many_blocks_on_a_gpu(dtype, tolerances):
    """More logits than one tile of the gradient holds; neither side is a multiple of a block."""
    compute = functools.partial(call_on, "cuda", form="triton")
    assert_close_to_fp64(compute, 4500, 520, dtype, 100.0, tolerances)


def test_columns_are_not_summed_up_where_only_rows_are_asked_for(monkeypatch):
    """Cross-entropy may have thousands of columns, one for each class, to some hundred rows."""
    dims, plain = [], loss_tiled._accumulate

    def accumulate(logits: Any, scratch: Any, dim: int, *sums: Any) -> None:
        dims.append(dim)
        plain(logits, scratch, dim, *sums)

    monkeypatch.setattr(loss_tiled, "_accumulate", accumulate)
    images, texts = rows(5, seed=0), rows(9, seed=1)
    for directions, expected in (("i2t", {1}), ("t2i", {0, 1}), ("both", {0, 1})):
        options = {"text_class_ids": torch.arange(9), "directions": directions, "form": "tiled"}
        unified_contrastive_loss(images, texts, torch.arange(5), 10.0, **options)
        assert set(dims) == expected
        dims.clear()


@pytest.mark.parametrize("trained", range(3), ids=["images", "texts", "scale"])
def test_only_what_is_asked_for_is_differentiated(trained):
    inputs = [rows(9, seed=1), rows(9, seed=2), torch.tensor(5.0, dtype=torch.float64)]
    inputs[trained].requires_grad_()
    dense, tiled = (
        torch.autograd.grad(
            unified_contrastive_loss(*inputs[:2], torch.arange(9) // 2, inputs[2], form=form),
            inputs[trained],
        )[0]
        for form in ("dense", "tiled")
    )
    torch.testing.assert_close(tiled, dense, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("form", ["dense", "tiled"])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_second_derivative_is_right_or_refused(form, sigmoid):
    """A gradient penalty, say, which would add nothing if gradients passed for constants."""
    images, texts = rows(9, seed=1).requires_grad_(), rows(9, seed=2)
    if sigmoid:
        loss = sigmoid_contrastive_loss(images, texts, torch.arange(9), 5.0, -1.0, form=form)
    else:
        loss = unified_contrastive_loss(images, texts, torch.arange(9), 5.0, form=form)
    if form == "tiled":
        with pytest.raises(RuntimeError, match=r"no second derivative .*efficiency.loss=dense"):
            torch.autograd.grad(loss, images, create_graph=True)
    else:
        (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
        assert torch.autograd.grad(gradient.square().sum(), images)[0].abs().max() > 0.01


def test_a_second_derivative_of_features_of_other_ranks_is_refused():
    features = rows(3, seed=1).requires_grad_()
    with fake_ranks(2) as ranks, pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gather_rows(features, ranks).sum(), features, create_graph=True)


@pytest.mark.parametrize(
    ("shape", "number"),
    [
        ((1, 1), 1),
        ((16_384, 16_384), 16),
        ((64, 65_536), 1),
        ((64, 1 << 20), 4),
        ((1 << 20, 64), 4),
        ((4097, 3), 1),
        ((1, 3 << 24), 3),
    ],
)
def test_tiles_of_a_gpu_are_as_few_as_their_area_allows(shape, number):
    tiles = _blocks(*shape, "cuda")
    assert len(tiles[0]) * len(tiles[1]) == number
    assert tiles[0][0].stop * tiles[1][0].stop <= LARGEST_TILE["cuda"]
    for size, parts in zip(shape, tiles, strict=True):
        ends = [0, *(part.stop for part in parts)]
        assert [part.start for part in parts] == ends[:-1]
        assert ends[-1] == size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_as_large_as_the_logits(dtype):
    n = 600
    images, texts = rows(n, seed=1).to(dtype), rows(n, seed=2).to(dtype)
    sizes = {}
    for form in ("dense", "tiled"):
        with LargestTensor() as largest:
            loss_and_gradients(images, texts, torch.arange(n) // 3, 10.0, form=form)
        sizes[form] = largest.num_bytes
    assert sizes["dense"] >= n * n * 4
    assert sizes["tiled"] <= n * D * 4
