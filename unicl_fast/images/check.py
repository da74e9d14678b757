"""Checks an image's bytes strictly, and normalises everything that decoders could read differently.

A plain, upright, undamaged 8-bit grey or RGB JPEG or PNG keeps its bytes. Other readable images are
decoded and encoded anew; unreadable ones, or ones with warnings, are refused. docs/data-format.md
lists the conversions. (ITU-T T.81, annex B; Exif 2.32, section 4.6)
"""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from unicl_fast.images.codec import ImageError as ImageError
from unicl_fast.images.codec import (
    Pixels,
    check_size,
    encode_jpeg,
    encode_png,
    encode_ppm,
    encode_webp,
    image_of,
    open_image,
    orientation_of,
    pillow_error,
    pillow_limits,
    pixels_of,
    turn_upright,
)
from unicl_fast.images.containers import (
    RIFF_HEADER_BYTES,
    check_avif_end,
    check_png_stream,
    check_qoi_end,
    check_webp_end,
    largest_extra,
)
from unicl_fast.images.containers import simple_webp as simple_webp
from unicl_fast.images.limits import MAX_PIXELS, REENCODE_QUALITY, RESIZE_QUALITY, ImageFormat

MAX_SCANS = 500
"""A progressive JPEG with more scans is an attack on decoding time; cameras write about 10."""
MAX_PNG_EXTRA = 1_000_000
"""Bytes of the largest chunk without pixels in a kept PNG; DALI refuses 8 MB."""
REENCODE_SUBSAMPLING = "444"
RESIZE_SUBSAMPLING = "420"

_JPEG_SIGNATURE = b"\xff\xd8\xff"
_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})
_SOS, _EOI, _APP0, _APP1, _APP14 = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE
_PLAIN_PROCESSES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive; all Huffman
_PROGRESSIVE = frozenset({0xC2, 0xCA})
_LOSSLESS = frozenset({0xC3, 0xC7, 0xCB, 0xCF})
_ALL_COEFFICIENTS = (1 << 64) - 1
_MARKER_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
"""Within a scan, FF is followed by zero or is a restart marker."""
_ORIENTATION_TAG = 0x0112
_EXIF_FORMATS = {1: "B", 3: "H", 4: "I"}
_EXIF_SHORT = 3

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PLAIN_PNG_COLOUR_TYPES = frozenset({0, 2})

_KEPT: dict[ImageFormat | Literal["packed"], frozenset[str]] = {
    "keep": frozenset({"jpg", "png"}),
    "jpeg": frozenset({"jpg"}),
    "webp": frozenset({"webp"}),
    "png": frozenset({"png"}),
    "ppm": frozenset(),
    "raw": frozenset(),
    "packed": frozenset({"jpg", "webp", "png", "ppm"}),
}
"""Extensions of plain images that keep their bytes."""


@dataclass(kw_only=True, slots=True)  # frozen would take three times as long to create
class CheckedImage:
    """An image that every decoder reads alike, or its pixels."""

    data: bytes
    """A file, or (raw) RGB pixels [h w 3]."""
    extension: str
    """jpg, webp, png, ppm or raw."""
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
    """Checks an image's bytes and normalises them if needed.

    Args:
        data: the contents of an image file.
        short_side: a larger image is scaled down to this shorter side and encoded anew; 0 keeps
            sizes.
        square_side: an image is scaled, down or up, to this shorter side, and centre-cropped to a
            square of so many pixels; 0 keeps sizes.
        quality: 1 to 100, for images that become JPEG or WebP; with `format` keep, only for scaled
            ones.
        max_pixels: an image whose header names more is refused before decoding.
        format: the form of the result; "packed" keeps the bytes of any kind that a data set stores.

    Raises ImageError: the image is damaged, not an image, too large, or of an unsupported kind.
    """
    if not data:
        raise ImageError("empty", "the file is empty")
    target = _target_of(short_side, square_side)
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
    elif format == "ppm":
        data, extension = encode_ppm(pixels), "ppm"
    else:
        if format == "jpeg" or pixels is not decoded:
            data = encode_jpeg(pixels, quality=quality, subsampling=RESIZE_SUBSAMPLING)
        else:  # nearly lossless, since no other quality was requested
            data = encode_jpeg(pixels, quality=REENCODE_QUALITY, subsampling=REENCODE_SUBSAMPLING)
        _check_jpeg_data(data)
        extension = "jpg"
    return CheckedImage(
        data=data,
        extension=extension,
        height=height,
        width=width,
        reencoded=format not in ("ppm", "raw"),
    )


@dataclass(frozen=True, slots=True)
class _Target:
    """The size to scale an image to."""

    short_side: int
    square_side: int

    def needs_resize(self, height: int, width: int) -> bool:
        if self.square_side:
            return (height, width) != (self.square_side, self.square_side)
        return 0 < self.short_side < min(height, width)

    def scaled(self, pixels: Pixels) -> Pixels:
        """Pixels of the target size, by Pillow's bicubic filter with antialiasing."""
        height, width, _ = pixels.shape
        if not self.needs_resize(height, width):
            return pixels
        edge = min(height, width)
        top, left = (height - edge) // 2, (width - edge) // 2
        if edge == self.square_side:
            return pixels[top : top + edge, left : left + edge]
        if self.square_side:
            # crop first: a one-row image scaled whole would become millions of pixels
            size, box = (self.square_side,) * 2, (left, top, left + edge, top + edge)
        else:
            scale = self.short_side / edge
            size = max(1, round(width * scale)), max(1, round(height * scale))
            box = (0, 0, width, height)
        scaled = np.asarray(image_of(pixels).resize(size, Image.Resampling.BICUBIC, box=box))
        return scaled if scaled.ndim == 3 else scaled[..., None]


_target_of = functools.cache(_Target)


def _decode(
    data: bytes, target: _Target, *, max_pixels: int, kept: frozenset[str]
) -> CheckedImage | Pixels:
    """Decodes an image strictly, or returns it unchanged if its bytes can be kept."""
    if data.startswith(_JPEG_SIGNATURE):
        return _decode_any_jpeg(data, target, max_pixels=max_pixels, keep="jpg" in kept)
    plain: bytes | None = None
    with pillow_limits(max_pixels):
        if data.startswith(_PNG_SIGNATURE):
            extension, (pixels, plain) = "png", _decode_png(data)
        elif data[:4] == b"RIFF" and data[8:RIFF_HEADER_BYTES] == b"WEBP":
            extension, (pixels, plain) = "webp", _decode_webp(data)
        else:
            image = open_image(data)
            if image.format == "QOI":
                check_qoi_end(data)
            elif image.format == "AVIF":
                check_avif_end(data, image.info.get("exif", b""))
            extension, pixels = "ppm", pixels_of(image)
            if image.format == "PPM" and "ppm" in kept and data == encode_ppm(pixels):
                plain = data
    height, width, _ = pixels.shape
    if plain is None or extension not in kept or target.needs_resize(height, width):
        return pixels
    return CheckedImage(
        data=plain, extension=extension, height=height, width=width, reencoded=plain is not data
    )


def _decode_any_jpeg(
    data: bytes, target: _Target, *, max_pixels: int, keep: bool
) -> CheckedImage | Pixels:
    header = read_jpeg_header(data)
    height, width = header.height, header.width
    check_size(height, width, max_pixels)
    # libjpeg refuses a second scan in a one-scan file
    if not header.is_one_scan and data.count(b"\xff\xda") > MAX_SCANS:
        raise ImageError("unsupported", f"the JPEG has more than {MAX_SCANS} scans")
    decoded: CheckedImage | Pixels
    if keep and header.is_plain and not target.needs_resize(height, width):
        _check_jpeg_data(data)
        decoded = CheckedImage(
            data=data, extension="jpg", height=height, width=width, reencoded=False
        )
    else:
        with pillow_limits(max_pixels):
            decoded = _jpeg_pixels(data, header)
    if header.process not in _LOSSLESS and not header.is_one_scan:
        _require_all_scans(data, header)
    return decoded


def _check_jpeg_data(data: bytes) -> None:
    """Decodes a JPEG only for its warnings."""
    # At 1/8 size and without colour libjpeg still reads every code of every component, the source
    # of all its warnings, and skips transforms that cannot fail: 1.4 times as fast.
    _decode_jpeg(data, "GRAY", fastdct=True, min_side=1)


def _decode_jpeg(
    data: bytes, colorspace: str, *, fastdct: bool = False, min_side: int = 0
) -> Pixels:
    """libjpeg-turbo with warnings as errors: no grey tail for a truncated or damaged JPEG.

    `min_side` scales down to the smallest size whose sides have at least so many pixels.
    """
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data, colorspace, fastdct, False, min_side, min_side, strict=True
        )
    except MemoryError as error:
        raise ImageError("too large", "libjpeg: not enough memory") from error
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ImageError("damaged", f"libjpeg: {error}") from error
    return pixels


def _jpeg_pixels(data: bytes, header: JpegHeader) -> Pixels:
    """Decodes any JPEG that reads without warnings, turned upright."""
    if header.num_components == 4:
        _decode_jpeg(data, "CMYK", min_side=1)
        return pixels_of(open_image(data))  # Pillow knows which CMYK files are stored inverted
    pixels = _decode_jpeg(data, "GRAY" if header.num_components == 1 else "RGB")
    return turn_upright(pixels, header.orientation)


def _decode_png(data: bytes) -> tuple[Pixels, bytes | None]:
    """Decodes a PNG; also returns its bytes if it is plain."""
    image = open_image(data)
    try:
        image.verify()  # checksums of all chunks; `load` skips the pixel data's
    except Exception as error:
        raise pillow_error(error) from error
    image = open_image(data)
    pixels = pixels_of(image)
    width, height = image.size
    check_png_stream(data, height=height, width=width)
    bit_depth, colour_type = data[24], data[25]
    is_plain = (
        bit_depth == 8
        and colour_type in _PLAIN_PNG_COLOUR_TYPES
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
        and orientation_of(image) == 1
        and largest_extra(data) <= MAX_PNG_EXTRA
    )
    return pixels, data if is_plain else None


def _decode_webp(data: bytes) -> tuple[Pixels, bytes | None]:
    """Decodes a WebP, of which libwebp refuses a truncated file but cannot detect changed bytes.

    Also returns it in the simple format if it is plain.
    """
    image = open_image(data)
    pixels = pixels_of(image)
    check_webp_end(data)
    is_plain = image.mode == "RGB" and orientation_of(image) == 1
    return pixels, simple_webp(data) if is_plain else None


@dataclass(frozen=True, kw_only=True, slots=True)
class JpegHeader:
    """The facts that decide whether a JPEG can keep its bytes."""

    height: int
    width: int
    num_components: int
    component_ids: bytes
    process: int
    """The frame's marker, which names the coding process."""
    first_scan: bytes
    """The body of the first scan's header."""
    scan_start: int
    """The first byte of the first scan's data."""
    orientation: int
    """Exif orientation 1 to 8; 1 if there is none."""
    is_plain: bool
    """8-bit grey or YCbCr, Huffman coded, upright for every decoder."""
    is_one_scan: bool
    """Whether the first scan has all coefficients of all components."""


_last_header: tuple[bytes, JpegHeader] | None = None


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Reads the markers up to the first scan; ImageError if there is no frame or scan.

    Caches the last header, which costs more than the rest of decoding: small images of one data set
    mostly begin with the same bytes.
    """
    global _last_header
    known = _last_header  # another thread may replace it
    if known is None or not data.startswith(known[0]):
        header = _walk_to_scan(data)
        known = _last_header = data[: header.scan_start], header
    return known[1]


def _walk_to_scan(data: bytes) -> JpegHeader:
    frame: tuple[int, bytes] | None = None
    jfif, adobe_transform = False, None
    orientations: list[int | None] = []
    position = 2
    while True:
        marker, body, position = _next_segment(data, position)
        if marker in _SOF_MARKERS and frame is None:
            frame = marker, body
        elif marker == _APP0 and body.startswith(b"JFIF\0"):
            jfif = True
        elif marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
            adobe_transform = body[11]
        elif marker == _APP1 and body.startswith(b"Exif\0"):
            orientations.append(_exif_orientation(body[6:]))
        elif marker == _SOS:
            first_scan = body
            break
        elif marker == _EOI:
            raise ImageError("damaged", "the JPEG ends before its image begins")
    if frame is None:
        raise ImageError("damaged", "the JPEG has no frame header before its first scan")
    process, body = frame
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        raise ImageError("damaged", "the JPEG's frame header is cut short")
    precision, height, width, num_components = struct.unpack_from(">BHHB", body)
    # libjpeg's rules for whether three components are luma and chroma
    is_ycbcr = num_components == 3 and (
        jfif or (body[6:15:3] != b"RGB" if adobe_transform is None else adobe_transform == 1)
    )
    known = orientations[0] if orientations else 1
    return JpegHeader(
        height=height,
        width=width,
        num_components=num_components,
        component_ids=body[6 : 6 + 3 * num_components : 3],
        process=process,
        first_scan=first_scan,
        scan_start=position,
        orientation=known if known is not None and 1 <= known <= 8 else 1,
        is_plain=(
            process in _PLAIN_PROCESSES
            and precision == 8
            and (num_components == 1 or is_ycbcr)
            and len(orientations) <= 1
            and known == 1
        ),
        is_one_scan=(
            process not in _PROGRESSIVE
            and first_scan != b""
            and len(first_scan) >= 4 + 2 * first_scan[0]
            and set(body[6 : 6 + 3 * num_components : 3]) <= set(_components_of(first_scan))
        ),
    )


def _components_of(scan: bytes) -> bytes:
    """The component ids of a scan, from the body of its header."""
    return scan[1 : 1 + 2 * scan[0] : 2]


def _require_all_scans(data: bytes, header: JpegHeader) -> None:
    """Refuses a JPEG whose scans lack coefficients or bits of them.

    One that was truncated between scans and closed with an end marker reads without a warning, as a
    coarse image. T.81 allows omitting bits (annex G.1.1), which no usual encoder does.
    """
    scan, position, num_scans = header.first_scan, header.scan_start, 1
    missing = dict.fromkeys(header.component_ids, _ALL_COEFFICIENTS)
    while True:
        if not scan or len(scan) < 4 + 2 * scan[0]:
            raise ImageError("damaged", f"the header of the JPEG's scan {num_scans} is cut short")
        brought = _ALL_COEFFICIENTS
        if header.process in _PROGRESSIVE:
            first, last, bits = scan[1 + 2 * scan[0] : 4 + 2 * scan[0]]
            # the lower half of `bits` counts bits left to later scans
            brought = 0 if bits & 15 else (1 << last + 1) - (1 << first)
        for component in _components_of(scan):
            missing[component] = missing.get(component, 0) & ~brought
        if not any(missing.values()):
            return
        marker = 0
        while marker != _SOS:
            found = _MARKER_AFTER_SCAN.search(data, position)
            if found is None or data[found.end() - 1] == _EOI:
                message = f"the JPEG ends after {num_scans} of its scans; its image needs more"
                raise ImageError("damaged", message)
            marker, scan, position = _next_segment(data, found.start())
        num_scans += 1


def _next_segment(data: bytes, position: int) -> tuple[int, bytes, int]:
    """The marker at `position`, its body, and where the next marker is expected."""
    if data[position : position + 1] != b"\xff":
        where = "ends inside its header" if position >= len(data) else "has garbage in its header"
        raise ImageError("damaged", f"the JPEG {where} (byte {position})")
    while data[position : position + 1] == b"\xff":  # any number of fill bytes may come first
        position += 1
    length = 0
    if position < len(data):
        marker = data[position]
        position += 1
        if marker in _WITHOUT_LENGTH or marker == _EOI:
            return marker, b"", position
        length = int.from_bytes(data[position : position + 2], "big")
    if length < 2 or position + length > len(data):
        raise ImageError("damaged", f"the JPEG ends inside its header (byte {position})")
    return marker, data[position + 2 : position + length], position + length


def _exif_orientation(tiff: bytes) -> int | None:
    """Exif orientation: 1 if none is given, None if it is ambiguous."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == _ORIENTATION_TAG:
                if kind not in _EXIF_FORMATS or number != 1:
                    return None
                (value,) = struct.unpack_from(order + _EXIF_FORMATS[kind], tiff, entry + 8)
                if value == 0 and kind == _EXIF_SHORT:
                    return 1  # "unknown", which Picasa wrote into many photos; nobody rotates it
                # decoders disagree about types other than SHORT
                return None if kind != _EXIF_SHORT and value == 1 else int(value)
    except struct.error:
        return None
    return 1
