"""The best checkpoint stays at any cadence, however many follow, and after resuming."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import tiny_config, trainer_of

import unicl_fast.checkpoints.files as checkpoint_files
from unicl_fast.checkpoints.files import (
    Best,
    checkpoint_name,
    list_checkpoints,
    read_best,
    write_best,
    write_checkpoint,
)
from unicl_fast.checkpoints.load import DamagedCheckpointError, find_checkpoint, read_state
from unicl_fast.conversion.initial import load_encoders
from unicl_fast.training.metrics import choose_best_metric
from unicl_fast.training.trainer import Trainer


def trainer_in(
    folder: Path,
    images: torch.Tensor,
    values: dict[int, float],
    *,
    save_every: int = 1,
    keep: int = 1,
    best: str = "",
    steps: int = 6,
) -> Trainer:
    """A run whose evaluation gives the value of the step."""
    checkpoint = {"every_steps": save_every, "keep": keep, "best": best}
    config = tiny_config(steps=steps).changed(
        checkpoint=checkpoint, run={"evaluate_every_steps": 1}
    )
    trainer = trainer_of(images, config, folder)
    trainer.evaluations = {
        "zero_shot/digits": lambda model: {"top1": values[trainer.step], "top5": -trainer.step}
    }
    return trainer


def kept(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints")]


RISING_AND_FALLING = {1: 0.2, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.3, 6: 0.1}


def test_it_stays_beside_the_newest_and_the_one_before_it_goes(images, tmp_path):
    trainer_in(tmp_path, images, RISING_AND_FALLING).fit()
    assert kept(tmp_path) == [2, 6]
    assert read_best(tmp_path / "checkpoints") == Best(2, "zero_shot/digits/top1", 0.5)
    assert find_checkpoint(tmp_path).name == "step-00000006"
    assert (tmp_path / "best").readlink() == Path("checkpoints", "step-00000002")
    for path in (tmp_path / "best", tmp_path / "checkpoints" / "best"):
        assert find_checkpoint(path).name == "step-00000002"
    best, newest = (load_encoders(path).image_projection for path in (tmp_path / "best", tmp_path))
    assert not torch.equal(best, newest)


def test_the_link_to_the_best_follows_the_file_and_is_not_needed(tmp_path, caplog):
    folder, link = tmp_path / "checkpoints", tmp_path / "best"
    for step in (1, 2):
        (folder / checkpoint_name(step)).mkdir(parents=True)
        (folder / checkpoint_name(step) / "state.json").touch()
        write_best(folder, Best(step, "top1", 0.5))
        assert link.readlink() == Path("checkpoints", checkpoint_name(step))
    link.unlink()
    link.symlink_to(Path("checkpoints", checkpoint_name(1)))  # killed before it was replaced
    assert find_checkpoint(link) == folder / checkpoint_name(2)
    write_best(folder, None)
    assert not link.is_symlink()
    link.mkdir()  # as in a copy that followed links
    write_best(folder, Best(1, "top1", 0.5))
    assert f"{link} is no link" in caplog.text
    assert find_checkpoint(link) == folder / checkpoint_name(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoints"]


NUMBERS_THAT_ARE_NONE = RISING_AND_FALLING | {1: float("nan"), 3: float("inf"), 5: float("nan")}


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        (RISING_AND_FALLING, {"best": "zero_shot/digits/top5"}, [1, 6]),
        (RISING_AND_FALLING, {"best": "none"}, [6]),
        (RISING_AND_FALLING, {"save_every": 0}, [2, 6]),  # though none was due in step 2
        (NUMBERS_THAT_ARE_NONE, {}, [2, 6]),
    ],
    ids=["another number", "none", "not due", "not finite"],
)
def test_the_best_is_that_of_the_number_that_is_named(images, tmp_path, values, settings, expected):
    trainer_in(tmp_path, images, values, **settings).fit()
    assert kept(tmp_path) == expected
    if len(expected) == 1:
        with pytest.raises(FileNotFoundError, match="has no best checkpoint"):
            find_checkpoint(tmp_path / "best")


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["nothing", "best.json", "metrics.jsonl"])
def test_a_resumed_run_remembers_it(images, tmp_path, lost):
    trainer_in(tmp_path, images, RISING_AND_FALLING, steps=4, keep=2).fit()
    assert kept(tmp_path) == [2, 3, 4]
    if lost == "best.json":  # killed before it was written
        (tmp_path / "checkpoints" / lost).unlink()
    elif lost == "metrics.jsonl":
        lines = (tmp_path / lost).read_text().splitlines()
        (tmp_path / lost).write_text("".join(f"{line}\n" for line in lines if '"step": 4' in line))
    resumed = trainer_in(tmp_path, images, RISING_AND_FALLING)
    resumed.resume(find_checkpoint(tmp_path))
    resumed.fit()
    assert kept(tmp_path) == [2, 6]


@pytest.mark.slow
def test_who_goes_back_before_it_looks_for_another(images, tmp_path):
    trainer_in(tmp_path, images, RISING_AND_FALLING, keep=0).fit()
    again = trainer_in(tmp_path, images, dict.fromkeys(range(7), 0.0), keep=2)
    again.resume(tmp_path / "checkpoints" / "step-00000001")
    again.fit()
    assert kept(tmp_path) == [1, 5, 6]
    assert read_best(tmp_path / "checkpoints") == Best(1, "zero_shot/digits/top1", 0.2)


def test_one_that_could_not_be_written_is_not_the_best(images, tmp_path, caplog, monkeypatch):
    def write_but_step_2(folder: Path, *, step: int, **rest: Any) -> Path:
        if step == 2:
            raise OSError("no space left")
        return write_checkpoint(folder, step=step, **rest)

    monkeypatch.setattr("unicl_fast.checkpoints.writer.write_checkpoint", write_but_step_2)
    trainer_in(tmp_path, images, RISING_AND_FALLING | {4: 0.45}).fit()
    assert kept(tmp_path) == [4, 6]
    assert "NO CHECKPOINT of step 2: no space left; training continues" in caplog.text
    assert "step 2 is the best so far, but its checkpoint is not kept" in caplog.text


def test_a_best_that_is_gone_or_damaged_is_said(images, tmp_path):
    trainer_in(tmp_path, images, RISING_AND_FALLING).fit()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    with pytest.raises(FileNotFoundError, match="step-00000002 as its best, which is not there"):
        load_encoders(tmp_path / "best")
    (tmp_path / "checkpoints" / "best.json").write_text(json.dumps({"step": "x"}))
    with pytest.raises(ValueError, match=r"best.json is damaged"):
        load_encoders(tmp_path / "best")


def test_a_metric_that_no_evaluation_gives_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="checkpoint.best=zero_shot/cats/top1: no evaluation"):
        trainer_in(tmp_path, images, {}, best="zero_shot/cats/top1").fit()
    with pytest.raises(ValueError, match="it has none: set data.evaluate"):
        choose_best_metric("zero_shot/cats/top1", [])
    assert choose_best_metric("", []) is None
    assert choose_best_metric("", ["retrieval/a"]) == "retrieval/a/recall_at_1"
    assert choose_best_metric("", ["retrieval/a", "zero_shot/b"]) == "evaluated/mean"


def test_a_key_that_is_not_among_the_numbers_keeps_no_best(images, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer_in(tmp_path, images, RISING_AND_FALLING, best="zero_shot/digits/top3").fit()
    assert kept(tmp_path) == [6]
    assert caplog.text.count("checkpoint.best means zero_shot/digits/top3") == 1


def test_two_writers_of_one_step_do_not_join_their_files(tmp_path, monkeypatch):
    """The second writes all of its checkpoint between two files of the first."""
    save_file, is_first = checkpoint_files.save_file, True

    def write(run_id: str, value: float) -> None:
        tensors = {"weight": torch.full((3,), value)}
        files = {"model.safetensors": tensors, "optimizer.safetensors": tensors}
        write_checkpoint(tmp_path, step=6, files=files, state={"run_id": run_id})

    def interrupted(*arguments: Any, **options: Any) -> None:
        nonlocal is_first
        save_file(*arguments, **options)
        if is_first:
            is_first = False
            write("second", 2.0)

    monkeypatch.setattr(checkpoint_files, "save_file", interrupted)
    write("first", 1.0)
    (written,) = list_checkpoints(tmp_path)
    values = {load_file(path)["weight"][0].item() for path in written.glob("*.safetensors")}
    assert values == {1.0}
    assert not list(tmp_path.glob(".*"))


def test_a_file_of_another_checkpoint_is_refused(images, tmp_path):
    trainer_of(images, tiny_config(steps=4), tmp_path).fit()
    one, other = list_checkpoints(tmp_path / "checkpoints")
    for name in ("optimizer.safetensors", "model.safetensors"):
        shutil.copy(other / name, one / name)
        with pytest.raises(DamagedCheckpointError, match="safetensors is damaged: its xxh3 is"):
            read_state(one)
