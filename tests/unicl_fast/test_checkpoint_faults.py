"""Checkpoints when disks and files fail: what is sound is found, what is there is not harmed."""

from __future__ import annotations

import contextlib
import logging
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rank_workers import StepwiseLoader
from small_runs import tiny_config

from unicl_fast.checkpoint import find_sound_checkpoint, list_checkpoints, read_state
from unicl_fast.trainer import Trainer


@pytest.fixture(scope="module")
def trained(images: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    Trainer(tiny_config(), StepwiseLoader(images), run_folder=folder, progress=False).fit()
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 10 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    run_folder: Path, name: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = list_checkpoints(run_folder / "checkpoints")[-1]
    if harm == "flip" and name != "state.json":  # most bytes of a text may be another one
        flip_a_byte(newest / name)
    elif harm == "remove":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes((newest / name).read_bytes()[:-200])
    with caplog.at_level(logging.WARNING):
        found = find_sound_checkpoint(run_folder)
    assert found is not None
    assert found.name == "step-00000004"
    assert "passing over" in caplog.text
    assert newest.name in caplog.text


def test_where_all_are_damaged_nothing_is_started_anew(run_folder: Path) -> None:
    for checkpoint in list_checkpoints(run_folder / "checkpoints"):
        flip_a_byte(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="all 3 checkpoints"):
        find_sound_checkpoint(run_folder)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert find_sound_checkpoint(tmp_path) is None


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(
    images: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(tiny_config(), StepwiseLoader(images), run_folder=tmp_path, progress=False)
    trainer.save()
    (first,) = list_checkpoints(tmp_path / "checkpoints")
    trainer.train_step(next(trainer.loader.batches(0)))
    with full_disk():
        trainer.save(must=False)
        with pytest.raises(OSError, match="cannot be written"):
            trainer.save()
    assert "NO CHECKPOINT of step 1" in caplog.text
    assert list((tmp_path / "checkpoints").iterdir()) == [first]
    assert read_state(first).step == 0
    trainer.save()
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2


def test_a_folder_that_is_gone_is_made_again(images: torch.Tensor, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(), StepwiseLoader(images), run_folder=tmp_path, progress=False)
    trainer.save()
    shutil.rmtree(tmp_path / "checkpoints")
    trainer.save()
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 1
