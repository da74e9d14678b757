"""What `unicl-pack build` costs beside what it cannot do without: decoding, scaling, encoding.

    unicl-bench pack --data FOLDER_OR_ZIP [--resize short:256] [--formats jpeg webp] [--json FILE]

The rival is a bare loop over the same files in as many processes: read, decode strictly, and where
an image is changed scale and encode, with the same libraries and settings. It decodes in full,
also where bytes are kept and unicl-pack takes a short cut (docs/performance.md says how much). It
checks no header, limits no time or memory, and writes nothing. First every image that it makes is
compared with what was packed, byte for byte. Both start their processes on the clock; what that
takes is measured with one image, and left out of the ratios that say so.
"""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import xxhash
from PIL import Image

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.check import RESIZE_QUALITY, RESIZE_SUBSAMPLING, ImageFormat
from unicl_fast.images.encode import PNG_COMPRESSION, WEBP_METHOD, encode_jpeg
from unicl_fast.system.machine import usable_cores

from ..harness import (
    BenchmarkSettings,
    Figures,
    Turn,
    print_figures,
    ratios_of,
    summarise,
    write_result,
)

_OURS, _BARE = "unicl-pack", "bare loop"
_CHUNK = 64
_JPEG = b"\xff\xd8\xff"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """Images/s that are packed, against decoding, scaling and encoding them alone."""

    data: Path
    """Folder or zip with plain JPEGs in it, at any depth; others are passed over."""
    formats: tuple[ImageFormat, ...] = ("keep", "jpeg", "webp", "png")
    """As --format of unicl-pack build."""
    resize: str = ""
    """As --resize of unicl-pack build: short:PIXELS or square:PIXELS."""
    images: int = 0
    """Take so many of them, evenly spread; 0 takes all."""
    copies: int = 1
    """Pack each so many times: a run should be much longer than the start of its processes."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Recipe:
    """What the bare loop makes of an image."""

    format: ImageFormat
    short_side: int
    square_side: int


def run(settings: Settings) -> None:
    """Compares, measures, prints, and writes the JSON if one is wanted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_images(settings, folder / "images")
        starts = start_turns(settings, paths[0], folder)
        num_bytes = sum(path.stat().st_size for path in paths)
        figures: Figures = {
            "images": summarise([len(paths)]),
            "bytes of an image": summarise([num_bytes / len(paths)]),
        }
        for name, turns in starts.items():
            figures[f"start of {name}, s"] = summarise([turn.wall_seconds for turn in turns])
        for format in settings.formats:
            figures |= measure(settings, paths, format, folder, starts)
    print_figures(figures)
    write_result(settings, figures, "pillow", "simplejpeg", "numpy", "tokenizers")


def write_images(settings: Settings, folder: Path) -> list[Path]:
    """The images as files of one class folder, so that both read the same in the same way."""
    images = list(_find_jpegs(settings.data))
    if not images:
        raise ValueError(f"{settings.data} holds no JPEG: name a folder or a zip of some")
    if 0 < settings.images < len(images):
        step = len(images) / settings.images
        images = [images[int(place * step)] for place in range(settings.images)]
    (folder / "class").mkdir(parents=True)
    paths = []
    for number, data in enumerate(images * settings.copies):
        paths.append(folder / "class" / f"{number:08d}.jpg")
        paths[-1].write_bytes(data)
    return paths


def _find_jpegs(place: Path) -> Iterator[bytes]:
    if place.is_dir():
        contents = (path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file())
        yield from (data for data in contents if data.startswith(_JPEG))
        return
    with zipfile.ZipFile(place) as archive:
        for name in sorted(archive.namelist()):
            data = archive.read(name)
            if data.startswith(_JPEG):
                yield data


def start_turns(settings: Settings, image: Path, folder: Path) -> dict[str, list[Turn]]:
    """Both with an image for each process: what they cost whatever they do."""
    one = folder / "one" / "class"
    one.mkdir(parents=True)
    few = [one / f"{number}.jpg" for number in range(usable_cores())]
    for path in few:
        shutil.copy(image, path)
    return take_turns_of(settings, few, _Recipe("keep", 0, 0), "", folder)


def take_turns_of(
    settings: Settings, paths: Sequence[Path], recipe: _Recipe, resize: str, folder: Path
) -> dict[str, list[Turn]]:
    turns: dict[str, list[Turn]] = {_OURS: [], _BARE: []}
    for _ in range(settings.rounds):
        turns[_OURS].append(pack(paths[0].parents[1], folder / "packed", recipe.format, resize))
        shutil.rmtree(folder / "packed")
        turns[_BARE].append(_timed(lambda: loop(paths, recipe)))
    return turns


def measure(
    settings: Settings,
    paths: Sequence[Path],
    format: ImageFormat,
    folder: Path,
    starts: dict[str, list[Turn]],
) -> Figures:
    """One format: the proof that both make the same, then turns."""
    kind, _, number = settings.resize.partition(":")
    sides = {"short": 0, "square": 0} | ({kind: int(number)} if kind else {})
    recipe = _Recipe(format, sides["short"], sides["square"])
    compare(settings, paths, recipe, folder)
    turns = take_turns_of(settings, paths, recipe, settings.resize, folder)
    beyond = {name: _less_start(mine, starts[name]) for name, mine in turns.items()}
    rates = {
        f"{format}: {name}, images/s": summarise([len(paths) / t.wall_seconds for t in mine])
        for name, mine in turns.items()
    }
    # of equal work: how many times as long the other one takes
    return rates | {
        f"{format}: rate against the bare loop": summarise(ratios_of(turns, _BARE, _OURS)),
        f"{format}: the same, starts left out": summarise(ratios_of(beyond, _BARE, _OURS)),
        f"{format}: the same by CPU time": summarise(
            ratios_of(beyond, _BARE, _OURS, unit="cpu_seconds")
        ),
    }


def _less_start(turns: Sequence[Turn], starts: Sequence[Turn]) -> list[Turn]:
    """Turns without the median start; never less than a tenth, where noise is all there is."""
    wall = statistics.median(turn.wall_seconds for turn in starts)
    processor = statistics.median(turn.cpu_seconds for turn in starts)
    return [
        Turn(
            max(turn.wall_seconds - wall, turn.wall_seconds / 10),
            max(turn.cpu_seconds - processor, turn.cpu_seconds / 10),
        )
        for turn in turns
    ]


def pack(source: Path, out: Path, format: ImageFormat, resize: str) -> Turn:
    """A build by the program; its own clock leaves out the start of Python and its imports."""
    told = out.with_suffix(".json")
    command = [sys.executable, "-m", "unicl_fast.tools.pack", "build", str(source)]
    command += ["--out", str(out), "--format", format, "--json", str(told)]
    processor = _children_seconds()
    done = subprocess.run(
        command + (["--resize", resize] if resize else []),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"unicl-pack failed: {done.stderr.strip().splitlines()[-1]}")
    seconds = json.loads(told.read_text(encoding="utf-8"))["seconds"]
    return Turn(seconds, _children_seconds() - processor)


def loop(paths: Sequence[Path], recipe: _Recipe) -> list[int]:
    """The bare loop; returns the XXH3 of what it made, in order."""
    chunks = [paths[place : place + _CHUNK] for place in range(0, len(paths), _CHUNK)]
    processes = usable_cores()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        hashes = pool.map(_work, chunks, [recipe] * len(chunks))
        return [one for chunk in hashes for one in chunk]


def _work(paths: Sequence[Path], recipe: _Recipe) -> list[int]:
    return [xxhash.xxh3_64_intdigest(_make(path.read_bytes(), recipe)) for path in paths]


def _make(data: bytes, recipe: _Recipe) -> bytes:
    """What anybody would write who wants this done and no more."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    space = "GRAY" if colours == "Gray" else "RGB"
    pixels = simplejpeg.decode_jpeg(data, colorspace=space, strict=True)
    pixels, is_scaled = _scale(pixels, height, width, recipe)
    if not is_scaled and recipe.format in ("keep", "jpeg"):
        return data
    if recipe.format in ("keep", "jpeg"):  # with the markers that make ours comparable
        return encode_jpeg(pixels, quality=RESIZE_QUALITY, subsampling=RESIZE_SUBSAMPLING)
    if recipe.format == "raw":
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))).tobytes()
    file = io.BytesIO()
    options: dict[str, Any] = {"format": "PNG", "compress_level": PNG_COMPRESSION}
    if recipe.format == "webp":
        options = {"format": "WEBP", "quality": RESIZE_QUALITY, "method": WEBP_METHOD}
    Image.fromarray(pixels.squeeze(2) if space == "GRAY" else pixels).save(file, **options)
    return file.getvalue()


def _scale(pixels: Any, height: int, width: int, recipe: _Recipe) -> tuple[Any, bool]:
    """Pixels [h w c] as large as they are wanted, and whether that is another size."""
    side, edge = recipe.square_side or recipe.short_side, min(height, width)
    if side == 0 or (edge <= side if recipe.short_side else (height, width) == (side, side)):
        return pixels, False
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    box, size = None, (round(width * side / edge), round(height * side / edge))
    if recipe.square_side:
        left, top = (width - edge) // 2, (height - edge) // 2
        box, size = (left, top, left + edge, top + edge), (side, side)
    scaled = np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))
    return scaled if scaled.ndim == 3 else scaled[..., None], True


def compare(settings: Settings, paths: Sequence[Path], recipe: _Recipe, folder: Path) -> None:
    """Refuses to time what does not make the same files."""
    pack(paths[0].parents[1], folder / "packed", recipe.format, settings.resize)
    with PackedDataset(folder / "packed") as dataset:
        packed = Counter(dataset.samples["xxh3"].tolist())
    shutil.rmtree(folder / "packed")
    made = Counter(loop(paths, recipe))
    if made != packed:
        raise RuntimeError(
            f"{recipe.format}: {(made - packed).total()} of {len(paths)} images of the bare loop "
            "are not what was packed; nothing was timed. It takes plain JPEGs only"
        )
    print(f"{recipe.format}: all {len(paths):,} images are packed as the bare loop makes them")


def _timed(work: Any) -> Turn:
    wall, processor = time.perf_counter(), _seconds()
    work()
    return Turn(time.perf_counter() - wall, _seconds() - processor)


def _seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return time.process_time() + _children_seconds()


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
