"""One image is checked strictly and normalised, or made into a file of one format."""

import csv
import io
import re
import struct
import zlib
from typing import Any, Literal

import numpy as np
import pytest
import simplejpeg
from bombs import jpeg_that_declares, png, zeros
from hypothesis import given
from hypothesis import strategies as st
from packed_sets import saved
from PIL import Image, ImageOps
from property_tests import examples

from unicl_fast.images import check as images
from unicl_fast.images.check import ImageError, check_image, read_jpeg_header, simple_webp
from unicl_fast.images.codec import MAX_WEBP_SIDE
from unicl_fast.images.limits import MAX_PIXELS

Format = Literal["jpeg", "webp", "png", "keep"]
FORMATS: tuple[Format, ...] = ("jpeg", "webp", "png")
PILLOW = {"jpeg": "JPEG", "webp": "WEBP", "png": "PNG", "keep": "JPEG"}
EXTENSION = {"jpeg": "jpg", "webp": "webp", "png": "png", "keep": "jpg"}


def photo(height: int = 40, width: int = 56) -> Image.Image:
    """A smooth image with a different corner each, so that turns and mirrors show."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


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
PLAIN["keep"] = {
    "progressive": saved(RGB, format="JPEG", progressive=True),
    "4:4:4": saved(RGB, format="JPEG", subsampling=0),
    "restart markers": saved(RGB, format="JPEG", restart_marker_blocks=2),
    **PLAIN["jpeg"],
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


@pytest.mark.parametrize("format", [*FORMATS, "keep"])
def test_plain_images_of_the_format_keep_their_bytes(format):
    for kind, data in PLAIN[format].items():
        image = check_image(data, format=format, quality=30)
        assert image.data is data, kind
        assert not image.reencoded
        assert (image.extension, image.height, image.width) == (EXTENSION[format], 40, 56)


@pytest.mark.parametrize("format", [*FORMATS, "keep"])
def test_every_other_kind_becomes_a_plain_file_that_looks_the_same(format):
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
def test_any_size_is_what_it_should_be_and_comes_back(data, height, width, format):
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


def test_quality_is_that_of_every_jpeg_and_webp_that_is_encoded():
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
def test_a_wrapped_webp_loses_its_wrapping_and_not_a_bit_of_its_image(kind):
    data = PLAIN["webp"][kind]
    for wrapped in (extended(data), extended(data, (b"ICCP", b"profile"), flags=0x20)):
        assert np.array_equal(shown(wrapped), shown(data))
        image = check_image(wrapped, format="webp")
        assert image.data == data
        assert image.reencoded
        # a data set holds simple ones only
        assert check_image(wrapped, format="packed").reencoded


def test_what_decoders_may_see_differently_is_no_simple_webp():
    data = PLAIN["webp"]["lossy"]
    assert simple_webp(data) is data
    for odd in (data + b"more", data[:-2], extended(data) + data[12:], b"RIFF\4\0\0\0WEBP"):
        assert simple_webp(odd) is None
    image = check_image(data + b"behind the end", format="webp")
    assert image.reencoded
    assert len(image.data) == 8 + int.from_bytes(image.data[4:8], "little")


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
def test_zeros_in_place_of_the_tail_are_damage(kind, part):
    data = CHECKED_ENDS[kind]
    assert check_image(data)
    start = int(len(data) * part)
    with pytest.raises(ImageError) as caught:
        check_image(data[:start] + bytes(len(data) - start))
    assert caught.value.kind == "damaged"


def test_a_ppm_is_kept_only_as_we_would_write_it():
    plain = saved(NOISE, format="PPM")
    assert check_image(plain, format="packed").data is plain
    assert check_image(plain, format="ppm").data == plain
    assert check_image(plain).extension == "jpg"
    for odd in (plain.replace(b"P6\n", b"P6 ", 1), plain + b"after the end"):
        image = check_image(odd, format="packed")
        assert (image.extension, image.reencoded) == ("jpg", True)
        assert check_image(odd, format="ppm").data == plain
    grey = check_image(saved(NOISE.convert("L"), format="PPM"), format="ppm").data
    assert len(grey) == len(plain)


def test_zeros_at_the_end_of_sound_files_are_no_damage():
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


def test_what_is_too_wide_for_webp_is_refused_and_fits_elsewhere():
    wide = saved(Image.new("RGB", (MAX_WEBP_SIDE + 1, 2)), format="PNG")
    with pytest.raises(ImageError, match="16384 x 2 pixels; WebP holds at most 16,383"):
        check_image(wide, format="webp")
    assert check_image(wide, format="jpeg").width == MAX_WEBP_SIDE + 1
    assert check_image(wide, format="png").data is wide
    assert check_image(wide, format="webp", short_side=1).width == 8192


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def jpeg(**options: Any) -> bytes:
    return saved(RGB, format="JPEG", **options)


PNG, PHOTO = saved(RGB, format="PNG"), saved(photo(400, 600), format="JPEG")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_exif_orientation_is_baked_in(orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    data = saved(RGB, format=file_format, exif=exif, **more)
    image = check_image(data)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    assert image.reencoded == (orientation != 1)
    assert (image.height, image.width) == upright.shape[:2]
    assert np.abs(decoded(image.data) - upright).mean() < 2


def test_the_transparent_value_of_a_16_bit_grey_png_lies_on_white():
    values = np.full((16, 16), 1000, np.uint16)
    values[:8] = 999  # the same grey in 8 bits
    data = saved(Image.fromarray(values), format="PNG")
    body = b"tRNS" + (999).to_bytes(2, "big")
    chunk = b"\0\0\0\x02" + body + zlib.crc32(body).to_bytes(4, "big")
    start = data.index(b"IDAT") - 4
    image = check_image(data[:start] + chunk + data[start:], format="png")
    grey = decoded(image.data)[..., 0]
    assert (grey[:8] == 255).all()
    assert (grey[8:] == 4).all()


SCAN = re.compile(rb"\xff\xda\x00[\x06-\x0c]")


@pytest.mark.parametrize("kind", ["colour", "grey", "cmyk", "one scan a component"])
def test_a_jpeg_cut_between_scans_is_damaged(kind):
    """No decoder warns: the file ends where a file may end, and its image is coarse."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8))
    image = image.convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
    data = saved(image, format="JPEG", progressive=kind != "one scan a component")
    if kind == "one scan a component":
        data = as_one_scan_a_component(data)
    starts = [found.start() for found in SCAN.finditer(data)]
    assert len(starts) >= 3
    assert check_image(data).reencoded == (kind == "cmyk")
    for start in starts[1:]:
        cut = data[:start] + b"\xff\xd9"
        Image.open(io.BytesIO(cut)).load()
        with pytest.raises(ImageError, match="scans; its image needs more") as caught:
            check_image(cut, format="packed")
        assert caught.value.kind == "damaged"


def as_one_scan_a_component(data: bytes) -> bytes:
    """A baseline JPEG of one grey component in three scans, each its component's alone."""
    grey = saved(Image.open(io.BytesIO(data)).convert("L"), format="JPEG")
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    sides = grey[frame + 4 : frame + 9]
    components = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    head = grey[:frame] + b"\xff\xc0\x00\x11" + sides + b"\x03" + components
    scans = (
        b"\xff\xda\x00\x08\x01" + bytes([number]) + grey[scan + 6 : -2] for number in (1, 2, 3)
    )
    return head + grey[frame + 13 : scan] + b"".join(scans) + b"\xff\xd9"


def png_of_chunks(data: bytes, *pixels: bytes) -> bytes:
    """A PNG with the header of another, and these parts of its pixels' compressed stream."""
    chunks = [(b"IHDR", data[16:29]), *((b"IDAT", part) for part in pixels), (b"IEND", b"")]
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "I;16"])
def test_the_checksum_of_a_pngs_pixels_is_compared(mode):
    """Chunks' own checksums do not tell; Pillow never reads so far, and DALI refuses the file."""
    values = np.arange(40 * 56, dtype=np.uint16).reshape(40, 56)
    image = Image.fromarray(values) if mode == "I;16" else photo().convert(mode)
    data = saved(image, format="PNG")
    length = int.from_bytes(data[33:37], "big")
    stream, checksum = data[41 : 37 + length], data[37 + length : 41 + length]
    assert check_image(png_of_chunks(data, stream, checksum))
    assert check_image(png_of_chunks(data, stream[:50], stream[50:], checksum + b"behind"))
    for wrong, why in ((bytes(4), "incorrect data check"), (b"", "end before their checksum")):
        with pytest.raises(ImageError, match=why) as caught:
            check_image(png_of_chunks(data, stream, wrong))
        assert caught.value.kind == "damaged"


def test_what_follows_a_pngs_pixels_is_not_inflated_without_end():
    assert check_image(png(8, 8, data=zeros(40)))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not an image"),
        (b"\xff\xd8\xff", "damaged"),
        (b"\xff\xd8\xff\xd9", "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (PNG[: len(PNG) // 2], "damaged"),
        (PNG[: PNG.index(b"IDAT") + 20] + b"x" + PNG[PNG.index(b"IDAT") + 21 :], "damaged"),
        # Pillow and DALI decode it to a grey tail without a word
        (PHOTO[: len(PHOTO) * 3 // 4] + b"\xff\xd9", "damaged"),
    ],
)
def test_what_is_no_image_is_refused_with_its_kind(data, kind):
    with pytest.raises(ImageError) as caught:
        check_image(data)
    assert caught.value.kind == kind


def test_size_is_checked_from_the_header_before_decoding():
    assert MAX_PIXELS < 60_000**2
    with pytest.raises(ImageError, match="60000 x 60000") as caught:
        check_image(jpeg_that_declares(60_000, 60_000))
    assert caught.value.kind == "too large"


def test_too_many_scans_are_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_SCANS", 3)
    with pytest.raises(ImageError, match="scans"):
        check_image(jpeg(progressive=True))


def test_resize_shrinks_the_short_side_and_never_enlarges():
    big = saved(photo(300, 450), format="JPEG")
    small = check_image(big, short_side=100, quality=85)
    assert (small.height, small.width) == (100, 150)
    assert small.reencoded
    assert check_image(big, short_side=300).data is big
    assert np.abs(decoded(small.data) - np.asarray(photo(100, 150)).astype(int)).mean() < 4
    grey = saved(photo(64, 80).convert("L"), format="PNG")
    assert read_jpeg_header(check_image(grey, short_side=32).data).num_components == 1


@given(data=st.data())
@examples(300)
def test_the_fast_check_sees_all_that_a_full_decode_sees(data):
    damaged = bytearray(jpeg(progressive=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(2, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        simplejpeg.decode_jpeg(bytes(damaged), strict=True)
        sound = True
    except ValueError:
        sound = False
    try:
        image = check_image(bytes(damaged))
    except ImageError:
        return
    assert sound or image.reencoded


def test_hostile_files_are_accepted_or_refused_but_never_crash(shared_data):
    folder = shared_data / "hostile"
    num_accepted = 0
    with (folder / "manifest.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                check_image((folder / row["file"]).read_bytes())
            except ImageError as error:
                assert str(error)  # noqa: PT017
                assert error.kind  # noqa: PT017
                continue
            num_accepted += 1
            assert not row["libjpeg_turbo"].startswith(("warning", "error")), row["file"]
            assert row["pil"] == "ok", row["file"]
    assert num_accepted > 150
