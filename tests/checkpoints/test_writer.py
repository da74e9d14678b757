"""Checkpoints are written while training continues: when tensors are copied, and who waits."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import finish_writing, tiny_config, trainer_of

from unicl_fast.checkpoints import writer as checkpoint_writer
from unicl_fast.checkpoints.files import list_checkpoints, write_checkpoint
from unicl_fast.checkpoints.writer import HostCopies
from unicl_fast.distributed.signals import Interrupted


class SlowDisk:
    """Writes checkpoints when it is told to."""

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.asked = threading.Event()
        self.steps: list[int] = []
        self.at_once = self.most_at_once = 0

    def write_when_awaited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Writes as soon as somebody waits for the thread that writes."""
        join = threading.Thread.join

        def join_and_write(thread: threading.Thread, timeout: float | None = None) -> None:
            if thread.name == "checkpoint":
                self.may_write.set()
            join(thread, timeout)

        monkeypatch.setattr(threading.Thread, "join", join_and_write)

    def write(self, folder: Path, *, step: int, **rest: object) -> Path:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.asked.set()
        assert self.may_write.wait(60)
        self.steps.append(step)
        self.at_once -= 1
        return write_checkpoint(folder, step=step, **rest)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk()
    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", disk.write)
    yield disk
    disk.may_write.set()


def test_training_continues_while_it_is_written_and_what_is_written_is_from_before(
    images, tmp_path, disk
):
    trainer = trainer_of(images, folder=tmp_path)
    batches = trainer.loader.batches(0)
    trainer.train_step(next(batches))
    weights = trainer.model.image_projection.detach().clone()
    average = trainer.optimizer.state[trainer.model.image_projection]["exp_avg"].clone()
    trainer.save(required=False)
    assert disk.asked.wait(60)
    for _ in range(2):
        trainer.train_step(next(batches))
    assert not list_checkpoints(tmp_path / "checkpoints")
    disk.may_write.set()
    finish_writing(trainer)
    (written,) = list_checkpoints(tmp_path / "checkpoints")
    assert written.name == "step-00000001"
    assert torch.equal(load_file(written / "model.safetensors")["image_projection"], weights)
    stored = load_file(written / "optimizer.safetensors")
    assert torch.equal(stored["exp_avg.image_projection"], average)
    assert stored["step.image_projection"] == 1


@pytest.mark.slow
def test_one_that_is_due_meanwhile_waits_and_none_is_left_out(images, tmp_path, disk, monkeypatch):
    disk.write_when_awaited(monkeypatch)
    trainer_of(images, tiny_config(steps=8), tmp_path).fit()
    assert disk.steps == [2, 4, 6, 8]
    assert disk.most_at_once == 1
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 4


def test_an_interruption_waits_for_its_own(images, tmp_path, disk, monkeypatch):
    trainer = trainer_of(images, folder=tmp_path)
    monkeypatch.setattr("unicl_fast.distributed.signals.Interruption.has_come", lambda *_: True)
    threading.Thread(target=lambda: disk.asked.wait(60) and disk.may_write.set()).start()
    with pytest.raises(Interrupted):
        trainer.fit()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]


class FaultError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "written"), [(FaultError, ["step-00000002"]), (KeyboardInterrupt, [])]
)
def test_a_good_write_is_finished_when_training_fails_unless_one_asks_twice_to_stop(
    images, tmp_path, disk, monkeypatch, error, written
):
    disk.write_when_awaited(monkeypatch)
    trainer = trainer_of(images, folder=tmp_path)
    step_of = trainer.train_step

    def train_step(batch):
        if batch.step == 2:
            raise error
        return step_of(batch)

    trainer.train_step = train_step
    with pytest.raises(error):
        trainer.fit()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == written
    disk.may_write.set()
    finish_writing(trainer)


def test_a_fault_of_the_program_is_not_taken_for_one_of_the_disk(images, tmp_path, monkeypatch):
    def write(*_: object, **__: object) -> None:
        raise FaultError("wrong")

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", write)
    with pytest.raises(RuntimeError, match="writing a checkpoint failed: FaultError"):
        trainer_of(images, folder=tmp_path).fit()


def test_copies_are_in_logical_order_and_their_memory_is_used_again():
    files = {
        "one": {
            "flags": torch.tensor([True, False, True]),
            "wide": torch.randn(3, 2, dtype=torch.float64),
            "scalar": torch.tensor(2.5),
            "none": torch.zeros(0, 4),
            "narrow": torch.randn(5).bfloat16(),
        },
        "two": {
            "kernel": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
            "scalar": torch.tensor(7),
        },
    }
    copies = HostCopies()
    first = copies.take(files)
    where = first["two"]["kernel"].data_ptr()
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            assert torch.equal(first[file][name], tensor), name
            assert first[file][name].is_contiguous()
    files["two"]["kernel"] += 1
    second = copies.take(files)
    assert second["two"]["kernel"].data_ptr() == where
    assert torch.equal(second["two"]["kernel"], files["two"]["kernel"])
    files["two"]["more"] = torch.ones(2)
    assert copies.take(files)["two"]["more"].tolist() == [1, 1]


@pytest.mark.gpu
def test_copies_from_a_device_are_ordered_before_the_next_update():
    weights = torch.ones(1 << 24, device="cuda")
    copies = HostCopies()
    for value in range(1, 4):
        weights.fill_(value)
        taken = copies.take({"a": {"weights": weights}})
        weights.fill_(-1)  # the next update, which must come behind the copy
        copies.wait()
        assert taken["a"]["weights"].is_pinned()
        assert (taken["a"]["weights"] == value).all()
