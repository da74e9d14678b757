"""A running graph: order, ends, errors, and how long its tensors live."""

from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from unicl_fast.config import DataConfig
from unicl_fast.pipelines.graph import build_train_graph
from unicl_fast.pipelines.host_batches import HostBatch
from unicl_fast.pipelines.running import DecodingError, Pace, decode

pytestmark = pytest.mark.dali

CPU = torch.device("cpu")
SIZE = 24


@pytest.fixture(scope="module")
def encoded(shared_data: Path) -> list[np.ndarray]:
    files = sorted((shared_data / "captions" / "flickr8k" / "images").iterdir())[:40]
    return [np.frombuffer(file.read_bytes(), dtype=np.uint8) for file in files]


def host_batches(
    encoded: list[np.ndarray], count: int, *, damaged: int = -1, failing: int = -1
) -> Generator[HostBatch[int], None, None]:
    """Batches of four images; number `damaged` holds a web page, at `failing` reading fails."""
    for number in range(count):
        images = [encoded[(4 * number + i) % len(encoded)] for i in range(4)]
        if number == damaged:
            images[2] = np.frombuffer(b"<html>not found</html>", dtype=np.uint8)
        if number == failing:
            raise RuntimeError("the disk is gone")
        inputs = (
            images,
            np.zeros((4, 2), dtype=np.int32),
            np.full((4, 2), 60, dtype=np.int32),
            np.zeros((4, 1), dtype=np.int32),
        )
        yield HostBatch(inputs=inputs, metadata=number)


def run(
    batches: Generator[HostBatch[int], None, None], *, prefetch: int = 2, graphs: int = 2
) -> Iterator[tuple[torch.Tensor, int]]:
    data = DataConfig(image_size=SIZE, evaluation_resize=SIZE)
    build = partial(build_train_graph, data=data, device=CPU)
    pace = Pace(threads=(2,) * graphs, ahead=prefetch)
    return decode(build, batches, batch_size=4, device=CPU, pace=pace)


@pytest.mark.parametrize(
    ("count", "prefetch", "graphs"), [(0, 3, 3), (1, 1, 2), (1, 3, 3), (7, 4, 1), (7, 3, 3)]
)
def test_every_batch_comes_once_and_beside_its_metadata(encoded, count, prefetch, graphs):
    seen = []
    running = run(host_batches(encoded, count), prefetch=prefetch, graphs=graphs)
    for images, number in running:
        assert tuple(images.shape) == (4, SIZE, SIZE, 3)
        seen.append(number)
    assert seen == list(range(count))


def test_tensors_stay_what_they_were_as_long_as_they_are_held(encoded):
    """No copy is made, so this is DALI's promise to keep, even behind the end of the graph."""
    held, copies = [], []
    for images, _ in run(host_batches(encoded, 10)):
        held.append(images)
        copies.append(images.clone())
    assert len({images.data_ptr() for images in held}) == 10
    for images, copy in zip(held, copies, strict=True):
        assert torch.equal(images, copy)


def test_buffers_are_reused_when_nobody_holds_them(encoded):
    addresses = set()
    for images, _ in run(host_batches(encoded, 40)):
        addresses.add(images.data_ptr())
        del images
    assert len(addresses) < 40  # one a batch if none were reused; the allocator decides how many


@pytest.mark.parametrize(
    ("prefetch", "graphs", "in_flight"),
    [(1, 1, (5,)), (3, 1, (5, 6, 7)), (2, 3, (5, 6, 7, 8)), (2, 2, (0, 2)), (2, 2, (8,))],
)
def test_a_batch_that_cannot_be_decoded_is_told_and_those_before_it_arrive(
    encoded, prefetch, graphs, in_flight
):
    damaged = in_flight[0]
    running = run(host_batches(encoded, 9, damaged=damaged), prefetch=prefetch, graphs=graphs)
    assert [next(running)[1] for _ in range(damaged)] == list(range(damaged))
    with pytest.raises(DecodingError, match="image_slice") as caught:
        next(running)
    assert caught.value.in_flight == in_flight


def test_an_error_while_preparing_a_batch_arrives_as_it_is(encoded):
    with pytest.raises(RuntimeError, match="the disk is gone") as caught:
        list(run(host_batches(encoded, 9, failing=5)))
    assert not isinstance(caught.value, DecodingError)
