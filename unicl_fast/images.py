"""Checks one picture's bytes strictly, and normalises what decoders might read differently.

A picture that is a plain 8-bit grey or RGB JPEG or PNG, the right way up and free of damage, keeps
its bytes. Anything else that can be read is decoded here and encoded anew, so that the decoder of
the training run meets no surprises. What cannot be read, or reads only with warnings, is refused
with a `PictureError` that gives the reason. `docs/data-format.md` lists the conversions.

Decoding for training is DALI's business; this module only decides what DALI is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from unicl_fast.jpeg_header import JpegHeader, read_jpeg_header
from unicl_fast.pillow_decoding import MAX_PIXELS as MAX_PIXELS
from unicl_fast.pillow_decoding import MAX_SIDE as MAX_SIDE
from unicl_fast.pillow_decoding import PictureError as PictureError
from unicl_fast.pillow_decoding import (
    Pixels,
    check_size,
    open_picture,
    orientation_of,
    pillow_error,
    pillow_limits,
    pixels_of,
    turn_upright,
)

MAX_SCANS = 500
"""A progressive JPEG with more scans is an attack on the decoder's time; cameras write about 10."""
MAX_PNG_EXTRA = 1_000_000
"""Largest chunk beside pixels of a PNG that keeps its bytes; at run time 8 MB would be refused."""
REENCODE_QUALITY = 95
REENCODE_SUBSAMPLING = "444"
RESIZE_QUALITY = 90
RESIZE_SUBSAMPLING = "420"

_JPEG_SIGNATURE = b"\xff\xd8\xff"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PLAIN_PNG_COLOUR_TYPES = frozenset({0, 2})


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A picture that every decoder reads alike."""

    data: bytes
    extension: str
    """jpg or png."""
    height: int
    width: int
    reencoded: bool
    """Whether `data` differs from the bytes that came in."""


def check_picture(
    data: bytes,
    *,
    short_side: int = 0,
    quality: int = RESIZE_QUALITY,
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """Checks a picture's bytes and normalises them if need be.

    Args:
        data: the contents of a picture file.
        short_side: a picture whose shorter side is longer than this many pixels is scaled down to
            it and encoded anew; 0 leaves sizes alone. Nothing is ever enlarged.
        quality: JPEG quality of scaled pictures, 1 to 100.
        max_pixels: a picture with more is refused by what its header says, before it is decoded.

    Raises:
        PictureError: the picture is damaged, not a picture, too large, or of an unsupported kind.
    """
    if not data:
        raise PictureError("empty", "the file is empty")
    if data.startswith(_JPEG_SIGNATURE):
        return _check_jpeg(data, short_side=short_side, quality=quality, max_pixels=max_pixels)
    with pillow_limits(max_pixels):
        if data.startswith(_PNG_SIGNATURE):
            return _check_png(data, short_side=short_side, quality=quality)
        return _encode(pixels_of(open_picture(data)), short_side=short_side, quality=quality)


def _check_jpeg(data: bytes, *, short_side: int, quality: int, max_pixels: int) -> Picture:
    try:
        header = read_jpeg_header(data)
    except ValueError as error:
        raise PictureError("damaged", str(error)) from error
    check_size(header.height, header.width, max_pixels)
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise PictureError("unsupported", f"the JPEG has more than {MAX_SCANS} scans")
    if header.is_plain and not _needs_resize(header.height, header.width, short_side):
        _check_jpeg_data(data)
        return Picture(
            data=data,
            extension="jpg",
            height=header.height,
            width=header.width,
            reencoded=False,
        )
    with pillow_limits(max_pixels):
        pixels = _jpeg_pixels(data, header)
    return _encode(pixels, short_side=short_side, quality=quality)


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
        raise PictureError("too large", "libjpeg: not enough memory") from error
    except (ValueError, RuntimeError, OverflowError) as error:
        raise PictureError("damaged", f"libjpeg: {error}") from error
    return pixels


def _jpeg_pixels(data: bytes, header: JpegHeader) -> Pixels:
    """Decodes any JPEG that is read without warnings, turned the right way up."""
    if len(header.component_ids) == 4:
        _decode_jpeg(data, colorspace="CMYK", min_height=1, min_width=1)
        return pixels_of(open_picture(data))  # Pillow knows which CMYK files are stored inverted
    grey = len(header.component_ids) == 1
    pixels = _decode_jpeg(data, colorspace="GRAY" if grey else "RGB")
    return turn_upright(pixels, header.orientation)


def _check_png(data: bytes, *, short_side: int, quality: int) -> Picture:
    image = open_picture(data)
    try:
        image.verify()  # the checksums of all chunks; `load` skips those of the pixel data
    except Exception as error:
        raise pillow_error(error) from error
    image = open_picture(data)
    pixels = pixels_of(image)
    bit_depth, colour_type = data[24], data[25]
    if (
        bit_depth == 8
        and colour_type in _PLAIN_PNG_COLOUR_TYPES
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
        and orientation_of(image) == 1
        and _largest_extra(data) <= MAX_PNG_EXTRA
        and not _needs_resize(image.height, image.width, short_side)
    ):
        return Picture(
            data=data, extension="png", height=image.height, width=image.width, reencoded=False
        )
    return _encode(pixels, short_side=short_side, quality=quality)


def _largest_extra(png: bytes) -> int:
    """Length of a sound PNG's longest chunk that holds no pixels: profiles, texts, Exif data."""
    largest, position = 0, len(_PNG_SIGNATURE)
    while position + 8 <= len(png):
        length = int.from_bytes(png[position : position + 4], "big")
        if png[position + 4 : position + 8] != b"IDAT":
            largest = max(largest, length)
        position += 12 + length
    return largest


def _needs_resize(height: int, width: int, short_side: int) -> bool:
    return 0 < short_side < min(height, width)


def _encode(pixels: Pixels, *, short_side: int, quality: int) -> Picture:
    """Pixels to a plain JPEG, scaled down first if asked for; checked like any other."""
    subsampling = REENCODE_SUBSAMPLING
    height, width, channels = pixels.shape
    if _needs_resize(height, width, short_side):
        pixels = _scale_down(pixels, short_side)
        subsampling = RESIZE_SUBSAMPLING
    else:
        quality = REENCODE_QUALITY
    try:
        data: bytes = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels),
            quality=quality,
            colorspace="GRAY" if channels == 1 else "RGB",
            colorsubsampling="Gray" if channels == 1 else subsampling,
        )
    except (ValueError, RuntimeError, OverflowError) as error:
        raise PictureError("unsupported", f"libjpeg cannot encode it: {error}") from error
    _check_jpeg_data(data)
    height, width, _ = pixels.shape
    return Picture(data=data, extension="jpg", height=height, width=width, reencoded=True)


def _scale_down(pixels: Pixels, short_side: int) -> Pixels:
    """Bicubic with antialiasing, the shorter side becoming `short_side`."""
    height, width, _ = pixels.shape
    scale = short_side / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Pillow takes grey pixels without a channel axis
    image = Image.fromarray(
        np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    )
    scaled = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    return scaled if scaled.ndim == 3 else scaled[..., None]
