"""Peers of `unicl-bench input` that stand on torch's DataLoader: torchvision, timm, webdataset.

Each is set up as its own documentation does it, with the same crops, the bilinear filter and no
other augmentation, and yields normalised float32 [b c h w]. Stops between epochs would weigh more
on small data than on the real thing, so the data set is repeated until nobody can reach its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from unicl_fast.config import CLIP_MEAN, CLIP_STD

from .contenders import Task

_ENOUGH = 2_000_000
"""Images that no run gets through; the sampler keeps a permutation of so many numbers."""


class _Repeated(Dataset[Any]):
    """An ImageFolder again and again."""

    def __init__(self, folder: ImageFolder) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return max(1, _ENOUGH // len(self._folder)) * len(self._folder)

    def __getitem__(self, index: int) -> Any:
        return self._folder[index % len(self._folder)]

    @property
    def transform(self) -> Any:
        return self._folder.transform

    @transform.setter
    def transform(self, transform: Any) -> None:  # timm's create_loader sets it from outside
        self._folder.transform = transform


def torchvision_batches(task: Task) -> Iterator[Tensor]:
    """What most people write."""
    return _images(_data_loader(ImageFolder(str(task.class_folder), _pil_transform(task)), task))


def torchvision_v2_batches(task: Task) -> Iterator[Tensor]:
    """What torchvision's documentation recommends today: uint8 tensors until the end."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(
                task.image_size, scale=task.scale, ratio=task.ratio, antialias=True
            ),
            v2.RandomHorizontalFlip(task.flip),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    folder = ImageFolder(str(task.class_folder), transform, loader=_decode)
    return _images(_data_loader(folder, task))


def timm_batches(task: Task) -> Iterator[Tensor]:
    """`create_loader` as timm's training script calls it, its augmentation switched off."""
    from timm.data import create_loader

    loader = create_loader(
        _Repeated(ImageFolder(str(task.class_folder))),
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
        device=torch.device("cpu"),
    )
    return _images(loader)


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
        pipeline,
        batch_size=None,
        shuffle=False,
        num_workers=task.threads,
        persistent_workers=True,
    )
    return _images(loader)


def _pil_transform(task: Task) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(task.image_size, scale=task.scale, ratio=task.ratio),
            transforms.RandomHorizontalFlip(task.flip),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )


def _decode(path: str) -> Tensor:
    return decode_image(path, mode=ImageReadMode.RGB)


def _stack(samples: list[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
    images, texts = zip(*samples, strict=True)
    return torch.stack(images), list(texts)


def _data_loader(folder: ImageFolder, task: Task) -> DataLoader[Any]:
    return DataLoader(
        _Repeated(folder),
        batch_size=task.batch_size,
        shuffle=True,
        num_workers=task.threads,
        drop_last=True,
    )


def _images(loader: Any) -> Iterator[Tensor]:
    for images, _ in loader:
        yield images
