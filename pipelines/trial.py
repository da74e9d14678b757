"""Tries a GPU's decoder in a separate process before a loader relies on it.

In a run it is part of the process that trains: if it crashes, the run ends without a message.

    python -m unicl_fast.pipelines.trial < INPUT    (`_describe` makes it)
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from unicl_fast.config import DataConfig
from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset
from unicl_fast.system.gpu_kernels import fault_of

from .graph import Pipeline, build_evaluation_graph, build_train_graph
from .host_batches import HostBatch
from .running import decode

_COMMAND = (sys.executable, "-m", __name__)
_IMAGES = 64
"""Images of each data set that are tried."""

_tried: set[tuple[str, ...]] = set()


def try_decoder(datasets: Sequence[PackedDataset], data: DataConfig, device: torch.device) -> None:
    """Decodes images of data sets as training and evaluation do, once for each device and set.

    Raises:
        ValueError: the process crashed, failed or hung; says how, and what to do.
    """
    key = (str(device), *(dataset.location for dataset in datasets))
    if key in _tried:
        return
    fault = fault_of(_COMMAND, _describe(datasets, data, device))
    if not fault:
        _tried.add(key)
        return
    raise ValueError(
        f"data.decode_device=gpu: decoding images of {', '.join(key[1:])} on {device}, "
        f"tried in a process of its own, {fault}; take data.decode_device=cpu, or update DALI, "
        "nvImageCodec and the driver"
    )


def _describe(datasets: Sequence[PackedDataset], data: DataConfig, device: torch.device) -> bytes:
    """A line of JSON (settings; height, width and bytes of each image), then the files."""
    files, sizes = [], []
    for dataset in datasets:
        # packing has shuffled the samples, so the first ones are representative
        for index, row in enumerate(dataset.samples[:_IMAGES]):
            try:
                file = dataset.image_bytes(index, verify=True, max_pixels=data.max_pixels)
            except DamagedSampleError:
                continue  # the loader will replace it
            files.append(file.tobytes())
            sizes.append([int(row["height"]), int(row["width"]), len(files[-1])])
    settings = {"image_size": data.image_size, "interpolation": data.interpolation}
    head = {"device": str(device), "data": settings, "images": sizes}
    return b"".join([json.dumps(head).encode(), b"\n", *files])


def _decode(head: dict[str, Any], content: bytes) -> None:
    images = np.array(head["images"], dtype=np.int64)
    ends = np.cumsum(images[:, 2]).tolist()
    files = np.split(np.frombuffer(content, np.uint8), ends[:-1])
    shapes, device = images[:, :2], torch.device(head["device"])
    data = DataConfig(**head["data"], evaluation_resize=head["data"]["image_size"])
    windows = (shapes // 4).astype(np.int32), np.maximum(shapes // 2, 1).astype(np.int32)
    whole = np.zeros(shapes.shape, np.float32), shapes.astype(np.float32)
    graphs: list[tuple[Callable[..., Pipeline], tuple[Any, ...]]] = [
        (build_train_graph, (files, *windows, np.zeros((len(files), 1), np.int32))),
        (build_evaluation_graph, (files, *whole)),
    ]
    for build, inputs in graphs:
        batches = (HostBatch(inputs=each, metadata=None) for each in [inputs])
        graph = functools.partial(build, data=data, device=device)
        for decoded, _ in decode(graph, batches, batch_size=len(files), device=device):
            decoded.cpu()


if __name__ == "__main__":
    _decode(json.loads(sys.stdin.buffer.readline()), sys.stdin.buffer.read())
