"""Bytes to the encoder's input, by the one function."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional as V

from unicl_fast.config import CLIP_MEAN, CLIP_STD
from unicl_fast.precision import Precision, normalise_images

PICTURES = torch.arange(2 * 5 * 7 * 3, dtype=torch.int64).mul(37).remainder(256)
PICTURES = PICTURES.to(torch.uint8).view(2, 5, 7, 3)


def test_equals_torchvision_and_is_channels_last() -> None:
    ours = normalise_images(PICTURES, mean=CLIP_MEAN, std=CLIP_STD)
    pictures = PICTURES.permute(0, 3, 1, 2).contiguous()
    theirs = V.normalize(V.to_dtype(pictures, torch.float32, scale=True), CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert ours.shape == (2, 3, 5, 7)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert not ours.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounds_once(dtype: torch.dtype) -> None:
    ours = normalise_images(PICTURES, mean=CLIP_MEAN, std=CLIP_STD, dtype=dtype)
    exact = normalise_images(PICTURES, mean=CLIP_MEAN, std=CLIP_STD, dtype=torch.float64)
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().max() <= torch.finfo(dtype).eps * 1.3


def test_the_other_order_holds_the_same_numbers() -> None:
    last = normalise_images(PICTURES, mean=CLIP_MEAN, std=CLIP_STD)
    first = normalise_images(PICTURES, mean=CLIP_MEAN, std=CLIP_STD, channels_last=False)
    assert torch.equal(first, last)
    assert first.is_contiguous()


def test_what_is_no_uint8_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected uint8 pictures \[b h w 3\]"):
        normalise_images(torch.zeros(1, 3, 4, 4), mean=CLIP_MEAN, std=CLIP_STD)


def test_only_fp16_scales_the_loss() -> None:
    scaling = {
        name: Precision(name).build_scaler("cpu").is_enabled()
        for name in ("fp32", "bf16", "fp16", "fp64")
    }
    assert scaling == {"fp32": False, "bf16": False, "fp16": True, "fp64": False}
