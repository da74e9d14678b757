"""Parts of image files that decoders skip: containers, and how they end.

Decoders stop after the last pixel, so they miss a lost tail replaced by zeros. Chunks of PNG
(w3.org/TR/png-3) and WebP's RIFF (developers.google.com/speed/webp/docs/riff_container) and boxes
of AVIF (ISO/IEC 14496-12) reveal it.
"""

import zlib
from collections.abc import Iterator

from unicl_fast.images.codec import ImageError, open_image, pixels_of

_PNG_SIGNATURE_BYTES = 8
_INFLATED_AT_ONCE = 1 << 16

RIFF_HEADER_BYTES = 12
_CHUNK_HEADER_BYTES = 8
_BITSTREAMS = frozenset({b"VP8 ", b"VP8L"})
_ALPHA_OR_FRAMES = frozenset({b"ALPH", b"ANIM", b"ANMF"})
_LOSSLESS_SIGNATURE = 0x2F
_LOSSLESS_ALPHA_BIT = 28  # after 14 bits of width and 14 of height

_ZEROS = bytes(8)  # an even number: RIFF pads to one
_QOI_END = bytes(7) + b"\1"


def check_png_stream(data: bytes, *, height: int, width: int) -> None:
    """Inflates a PNG's pixels for their Adler-32, which Pillow skips and libpng requires.

    Costs a third of a PNG's check. Bytes after the pixels of the [height width] image are ignored.
    Raises ImageError if the stream is damaged, or ends before its checksum.
    """
    stream = zlib.decompressobj()
    left = 8 * height * (width + 1) + 64  # 16-bit RGBA, and a filter byte a row of each pass
    try:
        for name, body in _png_chunks(data):
            while name == b"IDAT" and not stream.eof:
                inflated = stream.decompress(body, _INFLATED_AT_ONCE)
                body, left = stream.unconsumed_tail, left - len(inflated)
                if left < 0:
                    return
                if not body and len(inflated) < _INFLATED_AT_ONCE:
                    break
    except zlib.error as error:
        raise ImageError("damaged", f"the PNG's pixels: {error}") from error
    if not stream.eof:
        raise ImageError("damaged", "the PNG's compressed pixels end before their checksum")


def largest_extra(png: bytes) -> int:
    """Length of a sound PNG's longest chunk without pixels: profiles, texts, Exif data."""
    return max((len(body) for name, body in _png_chunks(png) if name != b"IDAT"), default=0)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes | memoryview]]:
    """Name and body of each chunk up to the image's end."""
    name, position = b"", _PNG_SIGNATURE_BYTES
    while name != b"IEND" and position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        yield name, memoryview(data)[position + 8 : position + 8 + length]
        position += 12 + length


def check_qoi_end(data: bytes) -> None:
    """Raises ImageError for a QOI without end marker; zeros may follow it."""
    if not data.rstrip(b"\0").endswith(_QOI_END):
        raise ImageError("damaged", "the QOI does not end with its end marker: its tail is lost")


def check_avif_end(data: bytes, exif: bytes) -> None:
    """Raises ImageError for an AVIF ending in zeros: coded images never do (AV1, section 5.3.4)."""
    name, position = b"", 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        if size == 1:  # the size follows in 64 bits
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        position += size if size >= 8 else len(data)  # 0: all the rest
    is_lost = name in (b"mdat", bytes(4)) and data.endswith(_ZEROS)
    if is_lost and not exif.endswith(_ZEROS):
        raise ImageError("damaged", "the AVIF ends in zeros: its tail is lost")


def check_webp_end(data: bytes) -> None:
    """Raises ImageError for a WebP that decodes as well without the zeros at its end.

    libwebp does not check whether the pixels use all their bytes. Zeros alone prove little: a black
    area can need a bit a pixel. Animations are not checked.
    """
    for name, chunk in _chunks(data):
        if name in _BITSTREAMS and chunk.endswith(_ZEROS):
            body = chunk[_CHUNK_HEADER_BYTES : -len(_ZEROS)]
            try:
                pixels_of(open_image(_webp_of(name + len(body).to_bytes(4, "little") + body)))
            except ImageError:
                continue
            raise ImageError(
                "damaged", "the WebP ends in zeros that it has no use for: its tail is lost"
            )


def simple_webp(data: bytes) -> bytes | None:
    """The image in WebP's simple format (one VP8 or VP8L bitstream), which DALI is sure to read.

    If the extended format (VP8X) adds nothing that affects pixels, only the wrapping is removed, so
    a lossy image is not encoded twice. `data` must have been decoded without complaint. Returns
    `data` itself if simple; None for alpha, animation, several bitstreams or trailing bytes.
    """
    chunks = _chunks(data)
    names = [name for name, _ in chunks]
    bitstreams = [chunk for name, chunk in chunks if name in _BITSTREAMS]
    if len(bitstreams) != 1 or _ALPHA_OR_FRAMES.intersection(names):
        return None
    (chunk,) = bitstreams
    if names[0] not in (_BITSTREAMS | {b"VP8X"}) or _has_alpha(chunk):
        return None
    if len(chunks) == 1:
        return data
    return _webp_of(chunk)


def _webp_of(chunk: bytes) -> bytes:
    return b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Name and bytes of each chunk, including header and padding; empty if lengths disagree."""
    chunks, position = [], RIFF_HEADER_BYTES
    while position < len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        end = position + _CHUNK_HEADER_BYTES + size + size % 2
        chunks.append((data[position : position + 4], data[position:end]))
        position = end
    whole = position == len(data) == int.from_bytes(data[4:8], "little") + 8
    return chunks if whole else []


def _has_alpha(chunk: bytes) -> bool:
    if chunk[:4] != b"VP8L":
        return False
    header = chunk[_CHUNK_HEADER_BYTES : _CHUNK_HEADER_BYTES + 5]
    if len(header) < 5 or header[0] != _LOSSLESS_SIGNATURE:
        return True  # an unknown bitstream is not plain
    return bool(int.from_bytes(header[1:], "little") >> _LOSSLESS_ALPHA_BIT & 1)
