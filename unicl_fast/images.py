"""Checks one picture's bytes strictly, and normalises what decoders might read differently.

A picture that is a plain 8-bit grey or RGB JPEG or PNG, the right way up and free of damage, keeps
its bytes. Anything else that can be read is decoded here and encoded anew, so that the decoder of
the training run meets no surprises. What cannot be read, or reads only with warnings, is refused
with a `PictureError` that gives the reason. `docs/data-format.md` lists the conversions.

Decoding for training is DALI's business; this module only decides what DALI is given.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from unicl_fast.jpeg_header import JpegHeader, read_jpeg_header

MAX_PIXELS = 89_478_485
"""Largest picture accepted by default, checked before any memory is taken: a quarter GiB as RGB,
and the limit above which Pillow warns of decompression bombs."""
MAX_SIDE = 65_500
"""libjpeg's limit for a side."""
MAX_SCANS = 500
"""A progressive JPEG with more scans is an attack on the decoder's time; cameras write about 10."""
REENCODE_QUALITY = 95
REENCODE_SUBSAMPLING = "444"
RESIZE_QUALITY = 90
RESIZE_SUBSAMPLING = "420"

PILLOW_FORMATS = (
    "JPEG", "PNG", "GIF", "WEBP", "AVIF", "JPEG2000", "BMP", "TIFF", "PPM", "ICO", "PCX", "SGI",
    "PSD", "QOI", "XVThumb",
)  # fmt: skip
"""What Pillow may be asked to open: no format that starts another program (EPS), and none without
a signature (TGA), which would take any file for a picture."""

_JPEG_SIGNATURE = b"\xff\xd8\xff"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_PLAIN_PNG_COLOUR_TYPES = frozenset({0, 2})

Pixels = npt.NDArray[np.uint8]


class PictureError(ValueError):
    """Why a picture was refused: a short `kind` to count by, and a sentence."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


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
    with _pillow_limits(max_pixels):
        if data.startswith(_PNG_SIGNATURE):
            return _check_png(data, short_side=short_side, quality=quality)
        return _encode(_pixels_of(_open(data)), short_side=short_side, quality=quality)


@contextlib.contextmanager
def _pillow_limits(max_pixels: int) -> Iterator[None]:
    """Makes Pillow's own check of sizes raise above `max_pixels`, and silences its other warnings.

    Pillow checks wherever a size becomes known, also late: an icon of 16 x 16 by its directory may
    hold a PNG of any size, and the first frame of a GIF may be larger than its screen.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters raises, or is checked here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _check_jpeg(data: bytes, *, short_side: int, quality: int, max_pixels: int) -> Picture:
    try:
        header = read_jpeg_header(data)
    except ValueError as error:
        raise PictureError("damaged", str(error)) from error
    _check_size(header.height, header.width, max_pixels)
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
    with _pillow_limits(max_pixels):
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
        return _pixels_of(_open(data))  # Pillow knows which CMYK files are stored inverted
    grey = len(header.component_ids) == 1
    pixels = _decode_jpeg(data, colorspace="GRAY" if grey else "RGB")
    return _turn_upright(pixels, header.orientation)


def _check_png(data: bytes, *, short_side: int, quality: int) -> Picture:
    image = _open(data)
    try:
        image.verify()  # the checksums of all chunks; `load` skips those of the pixel data
    except Exception as error:
        raise _pillow_error(error) from error
    image = _open(data)
    pixels = _pixels_of(image)
    bit_depth, colour_type = data[24], data[25]
    if (
        bit_depth == 8
        and colour_type in _PLAIN_PNG_COLOUR_TYPES
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
        and _orientation(image) == 1
        and not _needs_resize(image.height, image.width, short_side)
    ):
        return Picture(
            data=data, extension="png", height=image.height, width=image.width, reencoded=False
        )
    return _encode(pixels, short_side=short_side, quality=quality)


def _open(data: bytes) -> Image.Image:
    """Pillow's view of the file, its size checked before anything is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    except UnidentifiedImageError:
        raise PictureError("not a picture", "no known picture format") from None
    except Exception as error:
        raise _pillow_error(error) from error
    _check_size(image.height, image.width, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    return image


def _pixels_of(image: Image.Image) -> Pixels:
    """Decodes what Pillow opened: its first frame, 8 bits, grey or RGB, the right way up."""
    try:
        if image.mode == "F":
            raise PictureError("unsupported", "floating-point pixels have no known range")
        image.load()
        pixels = np.asarray(_to_grey_or_rgb(image))
        orientation = _orientation(image)
    except PictureError:
        raise
    except Exception as error:
        raise _pillow_error(error) from error
    return _turn_upright(pixels if pixels.ndim == 3 else pixels[..., None], orientation)


def _pillow_error(error: Exception) -> PictureError:
    """Pillow's plugins raise whatever their parsing stumbles over, from OSError to IndexError."""
    too_large = (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError)
    if isinstance(error, too_large):
        return PictureError("too large", f"Pillow: {str(error) or 'not enough memory'}")
    return PictureError("damaged", f"Pillow: {type(error).__name__}: {error}")


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(np.asarray(image))
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image.convert("RGB")


def _from_16_bits(values: npt.NDArray[np.integer]) -> Image.Image:
    """Scales 0 to 65,535 onto 0 to 255, rounded: a division by 257."""
    if values.min() < 0 or values.max() > 65535:
        raise PictureError("unsupported", "32-bit pixels beyond 16 bits have no known range")
    scaled = (values.astype(np.uint32) + 128) // 257
    return Image.fromarray(scaled.astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """Exif orientation of a loaded picture; unreadable Exif data count as none."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Applies the Exif orientation: 2, 4 mirror; 3, 6, 8 turn; 5, 7 do both."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise PictureError("damaged", f"the header says {width} x {height} pixels")
    if height * width > max_pixels or max(height, width) > MAX_SIDE:
        raise PictureError(
            "too large",
            f"{width} x {height} pixels; at most {max_pixels:,} and {MAX_SIDE:,} a side are taken",
        )


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
