"""The tiled loss against the dense one in fp64, value and gradients, and what it allocates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_inputs import CAPTION_KEY, D, LargestTensor, as_matrix, random_membership, rows, tiles_of
from property_tests import examples

from unicl_fast.objectives import loss_tiled
from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.objectives.loss_tiled import LARGEST_TILE, _blocks
from unicl_fast.objectives.positives import Membership

small_tiles = tiles_of(7)


def assert_forms_agree(
    images: torch.Tensor, texts: torch.Tensor, class_ids: Any, scale: float, **arguments: Any
) -> None:
    """Loss and gradients of both features and the scale, within rounding of the largest."""
    found = []
    for form in ("dense", "tiled"):
        inputs = [
            images.clone().requires_grad_(),
            texts.clone().requires_grad_(),
            torch.tensor(scale, dtype=torch.float64, requires_grad=True),
        ]
        loss = unified_contrastive_loss(
            inputs[0], inputs[1], class_ids, inputs[2], form=form, **arguments
        )
        found.append((loss, *torch.autograd.grad(loss, inputs)))
    for dense, tiled in zip(*found, strict=True):
        torch.testing.assert_close(
            tiled, dense, rtol=1e-10, atol=1e-12 * max(1, scale, float(dense.detach().abs().max()))
        )


def test_columns_are_not_summed_up_where_only_rows_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cross-entropy may have thousands of columns, one for each class, to some hundred rows."""
    dims, plain = [], loss_tiled._accumulate

    def accumulate(logits: Any, scratch: Any, dim: int, *sums: Any) -> None:
        dims.append(dim)
        plain(logits, scratch, dim, *sums)

    monkeypatch.setattr(loss_tiled, "_accumulate", accumulate)
    images, texts = rows(5, seed=0), rows(9, seed=1)
    for directions, expected in (("i2t", {1}), ("t2i", {0, 1}), ("both", {0, 1})):
        assert_forms_agree(
            images, texts, torch.arange(5), 10.0, text_class_ids=torch.arange(9),
            directions=directions,
        )  # fmt: skip
        assert set(dims) == expected
        dims.clear()


structures = st.sampled_from(["one class", "all distinct", "three classes", "keys of captions"])


@given(
    structure=structures,
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    scale=st.floats(0.01, 100),
    counts=st.sampled_from(["none", "ones", "many", "with padding"]),
    directions=st.sampled_from(["both", "i2t", "t2i"]),
    unit=st.booleans(),
    duplicates=st.booleans(),
    seed=st.integers(0, 10_000),
)
@examples(150)
def test_any_class_structure(
    structure: str,
    sizes: tuple[int, int],
    scale: float,
    counts: str,
    directions: str,
    unit: bool,
    duplicates: bool,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    b, u = sizes
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
    images, texts = rows(b, seed=seed, unit=unit), rows(u, seed=seed + 1, unit=unit)
    if duplicates:
        images, texts = images[: b // 2 + 1].repeat(2, 1)[:b], texts[:1].repeat(u, 1)
    assert_forms_agree(
        images,
        texts,
        class_ids[:b],
        scale,
        text_class_ids=class_ids[b:],
        text_counts=text_counts,
        directions=directions,
    )


@given(
    classes=st.lists(st.integers(0, 4), min_size=2, max_size=30),
    scale=st.floats(0.1, 100),
)
def test_two_views_without_the_image_itself(classes: list[int], scale: float) -> None:
    views = rows(len(classes), seed=len(classes))
    assert_forms_agree(views, views, torch.tensor(classes), scale, exclude_self=True)


@given(
    sizes=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    mixed=st.booleans(),
    counted=st.booleans(),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 10_000),
)
def test_several_labels_a_sample(
    sizes: tuple[int, int], mixed: bool, counted: bool, scale: float, seed: int
) -> None:
    """Both forms, and the rule itself: weights Y Y^T over the sum of the row."""
    random = np.random.default_rng(seed)
    b, u = sizes
    of_images, of_texts = (random_membership(random, n, mixed=mixed) for n in sizes)
    counts = torch.from_numpy(random.integers(1, 4, u)) if counted else None
    images, texts = rows(b, seed=seed), rows(u, seed=seed + 1)
    arguments = {"text_class_ids": of_texts, "text_counts": counts}
    assert_forms_agree(images, texts, of_images, scale, **arguments)

    m = np.ones(u) if counts is None else counts.numpy()
    logits = scale * images.numpy() @ texts.numpy().T
    weights = as_matrix(of_images, b) @ as_matrix(of_texts, u).T * m
    log_softmax = logits - np.logaddexp.reduce(logits + np.log(m), axis=1, keepdims=True)
    row_sums = weights.sum(axis=1)
    means = (weights * log_softmax).sum(axis=1) / np.where(row_sums > 0, row_sums, 1)
    ours = unified_contrastive_loss(
        images, texts, of_images, scale, directions="i2t", form="tiled", **arguments
    )
    assert ours.item() == pytest.approx(-means.mean(), rel=1e-10, abs=1e-12)


def test_class_ids_are_memberships_of_one_label() -> None:
    class_ids = torch.tensor([3, 1, 3, 3, 9])
    membership = Membership(torch.arange(5), class_ids, torch.ones(5))
    images, texts = rows(5, seed=1), rows(5, seed=2)
    for form in ("dense", "tiled"):
        one = unified_contrastive_loss(images, texts, class_ids, 10.0, form=form)
        other = unified_contrastive_loss(images, texts, membership, 10.0, form=form)
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_gradients_equal_differences(exclude_self: bool) -> None:
    class_ids = torch.tensor([0, 0, 1, 1, 1, 7, 7, 8, 8])
    counts = None if exclude_self else torch.tensor([1, 2, 3, 1, 1, 1, 4, 1, 1])

    def loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return unified_contrastive_loss(
            images,
            texts,
            class_ids,
            scale,
            text_counts=counts,
            exclude_self=exclude_self,
            form="tiled",
        )

    inputs = (rows(9, seed=1), rows(9, seed=2), torch.tensor(3.0, dtype=torch.float64))
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("trained", ["images", "texts", "scale"])
def test_only_what_is_asked_for_is_differentiated(trained: str) -> None:
    inputs = {
        "images": rows(9, seed=1),
        "texts": rows(9, seed=2),
        "scale": torch.tensor(5.0, dtype=torch.float64),
    }
    inputs[trained].requires_grad_()
    gradients = []
    for form in ("dense", "tiled"):
        loss = unified_contrastive_loss(
            inputs["images"], inputs["texts"], torch.arange(9) // 2, inputs["scale"], form=form
        )
        gradients.append(torch.autograd.grad(loss, inputs[trained])[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-14)


def test_logits_beyond_the_range_of_exp_in_one_batch() -> None:
    """fp32 at scale 100: a row of -100 and a row of +100, so that no common shift would do."""
    u = torch.eye(2).repeat(4, 1)
    images, texts = torch.cat([u, -u]).requires_grad_(), u.clone().requires_grad_()
    class_ids, text_class_ids = torch.arange(16) % 8, torch.arange(8)
    found = []
    for form in ("dense", "tiled"):
        loss = unified_contrastive_loss(
            images, texts, class_ids, 100.0, text_class_ids=text_class_ids, form=form
        )
        found.append((loss, *torch.autograd.grad(loss, (images, texts))))
    for dense, tiled in zip(*found, strict=True):
        assert tiled.isfinite().all()
        torch.testing.assert_close(tiled, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "number"),
    [
        ((1, 1), 1),
        ((4096, 4096), 1),
        ((16_384, 16_384), 16),
        ((64, 65_536), 1),
        ((64, 1 << 20), 4),
        ((1 << 20, 64), 4),
        ((4097, 3), 1),
        ((1, 3 << 24), 3),
    ],
)
def test_tiles_of_a_gpu_are_as_few_as_their_area_allows(
    shape: tuple[int, int], number: int
) -> None:
    rows, columns = _blocks(*shape, "cuda")
    assert len(rows) * len(columns) == number
    assert rows[0].stop * columns[0].stop <= LARGEST_TILE["cuda"]
    for size, parts in zip(shape, (rows, columns), strict=True):
        ends = [0, *(part.stop for part in parts)]
        assert [part.start for part in parts] == ends[:-1]
        assert ends[-1] == size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_as_large_as_the_logits(dtype: torch.dtype) -> None:
    n = 600
    images, texts = rows(n, seed=1).to(dtype), rows(n, seed=2).to(dtype)
    class_ids = torch.arange(n) // 3
    sizes = {}
    for form in ("dense", "tiled"):
        inputs = images.clone().requires_grad_(), texts.clone().requires_grad_()
        with LargestTensor() as largest:
            unified_contrastive_loss(*inputs, class_ids, 10.0, form=form).backward()
        sizes[form] = largest.num_bytes
    assert sizes["dense"] >= n * n * 4
    assert sizes["tiled"] <= n * D * 4
