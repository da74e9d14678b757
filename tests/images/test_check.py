"""Strict checking and normalising of one image."""

from __future__ import annotations

import csv
import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from property_tests import examples

from unicl_fast.images import check as images
from unicl_fast.images.check import MAX_PIXELS, ImageError, check_image, read_jpeg_header


def photo(height: int = 40, width: int = 56, *, channels: int = 3) -> np.ndarray:
    """A smooth image with a different corner each, so that turns and mirrors show."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)]
    return np.stack(planes[:channels], axis=-1).astype(np.uint8)


def saved(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def jpeg(**options: Any) -> bytes:
    return saved(Image.fromarray(photo()), format="JPEG", **options)


PLAIN = {
    "baseline": lambda: jpeg(),
    "progressive": lambda: jpeg(progressive=True),
    "grey": lambda: saved(Image.fromarray(photo()).convert("L"), format="JPEG"),
    "4:4:4": lambda: jpeg(subsampling=0),
    "restart markers": lambda: jpeg(restart_marker_blocks=2),
    "png rgb": lambda: saved(Image.fromarray(photo()), format="PNG"),
    "png grey": lambda: saved(Image.fromarray(photo()).convert("L"), format="PNG"),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_images_keep_their_bytes(kind: str) -> None:
    data = PLAIN[kind]()
    image = check_image(data)
    assert image.data is data
    assert not image.reencoded
    assert (image.height, image.width) == (40, 56)
    assert image.extension == ("png" if kind.startswith("png") else "jpg")


RGB = Image.fromarray(photo())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_exif_orientation_is_baked_in(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(
        RGB,
        format=file_format,
        exif=exif,
        **({"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}),
    )
    image = check_image(data)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    assert image.reencoded == (orientation != 1)
    assert (image.height, image.width) == upright.shape[:2]
    assert np.abs(decoded(image.data) - upright).mean() < 2


def test_the_transparent_value_of_a_16_bit_grey_png_lies_on_white() -> None:
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


def test_images_that_begin_alike_are_checked_each_and_their_header_is_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As small images of one data set do: their header takes longer to read than they to decode."""
    walked: list[bytes] = []
    walk = images._walk_to_scan
    monkeypatch.setattr(images, "_walk_to_scan", lambda data: walked.append(data) or walk(data))
    monkeypatch.setattr(images, "_last_header", None)
    alike = [saved(Image.fromarray(255 - photo()), format="JPEG"), jpeg()]
    assert [check_image(data).data for data in alike] == alike
    assert walked == alike[:1]
    start = read_jpeg_header(jpeg()).scan_start
    for damaged in (jpeg()[: start - 1], jpeg()[:start], jpeg()[: start + 20]):
        with pytest.raises(ImageError) as caught:
            check_image(damaged)
        assert caught.value.kind == "damaged"
    other = jpeg(quality=30)
    assert (check_image(other).height, check_image(jpeg()).width) == (40, 56)
    assert [each for each in walked if each in (other, jpeg())] == [other, jpeg()]


def test_a_cut_jpeg_closed_with_an_end_marker_is_damaged() -> None:
    """Pillow and DALI decode such a file to a grey tail without a word."""
    data = saved(Image.fromarray(photo(400, 600)), format="JPEG")
    cut = data[: len(data) * 3 // 4] + b"\xff\xd9"
    Image.open(io.BytesIO(cut)).load()
    with pytest.raises(ImageError, match="libjpeg") as caught:
        check_image(cut)
    assert caught.value.kind == "damaged"


SCAN = re.compile(rb"\xff\xda\x00[\x06-\x0c]")


@pytest.mark.parametrize("kind", ["colour", "grey", "cmyk", "one scan a component"])
def test_a_jpeg_cut_between_scans_is_damaged(kind: str) -> None:
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


@pytest.mark.slow
def test_real_photos_cut_between_scans_are_damaged(shared_data: Path) -> None:
    for path in sorted((shared_data / "decode" / "images").iterdir())[::28]:
        data = saved(Image.open(path), format="JPEG", progressive=True, quality=90)
        assert check_image(data).data is data
        for found in list(SCAN.finditer(data))[1:]:
            with pytest.raises(ImageError):
                check_image(data[: found.start()] + b"\xff\xd9")


def test_a_png_with_a_wrong_checksum_is_damaged() -> None:
    data = bytearray(PLAIN["png rgb"]())
    data[data.index(b"IDAT") + 20] ^= 1
    with pytest.raises(ImageError):
        check_image(bytes(data))


def png_of_chunks(data: bytes, *pixels: bytes) -> bytes:
    """A PNG with the header of another, and these parts of its pixels' compressed stream."""
    chunks = [(b"IHDR", data[16:29]), *((b"IDAT", part) for part in pixels), (b"IEND", b"")]
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "I;16"])
def test_the_checksum_of_a_pngs_pixels_is_compared(mode: str) -> None:
    """Chunks' own checksums do not tell; Pillow never reads so far, and DALI refuses the file."""
    values = np.arange(40 * 56, dtype=np.uint16).reshape(40, 56)
    image = Image.fromarray(values) if mode == "I;16" else Image.fromarray(photo()).convert(mode)
    data = saved(image, format="PNG")
    length = int.from_bytes(data[33:37], "big")
    stream, checksum = data[41 : 37 + length], data[37 + length : 41 + length]
    assert check_image(png_of_chunks(data, stream, checksum))
    assert check_image(png_of_chunks(data, stream[:50], stream[50:], checksum + b"behind"))
    for wrong, why in ((bytes(4), "incorrect data check"), (b"", "end before their checksum")):
        with pytest.raises(ImageError, match=why) as caught:
            check_image(png_of_chunks(data, stream, wrong))
        assert caught.value.kind == "damaged"


def test_what_follows_a_pngs_pixels_is_not_inflated_without_end() -> None:
    data = saved(Image.new("RGB", (8, 8)), format="PNG")
    rows = bytes(8 * 25)
    bomb = png_of_chunks(data, zlib.compress(rows + bytes(200_000_000)))
    assert check_image(bomb)


def test_a_cut_png_is_damaged() -> None:
    data = PLAIN["png rgb"]()
    with pytest.raises(ImageError):
        check_image(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not an image"),
        (b"\xff\xd8\xff", "damaged"),
        (b"\xff\xd8\xff\xd9", "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_what_is_no_image_is_refused_with_its_kind(data: bytes, kind: str) -> None:
    with pytest.raises(ImageError) as caught:
        check_image(data)
    assert caught.value.kind == kind


def test_size_is_checked_from_the_header_before_decoding() -> None:
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, 60_000, 60_000)
    assert MAX_PIXELS < 60_000**2
    with pytest.raises(ImageError, match="60000 x 60000") as caught:
        check_image(bytes(data))
    assert caught.value.kind == "too large"


def test_too_many_scans_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_SCANS", 3)
    with pytest.raises(ImageError, match="scans"):
        check_image(jpeg(progressive=True))


def test_resize_shrinks_the_short_side_and_never_enlarges() -> None:
    big = saved(Image.fromarray(photo(300, 450)), format="JPEG")
    small = check_image(big, short_side=100, quality=85)
    assert (small.height, small.width) == (100, 150)
    assert small.reencoded
    assert check_image(big, short_side=300).data is big
    assert np.abs(decoded(small.data) - photo(100, 150)).mean() < 4


def test_resize_of_grey_png_stays_grey() -> None:
    data = saved(Image.fromarray(photo(64, 80)).convert("L"), format="PNG")
    image = check_image(data, short_side=32)
    assert (image.height, image.width) == (32, 40)
    assert read_jpeg_header(image.data).num_components == 1


@given(st.binary(max_size=400))
@examples(200)
def test_any_bytes_give_a_image_or_a_reason(data: bytes) -> None:
    for prefix in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF....WEBP"):
        try:
            check_image(prefix + data)
        except ImageError as error:
            assert str(error)  # noqa: PT017


@given(data=st.data())
@examples(300)
def test_the_fast_check_sees_all_that_a_full_decode_sees(data: st.DataObject) -> None:
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


def hostile_files(shared_data: Path) -> list[tuple[dict[str, str], bytes]]:
    folder = shared_data / "hostile"
    with (folder / "manifest.csv").open(encoding="utf-8") as file:
        return [(row, (folder / row["file"]).read_bytes()) for row in csv.DictReader(file)]


def accepted_hostile_files(shared_data: Path) -> dict[str, images.CheckedImage]:
    accepted = {}
    for row, data in hostile_files(shared_data):
        try:
            accepted[row["file"]] = check_image(data)
        except ImageError as error:
            assert str(error)  # noqa: PT017
            assert error.kind  # noqa: PT017
    return accepted


def test_hostile_files_are_accepted_or_refused_but_never_crash(shared_data: Path) -> None:
    accepted = accepted_hostile_files(shared_data)
    assert len(accepted) > 150
    for row, _ in hostile_files(shared_data):
        if row["libjpeg_turbo"].startswith(("warning", "error")):
            assert row["file"] not in accepted
        if row["pil"] != "ok":
            assert row["file"] not in accepted


def test_real_photos_keep_their_bytes(shared_data: Path) -> None:
    for path in sorted((shared_data / "decode" / "images").iterdir())[:60]:
        data = path.read_bytes()
        image = check_image(data)
        assert image.data is data, path.name
        assert (image.width, image.height) == Image.open(path).size


@pytest.mark.slow
@pytest.mark.dali
def test_dali_reads_every_accepted_file_at_the_recorded_size(shared_data: Path) -> None:
    import nvidia.dali as dali

    pixels = accepted_hostile_files(shared_data)
    unknown_orientation = shared_data / "decode" / "images" / "n03337140_file.JPEG"
    pixels["orientation 0"] = check_image(unknown_orientation.read_bytes())
    queue = [np.frombuffer(image.data, np.uint8) for image in pixels.values()]

    @dali.pipeline_def(batch_size=len(queue), num_threads=2, device_id=None)
    def decode() -> Any:
        encoded = dali.fn.external_source(source=lambda: queue, batch=True)
        return dali.fn.decoders.image(encoded, output_type=dali.types.RGB)

    (result,) = decode(prefetch_queue_depth=1).run()
    for place, (name, image) in enumerate(pixels.items()):
        pixels = result.at(place)
        assert pixels.shape == (image.height, image.width, 3), name
        difference = np.abs(pixels.astype(int) - decoded(image.data)).max()
        # decoders differ in chroma upsampling; a PNG leaves no room for opinion
        assert difference <= (0 if image.extension == "png" else 8), name
