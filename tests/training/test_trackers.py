"""Trackers get each line of metrics, continue when a run resumes, and cannot harm it."""

import contextlib
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from damage import HOSTILE
from small_runs import tiny_config, trainer_of

from unicl_fast.config_json import config_to_dict
from unicl_fast.training import trackers as trackers_module
from unicl_fast.training.metrics import MetricsWriter, read_metrics
from unicl_fast.training.trackers import OPENERS, TrackedRun, Tracker, Trackers, require_trackers

Curves = dict[str, list[tuple[int, float]]]
RUN_ID = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each package's own local back end."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # MLflow puts artifacts there


def begin(folder: Path, name: Any, start_step: int = 0) -> MetricsWriter:
    """As a trainer does at each start."""
    folder.mkdir(exist_ok=True)
    trackers = Trackers([name], TrackedRun(folder, RUN_ID, {"run": {"seed": 1}}, start_step))
    return MetricsWriter(folder, start_step=start_step, trackers=trackers)


# Faults.


def test_a_tracker_that_fails_in_any_way_ends_nothing(tmp_path, monkeypatch, caplog):
    """As a protobuf of another version does when TensorBoard is imported or writes."""
    fail = Mock(side_effect=TypeError("Descriptors cannot be created directly"))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.__init__", fail)
    with contextlib.closing(begin(tmp_path, "tensorboard")) as metrics:
        metrics.write({"step": 1, "loss": 2.0})
    assert "NO MORE LINES to tensorboard: TypeError('Descriptors" in caplog.text
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_tracker_that_hangs_keeps_no_step_waiting(tmp_path, monkeypatch, caplog):
    end = threading.Event()
    hanging = Tracker(log=lambda values, step: end.wait(), close=lambda: None)
    monkeypatch.setitem(OPENERS, "wandb", lambda run: hanging)
    monkeypatch.setattr(trackers_module, "_SECONDS_TO_CLOSE", 0.2)
    monkeypatch.setattr(trackers_module, "_MOST_WAITING", 5)
    with contextlib.closing(begin(tmp_path, "wandb")) as metrics:
        for step in range(1, 20):
            metrics.write({"step": step, "loss": 1.0})
    end.set()
    assert "wandb does not keep up" in caplog.text
    assert "wandb has not taken the last" in caplog.text
    assert len(read_metrics(tmp_path)) == 19


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(trackers_module, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install wandb, or pip install .*\[trackers\]"):
        require_trackers(["wandb"])


# The packages themselves.


def curves_of_tensorboard(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def curves_of_mlflow(folder: Path) -> Curves:
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.json"]
    return {
        name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def curves_of_wandb(folder: Path) -> Curves:
    from wandb.proto import wandb_internal_pb2

    found: Curves = {}
    for path in sorted(folder.glob(f"wandb/offline-run-*-{RUN_ID}*/run-{RUN_ID}.wandb")):
        for data in records_of(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") != "history":
                continue
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for name, value in items.items():
                if not name.startswith("_") and name != "step":
                    found.setdefault(name, []).append((items["step"], value))
    return found


def records_of(log: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format: blocks of 32 KiB, after the file's header in the first.

    Each part has a header: checksum, length, and 1 for a whole record, 2 first, 3 middle, 4 last.
    """
    place, whole = 7, b""
    while place + 7 <= len(log):
        if (1 << 15) - place % (1 << 15) < 7:
            place += (1 << 15) - place % (1 << 15)
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        whole = (b"" if kind in (1, 2) else whole) + log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole


READ: dict[str, Callable[[Path], Curves]] = {
    **{"tensorboard": curves_of_tensorboard, "mlflow": curves_of_mlflow},
    "wandb": curves_of_wandb,
}


def curves_with(holds: Callable[[Curves], bool], name: str, folder: Path) -> Curves:
    """The curves of a tracker once they are as expected: wandb's own process may still write."""
    deadline = time.monotonic() + 60
    while not holds(curves := READ[name](folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return curves


trackers = pytest.mark.parametrize(
    "name",
    ["tensorboard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlflow", "wandb"))],
)


@trackers
def test_a_resumed_run_continues_the_run_of_its_tracker(tmp_path, name, caplog):
    """Killed after step 6, and resumed from step 4."""
    pytest.importorskip(name)
    for start, end in ((0, 6), (4, 8)):
        if start and name in ("tensorboard", "wandb"):
            begun = int(time.time())
            while int(time.time()) == begun:  # the names of their files have seconds
                time.sleep(0.05)
        with contextlib.closing(begin(tmp_path, name, start_step=start)) as metrics:
            for step in range(start + 1, end + 1):
                metrics.write({"step": step, "loss": step / 8, "seconds/data_wait": 0.5})
                if step % 4 == 0:  # an evaluation, on a line of its own
                    metrics.write({"step": step, "top1": step / 16})
    assert not [record for record in caplog.records if record.name.startswith("unicl_fast")]
    again = [] if name == "tensorboard" else [5, 6]  # it replaces what is done again
    curves = curves_with(lambda found: len(found["loss"]) == 8 + len(again), name, tmp_path)
    expected = sorted([*range(1, 9), *again])
    assert sorted(curves["loss"]) == [(step, step / 8) for step in expected]
    assert curves["top1"] == [(4, 0.25), (8, 0.5)]
    assert sorted(step for step, _ in curves["seconds/data_wait"]) == expected


@pytest.mark.slow
def test_wandb_gets_no_secret_of_the_command_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    url = "s3://user:password-of-mine@host/data"
    monkeypatch.setattr("sys.argv", ["unicl-pretrain", "--data.train", url])
    with contextlib.closing(begin(tmp_path, "wandb")) as metrics:
        metrics.write({"step": 1, "loss": 1.0})
    files = [path for path in tmp_path.glob("wandb/**/*") if path.is_file()]
    assert [path for path in files if path.suffix == ".wandb"]
    assert not [path for path in files if b"password-of-mine" in path.read_bytes()]


@trackers
def test_any_name_of_a_data_set_is_taken(tmp_path, name, caplog):
    pytest.importorskip(name)
    keys = [f"zero_shot/{one}/top1" for one in (*HOSTILE, "line\nbreak", "\udcff")]
    with contextlib.closing(begin(tmp_path, name)) as metrics:
        metrics.write({"step": 1} | dict.fromkeys(keys, 0.5))
        metrics.write({"step": 2, "loss": 0.5})
    assert not [record for record in caplog.records if record.name.startswith("unicl_fast")]
    if name != "mlflow":
        curves = curves_with(lambda found: "loss" in found, name, tmp_path)
        assert curves["loss"] == [(2, 0.5)]


def test_a_trainer_sends_its_lines(images, tmp_path, monkeypatch):
    config = tiny_config(steps=2).changed(run={"trackers": ("wandb",)})
    log, close = Mock(), Mock()
    monkeypatch.setitem(OPENERS, "wandb", opened := Mock(return_value=Tracker(log, close)))
    trainer = trainer_of(images, config, tmp_path)
    trainer.fit()
    lines = read_metrics(tmp_path)
    assert [call.args[0]["loss"] for call in log.call_args_list] == [one["loss"] for one in lines]
    opened.assert_called_once_with((tmp_path, trainer.run_id, config_to_dict(config), 0))
