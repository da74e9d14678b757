"""Which images of a batch the decoder refuses: DALI says that a batch failed, seldom at which.

Every sample is decoded alone, by the same graph with room for one. That is slow (about the time of
the batch on one thread, and a new graph behind each image that fails) and happens only when a
batch has failed. What becomes of the culprits is the loaders' business.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..graph.graph import Pipeline, Source
from .feed import DecodingError, HostBatch, run_graphs

_SOUND_SIDE = 16


def find_undecodable(
    build: Callable[[Source], Pipeline], inputs: tuple[Any, ...], *, device: torch.device
) -> dict[int, str]:
    """Place in the batch -> what the decoder said, of each sample that fails alone; often one.

    Args:
        build: makes the graph that failed, for batches of one.
        inputs: of the batch, as the graph takes them: encoded images, two corners or a corner
            and a size of what is cut out, and others with a row a sample.
        device: where the graph's outputs lie.

    Raises:
        DecodingError: the decoder fails at a sound image too, so that the images are not to
            blame (a device that is lost, or out of memory).
    """
    reasons: dict[int, str] = {}
    start, size = 0, len(inputs[0])
    while start < size:
        try:
            for _ in run_graphs([build], _one_by_one(inputs, start), device=device, ahead=1):
                pass
            break
        except DecodingError as error:
            (culprit,) = error.in_flight
            reasons[culprit] = reason_of(error)
            start = culprit + 1
    if reasons:
        for _ in run_graphs([build], iter([_sound(inputs)]), device=device, ahead=1):
            pass
    return reasons


def reason_of(error: DecodingError) -> str:
    """The heart of DALI's message in one line: it wraps it in tracebacks of the graph."""
    text = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
    text = text.partition("C++ context:")[0]
    return " ".join((text.strip() or str(error)).split()) or type(error).__name__


def _one_by_one(inputs: tuple[Any, ...], start: int) -> Iterator[HostBatch[int]]:
    for i in range(start, len(inputs[0])):
        yield HostBatch(inputs=tuple(column[i : i + 1] for column in inputs), facts=i)


def _sound(inputs: tuple[Any, ...]) -> HostBatch[int]:
    """A batch of one image that any decoder takes, whole."""
    encoded, start, end_or_shape, *others = (column[:1] for column in inputs)
    del encoded
    whole = np.zeros_like(start), np.full_like(end_or_shape, _SOUND_SIDE)
    return HostBatch(inputs=([_sound_image()], *whole, *others), facts=0)


@functools.cache
def _sound_image() -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.new("RGB", (_SOUND_SIDE, _SOUND_SIDE), (120, 130, 140)).save(file, format="JPEG")
    return np.frombuffer(file.getvalue(), dtype=np.uint8)
