"""Checks one image's bytes strictly, and normalises what decoders might read differently.

An image that is a plain 8-bit grey or RGB JPEG or PNG, the right way up and free of damage, keeps
its bytes. Anything else that can be read is decoded here and encoded anew, so that the decoder of
the training run meets no surprises. What cannot be read, or reads only with warnings, is refused
with an `ImageError` that gives the reason. Where all images shall have one format, only plain ones
of that format keep their bytes. `docs/data-format.md` lists the conversions. For a raw data set the
same decoding gives pixels, and nothing is encoded.

Decoding for training is DALI's work; this module only decides what DALI is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from unicl_fast.images.decode import MAX_PIXELS as MAX_PIXELS
from unicl_fast.images.decode import MAX_SIDE as MAX_SIDE
from unicl_fast.images.decode import ImageError as ImageError
from unicl_fast.images.decode import (
    Pixels,
    check_size,
    open_image,
    orientation_of,
    pillow_error,
    pillow_limits,
    pixels_of,
    turn_upright,
)
from unicl_fast.images.encode import encode_jpeg, encode_png, encode_webp, image_of
from unicl_fast.images.headers import JpegHeader, is_webp, read_jpeg_header, simple_webp

MAX_SCANS = 500
"""A progressive JPEG with more scans attacks the decoder's time; cameras write about 10."""
MAX_PNG_EXTRA = 1_000_000
"""Bytes of the largest chunk without pixels that a kept PNG may have; DALI refuses 8 MB."""
REENCODE_QUALITY = 95
REENCODE_SUBSAMPLING = "444"
RESIZE_QUALITY = 90
RESIZE_SUBSAMPLING = "420"

_JPEG_SIGNATURE = b"\xff\xd8\xff"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PLAIN_PNG_COLOUR_TYPES = frozenset({0, 2})


ImageFormat = Literal["keep", "jpeg", "webp", "png", "raw"]
"""The form of a sound image: its bytes are kept (or encoded anew as JPEG where needed), it becomes
a file of that format, or it is stored decoded."""
_KEPT: dict[ImageFormat | Literal["packed"], frozenset[str]] = {
    "keep": frozenset({"jpg", "png"}),
    "jpeg": frozenset({"jpg"}),
    "webp": frozenset({"webp"}),
    "png": frozenset({"png"}),
    "raw": frozenset(),
    "packed": frozenset({"jpg", "webp", "png"}),
}
"""Extensions of the plain images that keep their bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedImage:
    """An image that every decoder reads alike, or its pixels."""

    data: bytes
    """A file, or (raw) RGB pixels [h w 3]."""
    extension: str
    """jpg, webp, png or raw."""
    height: int
    width: int
    reencoded: bool
    """Whether `data` differs from the file that was checked."""


def check_image(
    data: bytes,
    *,
    short_side: int = 0,
    square_side: int = 0,
    quality: int = RESIZE_QUALITY,
    max_pixels: int = MAX_PIXELS,
    format: ImageFormat | Literal["packed"] = "keep",
) -> CheckedImage:
    """Checks an image's bytes and normalises them if need be.

    Args:
        data: the contents of an image file.
        short_side: an image whose shorter side is longer than this many pixels is scaled down to
            it and encoded anew; 0 leaves sizes alone. It enlarges nothing.
        square_side: an image that is not a square of so many pixels is scaled, down or up, until
            its shorter side has them, and cropped at both ends of the longer one; 0 leaves sizes
            alone.
        quality: 1 to 100, for images that become JPEG or WebP; with `format` keep, for those that
            are scaled.
        max_pixels: an image whose header names more is refused before it is decoded.
        format: the form of the result; "packed" keeps the bytes of all that a data set may hold.

    Raises:
        ImageError: the image is damaged, not an image, too large, or of an unsupported kind.
    """
    if not data:
        raise ImageError("empty", "the file is empty")
    target = _Target(short_side=short_side, square_side=square_side)
    decoded = _decode(data, target, max_pixels=max_pixels, kept=_KEPT[format])
    if isinstance(decoded, CheckedImage):
        return decoded
    pixels = target.scaled(decoded)
    height, width, _ = pixels.shape
    if format == "raw":
        data, extension = np.broadcast_to(pixels, (height, width, 3)).tobytes(), "raw"
    elif format == "webp":
        data, extension = encode_webp(pixels, quality=quality), "webp"
    elif format == "png":
        data, extension = encode_png(pixels), "png"
    else:
        if format == "jpeg" or pixels is not decoded:
            data = encode_jpeg(pixels, quality=quality, subsampling=RESIZE_SUBSAMPLING)
        else:  # nearly lossless, since nobody asked for another quality
            data = encode_jpeg(pixels, quality=REENCODE_QUALITY, subsampling=REENCODE_SUBSAMPLING)
        _check_jpeg_data(data)
        extension = "jpg"
    reencoded = format != "raw"
    return CheckedImage(
        data=data, extension=extension, height=height, width=width, reencoded=reencoded
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    """The size that an image is scaled to."""

    short_side: int
    square_side: int

    def needs_resize(self, height: int, width: int) -> bool:
        if self.square_side:
            return (height, width) != (self.square_side, self.square_side)
        return 0 < self.short_side < min(height, width)

    def scaled(self, pixels: Pixels) -> Pixels:
        """Pixels of the target's size, by Pillow's bicubic filter with antialiasing."""
        height, width, _ = pixels.shape
        if not self.needs_resize(height, width):
            return pixels
        edge = min(height, width)
        if not self.square_side:
            scale = self.short_side / edge
            size = max(1, round(width * scale)), max(1, round(height * scale))
            return _resample(pixels, size=size)
        top, left = (height - edge) // 2, (width - edge) // 2
        if edge == self.square_side:
            return pixels[top : top + edge, left : left + edge]
        # only the square is made, since an image of one row of pixels would become millions of them
        size = self.square_side, self.square_side
        return _resample(pixels, size=size, box=(left, top, left + edge, top + edge))


def _decode(
    data: bytes, target: _Target, *, max_pixels: int, kept: frozenset[str]
) -> CheckedImage | Pixels:
    """Decodes an image strictly; one that may keep its bytes is returned as it is."""
    if data.startswith(_JPEG_SIGNATURE):
        return _decode_any_jpeg(data, target, max_pixels=max_pixels, keep="jpg" in kept)
    with pillow_limits(max_pixels):
        if data.startswith(_PNG_SIGNATURE):
            return _decode_png(data, target, keep="png" in kept)
        if is_webp(data):
            return _decode_webp(data, target, keep="webp" in kept)
        return pixels_of(open_image(data))


def _decode_any_jpeg(
    data: bytes, target: _Target, *, max_pixels: int, keep: bool
) -> CheckedImage | Pixels:
    try:
        header = read_jpeg_header(data)
    except ValueError as error:
        raise ImageError("damaged", str(error)) from error
    height, width = header.height, header.width
    check_size(height, width, max_pixels)
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise ImageError("unsupported", f"the JPEG has more than {MAX_SCANS} scans")
    if keep and header.is_plain and not target.needs_resize(height, width):
        _check_jpeg_data(data)
        return CheckedImage(data=data, extension="jpg", height=height, width=width, reencoded=False)
    with pillow_limits(max_pixels):
        return _jpeg_pixels(data, header)


def _check_jpeg_data(data: bytes) -> None:
    """Decodes a JPEG for its warnings only.

    At an eighth of the size and without colour libjpeg still reads every code of every component,
    where all its warnings arise, and skips transforms that cannot fail: 1.4 times as fast.
    """
    _decode_jpeg(data, colorspace="GRAY", min_height=1, min_width=1, fastdct=True)


def _decode_jpeg(data: bytes, **options: object) -> Pixels:
    """libjpeg-turbo with warnings taken as errors: a cut or damaged JPEG gives no grey tail."""
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, strict=True, **options)
    except MemoryError as error:
        raise ImageError("too large", "libjpeg: not enough memory") from error
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ImageError("damaged", f"libjpeg: {error}") from error
    return pixels


def _jpeg_pixels(data: bytes, header: JpegHeader) -> Pixels:
    """Decodes any JPEG that is read without warnings, turned the right way up."""
    if len(header.component_ids) == 4:
        _decode_jpeg(data, colorspace="CMYK", min_height=1, min_width=1)
        return pixels_of(open_image(data))  # Pillow knows which CMYK files are stored inverted
    grey = len(header.component_ids) == 1
    pixels = _decode_jpeg(data, colorspace="GRAY" if grey else "RGB")
    return turn_upright(pixels, header.orientation)


def _decode_png(data: bytes, target: _Target, *, keep: bool) -> CheckedImage | Pixels:
    image = open_image(data)
    try:
        image.verify()  # the checksums of all chunks; `load` skips those of the pixel data
    except Exception as error:
        raise pillow_error(error) from error
    image = open_image(data)
    pixels = pixels_of(image)
    width, height = image.size
    bit_depth, colour_type = data[24], data[25]
    if (
        keep
        and bit_depth == 8
        and colour_type in _PLAIN_PNG_COLOUR_TYPES
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
        and orientation_of(image) == 1
        and _largest_extra(data) <= MAX_PNG_EXTRA
        and not target.needs_resize(height, width)
    ):
        return CheckedImage(data=data, extension="png", height=height, width=width, reencoded=False)
    return pixels


def _largest_extra(png: bytes) -> int:
    """Length of a sound PNG's longest chunk that holds no pixels: profiles, texts, Exif data."""
    largest, position = 0, len(_PNG_SIGNATURE)
    while position + 8 <= len(png):
        length = int.from_bytes(png[position : position + 4], "big")
        if png[position + 4 : position + 8] != b"IDAT":
            largest = max(largest, length)
        position += 12 + length
    return largest


def _decode_webp(data: bytes, target: _Target, *, keep: bool) -> CheckedImage | Pixels:
    """Decodes a WebP; libwebp refuses a file that is cut, but cannot notice changed bytes."""
    image = open_image(data)
    pixels = pixels_of(image)
    simple = simple_webp(data) if keep else None
    if (
        simple is None
        or image.mode != "RGB"
        or orientation_of(image) != 1
        or target.needs_resize(image.height, image.width)
    ):
        return pixels
    return CheckedImage(
        data=simple,
        extension="webp",
        height=image.height,
        width=image.width,
        reencoded=simple is not data,
    )


def _resample(
    pixels: Pixels, *, size: tuple[int, int], box: tuple[int, int, int, int] | None = None
) -> Pixels:
    """Resizes the image, or a box (left, top, right, bottom) of it."""
    scaled = np.asarray(image_of(pixels).resize(size, Image.Resampling.BICUBIC, box=box))
    return scaled if scaled.ndim == 3 else scaled[..., None]
