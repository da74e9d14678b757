"""The sigmoid form against torch's cross-entropy, open_clip's SigLipLoss, and its edges."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_inputs import LargestTensor, assert_equal, rows, tiles_of
from open_clip.loss import SigLipLoss
from property_tests import examples
from torch.nn import functional as F

from unicl_fast import sigmoid_contrastive_loss

FORMS = ("dense", "tiled")


small_tiles = tiles_of(5)


def loss_and_gradients(
    images: torch.Tensor, texts: torch.Tensor, *rest: object, scale: float, bias: float, **options
) -> list[torch.Tensor]:
    """The loss, and its gradients of images, texts, scale and bias."""
    learnt = [images.clone(), texts.clone(), *torch.tensor([scale, bias], dtype=torch.float64)]
    learnt = [one.detach().requires_grad_() for one in learnt]
    loss = sigmoid_contrastive_loss(*learnt[:2], *rest, *learnt[2:], **options)
    return [loss.detach(), *torch.autograd.grad(loss, learnt)]


@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    num_classes=st.integers(1, 12),
    padded=st.booleans(),
    scale=st.floats(0.1, 120),
    bias=st.floats(-20, 20),
    seed=st.integers(0, 10_000),
)
@examples(60)
def test_equals_the_formula(sizes, num_classes, padded, scale, bias, seed):
    """Any classes, images without a positive text, counts, and texts of count 0."""
    random = np.random.default_rng(seed)
    b, u = sizes
    of_images, of_texts = (torch.from_numpy(random.integers(-1, num_classes, n)) for n in sizes)
    counts = torch.from_numpy(random.integers(0 if padded else 1, 5, u))
    images, texts = rows(b, seed=seed), rows(u, seed=seed + 1)
    logits, weights = scale * images @ texts.T + bias, (of_images[:, None] == of_texts).double()
    pairs = F.binary_cross_entropy_with_logits(logits, weights, reduction="none")
    expected = (pairs @ counts.double()).mean().item()
    call = images, texts, of_images
    options = {"scale": scale, "bias": bias, "text_class_ids": of_texts, "text_counts": counts}
    found = [loss_and_gradients(*call, form=form, **options) for form in FORMS]
    assert found[0][0].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("form", FORMS)
def test_all_classes_distinct_is_siglip(form):
    images, texts = rows(12, seed=1), rows(12, seed=2)
    learnt = [images.clone(), texts.clone(), *torch.tensor([10.0, -10.0], dtype=torch.float64)]
    learnt = [one.detach().requires_grad_() for one in learnt]
    theirs = SigLipLoss()(*learnt)
    expected = [theirs.detach(), *torch.autograd.grad(theirs, learnt)]
    class_ids = torch.arange(12) + 1000
    assert_equal(
        loss_and_gradients(images, texts, class_ids, scale=10.0, bias=-10.0, form=form), expected
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_are_near_fp64_and_finite_at_scale_100(dtype, form):
    """Pairs that resemble each other, and those that are as wrong as it gets."""
    class_ids = torch.arange(60) % 20
    classes = rows(20, seed=3)[class_ids]
    images = torch.nn.functional.normalize(classes + 0.4 * rows(60, seed=1), dim=1).to(dtype)
    for texts in (classes.to(dtype), -classes.to(dtype)):
        exact = loss_and_gradients(
            images.double(), texts.double(), class_ids, scale=100.0, bias=-10.0, form="dense"
        )
        found = loss_and_gradients(images, texts, class_ids, scale=100.0, bias=-10.0, form=form)
        assert found[0].dtype == torch.float32
        rel = 0.01 if (dtype, form) == (torch.bfloat16, "tiled") else 1e-4
        assert found[0].item() == pytest.approx(exact[0].item(), rel=rel)
        for ours, theirs in zip(found[1:3], exact[1:3], strict=True):
            assert ours.dtype == dtype
            assert ours.isfinite().all()
            assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_no_tensor_is_as_large_as_the_logits():
    n = 100
    images, texts = rows(n, seed=1), rows(n, seed=2)
    sizes = {}
    for form in FORMS:
        with LargestTensor() as largest:
            loss_and_gradients(images, texts, torch.arange(n) // 3, scale=9.0, bias=-9.0, form=form)
        sizes[form] = largest.num_bytes
    assert sizes["dense"] >= n * n * 8
    assert sizes["tiled"] <= images.numel() * 8


def test_kernels_of_the_softmax_form_are_not_taken_for_it():
    images = rows(4, seed=1)
    with pytest.raises(ValueError, match="for the softmax form only: set auto, dense or tiled"):
        sigmoid_contrastive_loss(images, images, torch.arange(4), 10.0, -10.0, form="triton")
