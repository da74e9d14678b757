"""Bytes to the encoder's input, by the one function."""

import pytest
import torch
from torchvision.transforms.v2 import functional as V

from unicl_fast.config import CLIP_MEAN, CLIP_STD, EfficiencyConfig
from unicl_fast.models import precision
from unicl_fast.models.precision import (
    Precision,
    _normalise_on_host,
    normalise_images,
    set_device_arithmetic,
    settle_precision,
)

IMAGES = torch.arange(2 * 5 * 7 * 3, dtype=torch.int64).mul(37).remainder(256)
IMAGES = IMAGES.to(torch.uint8).view(2, 5, 7, 3)


def test_equals_torchvision_and_is_channels_last():
    ours = normalise_images(IMAGES, mean=CLIP_MEAN, std=CLIP_STD)
    images = IMAGES.permute(0, 3, 1, 2).contiguous()
    theirs = V.normalize(V.to_dtype(images, torch.float32, scale=True), CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert ours.shape == (2, 3, 5, 7)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert not ours.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounds_once(dtype):
    ours = normalise_images(IMAGES, mean=CLIP_MEAN, std=CLIP_STD, dtype=dtype)
    exact = normalise_images(IMAGES, mean=CLIP_MEAN, std=CLIP_STD, dtype=torch.float64)
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().max() <= torch.finfo(dtype).eps * 1.3


@pytest.mark.parametrize(
    ("shape", "mean"),
    [
        ((64, 75, 75, 3), (0.4, 0.5, 0.6)),  # rows and the whole end within a block
        ((6, 256, 256, 3), (0.4, 0.5, 0.6)),
        ((100_000, 1, 4, 3), (0.4, 0.5, 0.6)),  # rows shorter than a block
        ((6, 256, 256, 4), (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_large_batches_hold_the_same_bits_as_small_ones(shape, mean):
    """They are stored past the caches, in blocks that know nothing of rows."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    assert images.numel() >= 1 << 20
    std = tuple(0.2 + number / 10 for number in mean)
    whole = normalise_images(images, mean=mean, std=std)
    pieces = [normalise_images(piece, mean=mean, std=std) for piece in images.tensor_split(32)]
    assert torch.equal(whole, torch.cat(pieces))
    channel = (images[..., 2].double() / 255 - mean[2]) / std[2]
    torch.testing.assert_close(whole[:, 2].double(), channel, rtol=0, atol=2e-6)


def test_an_address_that_no_block_can_begin_at(monkeypatch):
    monkeypatch.setattr(precision, "_LARGE_VALUES", 0)
    values = torch.arange(96, dtype=torch.uint8).view(1, 2, 48)
    factor = torch.tensor([2.0, 3.0, 4.0]).repeat(16)
    unaligned = torch.zeros(97)[1:].view(1, 2, 48)
    assert unaligned.data_ptr() % 64
    _normalise_on_host(unaligned, values, factor, factor, channels=3)
    torch.testing.assert_close(unaligned, values * factor + factor)


def test_what_is_no_uint8_batch_is_refused():
    with pytest.raises(ValueError, match=r"expected uint8 images \[b h w 3\]"):
        normalise_images(torch.zeros(1, 3, 4, 4), mean=CLIP_MEAN, std=CLIP_STD)


def test_only_fp16_scales_the_loss():
    scaling = {
        name: Precision(name).build_scaler("cpu").is_enabled()
        for name in ("fp32", "tf32", "bf16", "fp16", "fp64")
    }
    assert [name for name, is_enabled in scaling.items() if is_enabled] == ["fp16"]


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"),
    [(0.0123, 0.0054, "bf16"), (0.005, 0.0046, "fp32"), (0.005, 0.07, "fp32")],
    ids=["faster", "hardly faster", "emulated"],
)
def test_auto_is_what_was_measured_to_be_faster(
    monkeypatch, caplog,
    fp32, bf16, expected,
):  # fmt: skip
    monkeypatch.setattr(precision, "seconds_of_products", lambda threads: (fp32, bf16))
    monkeypatch.setattr(precision, "choose_device", lambda name: torch.device("cpu"))
    assert Precision("auto") == Precision(expected)
    with caplog.at_level("INFO"):
        assert settle_precision("auto", torch.device("cpu")) == expected
    assert f"precision: {expected}" in caplog.text
    assert f"took {1000 * fp32:.1f} ms in fp32 and {1000 * bf16:.1f} ms in bf16" in caplog.text
    assert settle_precision("auto", torch.device("cpu"), stored="fp64") == "fp64"
    assert settle_precision("bf16", torch.device("cpu"), stored="fp64") == "bf16"


def test_both_precisions_are_measured_once_and_no_random_number_is_drawn():
    precision.seconds_of_products.cache_clear()
    before = torch.get_rng_state()
    fp32, bf16 = precision.seconds_of_products(1)
    assert 0 < min(fp32, bf16) <= max(fp32, bf16) < 10
    assert torch.equal(torch.get_rng_state(), before)
    assert precision.seconds_of_products(1) == (fp32, bf16)


@pytest.mark.parametrize(
    ("precision_name", "expected"),
    [("tf32", True), ("bf16", True), ("fp16", True), ("fp32", False), ("fp64", False)],
)
def test_tf32_is_for_gpus_whose_encoders_round_anyway(precision_name, expected):
    switches = [
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "benchmark"),
    ]

    def state() -> list[bool]:
        return [getattr(*switch) for switch in switches]

    def restore(values: list[bool]) -> None:
        for (module, name), value in zip(switches, values, strict=True):
            setattr(module, name, value)

    before = state()
    settings = EfficiencyConfig(precision=precision_name)
    others = [not expected, not expected, False]
    try:
        restore(others)
        set_device_arithmetic(settings, torch.device("cpu"))
        assert state() == others
        set_device_arithmetic(settings, torch.device("cuda"))
        assert state() == [expected, expected, True]
    finally:
        restore(before)
