"""What lies in a WebP file beside its image, and the file without it.

Decoders agree on WebP's simple format: a RIFF header and one bitstream, lossy (VP8) or lossless
(VP8L); DALI promises no other. The extended format (VP8X) wraps the same bitstream together with a
colour profile, Exif data or the like, and may add alpha or frames. Where it adds only what no
decoder of pixels looks at, the wrapping comes off and the bitstream stays as it is, so that a lossy
image is not encoded twice. (Container: developers.google.com/speed/webp/docs/riff_container.)
"""

from __future__ import annotations

from collections.abc import Iterator

_RIFF_HEADER_BYTES = 12
_CHUNK_HEADER_BYTES = 8
_BITSTREAMS = frozenset({b"VP8 ", b"VP8L"})
_MORE_THAN_A_IMAGE = frozenset({b"ALPH", b"ANIM", b"ANMF"})
_LOSSLESS_SIGNATURE = 0x2F
_LOSSLESS_ALPHA_BIT = 28  # behind 14 bits of width and 14 of height


def is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:_RIFF_HEADER_BYTES] == b"WEBP"


def simple_webp(data: bytes) -> bytes | None:
    """The file in WebP's simple format that shows what a WebP file shows.

    Args:
        data: a file that a decoder has read without complaint.

    Returns:
        `data` itself where it is one, the same bitstream without its wrapping where it is not, and
        None where there is no such file (alpha, animation) or decoders may see different things
        (several bitstreams, bytes behind the end).
    """
    try:
        chunks = list(_chunks(data))
    except ValueError:
        return None
    names = [name for name, _ in chunks]
    bitstreams = [chunk for name, chunk in chunks if name in _BITSTREAMS]
    if len(bitstreams) != 1 or _MORE_THAN_A_IMAGE.intersection(names):
        return None
    if names[0] not in (_BITSTREAMS | {b"VP8X"}) or _has_alpha(bitstreams[0]):
        return None
    if len(chunks) == 1:
        return data
    (chunk,) = bitstreams
    return b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and bytes, header and padding included, of each chunk.

    Raises:
        ValueError: they do not fill the file as its headers say.
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
        return True  # no bitstream we know: whatever it is, it is not plain
    return bool(int.from_bytes(header[1:], "little") >> _LOSSLESS_ALPHA_BIT & 1)
