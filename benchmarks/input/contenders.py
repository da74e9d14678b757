"""Who takes part in `unicl-bench input`: a name, what it does, what it needs, where its code is.

A list without imports: each contender runs in a process of its own (input_worker.py), which imports
what that one needs and nothing else, so that memory is counted honestly and a package that is
missing costs its contender only.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from unicl_fast.config import Resample

Kind = Literal["ours", "peer", "limit", "stage"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What every contender is given: the same images, and the same law for the crops."""

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
    resample: Resample = "fused"
    """What resizes in our own loader."""
    keep_memory: bool = False
    """Let peers keep freed memory, as our programs do."""

    @property
    def class_folder(self) -> Path:
        """One folder a class, the same files byte for byte."""
        return self.scratch / "classes"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way from files to batches, or a part of it."""

    name: str
    kind: Kind
    """ours and peers make normalised float32 [b c h w]; limits and stages are parts of that."""
    what: str
    code: str
    """module:function; takes a `Task`, yields batches, or numbers of images."""
    prepare: str = ""
    """module:function that writes what it reads into `task.scratch`, in a process of its own."""
    install: str = ""
    """What to type where a package is missing."""
    tolerance: float = 0.4
    """Mean difference from Pillow's image that is let pass, in levels of 255. A rounding more or
    less makes 0.2; those with another filter or decoder have a wider one."""
    differs: str = ""
    """What it does not do as the others do."""


_HERE = "unicl_fast.benchmarks"
_BENCH = "pip install 'unicl_fast[bench]'"
_FFCV = (
    f"apt-get install libopencv-dev libturbojpeg0-dev pkg-config, {_BENCH}, then "
    "pip install --no-deps ffcv"
)

OURS = Contender(
    name="unicl_fast",
    kind="ours",
    what="TrainLoader: DALI decodes the crop, our fused kernel resizes it, normalised at the end",
    code=f"{_HERE}.input_own:ours",
    differs="batches lie in channels_last order",
)
RAW = Contender(
    name="unicl_fast-raw",
    kind="ours",
    what="the same loader on the data set of --raw-data",
    code=f"{_HERE}.input_own:ours",
    differs="batches lie in channels_last order; reads --raw-data",
)
PEERS = (
    Contender(
        name="torchvision",
        kind="peer",
        what="ImageFolder, PIL transforms, DataLoader",
        code=f"{_HERE}.input_torch_peers:torchvision_batches",
    ),
    Contender(
        name="torchvision-v2",
        kind="peer",
        what="ImageFolder with decode_image, transforms.v2 on uint8 tensors, DataLoader",
        code=f"{_HERE}.input_torch_peers:torchvision_v2_batches",
    ),
    Contender(
        name="timm",
        kind="peer",
        what="timm's create_loader with its prefetcher, no augmentation beyond crop and flip",
        code=f"{_HERE}.input_torch_peers:timm_batches",
    ),
    Contender(
        name="webdataset",
        kind="peer",
        what="tars as open_clip reads them: resampled shards, a shuffle buffer, PIL, WebLoader",
        code=f"{_HERE}.input_torch_peers:webdataset_batches",
        install=_BENCH,
    ),
    Contender(
        name="spdl",
        kind="peer",
        what="SPDL's pipeline of threads, FFmpeg decodes, crops and scales",
        code=f"{_HERE}.input_native_peers:spdl_batches",
        install=f"apt-get install ffmpeg, {_BENCH}",
        tolerance=3.0,
        differs="FFmpeg's decoder, chroma upsampling and scaler",
    ),
    Contender(
        name="ffcv-jpg",
        kind="peer",
        what="FFCV on JPEGs of at most 500 pixels and quality 90, as its users write ImageNet",
        code=f"{_HERE}.input_ffcv:jpg_batches",
        prepare=f"{_HERE}.input_ffcv:write_jpg",
        install=_FFCV,
        tolerance=3.0,
        differs="images encoded anew, the fast DCT, OpenCV's area filter",
    ),
    Contender(
        name="ffcv-raw",
        kind="peer",
        what="FFCV on decoded images of at most 500 pixels",
        code=f"{_HERE}.input_ffcv:raw_batches",
        prepare=f"{_HERE}.input_ffcv:write_raw",
        install=_FFCV,
        tolerance=3.0,
        differs="OpenCV's area filter; several times the disk",
    ),
    Contender(
        name="pool",
        kind="peer",
        what="a thread pool, simplejpeg and OpenCV, batches in buffers used again",
        code=f"{_HERE}.input_native_peers:pool_batches",
        install=_BENCH,
        tolerance=3.0,
        differs="OpenCV's area filter; batches lie in channels_last order",
    ),
    Contender(
        name="dali",
        kind="peer",
        what="plain DALI: webdataset reader, random crop decoder, its own resize and normalise",
        code=f"{_HERE}.input_native_peers:dali_batches",
        differs="border pixels repeated under the filter",
    ),
)
PARTS = (
    Contender(
        name="decode",
        kind="limit",
        what="DALI decodes the crop and nothing else, whole files in memory",
        code=f"{_HERE}.input_own:decode_alone",
    ),
    Contender(
        name="decode-cut",
        kind="limit",
        what="the same of files cut to their crops beforehand, as the loader cuts them",
        code=f"{_HERE}.input_own:decode_cut_alone",
    ),
    Contender(
        name="turbojpeg",
        kind="limit",
        what="libjpeg-turbo decodes the whole image and nothing else, bytes in memory",
        code=f"{_HERE}.input_own:turbojpeg_alone",
    ),
    Contender(
        name="read",
        kind="limit",
        what="our reader gets the bytes and compares their checksums, one thread",
        code=f"{_HERE}.input_own:read",
    ),
    Contender(
        name="write",
        kind="limit",
        what="a float32 batch is written into memory that is there, one thread",
        code=f"{_HERE}.input_own:write",
    ),
    Contender(
        name="plan",
        kind="stage",
        what="samples, windows and flips of a batch, one thread",
        code=f"{_HERE}.input_own:plan",
    ),
    Contender(
        name="texts",
        kind="stage",
        what="token rows gathered, equal ones and classes found, one thread",
        code=f"{_HERE}.input_own:texts",
    ),
    Contender(
        name="resample",
        kind="stage",
        what="decoded crops to squares, mirrored",
        code=f"{_HERE}.input_own:resample",
    ),
    Contender(
        name="augment",
        kind="stage",
        what="squares changed as the preset unicl asks",
        code=f"{_HERE}.input_own:augment",
    ),
    Contender(
        name="normalise",
        kind="stage",
        what="uint8 batches to float32, one thread",
        code=f"{_HERE}.input_own:normalise",
    ),
    Contender(
        name="loader",
        kind="stage",
        what="the whole TrainLoader, uint8 batches as the training step takes them",
        code=f"{_HERE}.input_own:loader",
    ),
)


def choose(asked: tuple[str, ...], offered: tuple[Contender, ...]) -> list[Contender]:
    """Contenders by name; `all` and `none` are names too, and commas separate as blanks do.

    Raises:
        ValueError: a name that is not offered.
    """
    names = [name for text in asked for name in text.split(",") if name]
    known = [contender.name for contender in offered]
    unknown = [name for name in names if name not in (*known, "all", "none")]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not among {', '.join(known)}, all, none")
    return [each for each in offered if "all" in names or each.name in names]


def load(code: str) -> Callable[[Task], Iterator[Any]]:
    """The function that `code` names."""
    module, _, function = code.partition(":")
    found = getattr(importlib.import_module(module), function)
    assert callable(found)
    return found  # type: ignore[no-any-return]
