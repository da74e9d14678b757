"""Images/s of decoders, alone and in DataLoaders, beside our loader, by a published protocol.

    unicl-bench imread [--folder FOLDER] [--workers 0 2 4 8] [--json FILE]

The protocol is imread_benchmark's (Iglovikov and Kosarevsky, arXiv 2605.08731). Each library
decodes every JPEG of a folder from memory to RGB pixels, one after the other on one thread, then in
a DataLoader with so many worker processes: in order, 32 at a time, not stacked, with workers that
stay. Whole epochs are timed after one that is not; the garbage collector is off. A file that a
library refuses is skipped for this library and counted. `results` in the JSON has its fields.

Two things differ. Contestants take turns, and each waits stopped in a process of its own. And the
files lie in one that is mapped, so that they are in memory once and not in every process; that
costs each decoder a copy of the file's bytes.

Our loader reads the same files from a packed data set, with as many threads as others have workers,
and one where they have none. It has no epochs, so it runs for some seconds, once the batches that
were ready are gone. It does more: images are resized to squares and put into one tensor a batch.
`unicl_fast-whole` decodes whole images, as the libraries do; `unicl_fast` decodes the crops of
training only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.reader import PackedDataset

from ..harness import (
    Figures,
    Stage,
    Turn,
    describe_machine,
    printed,
    rate_of,
    ratio_of,
)
from .contenders import Contender, ContenderError, Task
from .race import spread
from .worker import Worker

_WHOLE, _CROPS = "unicl_fast-whole", "unicl_fast"
_OURS = (_WHOLE, _CROPS)
_ONE_THREAD = "one thread"
_JPEG = b"\xff\xd8\xff"
_FILES, _ENDS = "files.bin", "ends.npy"
_TOLERANCE = 2.0
"""Largest mean difference from Pillow's pixels, in levels of 255; another IDCT makes below 1."""

Decode = Callable[[bytes], Any]
"""From the bytes of a JPEG to uint8 [h w 3]."""


def _pillow() -> Decode:
    from PIL import Image

    return lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _opencv() -> Decode:
    import cv2

    cv2.setNumThreads(1)
    return lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def _simplejpeg() -> Decode:
    import simplejpeg

    return lambda data: simplejpeg.decode_jpeg(data, colorspace="RGB")


def _torchvision() -> Decode:
    import torch
    from torchvision.io import ImageReadMode, decode_image

    torch.set_num_threads(1)

    def decode(data: bytes) -> Any:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_image(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()

    return decode


LIBRARIES: dict[str, tuple[Callable[[], Decode], str]] = {
    "pillow": (_pillow, "pillow"),
    "simplejpeg": (_simplejpeg, "simplejpeg"),
    "torchvision": (_torchvision, "torchvision"),
    "opencv": (_opencv, "opencv-python-headless"),
}
"""Decoders and their packages, by the names that imread_benchmark gives them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EpochTask(Task):
    """Epochs over the files that one library decodes; `threads` are DataLoader workers."""

    library: str = ""
    indices: tuple[int, ...] = ()

    def images(self) -> Iterator[bytes]:
        """The files of an epoch, in order."""
        return map(self.image, range(len(self.indices)))

    def image(self, number: int) -> bytes:
        files, ends = _mapped(self.scratch)
        index = self.indices[number]
        return files[ends[index] : ends[index + 1]].tobytes()


_maps: dict[Path, tuple[NDArray[np.uint8], list[int]]] = {}


def _mapped(scratch: Path) -> tuple[NDArray[np.uint8], list[int]]:
    if scratch not in _maps:
        files = np.memmap(scratch / _FILES, np.uint8, "r")
        _maps[scratch] = files, np.load(scratch / _ENDS).tolist()
    return _maps[scratch]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imread(Stage):
    """Images/s of decoders, alone and in DataLoaders, and of our loader, on a folder of JPEGs."""

    folder: Path | None = None
    """Folder with JPEGs at any depth; by default decode/ of the test data (UNICL_TEST_DATA)."""
    images: int = 0
    """Take so many of them, evenly spread; 0 takes all."""
    libraries: tuple[str, ...] = ("all",)
    """Decoders: pillow, simplejpeg, torchvision, opencv; or all that are installed."""
    workers: tuple[int, ...] = (0, 2, 4, 8)
    """Worker processes of DataLoaders, and threads of our loader."""
    batch_size: int = 32
    """Images of a batch."""
    image_size: int = 224
    """Side of the squares that our loader makes."""
    seconds: float = 3.0
    """Length of our loader's turns."""

    def run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="unicl-bench-") as name:
            scratch = Path(name)
            count = write_files(self._folder(), scratch, most=self.images)
            indices, left_out = check_libraries(self._chosen(), scratch, count)
            num_packed = pack(scratch, count)
            tasks = {
                name: EpochTask(
                    data=scratch / "packed",
                    scratch=scratch,
                    batch_size=min(self.batch_size, num_packed),
                    image_size=self.image_size,
                    threads=1,
                    library=name,
                    indices=indices.get(name, tuple(range(num_packed))),
                )
                for name in (*_OURS, *indices)
            }
            # no aspect ratio of a whole area but the image's own fits: every crop is the image
            tasks[_WHOLE] = dataclasses.replace(
                tasks[_WHOLE], scale=(1.0, 1.0), ratio=(0.001, 1000.0)
            )
            turns = {_ONE_THREAD: self._measure(tasks, _ONE_THREAD, left_out)}
            for workers in self.workers:
                column = f"{workers} workers"
                asked = {
                    name: dataclasses.replace(task, threads=max(workers, int(name in _OURS)))
                    for name, task in tasks.items()
                }
                turns[column] = self._measure(asked, column, left_out)
        results = _results(turns, tasks, count, self)
        figures = printed(_figures(turns))
        print(f"\n{verdict(figures, turns)}\n\n{table(figures, turns, tasks, count)}")
        packages = (*(package for _, package in LIBRARIES.values()), "nvidia-dali-cuda120", "numpy")
        self.write_result(figures, *packages, results=results, left_out=left_out)

    def _folder(self) -> Path:
        if self.folder is not None:
            return self.folder
        if test_data := os.environ.get("UNICL_TEST_DATA"):
            return Path(test_data) / "decode"
        raise ValueError("name a folder of JPEGs by --folder, or set UNICL_TEST_DATA")

    def _chosen(self) -> list[str]:
        names = [name for text in self.libraries for name in text.split(",") if name]
        if unknown := [name for name in names if name not in (*LIBRARIES, "all")]:
            raise ValueError(f"{unknown[0]!r} is not among {', '.join(LIBRARIES)}, all")
        return [name for name in LIBRARIES if "all" in names or name in names]

    def _measure(
        self, tasks: Mapping[str, EpochTask], column: str, left_out: dict[str, str]
    ) -> dict[str, list[Turn]]:
        """Turns of whole epochs; a library that fails is left out of this column."""
        turns: dict[str, list[Turn]] = {}
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for number in range(self.rounds + 2):
                for name, task in tasks.items():
                    try:
                        if not number:
                            contender = _contender(name, column)
                            workers[name] = stack.enter_context(Worker(contender, task))
                        elif name in workers:
                            turn = (
                                workers[name].turn(self.seconds)
                                if name in _OURS
                                else workers[name].next_batch()
                            )
                            turns.setdefault(name, []).append(turn)
                    except ContenderError as error:
                        if name in _OURS:
                            raise
                        print(f"{name} is left out of {column}: {error}", flush=True)
                        left_out[f"{name}, {column}"] = str(error)
                        workers.pop(name, None)
                        turns.pop(name, None)
        return {name: taken[1:] for name, taken in turns.items()}


def write_files(folder: Path, scratch: Path, *, most: int) -> int:
    """Writes a folder's JPEGs into one file, and links for a class folder; returns their number."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_jpeg(path)]
    if not paths:
        raise ValueError(f"{folder} holds no JPEG: name a folder of some by --folder")
    if 0 < most < len(paths):
        paths = [paths[number * len(paths) // most] for number in range(most)]
    images = scratch / "classes" / "image"
    images.mkdir(parents=True)
    ends = [0]
    with (scratch / _FILES).open("wb") as file:
        for number, path in enumerate(paths):
            ends.append(ends[-1] + file.write(path.read_bytes()))
            (images / f"{number:08d}.jpg").symlink_to(path.absolute())
    np.save(scratch / _ENDS, np.array(ends, np.int64))
    return len(paths)


def _is_jpeg(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_JPEG)) == _JPEG


def pack(scratch: Path, count: int) -> int:
    """Packs the files as they are; returns the number of images that could be packed."""
    from unicl_fast.packing.build import build_dataset

    build_dataset([scratch / "classes"], scratch / "packed", templates="simple", progress=False)
    with PackedDataset(scratch / "packed") as dataset:
        if len(dataset) < count:
            print(f"{count - len(dataset)} of {count} files are not packed: they are damaged")
        return len(dataset)


def check_libraries(
    names: Sequence[str], scratch: Path, count: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Decodes everything once with each library, and compares it with what Pillow makes of it.

    Returns the indices of the files that each decodes, and why libraries are left out.
    """
    decoders: dict[str, Decode] = {}
    left_out: dict[str, str] = {}
    for name in names:
        load, package = LIBRARIES[name]
        try:
            decoders[name] = load()
        except ImportError as error:
            left_out[name] = f"{error}; to have it: pip install {package}"
    indices: dict[str, list[int]] = {name: [] for name in decoders}
    files, truth_of = EpochTask(
        data=scratch, scratch=scratch, batch_size=1, image_size=1, threads=0,
        indices=tuple(range(count)),
    ), _pillow()  # fmt: skip
    for index, data in enumerate(files.images()):
        truth = _decoded(truth_of, data)
        for name, decode in decoders.items():
            pixels = _decoded(decode, data)
            if pixels is None:
                continue
            indices[name].append(index)
            if name not in left_out and (fault := _difference(pixels, truth)):
                left_out[name] = f"file {index}: {fault}"
    for name in decoders:
        if not indices[name]:
            left_out.setdefault(name, "it decodes none of the files")
    for name, why in left_out.items():
        print(f"{name} is left out: {why}", flush=True)
    sound = {name: tuple(found) for name, found in indices.items() if name not in left_out}
    return sound, left_out


def _decoded(decode: Decode, data: bytes) -> NDArray[np.uint8] | None:
    """The pixels, or None where the library refuses the file by an error of its own kind."""
    try:
        pixels = decode(data)
    except Exception:  # libraries raise errors of many kinds
        return None
    return None if pixels is None else np.asarray(pixels)


def _difference(pixels: NDArray[np.uint8], truth: NDArray[np.uint8] | None) -> str:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        return f"it makes {pixels.dtype} {list(pixels.shape)}, not uint8 [h w 3]"
    if truth is None:
        return ""
    if pixels.shape != truth.shape:
        return f"it makes {list(pixels.shape)} of what Pillow makes {list(truth.shape)}"
    levels = float(np.abs(pixels.astype(np.int16) - truth).mean())
    if levels <= _TOLERANCE:
        return ""
    return f"its pixels differ from Pillow's by {levels:.2f} levels in the mean"


def _contender(name: str, column: str) -> Contender:
    code = "decoding_epochs" if column == _ONE_THREAD else "loader_epochs"
    place = f"{__name__}:{code}"
    if name in _OURS:
        place = f"{__package__}.own:loader"
    return Contender(name=name, kind="peer", about=column, code=place)


def decoding_epochs(task: EpochTask) -> Iterator[int]:
    """Decodes one file after the other; yields the number of images of each epoch."""
    decode = LIBRARIES[task.library][0]()
    gc.disable()
    while True:
        for data in task.images():
            decode(data)
        yield len(task.indices)


class _DecodedFiles:
    """Decodes a file when its number is asked for: the data set of a DataLoader."""

    def __init__(self, task: EpochTask) -> None:
        self._task = task
        self._decode: Decode | None = None

    def __len__(self) -> int:
        return len(self._task.indices)

    def __getitem__(self, number: int) -> Any:
        if self._decode is None:  # in the worker's process
            self._decode = LIBRARIES[self._task.library][0]()
        return self._decode(self._task.image(number))


def _as_they_are(images: list[Any]) -> list[Any]:
    return images  # of different sizes, so nothing is stacked


def loader_epochs(task: EpochTask) -> Iterator[int]:
    """A DataLoader as the protocol has it; yields the number of images of each epoch."""
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        _DecodedFiles(task),  # type: ignore[arg-type]
        batch_size=task.batch_size,
        num_workers=task.threads,
        collate_fn=_as_they_are,
        persistent_workers=task.threads > 0,
    )
    gc.disable()
    while True:
        yield sum(map(len, loader))


Turns = Mapping[str, Mapping[str, Sequence[Turn]]]
"""By column, one thread or a number of workers, and by contestant."""


def _figures(turns: Turns) -> Figures:
    figures: Figures = {}
    for column, taken in turns.items():
        for name, mine in taken.items():
            figures[f"{name}, {column}, images/s"] = rate_of(mine, 1)
        for name in taken:
            if name not in _OURS:
                figures[f"{_WHOLE} / {name}, {column}"] = ratio_of(taken, name, _WHOLE)
                by_cpu_time = ratio_of(taken, name, _WHOLE, unit="cpu_seconds")
                figures[f"{_WHOLE} / {name}, {column}, by CPU time"] = by_cpu_time
    return figures


def verdict(figures: Figures, turns: Turns) -> str:
    """Compares ours with the fastest library in a DataLoader, where that is at its best."""
    cells = [
        (figures[f"{name}, {column}, images/s"]["median"], name, column)
        for column, taken in turns.items()
        for name in taken
        if column != _ONE_THREAD and name not in _OURS
    ]
    if not cells:
        return "No library ran beside our loader: nothing is compared."
    _, name, column = max(cells)
    ratio = spread(figures[f"{_WHOLE} / {name}, {column}"])
    return (
        f"{_WHOLE} makes {ratio} times the images/s of {name}, the fastest library in a "
        f"DataLoader, at its best with {column} and as many threads of ours: "
        f"{spread(figures[f'{_WHOLE}, {column}, images/s'])} beside "
        f"{spread(figures[f'{name}, {column}, images/s'])}."
    )


def table(figures: Figures, turns: Turns, tasks: Mapping[str, EpochTask], count: int) -> str:
    """Images/s: a row for each contestant, a column for each number of workers."""
    lines = [f"| images/s | {' | '.join(turns)} | files skipped |", "|---" * (len(turns) + 2) + "|"]
    for name, task in tasks.items():
        cells = [spread(figures.get(f"{name}, {column}, images/s")) for column in turns]
        lines.append(f"| {name} | {' | '.join(cells)} | {count - len(task.indices)} |")
    return "\n".join(lines)


def _results(
    turns: Turns, tasks: Mapping[str, EpochTask], count: int, settings: Imread
) -> list[dict[str, Any]]:
    """The figures in the fields of imread_benchmark: two entries for each contestant."""
    machine = describe_machine()
    results: list[dict[str, Any]] = []
    for name, task in tasks.items():
        system: dict[str, Any] = {
            "Python": machine["python"],
            "OS": platform.system(),
            "Machine": platform.machine(),
            "CPU": {"brand_raw": machine["processor"], "count": machine["cores"]},
        }
        with contextlib.suppress(PackageNotFoundError):
            system[name] = version(LIBRARIES[name][1] if name in LIBRARIES else "unicl_fast")
        common = {"library": name, "system_info": system, "num_runs": settings.rounds}
        if name in turns[_ONE_THREAD]:
            threads = {"requested_threads": 1, "effective_threads": 1}
            benchmark = _summary(turns[_ONE_THREAD][name], len(task.indices), count)
            entry = {"mode": "memory", "run_tag": "1t", "benchmark_results": benchmark}
            results.append({**common, **threads, **entry, "num_images": count})
        by_workers = [
            {"num_workers": workers, "num_warmup": 1, **_summary(mine, len(task.indices), count)}
            for workers in settings.workers
            if (mine := turns[f"{workers} workers"].get(name))
        ]
        loader = {"benchmark_type": "dataloader", "batch_size": task.batch_size, "num_threads": 1}
        results.append({**common, **loader, "worker_results": by_workers, "num_images": count})
    return results


def _summary(turns: Sequence[Turn], num_decoded: int, count: int) -> dict[str, Any]:
    micros = 1e6 * np.array([turn.wall_seconds for turn in turns])
    summary: dict[str, Any] = {
        "images_per_second_mean": float((1e6 / micros).mean()),
        "images_per_second_std": float((1e6 / micros).std(ddof=1)) if len(micros) > 1 else 0.0,
        "us_per_image_mean": float(micros.mean()),
    }
    for percent in (50, 90, 99):
        summary[f"images_per_second_p{percent}"] = float(np.percentile(1e6 / micros, percent))
        summary[f"us_per_image_p{percent}"] = float(np.percentile(micros, percent))
    return {
        **summary,
        "raw_times_s": (micros * num_decoded / 1e6).tolist(),
        "raw_throughput_ips": (1e6 / micros).tolist(),
        "num_images_total": count,
        "num_images_decoded": num_decoded,
        "num_images_skipped": count - num_decoded,
        "skip_rate": (count - num_decoded) / count,
    }
