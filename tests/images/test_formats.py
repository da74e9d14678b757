"""Images of every kind, made into files of one format."""

from __future__ import annotations

import csv
import io
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from property_tests import examples

from unicl_fast.images.check import (
    CheckedImage,
    ImageError,
    check_image,
    simple_webp,
)
from unicl_fast.images.codec import MAX_WEBP_SIDE

Format = Literal["jpeg", "webp", "png", "keep"]
FORMATS: tuple[Format, ...] = ("jpeg", "webp", "png")
PILLOW = {"jpeg": "JPEG", "webp": "WEBP", "png": "PNG", "keep": "JPEG"}
EXTENSION = {"jpeg": "jpg", "webp": "webp", "png": "png", "keep": "jpg"}


def photo(height: int = 40, width: int = 56) -> Image.Image:
    """A smooth image with a different corner each, so that turns and mirrors show."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def saved(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def shown(data: bytes) -> np.ndarray:
    """What Pillow sees, upright, on white where it is clear."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I;16"):
        return np.stack([np.rint(np.asarray(image) / 257)] * 3, axis=-1).astype(int)
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return np.asarray(white.convert("RGB")).astype(int)


def turned(image: Image.Image, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, exif=exif, **options)


def with_alpha(image: Image.Image) -> Image.Image:
    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    return clear


RGB, LIGHT = photo(), photo().convert("L")
WORDS = Image.fromarray(np.linspace(0, 65535, 40 * 56).reshape(40, 56).astype(np.uint16))
PLAIN: dict[Format, dict[str, bytes]] = {
    "jpeg": {
        "rgb": saved(RGB, format="JPEG"),
        "grey": saved(LIGHT, format="JPEG"),
        "profile": saved(RGB, format="JPEG", icc_profile=b"x" * 200),
    },
    "webp": {
        "lossy": saved(RGB, format="WEBP", quality=80),
        "lossless": saved(RGB, format="WEBP", lossless=True),
    },
    "png": {"rgb": saved(RGB, format="PNG"), "grey": saved(LIGHT, format="PNG")},
}
OTHERS: dict[str, bytes] = {
    "cmyk jpeg": saved(RGB.convert("CMYK"), format="JPEG", quality=95),
    "rgb jpeg": saved(RGB, format="JPEG", keep_rgb=True, quality=95),
    "bmp": saved(RGB, format="BMP"),
    "tiff": saved(RGB, format="TIFF"),
    "turned jpeg": turned(RGB, format="JPEG", quality=95),
    "turned webp": turned(RGB, format="WEBP", quality=95),
    "turned png": turned(RGB, format="PNG"),
    "alpha png": saved(with_alpha(RGB), format="PNG"),
    "grey and alpha png": saved(with_alpha(LIGHT), format="PNG"),
    "alpha webp": saved(with_alpha(RGB), format="WEBP", lossless=True),
    "palette png": saved(RGB.quantize(64, dither=Image.Dither.NONE), format="PNG"),
    "clear palette gif": saved(RGB.quantize(64), format="GIF", transparency=3),
    "16-bit png": saved(WORDS, format="PNG"),
    "1-bit png": saved(LIGHT.convert("1"), format="PNG"),
    "moving webp": saved(
        RGB, format="WEBP", save_all=True, append_images=[photo(40, 56).rotate(180)]
    ),
}
GREY = {"grey jpeg", "grey png", "grey and alpha png", "16-bit png", "1-bit png"}


def every_kind(format: Format) -> dict[str, bytes]:
    """What is not of this format, or not plain."""
    kept = ("jpeg", "png") if format == "keep" else (format,)
    plain = {
        f"{kind} {other}": data
        for other in FORMATS
        if other not in kept
        for kind, data in PLAIN[other].items()
    }
    return OTHERS | plain


@pytest.mark.parametrize("format", FORMATS)
def test_plain_images_of_the_format_keep_their_bytes(format: Format) -> None:
    for kind, data in PLAIN[format].items():
        image = check_image(data, format=format, quality=30)
        assert image.data is data, kind
        assert not image.reencoded
        assert (image.extension, image.height, image.width) == (EXTENSION[format], 40, 56)


@pytest.mark.parametrize("format", [*FORMATS, "keep"])
def test_every_other_kind_becomes_a_plain_file_that_looks_the_same(format: Format) -> None:
    for kind, data in every_kind(format).items():
        image = check_image(data, format=format, quality=95)
        assert image.reencoded, kind
        assert image.extension == EXTENSION[format]
        found, expected = Image.open(io.BytesIO(image.data)), shown(data)
        assert found.format == PILLOW[format]
        assert not found.info.keys() & {"exif", "icc_profile"}
        assert (image.height, image.width) == expected.shape[:2] == found.size[::-1]
        assert found.mode == ("L" if kind in GREY and format != "webp" else "RGB"), kind
        difference = np.abs(shown(image.data) - expected)
        if format == "png":
            # two conversions of CMYK, and of a palette's alpha, round apart
            assert difference.max() <= 1, kind
        else:  # chroma at half the size: hard edges of colour suffer
            assert difference.mean() < 4, kind
        if format == "keep":
            assert simplejpeg.decode_jpeg_header(image.data)[3] in ("444", "Gray")
        # what was made is plain itself
        assert check_image(image.data, format=format).data is image.data
        assert not check_image(image.data, format="packed").reencoded


@given(
    data=st.data(),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    format=st.sampled_from(FORMATS),
)
@examples(150)
def test_any_size_is_what_it_should_be_and_comes_back(
    data: st.DataObject, height: int, width: int, format: Format
) -> None:
    noise = np.random.default_rng(height * 100 + width)
    shape = (height, width, 3) if data.draw(st.booleans()) else (height, width)
    pixels = noise.integers(0, 256, shape, np.uint8)
    short, square = data.draw(st.sampled_from([(0, 0), (16, 0), (0, 16)]))
    source = saved(Image.fromarray(pixels), format="TIFF")
    image = check_image(source, format=format, short_side=short, square_side=square)
    if square:
        expected = (16, 16)
    elif 0 < short < min(height, width):
        scale = short / min(height, width)
        expected = round(height * scale), round(width * scale)
    else:
        expected = height, width
    assert (image.height, image.width) == expected
    found = Image.open(io.BytesIO(image.data))
    found.load()
    assert found.size == expected[::-1]
    again = check_image(image.data, format=format, short_side=short, square_side=square)
    assert again.data is image.data
    if format == "png" and expected == (height, width) and not square:
        assert np.array_equal(np.asarray(found), pixels)


def test_quality_is_that_of_every_jpeg_and_webp_that_is_encoded() -> None:
    source = saved(Image.effect_noise((64, 64), 60).convert("RGB"), format="PNG")
    for format in ("jpeg", "webp"):
        sizes = [len(check_image(source, format=format, quality=q).data) for q in (20, 60, 95)]
        assert sizes == sorted(set(sizes)), format


def extended(data: bytes, *chunks: tuple[bytes, bytes], flags: int = 0) -> bytes:
    """A simple WebP as an extended one, with more chunks behind its header."""
    width, height = Image.open(io.BytesIO(data)).size
    header = struct.pack("<I", flags) + (width - 1).to_bytes(3, "little")
    body = [(b"VP8X", header + (height - 1).to_bytes(3, "little")), *chunks]
    parts = b"".join(
        name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
        for name, content in body
    )
    return (
        b"RIFF" + struct.pack("<I", 4 + len(parts) + len(data) - 12) + b"WEBP" + parts + data[12:]
    )


@pytest.mark.parametrize("kind", ["lossy", "lossless"])
def test_a_wrapped_webp_loses_its_wrapping_and_not_a_bit_of_its_image(kind: str) -> None:
    data = PLAIN["webp"][kind]
    for wrapped in (extended(data), extended(data, (b"ICCP", b"profile"), flags=0x20)):
        assert np.array_equal(shown(wrapped), shown(data))
        image = check_image(wrapped, format="webp")
        assert image.data == data
        assert image.reencoded
        # a data set holds simple ones only
        assert check_image(wrapped, format="packed").reencoded


def test_what_decoders_may_see_differently_is_no_simple_webp() -> None:
    data = PLAIN["webp"]["lossy"]
    assert simple_webp(data) is data
    for odd in (data + b"more", data[:-2], extended(data) + data[12:], b"RIFF\4\0\0\0WEBP"):
        assert simple_webp(odd) is None
    image = check_image(data + b"behind the end", format="webp")
    assert image.reencoded
    assert len(image.data) == 8 + int.from_bytes(image.data[4:8], "little")


@pytest.mark.parametrize("lossless", [False, True])
def test_a_cut_webp_is_damaged_also_where_its_sizes_say_otherwise(lossless: bool) -> None:
    data = saved(
        Image.effect_noise((200, 150), 60).convert("RGB"), format="WEBP", lossless=lossless
    )
    for part in (0.3, 0.6, 0.9):
        cut = bytearray(data[: int(len(data) * part) // 2 * 2])
        for _ in range(2):
            with pytest.raises(ImageError) as caught:
                check_image(bytes(cut), format="webp")
            assert caught.value.kind == "damaged"
            struct.pack_into("<I", cut, 4, len(cut) - 8)
            struct.pack_into("<I", cut, 16, len(cut) - 20)


NOISE = Image.effect_noise((200, 150), 60).convert("RGB")
CHECKED_ENDS = {
    "webp": saved(NOISE, format="WEBP"),
    "lossless webp": saved(NOISE, format="WEBP", lossless=True),
    "webp with alpha": saved(with_alpha(NOISE), format="WEBP"),
    "webp with exif": turned(NOISE, format="WEBP"),
    "avif": saved(NOISE, format="AVIF"),
    "qoi": saved(NOISE, format="QOI"),
    "png": saved(NOISE, format="PNG"),
    "jpeg": saved(NOISE, format="JPEG"),
    "gif": saved(NOISE, format="GIF"),
    "jpeg 2000": saved(NOISE, format="JPEG2000"),
}


@pytest.mark.parametrize("kind", CHECKED_ENDS)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 0.99])
def test_zeros_in_place_of_the_tail_are_damage(kind: str, part: float) -> None:
    data = CHECKED_ENDS[kind]
    assert check_image(data)
    start = int(len(data) * part)
    with pytest.raises(ImageError) as caught:
        check_image(data[:start] + bytes(len(data) - start))
    assert caught.value.kind == "damaged"


@pytest.mark.parametrize("format", ["BMP", "PPM", "QOI"])
def test_plain_pixels_that_lack_their_last_byte_are_damaged(format: str) -> None:
    with pytest.raises(ImageError) as caught:
        check_image(saved(NOISE, format=format)[:-1])
    assert caught.value.kind == "damaged"


def test_zeros_at_the_end_of_sound_files_are_no_damage() -> None:
    """Black areas of lossless WebPs end in them, Exif data too, and files that were padded."""
    black = NOISE.copy()
    black.paste(0, (0, 75, 200, 150))
    webp = saved(black, format="WEBP", lossless=True, method=0, quality=0)
    assert webp.endswith(bytes(1000))
    assert check_image(webp, format="webp").data is webp
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0" + bytes(30)
    assert check_image(saved(NOISE, format="AVIF", exif=exif))
    assert check_image(saved(NOISE, format="WEBP", exif=exif))
    for kind in ("qoi", "png", "jpeg"):
        assert check_image(CHECKED_ENDS[kind] + bytes(100))


def test_what_is_too_wide_for_webp_is_refused_and_fits_elsewhere() -> None:
    wide = saved(Image.new("RGB", (MAX_WEBP_SIDE + 1, 2)), format="PNG")
    with pytest.raises(ImageError, match="16384 x 2 pixels; WebP holds at most 16,383"):
        check_image(wide, format="webp")
    assert check_image(wide, format="jpeg").width == MAX_WEBP_SIDE + 1
    assert check_image(wide, format="png").data is wide
    assert check_image(wide, format="webp", short_side=1).width == 8192


@pytest.mark.parametrize(
    "format",
    [pytest.param(one, marks=() if one == "webp" else pytest.mark.slow) for one in FORMATS],
)
def test_of_hostile_files_every_format_takes_what_it_has_room_for(
    shared_data: Path, format: Format
) -> None:
    folder = shared_data / "hostile"
    with (folder / "manifest.csv").open(encoding="utf-8") as file:
        names = [row["file"] for row in csv.DictReader(file)]

    def taken(format: Literal["keep", "jpeg", "webp", "png"]) -> dict[str, CheckedImage]:
        found = {}
        for name in names:
            try:
                found[name] = check_image(
                    (folder / name).read_bytes(), format=format, short_side=64
                )
            except ImageError as error:
                assert str(error)  # noqa: PT017
        return found

    kept, made = taken("keep"), taken(format)
    assert len(kept) == 175
    left_out = [kept[name] for name in kept.keys() - made.keys()]
    if format == "webp":  # one is that wide
        assert [max(one.height, one.width) > MAX_WEBP_SIDE for one in left_out] == [True]
    else:
        assert not left_out
    assert made.keys() <= kept.keys()
    for name, image in made.items():
        assert (image.height, image.width) == (kept[name].height, kept[name].width), name
        again = check_image(image.data, format="packed")
        assert not again.reencoded, name
        assert again.extension == EXTENSION[format]
