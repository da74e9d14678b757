"""Compares open_clip's own preprocessing with our evaluations', by a model's image features."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unicl_fast.conversion.preprocessing import for_open_clip
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.features import encode_images
from unicl_fast.evaluation.inference import Model
from unicl_fast.models.unicl import UniCL
from unicl_fast.training.data import folder_and_weight

_IMAGES = 16
_SIZES = ((320, 240), (240, 320), (280, 280), (400, 225))


def least_cosine(model: UniCL) -> tuple[float, str]:
    """The least cosine between an image's features as unicl-eval and as open_clip prepare it.

    Also returns a phrase for the images: some of the run's data if they are here.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    data = model.config.data
    settings = PreprocessCfg(size=data.image_size, **for_open_clip(data))
    prepare = image_transform_v2(settings, is_train=False)
    of_run = [folder_and_weight(spec)[0] for spec in data.train]
    images = [image for spec in of_run[:1] for image in _stored(spec)]
    what = f"{len(images)} of the run's images" if images else f"{_IMAGES} drawn images"
    images = images or list(_drawn())
    ours = torch.from_numpy(np.stack([Model(model).prepare(image) for image in images]))
    with torch.no_grad():
        theirs = model.encode_image(torch.stack([prepare(image) for image in images]))
    return (encode_images(model, ours) * theirs).sum(dim=1).min().item(), what


def _stored(spec: str) -> Iterator[Image.Image]:
    """Images spread over a packed data set on this machine; none if it is elsewhere or damaged."""
    with contextlib.suppress(OSError, ValueError), PackedDataset(Path(spec), verify=False) as data:
        for index in range(0, len(data), -(-len(data) // _IMAGES)):
            file = io.BytesIO(data.image_bytes(index, verify=True).data)
            yield Image.open(file).convert("RGB")


def _drawn() -> Iterator[Image.Image]:
    """Smooth images of several shapes."""
    random = np.random.default_rng(0)
    for number in range(_IMAGES):
        levels = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        size = _SIZES[number % len(_SIZES)]
        yield Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)
