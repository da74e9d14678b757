"""Checkpoints when disks and files fail: sound ones are found, and none is harmed."""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from damage import flip_a_byte, limited_files
from small_runs import finish_writing, tiny_config, trainer_of

from unicl_fast.batch import Batch
from unicl_fast.checkpoints.files import (
    list_checkpoints,
    set_later_checkpoints_aside,
    write_checkpoint,
)
from unicl_fast.checkpoints.load import find_sound_checkpoint, read_state
from unicl_fast.system.checksums import file_checksum
from unicl_fast.training.metrics import read_metrics
from unicl_fast.training.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(images: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    trainer_of(images, tiny_config(), folder).fit()
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def full_disk() -> contextlib.AbstractContextManager[None]:
    """No file may grow beyond 10 kB."""
    return limited_files(10_000)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_skipped_and_named(run_folder, name, harm, caplog):
    newest = list_checkpoints(run_folder / "checkpoints")[-1]
    if harm == "flip" and name != "state.json":  # most bytes of a text may be another one
        flip_a_byte(newest / name)
    elif harm == "remove":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes((newest / name).read_bytes()[:-200])
    with caplog.at_level(logging.WARNING):
        found = find_sound_checkpoint(run_folder)
    assert found.name == "step-00000004"
    assert "skipping a checkpoint" in caplog.text
    assert newest.name in caplog.text
    for checkpoint in list_checkpoints(run_folder / "checkpoints")[:-1]:
        flip_a_byte(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="all 3 checkpoints"):  # nothing is started anew
        find_sound_checkpoint(run_folder)


def fit_with(trainer: Trainer, *, before_step: Callable[[int], None]) -> None:
    """Trains, and lets something happen before each step."""
    step_of = trainer.train_step

    def train_step(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        before_step(batch.step)
        return step_of(batch)

    trainer.train_step = train_step
    trainer.fit()


def steps_in(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
@pytest.mark.parametrize("fault", ["full disk", "folder gone", "run gone"])
def test_a_run_outlives_its_disk_and_writes_again_when_it_can(images, tmp_path, caplog, fault):
    """Of steps 2, 4, 6 and 8 the disk fails those of 4 and 6."""
    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints"
    trainer = trainer_of(images, tiny_config(steps=8), folder)
    faults = contextlib.ExitStack()

    def before_step(step: int) -> None:
        if step == 3:
            finish_writing(trainer)
            if fault == "full disk":
                faults.enter_context(full_disk())
            elif fault == "run gone":
                folder.rename(tmp_path / "elsewhere")
            else:
                checkpoints.rename(folder / "elsewhere")
        elif step == 7:
            finish_writing(trainer)
            faults.close()

    with faults:
        fit_with(trainer, before_step=before_step)
    if fault == "full disk":
        assert steps_in(folder) == [2, 8]
        for step in (4, 6):
            assert f"NO CHECKPOINT of step {step}" in caplog.text
        assert not list(checkpoints.glob(".*"))
    else:  # it is made again
        assert steps_in(folder) == [4, 6, 8]
        elsewhere = tmp_path / "elsewhere" / "checkpoints"
        assert (elsewhere if fault == "run gone" else folder / "elsewhere").is_dir()
    for checkpoint in list_checkpoints(checkpoints):
        read_state(checkpoint)
    lines = read_metrics(folder)
    assert [line["step"] for line in lines][-2:] == [7, 8]
    if fault != "run gone":
        assert len(lines) == 8


def test_the_last_checkpoint_must_be_written(images, tmp_path):
    trainer = trainer_of(images, tiny_config(steps=4), tmp_path)

    def before_step(step: int) -> None:
        if step == 3:
            finish_writing(trainer)
            faults.enter_context(full_disk())

    with contextlib.ExitStack() as faults, pytest.raises(OSError, match="00004 cannot be written"):
        fit_with(trainer, before_step=before_step)
    assert steps_in(tmp_path) == [2]
    read_state(list_checkpoints(tmp_path / "checkpoints")[0])


def test_writing_a_step_again_never_leaves_it_without_a_checkpoint(run_folder):
    """A checkpoint that is written over one from before takes its place at the very end."""
    checkpoints = run_folder / "checkpoints"
    before = read_state(checkpoints / "step-00000006")
    tensors = {"model.safetensors": {"weight": torch.ones(100_000)}}
    with full_disk(), pytest.raises(OSError, match="cannot be written"):
        write_checkpoint(checkpoints, step=6, files=tensors, state={"run_id": "a"})
    assert read_state(checkpoints / "step-00000006") == before
    (checkpoints / "step-00000006").rename(checkpoints / ".step-00000006.replaced")  # cut off there
    set_later_checkpoints_aside(checkpoints, step=6)
    assert read_state(checkpoints / "step-00000006") == before
    write_checkpoint(checkpoints, step=6, files=tensors, state={"run_id": "a"})
    names = sorted(path.name for path in (checkpoints / "step-00000006").iterdir())
    assert names == ["model.safetensors", "state.json"]
    assert not list(checkpoints.glob(".*"))


def test_a_checkpoint_is_read_for_its_checksums_once(images, run_folder, monkeypatch):
    checksum = Mock(wraps=file_checksum)
    monkeypatch.setattr("unicl_fast.checkpoints.load.file_checksum", checksum)
    found = find_sound_checkpoint(run_folder)
    trainer = trainer_of(images, tiny_config(), run_folder)
    trainer.resume(found)
    names = sorted(call.args[0].name for call in checksum.call_args_list)
    assert names == ["model.safetensors", "optimizer.safetensors"]
    written = (found / "model.safetensors").stat()
    flip_a_byte(found / "model.safetensors")
    os.utime(found / "model.safetensors", ns=(written.st_atime_ns, written.st_mtime_ns))
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        trainer.resume(found)
