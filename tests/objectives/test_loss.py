"""The loss against its formula in NumPy, and its edges."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_inputs import CAPTION_KEY, rows, tiles_of
from reference_loss import unified_contrastive_loss as reference_loss

from unicl_fast import unified_contrastive_loss
from unicl_fast.objectives.loss import reference_loss as define_loss
from unicl_fast.objectives.positives import Membership

FORMS = ("dense", "tiled")


small_tiles = tiles_of(5)


@pytest.mark.parametrize("form", FORMS)
@given(
    classes=st.lists(st.sampled_from([0, 1, 2, -5, CAPTION_KEY, CAPTION_KEY + 1]), min_size=1),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 1000),
)
def test_equals_the_formula(form, classes, scale, seed):
    images, texts = rows(len(classes), seed=seed), rows(len(classes), seed=seed + 1)
    class_ids = torch.tensor(classes)
    i2t, t2i = reference_loss(images.numpy(), texts.numpy(), class_ids.numpy(), scale)

    def ours(directions: str) -> float:
        return unified_contrastive_loss(
            images, texts, class_ids, scale, directions=directions, form=form
        ).item()

    assert ours("i2t") == pytest.approx(i2t, rel=1e-10, abs=1e-12)
    assert ours("t2i") == pytest.approx(t2i, rel=1e-10, abs=1e-12)
    assert ours("both") == pytest.approx((i2t + t2i) / 2, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@given(
    texts=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    text_classes=st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_distinct_texts_with_counts_equal_all_texts(form, texts, text_classes):
    """Value and gradients: six texts of up to three classes, seen several times or not at all."""
    index, classes = torch.tensor(texts), torch.tensor(text_classes)
    images = rows(len(texts), seed=1).requires_grad_()
    features = rows(6, seed=2).requires_grad_()
    plain = unified_contrastive_loss(images, features[index], classes[index], 20.0, form="dense")
    plain_gradients = torch.autograd.grad(plain, (images, features))
    of_texts = {"text_class_ids": classes, "text_counts": torch.bincount(index, minlength=6)}
    counted = unified_contrastive_loss(
        images, features, classes[index], 20.0, form=form, **of_texts
    )
    counted_gradients = torch.autograd.grad(counted, (images, features))
    torch.testing.assert_close(counted, plain, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(counted_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_weights_average_the_losses_of_rows_and_columns(form):
    """Loss and gradients as the definition says, with distinct texts; their scale is irrelevant."""
    index, classes = torch.tensor([0, 1, 1, 2, 0, 3]), torch.tensor([0, 1, 1, 2])
    images, features = rows(6, seed=1).requires_grad_(), rows(4, seed=2).requires_grad_()
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    for own in ([1, 5, 2, 0.5, 7, 3], [3, 15, 6, 1.5, 21, 9], [3] * 6):
        weights = torch.tensor(own, dtype=torch.float32)
        found = unified_contrastive_loss(
            images, features, classes[index], scale, text_class_ids=classes, form=form,
            text_counts=index.bincount(), weights=(weights, index.bincount(weights)),
        )  # fmt: skip
        expected = define_loss(images, features[index], classes[index], scale, weights)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        gradients, expected = (
            torch.autograd.grad(one, (images, features, scale)) for one in (found, expected)
        )
        torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["one image", "one class", "all distinct", "captions only"])
def test_finite_at_scale_100(dtype, kind, form):
    n = 1 if kind == "one image" else 64
    class_ids = {
        "one image": torch.zeros(1, dtype=torch.int64),
        "one class": torch.zeros(n, dtype=torch.int64),
        "all distinct": torch.arange(n),
        "captions only": torch.arange(n) // 2 + CAPTION_KEY,
    }[kind]
    images = rows(n, 2, seed=1).to(dtype).requires_grad_()
    texts = (-rows(n, 2, seed=1)).to(dtype).requires_grad_()  # as wrong as it gets
    loss = unified_contrastive_loss(images, texts, class_ids, 100.0, form=form)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert images.grad.isfinite().all()
    assert texts.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_float64_stays_float64_under_autocast(form):
    images, texts, class_ids = rows(8), rows(8, seed=1), torch.arange(8)
    plain = unified_contrastive_loss(images, texts, class_ids, 10.0, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = unified_contrastive_loss(images, texts, class_ids, 10.0, form=form)
    assert inside.dtype == torch.float64
    assert inside.item() == plain.item()


MEMBERSHIP = Membership(torch.arange(4), torch.arange(4), torch.ones(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_ids": torch.arange(3)}, "expected 4 class_ids"),
        ({"text_features": torch.ones(2, 16)}, "pass text_class_ids"),
        ({"text_features": torch.ones(4, 8)}, "differ in dimension"),
        ({"text_counts": torch.ones(3)}, "expected 4 text_counts"),
        ({"class_ids": MEMBERSHIP._replace(labels=torch.arange(3))}, "Membership to be .e., got"),
        ({"class_ids": MEMBERSHIP}, "a Membership needs text_class_ids"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_shapes_that_do_not_fit_are_refused(arguments, message):
    plain = {"text_features": torch.ones(4, 16), "class_ids": torch.arange(4), "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        unified_contrastive_loss(torch.ones(4, 16), **(plain | arguments))


def test_without_triton_only_its_form_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "unicl_fast.objectives.loss_triton", raising=False)
    images, class_ids = rows(4), torch.arange(4)
    unified_contrastive_loss(images, images, class_ids, 1.0)
    with pytest.raises(ModuleNotFoundError, match="needs the package triton .*pip install triton"):
        unified_contrastive_loss(images, images, class_ids, 1.0, form="triton")
