"""The contestants of `unicl-bench input`, and the proof that they make the same images.

Nothing here imports their code, nor torch: each runs in a process of its own (worker.py). Two
comparisons decide who is timed: the pixels of squares that are shown whole, with Pillow's; and
means and deviations of images with random crops, with ours.
"""

import dataclasses
import io
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from unicl_fast.config import Resample
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.limits import ImageFormat

Kind = Literal["ours", "peer", "limit", "augmented"]
_SQUARES = 48
_EXTENSIONS = {b"\x89PNG": "png", b"RIFF": "webp"}
_BATCH = 16
_STANDARD_ERRORS = 5
_THUMBNAIL = 8


class ContenderError(RuntimeError):
    """A contestant could not do its work; the message says why."""


class MissingPackageError(ContenderError):
    """A package that the contestant needs is not installed."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The same images, and the same distribution of crops, for every contestant."""

    data: Path
    """Packed data set; its tars are WebDataset's and DALI's too."""
    scratch: Path
    """A folder for other forms of the same images, made once for all."""
    batch_size: int
    image_size: int
    threads: int
    """Decoding threads, or worker processes."""
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    augment: tuple[str, ...] = ()
    """Augmentation in our own loader."""
    resample: Resample = "fused"
    """Operators of our own loader."""

    @property
    def class_folder(self) -> Path:
        """One folder a class, the same files byte for byte."""
        return self.scratch / "classes"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way from files to batches, or a part of it."""

    name: str
    kind: Kind
    """ours and peers make normalised float32 [b c h w]; limits do a part of that, and augmented is
    ours with augmentation."""
    about: str
    code: str
    """module:function; takes a `Task`, yields batches, or numbers of images."""
    prepare: str = ""
    """module:function that writes what it reads into `task.scratch`, in a process of its own."""
    install: str = ""
    """The command that installs a missing package."""
    tolerance: float = 0.4
    """Largest mean difference from Pillow's image, in levels of 255. Another rounding makes 0.2;
    contestants with another filter or decoder have a wider one."""
    differs: str = ""
    """Its difference from the others, if any."""


C = TypeVar("C", bound=Contender)

_OWN = "benchmarks.input.own"
_PEERS = "benchmarks.input.peers"
INSTALL = "pip install -r benchmarks/requirements.txt"
_FFCV = (
    f"apt-get install libopencv-dev libturbojpeg0-dev pkg-config, {INSTALL}, then "
    "pip install --no-deps ffcv"
)
MOSAICML = (  # it asks for an old transformers
    "pip install --no-deps mosaicml-streaming brotli catalogue cramjam python-snappy zstd"
)

_CHANNELS_LAST = "batches lie in channels_last order"

OURS = Contender(
    name="unicl_fast",
    kind="ours",
    about="TrainLoader: DALI decodes the crop, our fused kernel resizes it, normalised at the end",
    code=f"{_OWN}:ours",
    differs=_CHANNELS_LAST,
)
RAW = dataclasses.replace(
    OURS,
    name="unicl_fast-raw",
    about="the same loader on the data set of --raw-data",
    differs=f"{_CHANNELS_LAST}; reads --raw-data",
)


def _peer(name: str, about: str, **more: Any) -> Contender:
    code = f"{_PEERS}:{name.replace('-', '_')}_batches"
    return Contender(name=name, kind="peer", about=about, code=code, **more)


PEERS = (
    _peer("torchvision", "ImageFolder, PIL transforms, DataLoader"),
    _peer("torchvision-v2", "ImageFolder with decode_image, v2 on uint8 tensors, DataLoader"),
    _peer("timm", "timm's create_loader with its prefetcher, no augmentation beyond crop and flip"),
    _peer(
        "webdataset",
        "tars as open_clip reads them: resampled shards, a shuffle buffer, PIL, WebLoader",
        install=INSTALL,
    ),
    _peer(
        "spdl",
        "SPDL's pipeline of threads, FFmpeg decodes, crops and scales",
        install=f"apt-get install ffmpeg, {INSTALL}",
        tolerance=3.0,
        differs="FFmpeg's decoder, chroma upsampling and scaler",
    ),
    _peer(
        "ffcv-jpg",
        "FFCV on JPEGs of at most 500 pixels and quality 90, as its users write ImageNet",
        prepare=f"{_PEERS}:write_ffcv_jpg",
        install=_FFCV,
        tolerance=3.0,
        differs="images encoded anew, the fast DCT, OpenCV's area filter",
    ),
    _peer(
        "ffcv-raw",
        "FFCV on decoded images of at most 500 pixels",
        prepare=f"{_PEERS}:write_ffcv_raw",
        install=_FFCV,
        tolerance=3.0,
        differs="OpenCV's area filter; several times the disk",
    ),
    _peer(
        "pool",
        "a thread pool, simplejpeg and OpenCV, batches in buffers used again",
        install=INSTALL,
        tolerance=3.0,
        differs=f"OpenCV's area filter; {_CHANNELS_LAST}",
    ),
    _peer(
        "turboloader",
        "TurboLoader's fused pass over a tar: decodes rows of the crop, resizes, normalises",
        prepare=f"{_PEERS}:write_tar",
        install=INSTALL,
        tolerance=3.0,
        differs="a process-wide pool of threads; torchvision's crops only",
    ),
    _peer(
        "litdata",
        "LitData's StreamingDataset and its loader, v2 on uint8 tensors",
        prepare=f"{_PEERS}:write_litdata",
        install=INSTALL,
    ),
    _peer(
        "mosaicml",
        "MosaicML's StreamingDataset, PIL transforms, DataLoader",
        prepare=f"{_PEERS}:write_mds",
        install=MOSAICML,
    ),
    _peer(
        "grain",
        "grain's MapDataset in worker processes, simplejpeg and OpenCV",
        install=INSTALL,
        tolerance=3.0,
        differs=f"OpenCV's area filter; {_CHANNELS_LAST}",
    ),
    _peer(
        "dali",
        "plain DALI: webdataset reader, random crop decoder, its own resize and normalise",
        differs="border pixels repeated under the filter",
    ),
)


def _limit(name: str, about: str) -> Contender:
    code = f"{_OWN}:{name.replace('-', '_')}"
    return Contender(name=name, kind="limit", about=about, code=code)


PARTS = (
    _limit("decode", "DALI decodes the crop and nothing else, whole files in memory"),
    _limit("decode-cut", "the same of files cut to their crops, as the loader cuts them"),
    _limit("turbojpeg", "libjpeg-turbo decodes the whole image and nothing else"),
    _limit("read", "our reader gets the bytes and compares their checksums, one thread"),
    _limit("write", "a float32 batch is written into memory that exists, one thread"),
)


def reason_left_out(contender: Contender, error: ContenderError) -> str:
    """Prints and returns why a contestant is left out; RuntimeError if it is ours."""
    reason = str(error)
    if isinstance(error, MissingPackageError) and contender.install:
        reason = f"{reason}; to have it: {contender.install}"
    if contender.kind in ("ours", "augmented"):
        raise RuntimeError(f"{contender.name}: {reason}") from error
    print(f"{contender.name} is left out: {reason}", flush=True)
    return reason


def choose(asked: tuple[str, ...], offered: tuple[C, ...]) -> list[C]:
    """Contestants by name; `all` and `none` are names too, and commas separate as blanks do."""
    names = [name for text in asked for name in text.split(",") if name]
    known = [contender.name for contender in offered]
    unknown = [name for name in names if name not in (*known, "all", "none")]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not among {', '.join(known)}, all, none")
    return [each for each in offered if "all" in names or each.name in names]


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """The difference of a contestant's images from Pillow's, in levels of 255."""

    mean: float
    high: float
    """99 of 100 values are smaller."""


def write_class_folder(dataset: PackedDataset, folder: Path) -> None:
    """Writes the same files in one folder a class; those without a label into one more."""
    for index in range(len(dataset)):
        labels = dataset.labels_of(index)
        home = folder / (f"{int(labels[0]):06d}" if len(labels) else "unlabelled")
        home.mkdir(exist_ok=True, parents=True)
        data = bytes(dataset.image_bytes(index))
        extension = _EXTENSIONS.get(data[:4], "jpg")
        (home / f"{index}.{extension}").write_bytes(data)


def comparison_task(dataset: PackedDataset, task: Task) -> tuple[Task, np.ndarray]:
    """A task whose result is known, and that: squares shown whole, by Pillow, [n h w 3] in levels.

    They are cropped from the first images and packed as JPEGs, or decoded as the data set is.
    """
    from unicl_fast.packing.build import build_dataset  # of which no contestant's process needs any

    scratch = task.scratch / "squares"
    (scratch / "classes" / "square").mkdir(parents=True)
    form: ImageFormat = "keep"
    if dataset.is_decoded:
        form = "ppm" if dataset.image_shape is None else "raw"
    extension = "jpg" if form == "keep" else "png"
    truth = []
    for index in range(min(_SQUARES, len(dataset))):
        path = scratch / "classes" / "square" / f"{index}.{extension}"
        _square(bytes(dataset.image_bytes(index))).save(path, quality=95)
        with Image.open(path) as image:
            resized = image.resize((task.image_size, task.image_size), Image.Resampling.BILINEAR)
        truth.append(np.asarray(resized, dtype=np.float32))
    sources, packed = [scratch / "classes"], scratch / "packed"
    build_dataset(sources, packed, format=form, workers=1, progress=False)
    asked = dataclasses.replace(
        task,
        data=packed,
        scratch=scratch,
        batch_size=min(_BATCH, len(truth)),
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        flip=0.0,
    )
    return asked, np.stack(truth)


def _square(encoded: bytes) -> Image.Image:
    with Image.open(io.BytesIO(encoded)) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.convert("RGB").crop((left, top, left + side, top + side))


def gap_to(truth: np.ndarray, images: np.ndarray) -> Gap:
    """Compares each image with the most similar one of `truth`, of which half must be found."""
    differences = _thumbnails(images)[:, None] - _thumbnails(truth)
    found = np.square(differences).sum(axis=(2, 3, 4)).argmin(axis=1)
    if (shown := len(np.unique(found))) < len(truth) / 2:
        raise ContenderError(f"only {shown} of {len(truth)} images were shown")
    levels = np.abs(images - truth[found])
    return Gap(float(levels.mean()), float(np.quantile(levels, 0.99)))


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """Means over a grid of `_THUMBNAIL` cells a side, without the remainder at the edges."""
    count, size = images.shape[:2]
    cells = min(_THUMBNAIL, size)
    cell = size // cells
    cut = images[:, : cells * cell, : cells * cell]
    return np.asarray(cut.reshape(count, cells, cell, cells, cell, 3).mean(axis=(2, 4)))


def compare_distributions(moments: np.ndarray, ours: np.ndarray) -> None:
    """Raises ContenderError if means or deviations of images [n 2] differ by more than chance."""
    errors = np.sqrt(sum(each.var(0) / len(each) for each in (moments, ours)))
    for name, mean, own, error in zip(
        ("mean", "deviation"), moments.mean(0), ours.mean(0), errors, strict=True
    ):
        if abs(mean - own) > _STANDARD_ERRORS * error:
            raise ContenderError(
                f"the images' {name} is {mean:.2f}, ours is {own:.2f} (standard error {error:.2f})"
            )


def compare_operators(spec: str, fused: np.ndarray, dali: np.ndarray) -> None:
    """Raises RuntimeError if two operators make different images of an augmentation, in levels.

    They resample a level apart, and DALI repeats border pixels (tests/pipelines/test_graph.py);
    thresholds of a policy make more of that in a few places.
    """
    gaps = np.abs(fused - dali).mean(axis=(1, 2, 3))
    middle, highest = float(np.median(gaps)), float(gaps.max())
    print(f"{spec}: mean difference of an image {middle:.3f}, at most {highest:.3f}", flush=True)
    if middle > 0.5 or (gaps > 3).mean() > 0.1:
        raise RuntimeError(f"{spec}: the fused operator and DALI's differ; nothing was timed")
