"""Lines of metrics.jsonl: when the disk fails, and the numbers about each data set of a mix."""

import contextlib
import dataclasses
import time
from pathlib import Path

import pytest
import torch
from damage import limited_files
from rank_workers import describe_sources_of_slices, described, named, run_on_ranks
from small_runs import global_batch, labelled_batch, poison_step, tiny_config, trainer_of

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.training.metrics import MetricsWriter, read_metrics
from unicl_fast.training.observers import DatasetNumbers
from unicl_fast.training.trackers import TrackedRun, Trackers
from unicl_fast.training.trainer import Trainer


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_metrics_that_cannot_be_written_cost_lines_and_not_the_run(tmp_path, caplog):
    trackers = Trackers(["tensorboard"], TrackedRun(tmp_path, "a", {}, 0))
    with contextlib.closing(MetricsWriter(tmp_path, trackers=trackers)) as metrics:
        metrics.write({"step": 1, "loss": 4.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        step, deadline = 2, time.monotonic() + 60
        with limited_files(size + 5):  # half of the next line would fit
            # until TensorBoard's thread has met the limit too
            while "NO MORE LINES to tensorboard" not in caplog.text and time.monotonic() < deadline:
                metrics.write({"step": step, "loss": 3.0})
                step += 1
                time.sleep(0.02)
        metrics.write({"step": step, "loss": 2.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, step]
    assert caplog.text.count("NO LINE of step") == 1
    assert f"is written again, from step {step} on" in caplog.text
    assert caplog.text.count("NO MORE LINES to tensorboard") == 1


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_lines_continue_in_another_file_when_theirs_is_gone(tmp_path, caplog, what):
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(MetricsWriter(tmp_path)) as metrics:
        metrics.write({"step": 1})
        path.rename(tmp_path / "old")
        if what == "replaced":  # as editors save a file
            path.write_text('{"step": 1, "edited": 1}\n')
        metrics.write({"step": 2})
        metrics.write({"step": 3})
    assert [line["step"] for line in read_metrics(tmp_path)][-2:] == [2, 3]
    assert caplog.text.count(f"{path} was moved, removed or replaced") == 1


@pytest.mark.parametrize(
    "damaged",
    [b'{"step": 2, "lo\xff": 1}', b'{"step": 2, "loss": "low"}', b'{"step": "2"}', b"[2]", b"{}",
     b'{"step": 2, "loss": ' + b"9" * 400 + b"}", b"[" * 100_000, b"", b"\0" * 20],
)  # fmt: skip
def test_a_damaged_line_is_named_and_left_out_when_a_run_resumes(tmp_path, caplog, damaged):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "loss": 0.1}', damaged, b'{"step": 3}', b'{"step": 4}', b'{"step']
    path.write_bytes(b"\n".join(lines))
    with contextlib.closing(MetricsWriter(tmp_path, start_step=3)) as metrics:
        metrics.write({"step": 4, "loss": 0.5})
    kept = [lines[0], lines[2], b'{"step": 4, "loss": 0.5}', b""]
    assert path.read_bytes().split(b"\n") == kept
    read_metrics(tmp_path)
    assert caplog.text.count(f"{path}: line 2 is damaged and is left out: ") == 1
    assert len(caplog.records) == 1


def with_targets(batch: Batch, **targets: torch.Tensor) -> Batch:
    return dataclasses.replace(batch, targets=dataclasses.replace(batch.targets, **targets))


def test_epochs_and_positives_of_each_source(images):
    batch = with_targets(
        global_batch(images),
        class_ids=torch.tensor([5, 5, 5, 9] + [2**61 + i for i in range(6)] + [9, 5]),
    )
    batch = dataclasses.replace(batch, source_ids=torch.tensor([0, 0, 2, 2] + [1] * 6 + [2, 2]))
    numbers = DatasetNumbers(
        ["a", "b", "c", "d"], epochs=lambda step: [step / 2, step / 4, 0.0, 0.0]
    )
    epochs = {"a": 1.5, "b": 0.75, "c": 0.0, "d": 0.0}
    positives = {"a": 4.0, "b": 1.0, "c": (4 + 2 + 2 + 4) / 4}  # d has no row in the batch
    assert described(numbers, batch, step=3) == (
        {f"epochs/{name}": number for name, number in epochs.items()}
        | {f"positives_per_row/{name}": number for name, number in positives.items()}
    )


def test_positives_of_images_of_several_labels(images):
    """Texts of classes 1, 1, 2 and captions; the first image has both classes, the last 2 and 3."""
    captions = [2**62 + i for i in range(9)]
    several = [[1, 2], [1], [2], *[[one] for one in captions]]
    several[-1] += [2, 3]
    entries = [(sample, one) for sample, classes in enumerate(several) for one in classes]
    batch = with_targets(
        global_batch(images),
        class_ids=torch.tensor([1, 1, 2, *captions]),
        image_classes=torch.tensor(entries).T.contiguous(),
    )
    batch = dataclasses.replace(batch, source_ids=torch.tensor([0, 1] + [2] * 9 + [3]))
    numbers = DatasetNumbers(["a", "b", "c", "d"], epochs=lambda step: [0.0] * 4)
    found = described(numbers, batch, step=1)
    assert [found[f"positives_per_row/{name}"] for name in "abcd"] == [3, 2, 1, 2]


def test_positives_are_counted_over_ranks(images):
    objectives = ("unicl", "unicl, labels")
    found = run_on_ranks(describe_sources_of_slices, 2, images, objectives)
    for number, objective in enumerate(objectives):
        batch = labelled_batch(images, objective=objective)
        batch = dataclasses.replace(batch, source_ids=torch.arange(12) % 2)
        numbers = DatasetNumbers(["a", "b"], epochs=lambda step: [1.0, 2.0])
        expected = described(numbers, batch, step=1)
        assert [of_rank[number] for of_rank in found] == [expected] * 2, objective


def test_each_logging_step_has_them(images, tmp_path):
    batch = dataclasses.replace(global_batch(images), source_ids=torch.arange(12) % 2)
    numbers = DatasetNumbers(["a", "b"], epochs=lambda step: [step, 2 * step])
    options = {"loader": ListLoader([batch]), "observers": [numbers]}
    trainer_of(images, tiny_config(steps=2), tmp_path, **options).fit()
    lines = read_metrics(tmp_path)
    assert [(line["epochs/a"], line["epochs/b"]) for line in lines] == [(1, 2), (2, 4)]
    assert all(line["positives_per_row/a"] >= 1 for line in lines)


def test_lines_that_are_written_a_step_later_are_the_same(images, tmp_path, monkeypatch):
    """As on a GPU; a save, an evaluation and the end of a run have all lines written before."""
    config = tiny_config(steps=8).changed(
        run={"max_bad_steps": 1, "evaluate_every_steps": 3}, checkpoint={"every_steps": 4}
    )
    written_at: list[int] = []

    def lines_of(run_folder: Path) -> list[dict[str, float]]:
        evaluations = {"some": lambda model: {"lines": float(len(read_metrics(run_folder)))}}
        numbers = DatasetNumbers(["a"], epochs=lambda step: [step / 2])
        options = {"change": named, "evaluations": evaluations, "observers": [numbers]}
        trainer = trainer_of(images, config, run_folder, **options)
        poison_step(trainer, step=4)
        trainer.fit()
        timed = ("seconds", "images_per", "data_wait", "step_sec", "eta", "host_memory", "mfu")
        return [
            {name: value for name, value in line.items() if not name.startswith(timed)}
            for line in read_metrics(run_folder)
        ]

    write = Trainer._write_line

    def note(run: Trainer, batch: Batch) -> None:
        written_at.extend([run.step] * (run._line is not None))
        write(run, batch)

    monkeypatch.setattr(Trainer, "_write_line", note)
    at_once = lines_of(tmp_path / "at once")
    assert [line["nonfinite_steps"] for line in at_once if "lr" in line] == [0] * 4 + [1] * 4
    assert written_at == [1, 2, 3, 4, 5, 6, 7, 8]
    written_at.clear()
    monkeypatch.setattr(Trainer, "_lets_lines_wait", lambda run: run.step < run.stage.span.end_step)
    assert lines_of(tmp_path / "later") == at_once
    # steps 3, 6 and 8 evaluate, and step 4 saves
    assert written_at == [2, 3, 3, 4, 6, 6, 8, 8]
    ends = lambda _, run, *given, **values: setattr(run, "ends_early", run.step == 5)  # noqa: E731
    monkeypatch.setattr(DatasetNumbers, "on_step", ends)
    assert [line["step"] for line in lines_of(tmp_path / "ended")] == [1, 2, 3, 3, 4, 5]
