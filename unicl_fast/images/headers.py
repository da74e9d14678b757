"""The markers of a JPEG and the chunks of a WebP, read before any pixel is decoded.

Packing must know which files every decoder reads alike: decoders agree on plain 8-bit Huffman
JPEGs in grey or YCbCr, and on WebP's simple format, and part ways on the rest. Pillow and
libjpeg-turbo's short interface do not tell all of it, so markers are walked here (ITU-T T.81, annex
B; Exif 2.32, section 4.6), and chunks too (developers.google.com/speed/webp/docs/riff_container).
Whether the image behind a header is sound is `check`'s work.

WebP's simple format is a RIFF header and one bitstream, lossy (VP8) or lossless (VP8L); DALI
promises to read no other. The extended format (VP8X) wraps the same bitstream together with a
colour profile, Exif data or the like, and may add alpha or frames. Where it adds only what no
decoder of pixels reads, the wrapping is removed and the bitstream stays as it is, so that a lossy
image is not encoded twice.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})
_SOS, _EOI, _APP0, _APP1, _APP14 = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE
_PLAIN_PROCESSES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive; all Huffman
_ORIENTATION_TAG = 0x0112
_EXIF_FORMATS = {1: "B", 3: "H", 4: "I"}
_EXIF_SHORT = 3
_RIFF_HEADER_BYTES = 12
_CHUNK_HEADER_BYTES = 8
_BITSTREAMS = frozenset({b"VP8 ", b"VP8L"})
_ALPHA_OR_FRAMES = frozenset({b"ALPH", b"ANIM", b"ANMF"})
_LOSSLESS_SIGNATURE = 0x2F
_LOSSLESS_ALPHA_BIT = 28  # behind 14 bits of width and 14 of height


@dataclass(frozen=True, kw_only=True, slots=True)
class JpegHeader:
    """Decides whether a JPEG can be kept as it is."""

    height: int
    width: int
    process: int
    """Low byte of the SOF marker: 0xC0 baseline, 0xC2 progressive, ..."""
    precision: int
    component_ids: tuple[int, ...]
    jfif: bool
    adobe_transform: int | None
    orientation: int
    """Exif orientation 1 to 8; 1 where there is none."""
    orientation_clear: bool
    """False if Exif data is broken or unusual, so that decoders may read it differently."""

    @property
    def is_ycbcr(self) -> bool:
        """Whether three components are luma and chroma, by the rules that libjpeg follows."""
        if len(self.component_ids) != 3:
            return False
        if self.jfif:
            return True
        if self.adobe_transform is not None:
            return self.adobe_transform == 1
        return self.component_ids != tuple(b"RGB")

    @property
    def is_plain(self) -> bool:
        """8-bit grey or YCbCr, Huffman coded, the right way up."""
        return (
            self.process in _PLAIN_PROCESSES
            and self.precision == 8
            and (len(self.component_ids) == 1 or self.is_ycbcr)
            and self.orientation == 1
            and self.orientation_clear
        )


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Walks the markers up to the first scan.

    Raises:
        ValueError: the markers do not lead to a frame and a scan.
    """
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
            break
        elif marker == _EOI:
            raise ValueError("the JPEG ends before its image begins")
    if frame is None:
        raise ValueError("the JPEG has no frame header before its first scan")
    process, body = frame
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        raise ValueError("the JPEG's frame header is cut short")
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    known = orientations[0] if orientations else 1
    return JpegHeader(
        height=height,
        width=width,
        process=process,
        precision=precision,
        component_ids=tuple(body[6 + 3 * index] for index in range(components)),
        jfif=jfif,
        adobe_transform=adobe_transform,
        orientation=known if known is not None and 1 <= known <= 8 else 1,
        orientation_clear=len(orientations) <= 1 and known == 1,
    )


def _next_segment(data: bytes, position: int) -> tuple[int, bytes, int]:
    """The marker at `position`, its body, and where the next marker is expected."""
    if data[position : position + 1] != b"\xff":
        where = "ends inside its header" if position >= len(data) else "has garbage in its header"
        raise ValueError(f"the JPEG {where} (byte {position})")
    while data[position : position + 1] == b"\xff":  # any number of fill bytes may come first
        position += 1
    if position >= len(data):
        raise ValueError(f"the JPEG ends inside its header (byte {position})")
    marker = data[position]
    position += 1
    if marker in _WITHOUT_LENGTH or marker == _EOI:
        return marker, b"", position
    length = int.from_bytes(data[position : position + 2], "big")
    if length < 2 or position + length > len(data):
        raise ValueError(f"the JPEG ends inside its header (byte {position})")
    return marker, data[position + 2 : position + length], position + length


def _exif_orientation(tiff: bytes) -> int | None:
    """The orientation in Exif data: 1 if none is given, None if it cannot be read for certain."""
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
                    return 1  # "unknown", which Picasa wrote into many photos; none rotates it
                # in another type than SHORT some decoders see the value and some do not
                return None if kind != _EXIF_SHORT and value == 1 else int(value)
    except struct.error:
        return None
    return 1


def is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:_RIFF_HEADER_BYTES] == b"WEBP"


def simple_webp(data: bytes) -> bytes | None:
    """The same image in WebP's simple format.

    Args:
        data: a file that a decoder has read without complaint.

    Returns:
        `data` itself where it has that format, else the same bitstream without its wrapping; None
        where there is no such file (alpha, animation) or decoders may see different images
        (several bitstreams, bytes after the end).
    """
    try:
        chunks = list(_chunks(data))
    except ValueError:
        return None
    names = [name for name, _ in chunks]
    bitstreams = [chunk for name, chunk in chunks if name in _BITSTREAMS]
    if len(bitstreams) != 1 or _ALPHA_OR_FRAMES.intersection(names):
        return None
    (chunk,) = bitstreams
    if names[0] not in (_BITSTREAMS | {b"VP8X"}) or _has_alpha(chunk):
        return None
    if len(chunks) == 1:
        return data
    return b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields name and bytes of each chunk, header and padding included.

    Raises:
        ValueError: the chunks do not fill the file as its headers say.
    """
    if int.from_bytes(data[4:8], "little") != len(data) - 8:
        raise ValueError("the file is not as long as its header says")
    position = _RIFF_HEADER_BYTES
    while position < len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        end = position + _CHUNK_HEADER_BYTES + size + size % 2
        if end > len(data):
            raise ValueError("a chunk reaches beyond the file")
        yield data[position : position + 4], data[position:end]
        position = end


def _has_alpha(chunk: bytes) -> bool:
    if chunk[:4] != b"VP8L":
        return False
    header = chunk[_CHUNK_HEADER_BYTES : _CHUNK_HEADER_BYTES + 5]
    if len(header) < 5 or header[0] != _LOSSLESS_SIGNATURE:
        return True  # an unknown bitstream is not plain
    return bool(int.from_bytes(header[1:], "little") >> _LOSSLESS_ALPHA_BIT & 1)
