"""Batches on their way to a GPU: nothing is read before it is there, and the host never waits."""

import dataclasses
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from fake_copies import CUDA, FakeGpu

from unicl_fast.batch import Batch, EvaluationBatch, ReadingTime, Targets, Texts, copied_ahead


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


def make_batch(step: int) -> Batch:
    numbers = 100 * step + torch.arange(4)
    return Batch(
        step=step,
        images=torch.full((4, 2, 2, 3), step, dtype=torch.uint8),
        texts=Texts(
            tokens=numbers[:3, None] + torch.arange(5),
            lengths=np.full(3, 5),
            index=numbers,
            counts=numbers[:3] + 3,
        ),
        targets=Targets(
            class_ids=numbers + 1,
            text_class_ids=numbers[:3] + 2,
            image_classes=torch.stack([numbers, numbers + 6]),
        ),
        global_index=numbers + 4,
        sample_ids=numbers + 5,
    )


def assert_equal(one: Any, other: Any) -> None:
    for field in dataclasses.fields(one):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(ours):
            assert_equal(ours, theirs)
        else:
            assert np.array_equal(ours, theirs), field.name


def test_reading_counts_waiting_in_any_thread_and_no_work(monkeypatch):
    reading = ReadingTime()

    def wait() -> None:
        with reading.measuring():
            time.sleep(0.05)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(wait) for _ in range(2)]:
            future.result()
    assert reading.blocked_seconds >= 0.1
    monkeypatch.setattr(time, "perf_counter", iter([10.0, 13.0]).__next__)
    monkeypatch.setattr(time, "thread_time", iter([1.0, 3.0]).__next__)
    before = reading.blocked_seconds
    with reading.measuring():
        pass
    assert reading.blocked_seconds - before == pytest.approx(1.0)


def test_on_the_cpu_nothing_is_copied():
    batch = make_batch(1)
    moved = batch.to(torch.device("cpu"))
    assert all(moved.model_inputs()[name] is value for name, value in batch.model_inputs().items())


def test_a_batch_is_copied_during_the_step_before_it(gpu):
    """The fake GPU refuses what is not pinned and not `non_blocking`."""
    asked_for: list[int] = []

    def batches() -> Generator[Batch, None, None]:
        for step in range(4):
            asked_for.append(step)
            yield make_batch(step)

    steps = []
    for batch in copied_ahead(batches(), CUDA):
        assert_equal(batch, make_batch(batch.step))
        # its memory may be filled anew only after this stream's kernels
        used_by = [gpu.used_by[value.data_ptr()] for value in batch.model_inputs().values()]
        assert used_by == [gpu.compute] * 8
        steps.append(batch.step)
        if batch.step < 3:
            gpu.wait_for_events(batch.step + 2)  # the next one is on its way
        assert asked_for == list(range(min(4, batch.step + 2)))  # and no other
    assert steps == [0, 1, 2, 3]


def test_evaluation_s_batches_take_the_same_way(gpu):
    made = [
        EvaluationBatch(images=torch.full((2, 2, 2, 3), step), sample_ids=torch.arange(2) + step)
        for step in range(3)
    ]
    for number, batch in enumerate(copied_ahead((each for each in made), CUDA)):
        assert torch.equal(batch.images, made[number].images)
        assert batch.sample_ids is made[number].sample_ids


def test_copies_are_made_on_their_device_by_one_stream(gpu):
    """A thread that sets none would begin a context on GPU 0, on each of a machine's ranks."""
    second = torch.device("cuda", 1)
    for _ in range(3):  # as often as an evaluation iterates
        assert len(list(copied_ahead((make_batch(step) for step in range(2)), second))) == 2
    assert gpu.devices == {"unicl-copy": second}
    assert [stream.device for stream in gpu.streams] == [second]


def test_the_end_and_errors_of_the_source_come_through(gpu):
    closed = []

    def batches(last: int) -> Generator[Batch, None, None]:
        try:
            yield from map(make_batch, range(last))
            raise RuntimeError("storage is gone")
        finally:
            closed.append(last)

    ahead = copied_ahead(batches(2), CUDA)
    assert [next(ahead).step, next(ahead).step] == [0, 1]
    with pytest.raises(RuntimeError, match="storage is gone"):
        next(ahead)
    assert closed == [2]
    source = batches(50)  # held here, nothing else closes it
    ahead = copied_ahead(source, CUDA)
    assert next(ahead).step == 0
    ahead.close()
    assert closed == [2, 50]


@pytest.mark.gpu
def test_a_gpu_gets_the_very_batches_and_the_host_does_not_wait():
    def batches() -> Generator[Batch, None, None]:
        yield from map(make_batch, range(20))

    for batch in copied_ahead(batches(), CUDA):
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(10_000_000)  # a step
            doubled = 2 * batch.images
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert batch.images.is_cuda
        assert torch.equal(doubled.cpu(), 2 * make_batch(batch.step).images)
        assert torch.equal(batch.texts.tokens.cpu(), make_batch(batch.step).texts.tokens)
