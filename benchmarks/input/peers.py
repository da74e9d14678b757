"""Peers of `unicl-bench input`: loaders that users would otherwise take.

Each is set up as its own documentation does it, with the same crops, the bilinear filter where it
has one, and no other augmentation, and yields normalised float32 [b c h w]. Each function imports
its own packages. Stops between epochs would weigh more on small data than on real data, so loaders
with epochs run them without a stop.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
import random
import tarfile
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.dlpack import from_dlpack

from unicl_fast.config import CLIP_MEAN, CLIP_STD
from unicl_fast.dataset.reader import PackedDataset

from .contenders import ContenderError, Task

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, v2

_ENOUGH = 2_000_000
"""Images that no run reaches the end of."""
_MEAN = 255 * np.array(CLIP_MEAN, np.float32)
_STD = 255 * np.array(CLIP_STD, np.float32)
_PER_LEVEL, _SHIFT = 1 / _STD, -_MEAN / _STD
_AHEAD = 3
"""Batches in work in addition to the one that was handed out."""
_FFCV_EPOCH = 500_000
"""Images of one of FFCV's epochs; between two of them its threads start anew."""


def torchvision_batches(task: Task) -> Iterator[Tensor]:
    """ImageFolder with PIL transforms, as most people write it."""
    from torchvision.datasets import ImageFolder

    return _load(ImageFolder(str(task.class_folder), _pil_transform(task)), task)


def torchvision_v2_batches(task: Task) -> Iterator[Tensor]:
    """Transforms v2 as torchvision's documentation recommends: uint8 tensors until the end."""
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image

    decode = functools.partial(decode_image, mode=ImageReadMode.RGB)
    return _load(ImageFolder(str(task.class_folder), _v2_transform(task), loader=decode), task)


def timm_batches(task: Task) -> Iterator[Tensor]:
    """`create_loader` as timm's training script calls it, its augmentation switched off."""
    from timm.data import create_loader
    from torchvision.datasets import ImageFolder

    loader = create_loader(
        ImageFolder(str(task.class_folder)),
        input_size=(3, task.image_size, task.image_size),
        batch_size=task.batch_size,
        is_training=True,
        scale=task.scale,
        ratio=task.ratio,
        hflip=task.flip,
        color_jitter=0.0,
        interpolation="bilinear",
        mean=CLIP_MEAN,
        std=CLIP_STD,
        num_workers=task.threads,
        use_multi_epochs_loader=True,
        device=torch.device("cpu"),
    )
    while True:
        for images, _ in loader:
            yield images


def webdataset_batches(task: Task) -> Iterator[Tensor]:
    """`get_wds_dataset` of open_clip with --dataset-resampled; the text stays what it is."""
    import webdataset

    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(sorted(map(str, task.data.glob("shard-*.tar")))),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(5000, initial=1000),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="json"),
        webdataset.map_dict(image=_pil_transform(task)),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(task.batch_size, partial=False, collation_fn=_stack),
    )
    loader = webdataset.WebLoader(
        pipeline, batch_size=None, shuffle=False, num_workers=task.threads, persistent_workers=True
    )
    return (images for images, _ in loader)


def _pil_transform(task: Task) -> Compose:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(task.image_size, scale=task.scale, ratio=task.ratio),
            transforms.RandomHorizontalFlip(task.flip),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )


def _v2_transform(task: Task) -> v2.Compose:
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(
                task.image_size, scale=task.scale, ratio=task.ratio, antialias=True
            ),
            v2.RandomHorizontalFlip(task.flip),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )


def _stack(samples: list[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
    images, texts = zip(*samples, strict=True)
    return torch.stack(images), list(texts)


def _load(folder: ImageFolder, task: Task) -> Iterator[Tensor]:
    loader = DataLoader(
        folder,
        batch_size=task.batch_size,
        sampler=RandomSampler(folder, num_samples=_ENOUGH),  # one epoch after the other
        num_workers=task.threads,
        drop_last=True,
    )
    return (images for images, _ in loader)


def dali_batches(task: Task) -> Iterator[Tensor]:
    """The graph of DALI's own examples on a webdataset."""
    from nvidia.dali import fn, pipeline_def, types

    shards = sorted(task.data.glob("shard-*.tar"))

    @pipeline_def  # type: ignore[untyped-decorator]
    def graph() -> Any:
        encoded = fn.readers.webdataset(
            paths=[str(shard) for shard in shards],
            index_paths=[str(shard.with_suffix(".idx")) for shard in shards],
            ext=["jpg;png;webp"],
            random_shuffle=True,
        )
        images = fn.decoders.image_random_crop(
            encoded, random_area=list(task.scale), random_aspect_ratio=list(task.ratio)
        )
        images = fn.resize(
            images,
            size=[task.image_size, task.image_size],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=_MEAN.tolist(),
            std=_STD.tolist(),
            mirror=fn.random.coin_flip(probability=task.flip),
        )

    pipeline = graph(batch_size=task.batch_size, num_threads=task.threads, device_id=None, seed=1)
    while True:
        (images,) = pipeline.run()
        yield from_dlpack(images.as_tensor())
        del images


def spdl_batches(task: Task) -> Iterator[Tensor]:
    """SPDL's threads, each having FFmpeg decode, crop, scale and mirror one image at a time."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    paths = sorted(str(path) for path in task.class_folder.glob("*/*"))
    draw = random.Random(1)
    size = task.image_size

    def source() -> Iterator[str]:
        while True:
            yield from draw.sample(paths, len(paths))

    def decode(path: str) -> Any:
        packets = spdl.io.demux_image(path)
        codec = packets.codec
        top, left, height, width = random_crop(draw, codec.height, codec.width, task)
        filters = [
            f"crop={width}:{height}:{left}:{top}:exact=1",
            f"scale={size}:{size}:flags=bilinear",
            *(["hflip"] if draw.random() < task.flip else []),
            "format=pix_fmts=rgb24",
        ]
        return spdl.io.decode_packets(packets, filter_desc=",".join(filters))

    mean, std = torch.from_numpy(_MEAN), torch.from_numpy(_STD)

    def finish(frames: list[Any]) -> Any:
        images = spdl.io.to_torch(spdl.io.convert_frames(frames))
        return ((images - mean) / std).permute(0, 3, 1, 2)

    pipeline = (
        PipelineBuilder()
        .add_source(source())
        .pipe(decode, concurrency=task.threads)
        .aggregate(task.batch_size, drop_last=True)
        .pipe(finish)
        .add_sink(_AHEAD)
        .build(num_threads=task.threads + 1)
    )
    with pipeline.auto_stop():
        yield from pipeline


def pool_batches(task: Task) -> Iterator[Tensor]:
    """Code of an hour: threads, fast libraries, buffers that are used again."""
    import cv2

    cv2.setNumThreads(1)
    shape = (task.batch_size, task.image_size, task.image_size, 3)
    free = collections.deque(np.empty(shape, np.float32) for _ in range(_AHEAD + 2))

    def make(out: NDArray[np.float32], index: int, seed: int) -> None:
        _crop_by_opencv(dataset.image_bytes(index), random.Random(seed), task, out)

    with PackedDataset(task.data) as dataset, ThreadPoolExecutor(task.threads) as pool:
        order = _endless_order(len(dataset))
        in_work: collections.deque[tuple[NDArray[np.float32], list[Future[None]]]]
        in_work = collections.deque()
        while True:
            while len(in_work) <= _AHEAD:
                batch = free.popleft()
                in_work.append((batch, [pool.submit(make, out, *next(order)) for out in batch]))
            batch, futures = in_work.popleft()
            for future in futures:
                future.result()
            yield torch.from_numpy(batch).permute(0, 3, 1, 2)
            free.append(batch)


def _crop_by_opencv(
    encoded: NDArray[np.uint8], draw: random.Random, task: Task, out: NDArray[np.float32]
) -> None:
    """Writes one crop of an image to `out`, float32 [h w 3], normalised."""
    import cv2

    size, image = task.image_size, decode_whole(encoded)
    top, left, height, width = random_crop(draw, image.shape[0], image.shape[1], task)
    crop = image[top : top + height, left : left + width]
    # the area filter is OpenCV's only one with antialias, and only shrinks
    shrinks = height >= size and width >= size
    square = cv2.resize(
        crop, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    if draw.random() < task.flip:
        square = square[:, ::-1]
    np.multiply(square, _PER_LEVEL, out=out)
    out += _SHIFT


def _endless_order(count: int) -> Iterator[tuple[int, int]]:
    """Samples, shuffled anew in each epoch, and a seed for each draw."""
    draw = random.Random(1)
    while True:
        for index in draw.sample(range(count), count):
            yield index, draw.getrandbits(32)


def decode_whole(encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Decodes to RGB with the fastest decoder for Python."""
    import simplejpeg

    if bytes(encoded[:2]) == b"\xff\xd8":
        decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded)
        return decoded
    import cv2

    pixels: Any = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    return np.ascontiguousarray(pixels[:, :, ::-1])


def random_crop(
    draw: random.Random, height: int, width: int, task: Task
) -> tuple[int, int, int, int]:
    """Top, left, height and width with the distribution of torchvision's RandomResizedCrop."""
    low, high = math.log(task.ratio[0]), math.log(task.ratio[1])
    for _ in range(10):
        area = height * width * draw.uniform(*task.scale)
        aspect = math.exp(draw.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, height - h), draw.randint(0, width - w), h, w
    w = min(width, round(height * task.ratio[1]))
    h = min(height, round(width / task.ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _write_ffcv(task: Task, *, mode: str) -> None:
    """Writes the data set in FFCV's format: as JPEGs (mode jpg), or as pixels (raw)."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(task.class_folder))
    image = RGBImageField(write_mode=mode, max_resolution=500, jpeg_quality=90)
    path = str(task.scratch / f"{mode}.beton")
    writer = DatasetWriter(path, {"image": image, "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(folder)


def _ffcv_batches(task: Task, *, mode: str) -> Iterator[Tensor]:
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    size = (task.image_size, task.image_size)
    image: list[Any] = [
        RandomResizedCropRGBImageDecoder(size, scale=task.scale, ratio=task.ratio),
        RandomHorizontalFlip(task.flip),
        NormalizeImage(_MEAN, _STD, np.float32),
        ToTensor(),
        ToTorchImage(convert_back_int16=False),
    ]
    count = sum(1 for _ in task.class_folder.glob("*/*"))
    loader = Loader(
        str(task.scratch / f"{mode}.beton"),
        batch_size=task.batch_size,
        num_workers=task.threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        indices=np.tile(np.arange(count), max(1, _FFCV_EPOCH // count)),
        pipelines={"image": image, "label": None},
    )
    while True:
        for (images,) in loader:
            yield images


write_ffcv_jpg = functools.partial(_write_ffcv, mode="jpg")
write_ffcv_raw = functools.partial(_write_ffcv, mode="raw")
ffcv_jpg_batches = functools.partial(_ffcv_batches, mode="jpg")
ffcv_raw_batches = functools.partial(_ffcv_batches, mode="raw")


def write_tar(task: Task) -> None:
    """All files in one tar."""
    with tarfile.TarFile(task.scratch / "images.tar", "w") as tar:
        for path in sorted(task.class_folder.glob("*/*")):
            tar.add(path, path.name)


def turboloader_batches(task: Task) -> Iterator[Tensor]:
    """Its fused pass: the crop's rows are decoded, resized and normalised by threads of C++."""
    import turboloader

    crops = task.scale != (1.0, 1.0)
    if crops and (task.scale, task.ratio) != ((0.08, 1.0), (3 / 4, 4 / 3)):
        raise ContenderError("TurboLoader has torchvision's own crops and no others")
    loader = turboloader.DataLoader(
        str(task.scratch / "images.tar"),
        batch_size=task.batch_size,
        num_workers=task.threads,
        shuffle=True,
        transform=turboloader.Normalize(list(CLIP_MEAN), list(CLIP_STD)),
        image_size=task.image_size,
        output_format="pytorch",
        antialias=True,
        train_aug=crops,
        hflip_prob=task.flip,
        drop_last=True,
    )
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for images, _ in loader:
            yield images


def write_litdata(task: Task) -> None:
    """Chunks of 64 MB; an image opened from a JPEG file keeps its bytes."""
    import litdata

    litdata.optimize(
        fn=Image.open,
        inputs=sorted(map(str, task.class_folder.glob("*/*"))),
        output_dir=str(task.scratch / "litdata"),
        chunk_bytes="64MB",
        num_workers=1,
    )


def litdata_batches(task: Task) -> Iterator[Tensor]:
    """StreamingDataset, whose images torchvision decodes, and v2 on uint8 tensors."""
    import litdata

    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    folder = str(task.scratch / "litdata")
    dataset = litdata.StreamingDataset(folder, shuffle=True, transform=_v2_transform(task))
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=task.batch_size, num_workers=task.threads, drop_last=True
    )
    while True:
        yield from loader


def write_mds(task: Task) -> None:
    """Shards of MosaicML streaming, of 64 MB as is usual."""
    from streaming import MDSWriter

    with MDSWriter(out=str(task.scratch / "mds"), columns={"image": "jpeg"}) as writer:
        for path in sorted(task.class_folder.glob("*/*")):
            with Image.open(path) as image:
                writer.write({"image": image})


def mosaicml_batches(task: Task) -> Iterator[Tensor]:
    """StreamingDataset, which has Pillow decode, and PIL transforms."""
    from streaming import StreamingDataset

    transform = _pil_transform(task)

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Tensor:
            image: Tensor = transform(super().__getitem__(index)["image"].convert("RGB"))
            return image

    size = task.batch_size
    dataset = Images(local=str(task.scratch / "mds"), shuffle=True, batch_size=size)
    loader: DataLoader[Tensor] = DataLoader(dataset, size, num_workers=task.threads, drop_last=True)
    while True:
        yield from loader


def grain_batches(task: Task) -> Iterator[Tensor]:
    """MapDataset over the files, with OpenCV as in `pool`, in worker processes."""
    import grain

    paths = sorted(map(str, task.class_folder.glob("*/*")))

    def make(path: str, generator: np.random.Generator) -> NDArray[np.float32]:
        out = np.empty((task.image_size, task.image_size, 3), np.float32)
        encoded = np.fromfile(path, np.uint8)
        _crop_by_opencv(encoded, random.Random(int(generator.integers(1 << 32))), task, out)
        return out

    dataset = grain.MapDataset.source(paths).seed(1).shuffle().repeat().random_map(make)
    options = grain.MultiprocessingOptions(num_workers=task.threads)
    batches = dataset.to_iter_dataset().batch(task.batch_size, drop_remainder=True)
    for images in batches.mp_prefetch(options):
        yield torch.from_numpy(images).permute(0, 3, 1, 2)
