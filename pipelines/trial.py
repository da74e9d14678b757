"""Tries a GPU's decoder in a child process before a loader relies on it.

In a run the decoder is part of the process that trains: if it crashes, the run ends without a
message.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unicl_fast.config import DataConfig
from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset
from unicl_fast.system.gpu_kernels import fault_of_child
from unicl_fast.system.machine import usable_cores

from .graph import Pipeline, build_evaluation_graph, build_train_graph
from .host_batches import HostBatch
from .running import Outputs, Pace, decode

_IMAGES = 64  # images of each data set that are tried
_ROUNDS, _BUSY_SIDE, _PRODUCTS = {"cuda": 20, "cpu": 2}, {"cuda": 4096, "cpu": 1}, 20
"""Times that they are decoded, while products of matrices of this side keep the device busy."""
_LARGEST_GAP, _MEAN_GAP = 2.0, 0.5
"""Mean absolute difference from the CPU's pixels, in levels of 255: of an image, and of all. A GPU
rounds in another way; chroma of the nearest pixel would make 0.65."""

_tried: set[tuple[str, ...]] = set()


def try_decoder(datasets: Sequence[PackedDataset], data: DataConfig, device: torch.device) -> None:
    """Decodes images of data sets as training and evaluation do, once for each device and set.

    Raises ValueError: the process crashed, failed or hung; says how, and names a remedy.
    """
    key = (str(device), *(dataset.location for dataset in datasets))
    if key in _tried:
        return
    settings = {"image_size": data.image_size, "interpolation": data.interpolation}
    images = _first_images(datasets, data)
    fault = fault_of_child(_decode, *images, settings, str(device))
    if not fault:
        _tried.add(key)
        return
    raise ValueError(
        f"data.decode_device=gpu: decoding images of {', '.join(key[1:])} on {device}, "
        f"tried in a process of its own, {fault}; take data.decode_device=cpu, or update DALI, "
        "nvImageCodec and the driver"
    )


def _first_images(
    datasets: Sequence[PackedDataset], data: DataConfig
) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
    """Files of images, and their heights and widths, int64 [b 2]."""
    files, shapes = [], []
    for dataset in datasets:
        # as for `mean_image_bytes`
        for index, row in enumerate(dataset.samples[:_IMAGES]):
            try:
                files.append(dataset.image_bytes(index, verify=True, max_pixels=data.max_pixels))
            except DamagedSampleError:
                continue  # the loader will replace it
            shapes.append([row["height"], row["width"]])
    return files, np.array(shapes, dtype=np.int64)


def _decode(
    files: list[NDArray[np.uint8]],
    shapes: NDArray[np.int64],
    settings: dict[str, Any],
    device_name: str,
) -> None:
    """Raises ArithmeticError if a device that also computes decodes other pixels than the CPU."""
    device, cpu = torch.device(device_name), torch.device("cpu")
    data = DataConfig(**settings, evaluation_resize=settings["image_size"], resample="dali")
    windows = (shapes // 4).astype(np.int32), np.maximum(shapes // 2, 1).astype(np.int32)
    whole = np.zeros(shapes.shape, np.float32), shapes.astype(np.float32)
    graphs: list[tuple[Callable[..., Pipeline], tuple[Any, ...]]] = [
        (build_train_graph, (files, *windows, np.zeros((len(files), 1), np.int32))),
        (build_evaluation_graph, (files, *whole)),
    ]
    work = torch.zeros(2 * [_BUSY_SIDE[device.type]], device=device)
    for build, inputs in graphs:

        def decoded_on(
            place: torch.device, rounds: int, build: Any = build, inputs: Any = inputs
        ) -> Outputs[int]:
            """Batches whose order is turned by their number: one that is stale is wrong."""
            turned = (
                HostBatch(inputs=tuple([*one[n:], *one[:n]] for one in inputs), metadata=n)
                for n in (number % len(files) for number in range(rounds))
            )
            graph = functools.partial(build, data=data, device=place)
            pace = Pace(threads=(usable_cores(),), ahead=2)
            return decode(graph, turned, batch_size=len(files), device=place, pace=pace)

        ((exact, _),) = decoded_on(cpu, 1)
        exact = exact.to(device)
        gaps = torch.zeros(len(files), device=device)
        for images, turn in decoded_on(device, _ROUNDS[device.type]):
            for _ in range(_PRODUCTS):  # as in training, the host and the decoder run ahead
                work = work @ work
            gap = (images.float() - exact.roll(-turn, 0)).abs().mean((1, 2, 3))
            gaps = torch.maximum(gaps, gap.roll(turn, 0))
        if not (gaps.max() < _LARGEST_GAP and gaps.mean() < _MEAN_GAP):
            raise ArithmeticError(
                f"its pixels differ from the CPU's, by up to {gaps.max():.1f} levels an image"
            )
