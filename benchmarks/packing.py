"""The cost of `unicl-pack build`, compared with other packers.

    unicl-bench pack --data FOLDER_OR_ZIP [--resize short:256] [--formats jpeg webp]

All read, decode strictly and encode the same files in as many processes, with the same libraries
and settings; `CONTESTANTS` says what each leaves out. The start of their processes is measured with
one image each, and left out of the ratios that say so.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import multiprocessing
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import xxhash
from PIL import Image

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.check import RESIZE_SUBSAMPLING
from unicl_fast.images.codec import PNG_COMPRESSION, WEBP_METHOD, encode_jpeg
from unicl_fast.images.limits import RESIZE_QUALITY, ImageFormat
from unicl_fast.system.machine import usable_cores
from unicl_fast.tools.diagnose.measuring import Turn, in_turns, timed

from .harness import Figures, Stage, printed, rate_of, ratio_of, seconds_of, summarise
from .input.contenders import INSTALL

_OURS, _BARE, _WEBDATASET, _IMG2DATASET = "unicl-pack", "bare loop", "webdataset", "img2dataset"
CONTESTANTS = {
    _OURS: "checks headers and limits, hashes each image, writes tar, index and arrays in one "
    "shuffled order, checksums every file, syncs, resumes after a kill",
    _BARE: "reads, decodes strictly, encodes and hashes; checks no headers and writes nothing",
    _WEBDATASET: "the bare loop without the hash, and ShardWriter in each process: tar and JSON "
    "in the order of the files; no hash, checksum, index or sync, and no resuming",
    _IMG2DATASET: "the bare loop without the hash, and its WebDatasetSampleWriter in each process: "
    "tar, JSON and Parquet; no hash (its downloader makes SHA-256), checksum, index or sync",
}
_NEEDS = {_WEBDATASET: ("webdataset",), _IMG2DATASET: ("img2dataset", "webdataset", "pyarrow")}
_INSTALL = {
    _WEBDATASET: INSTALL,
    _IMG2DATASET: "pip install --no-deps img2dataset",
}
_CHUNK = 64
_SHARD_IMAGES = 10_000
"""Images of a shard of img2dataset by default; fewer where a process would have none."""
_JPEG = b"\xff\xd8\xff"
_BUILD = (sys.executable, "-m", "unicl_fast.tools.pack", "build")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack(Stage):
    """Images/s of packing, against other writers, and against only decoding and encoding."""

    data: Path
    """Folder or zip with plain JPEGs in it, at any depth; other files are skipped."""
    formats: tuple[ImageFormat, ...] = ("keep", "jpeg", "webp", "png")
    """As --format of unicl-pack build."""
    resize: str = ""
    """As --resize of unicl-pack build: short:PIXELS or square:PIXELS."""
    images: int = 0
    """Number of images to take, evenly spread; 0 takes all."""
    copies: int = 1
    """Copies of each image: a run should be much longer than the start of its processes."""

    def run(self) -> None:
        left_out = {name: why for name in _NEEDS if (why := _missing(name))}
        for name, why in left_out.items():
            print(f"{name} is left out: {why}", flush=True)
        names = [name for name in CONTESTANTS if name not in left_out]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            paths = write_images(self, folder / "images")
            starts = start_turns(paths[0], folder, names, self.rounds)
            num_bytes = sum(path.stat().st_size for path in paths)
            figures: Figures = {
                "images": summarise([len(paths)]),
                "bytes of an image": summarise([num_bytes / len(paths)]),
            }
            for name, mine in starts.items():
                figures[f"start of {name}, s"] = seconds_of(mine)
            for format in self.formats:
                recipe = _Recipe(format, self.resize)
                compare(paths, recipe, folder, names)
                turns = take_turns_of(paths, recipe, folder, names, self.rounds)
                figures |= _figures(format, turns, starts, len(paths))
        self.write_result(
            printed(figures),
            *("pillow", "simplejpeg", "numpy", "tokenizers", "webdataset", "img2dataset"),
            contestants={name: CONTESTANTS[name] for name in names},
            left_out=left_out,
        )


def _missing(name: str) -> str:
    """Says what a contestant lacks here; nothing if it can run."""
    lacking = [package for package in _NEEDS[name] if importlib.util.find_spec(package) is None]
    if not lacking:
        return ""
    return f"{' and '.join(lacking)} not installed; to have it: {_INSTALL[name]}"


def _figures(
    format: str, turns: Mapping[str, list[Turn]], starts: Mapping[str, list[Turn]], count: int
) -> Figures:
    """Rates of all, and our rate against that of each other."""
    less = {name: _less_start(mine, starts[name]) for name, mine in turns.items()}
    figures = {f"{format}: {name}, images/s": rate_of(mine, count) for name, mine in turns.items()}
    for name in turns:
        if name != _OURS:
            ratio = f"{format}: {_OURS} / {name}"
            figures[ratio] = ratio_of(turns, name, _OURS)
            figures[f"{ratio}, starts left out"] = ratio_of(less, name, _OURS)
            figures[f"{ratio}, by CPU time"] = ratio_of(less, name, _OURS, unit="cpu_seconds")
    return figures


class _Recipe(NamedTuple):
    """The form of images that all contestants make, by options of unicl-pack build."""

    format: ImageFormat
    resize: str


def write_images(settings: Pack, folder: Path) -> list[Path]:
    """The images as files of one class folder, so that both read the same in the same way."""
    images = _find_jpegs(settings.data)
    if not images:
        raise ValueError(f"{settings.data} holds no JPEG: name a folder or a zip of some")
    if 0 < settings.images < len(images):
        images = [images[n * len(images) // settings.images] for n in range(settings.images)]
    (folder / "class").mkdir(parents=True)
    paths = []
    for number, data in enumerate(images * settings.copies):
        paths.append(folder / "class" / f"{number:08d}.jpg")
        paths[-1].write_bytes(data)
    return paths


def _find_jpegs(place: Path) -> list[bytes]:
    if place.is_dir():
        contents = (path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file())
        return [data for data in contents if data.startswith(_JPEG)]
    with zipfile.ZipFile(place) as archive:
        contents = (archive.read(name) for name in sorted(archive.namelist()))
        return [data for data in contents if data.startswith(_JPEG)]


def start_turns(
    image: Path, folder: Path, names: Sequence[str], rounds: int
) -> dict[str, list[Turn]]:
    """Turns of all with an image for each process: the cost of starting them."""
    (folder / "one" / "class").mkdir(parents=True)
    few = [folder / "one" / "class" / f"{number}.jpg" for number in range(usable_cores())]
    for path in few:
        shutil.copy(image, path)
    return take_turns_of(few, _Recipe("keep", ""), folder, names, rounds)


def take_turns_of(
    paths: Sequence[Path], recipe: _Recipe, folder: Path, names: Sequence[str], rounds: int
) -> dict[str, list[Turn]]:
    """Turns of the contestants; what one has written is removed each time, off the clock."""
    out = folder / "packed"

    def turn_of(name: str) -> Turn:
        if name == _OURS:
            return pack(paths[0].parents[1], out, recipe)
        return timed(lambda: loop(paths, recipe, name, out), cpu_clock=_cpu_seconds)

    works = {name: functools.partial(turn_of, name) for name in names}
    try:
        return in_turns(
            works, rounds=rounds, before=lambda _: shutil.rmtree(out, ignore_errors=True)
        )
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _less_start(turns: Sequence[Turn], starts: Sequence[Turn]) -> list[Turn]:
    """Turns without the median start; at least a tenth of them, where noise is all that is left."""
    wall = statistics.median(turn.wall_seconds for turn in starts)
    cpu = statistics.median(turn.cpu_seconds for turn in starts)
    pairs = [(turn.wall_seconds, turn.cpu_seconds) for turn in turns]
    return [Turn(max(w - wall, w / 10), max(c - cpu, c / 10)) for w, c in pairs]


def pack(source: Path, out: Path, recipe: _Recipe) -> Turn:
    """A build by the program; its own clock leaves out the start of Python and its imports."""
    result = out.with_suffix(".json")
    command = [*_BUILD, str(source), "--out", str(out), "--format", recipe.format]
    command += ["--json", str(result), *(["--resize", recipe.resize] if recipe.resize else [])]
    before = _cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"unicl-pack failed: {done.stderr.strip().splitlines()[-1]}")
    seconds = json.loads(result.read_text(encoding="utf-8"))["seconds"]
    return Turn(seconds, _cpu_seconds() - before)


def loop(paths: Sequence[Path], recipe: _Recipe, name: str, out: Path) -> None:
    """Makes all images in processes, and has them written into the folder `out` by `name`."""
    size = _CHUNK
    if name != _BARE:
        size = min(_SHARD_IMAGES, -(-len(paths) // usable_cores()))
        out.mkdir()
    chunks = [paths[start : start + size] for start in range(0, len(paths), size)]
    with ProcessPoolExecutor(usable_cores(), multiprocessing.get_context("spawn")) as pool:
        numbers, more = range(len(chunks)), [(recipe, name, out)] * len(chunks)
        for _ in pool.map(_work, numbers, chunks, more):
            pass


def _work(number: int, paths: Sequence[Path], more: tuple[_Recipe, str, Path]) -> list[int]:
    """Makes images; writes them as shard `number`, or returns their XXH3 where none is written."""
    recipe, name, out = more
    images = ((path, _make(path.read_bytes(), recipe)) for path in paths)
    if name == _BARE:
        return [xxhash.xxh3_64_intdigest(image) for _, image in images]
    with _WRITERS[name](out, number, _EXTENSIONS.get(recipe.format, recipe.format)) as write:
        for path, image in images:
            write(path.stem, image, {"label": path.parent.name})
    return []


_EXTENSIONS = {"keep": "jpg", "jpeg": "jpg"}
_Write = Callable[[str, bytes, dict[str, str]], object]
"""Writes one sample: its key, its image, and what else is known of it."""


@contextlib.contextmanager
def _webdataset(folder: Path, number: int, extension: str) -> Iterator[_Write]:
    import webdataset

    with webdataset.ShardWriter(f"{folder}/{number:05d}-%03d.tar", verbose=0) as writer:
        yield lambda key, image, facts: writer.write(
            {"__key__": key, extension: image, "json": facts}
        )


@contextlib.contextmanager
def _img2dataset(folder: Path, number: int, extension: str) -> Iterator[_Write]:
    import pyarrow

    # by its file: the package itself imports albumentations, wandb and more, which no writer needs
    package = importlib.util.find_spec("img2dataset")
    assert package is not None
    assert package.submodule_search_locations
    path = f"{package.submodule_search_locations[0]}/writer.py"
    module = runpy.run_path(path)
    schema = pyarrow.schema([("key", pyarrow.string()), ("label", pyarrow.string())])
    writer = module["WebDatasetSampleWriter"](number, str(folder), False, 5, schema, extension)
    yield lambda key, image, facts: writer.write(image, key, None, {"key": key, **facts})
    writer.close()


_WRITERS: dict[str, Callable[[Path, int, str], contextlib.AbstractContextManager[_Write]]]
_WRITERS = {_WEBDATASET: _webdataset, _IMG2DATASET: _img2dataset}


def _make(data: bytes, recipe: _Recipe) -> bytes:
    """The shortest code that does this and no more."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    space = "GRAY" if colours == "Gray" else "RGB"
    pixels = simplejpeg.decode_jpeg(data, colorspace=space, strict=True)
    pixels, is_scaled = _scale(pixels, height, width, recipe)
    if recipe.format in ("keep", "jpeg"):
        if not is_scaled:
            return data
        # with the markers that make ours comparable
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
    """Pixels [h w c] of the recipe's size, and whether that is another size than before."""
    kind, _, text = recipe.resize.partition(":")
    side, edge = int(text or 0), min(height, width)
    if side == 0 or (edge <= side if kind == "short" else (height, width) == (side, side)):
        return pixels, False
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    box, size = None, (round(width * side / edge), round(height * side / edge))
    if kind == "square":
        left, top = (width - edge) // 2, (height - edge) // 2
        box, size = (left, top, left + edge, top + edge), (side, side)
    scaled = np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))
    return scaled if scaled.ndim == 3 else scaled[..., None], True


def compare(paths: Sequence[Path], recipe: _Recipe, folder: Path, names: Sequence[str]) -> None:
    """Raises RuntimeError if they do not all make the same files."""
    made = Counter(_work(0, paths, (recipe, _BARE, folder)))
    out = folder / "packed"
    for name in names:
        if name == _BARE:
            continue
        if name == _OURS:
            pack(paths[0].parents[1], out, recipe)
            with PackedDataset(out) as dataset:
                packed = Counter(dataset.samples["xxh3"].tolist())
        else:
            loop(paths, recipe, name, out)
            packed = Counter(_hashes_in(out))
        shutil.rmtree(out)
        if made != packed:
            raise RuntimeError(
                f"{recipe.format}: {(made - packed).total()} of {len(paths)} images of the bare "
                f"loop differ from those that {name} has packed; nothing was timed. It takes plain "
                "JPEGs only"
            )
    print(f"{recipe.format}: all {len(paths):,} images are packed as the bare loop makes them")


def _hashes_in(folder: Path) -> Iterator[int]:
    """XXH3 of each image in the tars of a folder."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None and not member.name.endswith(".json"):
                    yield xxhash.xxh3_64_intdigest(file.read())


def _cpu_seconds() -> float:
    """CPU time of this process, and of those of its children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + usage.ru_utime + usage.ru_stime
