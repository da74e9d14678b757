"""Distillation against its formula in NumPy, in both forms, and over ranks that hold parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_inputs import LargestTensor, assert_equal, rows, tiles_of
from property_tests import examples
from reference_loss import affinity_loss as reference_loss
from torch.nn import functional as F

from unicl_fast.objectives.loss import LogitStatistics
from unicl_fast.objectives.loss_distillation import affinity_loss, feature_loss

FORMS = ("dense", "tiled")

small_tiles = tiles_of(5)


def teacher_rows(n: int, *, seed: int) -> torch.Tensor:
    """Of another width than the student's."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, 5, dtype=torch.float64, generator=generator), dim=1)


def loss_and_gradients(
    images: torch.Tensor, texts: torch.Tensor, *rest: object, scale: float, **options: object
) -> list[torch.Tensor]:
    """The loss, and its gradients of images, texts and scale."""
    learnt = [
        images.clone().requires_grad_(),
        texts.clone().requires_grad_(),
        torch.tensor(scale, dtype=torch.float64, requires_grad=True),
    ]
    loss = affinity_loss(*learnt[:2], *rest[:2], learnt[2], rest[2], **options)
    return [loss.detach(), *torch.autograd.grad(loss, learnt)]


@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 12)),
    scale=st.floats(0.1, 120),
    teacher_scale=st.floats(0.1, 120),
    seed=st.integers(0, 10_000),
)
@examples(60)
def test_affinities_equal_the_formula_with_texts_counted(
    sizes: tuple[int, int], scale: float, teacher_scale: float, seed: int
) -> None:
    """Distinct texts with counts, and some of count 0, are the texts of all samples."""
    random, (b, u) = np.random.default_rng(seed), sizes
    text_index = random.integers(0, u, b)
    counts = np.bincount(text_index, minlength=u)
    images, texts = rows(b, seed=seed), rows(u, seed=seed + 1)
    known = teacher_rows(b, seed=seed + 2), teacher_rows(u, seed=seed + 3)
    expected = reference_loss(
        *(one.numpy() for one in (images, texts[text_index], known[0], known[1][text_index])),
        scale,
        teacher_scale,
    )
    found = [
        loss_and_gradients(
            *(images, texts, *known, teacher_scale),
            scale=scale,
            text_counts=torch.from_numpy(counts),
            form=form,
        )
        for form in FORMS
    ]
    assert found[0][0].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert_equal(found[1], found[0], rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("exclude_self", [False, True])
def test_gradients_equal_differences_of_the_formula(form: str, exclude_self: bool) -> None:
    images = rows(7, seed=3).numpy()
    texts = images.copy() if exclude_self else rows(7, seed=4).numpy()
    known = [teacher_rows(7, seed=5)] * 2 if exclude_self else [
        teacher_rows(7, seed=5), teacher_rows(7, seed=6)
    ]  # fmt: skip
    values, h = [images, texts, np.array(6.0)], 1e-6
    options = {"exclude_self": exclude_self}
    found = loss_and_gradients(
        torch.from_numpy(images), torch.from_numpy(texts), *known, 9.0,
        scale=6.0, form=form, **options,
    )  # fmt: skip

    def loss(values: list[np.ndarray]) -> float:
        student = values[0], values[1]
        return reference_loss(
            *student, *(k.numpy() for k in known), float(values[2]), 9.0, **options
        )

    assert found[0].item() == pytest.approx(loss(values), rel=1e-10)
    if exclude_self:  # rows alone are looked at, and the formula's gradient is that of both
        images_and_texts = found[1] + found[2]
        found, values = [found[0], images_and_texts], [images]
    for which, gradient in enumerate(found[1:]):
        for index in np.ndindex(values[which].shape):
            around = []
            for moved_by in (h, -h):
                moved = [value.copy() for value in values]
                moved[which][index] += moved_by
                around.append(loss([moved[0], moved[0], np.array(6.0)] if exclude_self else moved))
            expected = (around[0] - around[1]) / (2 * h)
            assert gradient[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_a_student_that_agrees_has_no_loss_and_no_gradient(form: str) -> None:
    images, texts = rows(9, seed=1), rows(6, seed=2)
    found = loss_and_gradients(images, texts, images, texts, 20.0, scale=20.0, form=form)
    assert_equal(found, [torch.zeros_like(one) for one in found], rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_the_images_join_to_all_of_them(form: str) -> None:
    """Three ranks by hand: each has 4 images, and its statistics of columns are merged."""
    images, texts = rows(12, seed=1), rows(7, seed=2)
    known = teacher_rows(12, seed=3), teacher_rows(7, seed=4)
    counts = torch.tensor([1, 2, 0, 3, 1, 4, 1])
    whole = loss_and_gradients(
        images, texts, *known, 12.0, scale=30.0, text_counts=counts, form=form
    )
    parts = [slice(start, start + 4) for start in (0, 4, 8)]
    learnt = [images.clone().requires_grad_(), texts.clone().requires_grad_()]
    learnt.append(torch.tensor(30.0, dtype=torch.float64, requires_grad=True))

    def loss_of(part: slice, answers: list) -> tuple[torch.Tensor, list]:
        asked: list = []

        def all_reduce(columns: LogitStatistics, mean: torch.Tensor) -> tuple:
            asked.append((columns, mean))
            return answers[len(asked) - 1] if len(answers) >= len(asked) else (columns, mean)

        loss = affinity_loss(
            learnt[0][part], learnt[1], known[0][part], known[1], learnt[2], 12.0,
            text_counts=counts, form=form, all_reduce=all_reduce,
        )  # fmt: skip
        return loss, asked

    answers: list = []
    for call in range(2):
        asked = [loss_of(part, answers)[1][call] for part in parts]
        columns = zip(*(one for one, _ in asked), strict=True)
        logs, sums, weights = (torch.stack(one) for one in columns)
        merged = LogitStatistics(logs.logsumexp(0), sums.sum(0), weights.sum(0))
        answers.append((merged, torch.stack([mean for _, mean in asked]).mean()))
    loss, _ = loss_of(parts[0], answers)
    found = [loss.detach(), *torch.autograd.grad(loss, learnt)]
    assert_equal(found, whole, rtol=1e-9)


def test_tiles_store_no_matrix() -> None:
    images, texts = rows(100, seed=1), rows(75, seed=2)
    with LargestTensor() as largest:
        loss_and_gradients(
            images, texts, teacher_rows(100, seed=3), teacher_rows(75, seed=4), 9.0,
            scale=9.0, form="tiled",
        )  # fmt: skip
    assert largest.num_bytes < 100 * 75 * 8 / 4


def test_features_are_compared_by_their_angle_through_a_projection() -> None:
    features, projection = rows(6, seed=1), torch.randn(8, 5, dtype=torch.float64)
    known, counts = teacher_rows(6, seed=2), torch.tensor([1, 2, 0, 1, 3, 1])
    found = feature_loss(features, known.half(), projection, counts=counts)
    cosines = (F.normalize(features @ projection, dim=1) * known.half().double()).sum(1)
    cosines /= known.half().double().norm(dim=1)
    assert found.item() == pytest.approx(1 - float((counts * cosines).sum() / counts.sum()))
    assert feature_loss(known, known, None).item() == pytest.approx(0, abs=1e-12)
