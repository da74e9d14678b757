"""Decodes files of any format to pixels, and encodes pixels, by Pillow.

Decoding gives upright 8-bit grey or RGB. Only formats with a signature that start no other program
are decoded, and sizes are checked as soon as they are known. Encoding is deterministic, without
time, profile or text, in the simplest form of each format.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from unicl_fast.images.encoded_images import EncodedImages, ppm_header
from unicl_fast.images.limits import MAX_PIXELS, MAX_SIDE

PILLOW_FORMATS = (
    "JPEG", "PNG", "GIF", "WEBP", "AVIF", "JPEG2000", "BMP", "TIFF", "PPM", "ICO", "PCX", "SGI",
    "PSD", "QOI", "XVThumb",
)  # fmt: skip
"""Formats that Pillow may open: none that starts another program (EPS), and none without a
signature (TGA), which would accept any file."""
JPEG_BEGINS = b"\xff\xd8"
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_SMALLEST_CUT = 128  # images with a shorter side from this on get restart markers
_SEGMENTS_A_ROW = 8
_SHORTEST_SEGMENT = 32
"""Pixels between markers. A marker costs bytes and the prediction of colour: 2 to 3 % of a
photograph in 4:2:0, 4 % in 4:4:4; segments of half the length cost twice that."""
MAX_WEBP_SIDE = 16_383  # webP stores a side in 14 bits
WEBP_METHOD = 4  # libwebp's effort, 0 to 6; 4 is its default
PNG_COMPRESSION = 3
"""zlib's level. Photographs of 256 pixels need 12.5 ms; at 6, the default, 27 ms, 3 % smaller."""

Pixels = npt.NDArray[np.uint8]


class ImageError(ValueError):
    """An image was refused: `kind` is a word for counting, the message says why."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@contextlib.contextmanager
def pillow_limits(max_pixels: int) -> Iterator[None]:
    """Makes Pillow's size checks raise, also late ones; silences its other warnings."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the important ones raise, or are checked here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def open_image(data: bytes) -> Image.Image:
    """Opens the file with Pillow; its size is checked before anything is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    except UnidentifiedImageError:
        raise ImageError("not an image", "no known image format") from None
    except Exception as error:
        raise pillow_error(error) from error
    check_size(image.height, image.width, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    return image


def pixels_of(image: Image.Image) -> Pixels:
    """Decodes the first frame of an opened image: 8 bits, grey or RGB, upright."""
    try:
        if image.mode == "F":
            raise ImageError("unsupported", "floating-point pixels have no known range")
        image.load()
        pixels = np.asarray(_to_grey_or_rgb(image))
        orientation = orientation_of(image)
    except ImageError:
        raise
    except Exception as error:
        raise pillow_error(error) from error
    return turn_upright(pixels if pixels.ndim == 3 else pixels[..., None], orientation)


def pillow_error(error: Exception) -> ImageError:
    """Converts any error of Pillow's plugins, from OSError to IndexError."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        size = str(error).split(" exceeds")[0]  # the limit after it can be twice ours
        return ImageError("too large", f"{size}; at most {Image.MAX_IMAGE_PIXELS:,} are taken")
    if isinstance(error, MemoryError):
        return ImageError("too large", "Pillow: not enough memory")
    return ImageError("damaged", f"Pillow: {type(error).__name__}: {error}")


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(np.asarray(image), image.info.get("transparency"))
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image.convert("RGB")


def _from_16_bits(values: npt.NDArray[np.integer], transparent: Any) -> Image.Image:
    """Scales 0 to 65,535 onto 0 to 255, rounded; a PNG's `transparent` value becomes white."""
    if values.min() < 0 or values.max() > 65535:
        raise ImageError("unsupported", "32-bit pixels beyond 16 bits have no known range")
    scaled = (values.astype(np.uint32) + 128) // 257
    if isinstance(transparent, int):
        scaled[values == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8))


def orientation_of(image: Image.Image) -> int:
    """Exif orientation of a loaded image; 1 if unreadable."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Applies the Exif orientation: 2, 4 flip; 3, 6, 8 rotate; 5, 7 do both."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise ImageError("damaged", f"the header says {width} x {height} pixels")
    if height * width > max_pixels or max(height, width) > MAX_SIDE:
        raise ImageError(
            "too large",
            f"{width} x {height} pixels; at most {max_pixels:,} and {MAX_SIDE:,} a side are taken",
        )


def encode_jpeg(pixels: Pixels, *, quality: int, subsampling: str) -> bytes:
    """A baseline JPEG of pixels [h w 1 or 3]; `subsampling` is 444, 422 or 420. Or ImageError."""
    height, width, channels = pixels.shape
    halved = channels == 3 and subsampling != "444"
    interval = restart_interval(height, width, block_width=16 if halved else 8)
    return _saved(
        pixels,
        format="JPEG",
        quality=quality,
        subsampling=":".join(subsampling),
        **({"restart_marker_blocks": interval} if interval else {}),
    )


def restart_interval(height: int, width: int, *, block_width: int) -> int:
    """Blocks between restart markers; 0 for none.

    The loader cuts a file down to a window's part at them (`pipelines/kernels/jpeg_windows.py`), so
    the interval divides the blocks of a row: the divisor nearest to eight segments a row without
    being too short. In small images markers cost more than they save. `block_width` is the pixels
    coded together: 16 if chroma is halved, else 8.
    """
    if min(height, width) < _SMALLEST_CUT:
        return 0
    columns = -(-width // block_width)
    wished = columns / _SEGMENTS_A_ROW
    fitting = (
        interval
        for interval in range(1, columns + 1)
        if columns % interval == 0 and interval * block_width >= _SHORTEST_SEGMENT
    )
    return min(fitting, key=lambda interval: abs(math.log(interval / wished)))


def encode_webp(pixels: Pixels, *, quality: int) -> bytes:
    """A lossy WebP in the simple format, always with three channels; ImageError if too large."""
    height, width, _ = pixels.shape
    if max(height, width) > MAX_WEBP_SIDE:
        raise ImageError(
            "unsupported",
            f"{width} x {height} pixels; WebP holds at most {MAX_WEBP_SIDE:,} a side: --resize "
            "makes images smaller, and --format jpeg or png accepts larger ones",
        )
    return _saved(pixels, format="WEBP", quality=quality, method=WEBP_METHOD)


def encode_png(pixels: Pixels) -> bytes:
    """A lossless PNG with 8 bits, grey or RGB."""
    return _saved(pixels, format="PNG", compress_level=PNG_COMPRESSION)


def decode_files(
    pixels: NDArray[np.uint8],
    images: EncodedImages,
    shapes: NDArray[np.int64],
    begin: int,
    end: int,
) -> dict[int, str]:
    """Decodes packed images `begin` to `end - 1` whole, as RGB; JPEGs by libjpeg-turbo.

    Args:
        pixels: uint8 [n], room for [h w 3] of all images, one after another.
        images: b of them.
        shapes: their known heights and widths, int64 [b 2].
        begin: the first to decode.
        end: the one after the last.

    Returns:
        Row -> fault of images that cannot be decoded or have another size.
    """
    faults: dict[int, str] = {}
    rows = slice(begin, end)
    sizes = 3 * shapes.prod(axis=1)
    ends = np.cumsum(sizes)
    places = (ends - sizes)[rows].tolist(), ends[rows].tolist(), shapes[rows].tolist()
    each = zip(images.files(rows), *places, strict=True)
    for row, (file, first, last, (height, width)) in enumerate(each, begin):
        try:
            room = pixels[first:last]
            if file[0] == JPEG_BEGINS[0]:
                found = simplejpeg.decode_jpeg(file, "RGB", buffer=room, strict=False).shape
            else:
                with Image.open(io.BytesIO(file.data), formats=("PNG", "WEBP", "PPM")) as image:
                    found = (image.height, image.width, 3)
                    if found == (height, width, 3):
                        room[:] = np.asarray(image.convert("RGB")).reshape(-1)
            if found != (height, width, 3):
                faults[row] = f"it has {found[1]} x {found[0]} pixels, not {width} x {height}"
        except UnidentifiedImageError:  # its message names an object in memory
            faults[row] = "no known image format"
        except Exception as error:  # any kind, depending on the bytes
            faults[row] = str(error)
    return faults


def encode_ppm(pixels: Pixels) -> bytes:
    """A PPM (P6): three bytes a pixel, also for a grey image."""
    height, width, _ = pixels.shape
    return ppm_header(height, width) + np.broadcast_to(pixels, (height, width, 3)).tobytes()


def image_of(pixels: Pixels) -> Image.Image:
    """A Pillow image of pixels; grey ones lose their channel axis."""
    return Image.fromarray(
        np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    )


def _saved(pixels: Pixels, *, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    try:
        image_of(pixels).save(file, format=format, **options)
    except (ValueError, OSError) as error:
        raise ImageError("unsupported", f"Pillow cannot encode it: {error}") from error
    return file.getvalue()
