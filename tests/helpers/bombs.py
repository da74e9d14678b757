"""Images that would cost a careless program its memory, and honest ones just below a limit."""

import struct
import zlib
from collections.abc import Callable

import numpy as np
from packed_sets import saved
from PIL import Image


def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    """A grey 8-bit PNG with extra chunks and any bytes for (compressed) pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def zeros(megabytes: int) -> bytes:
    """So many zeros, compressed a thousandfold."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def small_jpeg() -> bytearray:
    return bytearray(saved(Image.new("RGB", (64, 48)), format="JPEG"))


def jpeg_that_declares(width: int, height: int) -> bytes:
    data = small_jpeg()
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def jpeg_with_segments(count: int) -> bytes:
    """A sound JPEG behind so many 64 kB of Exif data."""
    segment = b"\xff\xe1\xff\xff" + (b"Exif\0\0MM\0*" + b"\xff" * 65533)[:65533]
    data = bytes(small_jpeg())
    return data[:2] + segment * count + data[2:]


def jpeg_with_scans(count: int) -> bytes:
    data = saved(Image.effect_noise((64, 48), 90), format="JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * count + data[-2:]


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"


def tiff(**tags: tuple[int, int, int]) -> bytes:
    """A little-endian TIFF of one directory; tags are t256=(type, count, value)."""
    entries = b"".join(
        struct.pack("<HHII", int(name[1:]), *value) for name, value in sorted(tags.items())
    )
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def big_tiff(width: int, height: int, **more: tuple[int, int, int]) -> bytes:
    known = {
        "t256": (4, 1, width), "t257": (4, 1, height), "t258": (3, 1, 8), "t259": (3, 1, 8),
        "t262": (3, 1, 1), "t273": (4, 1, 8), "t277": (3, 1, 1), "t278": (4, 1, height),
        "t279": (4, 1, 100),
    }  # fmt: skip
    return tiff(**(known | more))


def icon(width: int, height: int) -> bytes:
    """An icon of 16 x 16 by its directory, with a larger PNG in it."""
    inside = png(width, height, data=zeros(1 + width * height // (1 << 20)))
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22)
    return b"\0\0\1\0\1\0" + entry + inside


def webp_canvas(width: int, height: int) -> bytes:
    frame = saved(Image.new("RGBA", (16, 16)), format="WEBP", lossless=True)[12:]
    canvas = struct.pack("<I", 0x12)[:4] + struct.pack("<I", width - 1)[:3]
    canvas += struct.pack("<I", height - 1)[:3]
    animation = b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    body = struct.pack("<I", 0)[:3] * 2 + struct.pack("<I", 15)[:3] * 2 + b"\x64\0\0\0" + frame
    animation += b"ANMF" + struct.pack("<I", len(body)) + body
    content = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + animation
    return b"RIFF" + struct.pack("<I", len(content)) + content


def jpeg2000_that_declares(width: int, height: int) -> bytes:
    data = bytearray(saved(Image.new("RGB", (64, 48)), format="JPEG2000", no_jp2=True))
    siz = data.index(b"\xff\x51")
    struct.pack_into(">II", data, siz + 6, width, height)
    return bytes(data)


def psd(width: int, height: int) -> bytes:
    head = struct.pack(">4sH6sHIIHH", b"8BPS", 1, bytes(6), 3, height, width, 8, 3)
    return head + bytes(12) + struct.pack(">H", 1) + bytes(100)


def bmp(width: int, height: int) -> bytes:
    data = bytearray(saved(Image.new("RGB", (8, 8)), format="BMP"))
    struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


BOMBS: dict[str, Callable[[], bytes]] = {
    "png-header": lambda: png(65_000, 65_000, data=zlib.compress(bytes(10))),
    "png-pixels": lambda: png(16, 16, data=zeros(300)),
    "png-profile": lambda: png(8, 8, (b"iCCP", b"x\0\0" + zeros(300)), data=zeros(1)),
    "png-text": lambda: png(8, 8, (b"zTXt", b"x\0\0" + zeros(300)), data=zeros(1)),
    "png-texts": lambda: png(8, 8, *[(b"iTXt", b"x\0\1\0\0\0" + zeros(1))] * 500, data=zeros(1)),
    "png-exif": lambda: png(8, 8, (b"eXIf", b"MM\0*" + b"\xff" * 20_000_000), data=zeros(1)),
    "png-comments": lambda: png(8, 8, *[(b"tEXt", b"key\0value")] * 5_000, data=zeros(1)),
    "png-large": lambda: png(50_000, 1_700, data=zeros(90)),
    "jpeg-header": lambda: jpeg_that_declares(65_500, 65_500),
    "jpeg-scans": lambda: jpeg_with_scans(600),
    "gif-screen": lambda: gif((65_535, 65_535), (4, 4)),
    "gif-frame": lambda: gif((4, 4), (65_535, 65_535)),
    "webp-canvas": lambda: webp_canvas(16_000, 16_000),
    "jpeg2000-header": lambda: jpeg2000_that_declares(60_000, 60_000),
    "tiff-header": lambda: big_tiff(60_000, 60_000),
    "tiff-strip": lambda: big_tiff(64, 64, t279=(4, 1, 4_000_000_000)),
    "tiff-rows": lambda: big_tiff(64, 64, t278=(4, 1, 4_000_000_000)),
    "tiff-samples": lambda: big_tiff(1_000, 1_000, t277=(3, 1, 60_000)),
    "tiff-tile": lambda: big_tiff(64, 64, t322=(4, 1, 1_000_000), t323=(4, 1, 1_000_000),
                                  t324=(4, 1, 8), t325=(4, 1, 100)),
    "icon": lambda: icon(9_000, 9_000),
    "bmp": lambda: bmp(30_000, 30_000),
    "pnm": lambda: b"P6 60000 60000 255\n" + bytes(100),
    "psd": lambda: psd(29_000, 29_000),
}  # fmt: skip
"""Of these only `SOUND_BOMBS` are images of at most a million pixels that can be decoded."""
SOUND_BOMBS = {"png-pixels", "png-exif", "png-comments"}
"""Their pixels are few and whole, and what else they carry is not for a decoder of pixels."""


def honest(side: int) -> dict[str, bytes]:
    """Sound images of side x side that need as much memory for it as their formats ever do."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 4), np.uint8)
    rgba = Image.fromarray(noise)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    words = Image.fromarray(noise[..., :2].copy().view("<u2")[..., 0])
    palette = grey.convert("P")
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "rgba.png": saved(rgba, format="PNG", compress_level=1),
        "rgb.png": saved(rgb, format="PNG", compress_level=1),
        "16.png": saved(words, format="PNG", compress_level=1),
        "palette.png": saved(palette, format="PNG", transparency=7),
        "cmyk.jpg": saved(rgb.convert("CMYK"), format="JPEG", progressive=True, quality=98),
        "turned.jpg": saved(rgb, format="JPEG", progressive=True, quality=98, exif=turned),
        "rgba.webp": saved(rgba, format="WEBP", lossless=True, method=0, quality=0),
        "rgba.jp2": saved(rgba, format="JPEG2000"),
        "rgb.avif": saved(rgb, format="AVIF", speed=10),
        "rgba.tiff": saved(rgba, format="TIFF", compression="tiff_lzw"),
        "grey.gif": saved(grey, format="GIF"),
        "rgb.bmp": saved(rgb, format="BMP"),
        "exif.jpg": jpeg_with_segments(300),
    }
