"""Trackers get the numbers of a run beside metrics.jsonl: TensorBoard, W&B, trackio, MLflow.

A tracker is three calls (`Tracker`). Each has a thread of its own, which also imports and opens it,
so that no network keeps a step waiting, and what fails is logged and ends that tracker, not the
run.

A resumed run continues the same curve: the run's id, which its checkpoints hold, is the tracker's
where that takes one, and `trackers.json` keeps what the tracker gave instead. Steps that were done
before a kill and are done again are not sent again: the lines that metrics.jsonl had of them tell
which, name by name. TensorBoard purges them itself, and MLflow is asked what it has, so that it
also gets lines that a kill took on their way.

Servers, projects and keys are the packages' own environment variables, such as WANDB_PROJECT,
WANDB_MODE=offline, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
"""

from __future__ import annotations

import functools
import json
import logging
import operator
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from unicl_fast.config import TrackerName
from unicl_fast.system.atomic_files import write_text_atomically
from unicl_fast.system.wording import encodable

logger = logging.getLogger(__name__)

STATE_NAME = "trackers.json"
PROJECT = "unicl_fast"
"""The project, or experiment, where no environment variable names one."""
_PACKAGES: dict[TrackerName, str] = {
    "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow",
}  # fmt: skip
_KNOW_THEIR_STEPS = ("tensorboard", "mlflow")
"""Trackers that leave out, or replace, what they have already."""
_SECONDS_TO_CLOSE = 60.0
_MOST_WAITING = 10_000
"""Lines that wait for a tracker that does not keep up; further ones are left out."""
_STEP = "step"
"""The axis of W&B's curves."""
_OUTSIDE_MLFLOW = re.compile(r"[^\w\-. :/]", re.ASCII)


class Tracker(Protocol):
    """The calls that a run needs of a tracker; each may raise."""

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Adds numbers to the curves."""

    def upload(self, image: Path, *, step: int) -> None:
        """Shows an image file."""

    def close(self) -> None:
        """Sends what is left."""


def require_trackers(names: Iterable[TrackerName]) -> None:
    """Refuses (ValueError) trackers whose packages are not installed."""
    for name in names:
        if find_spec(_PACKAGES[name]) is None:
            raise ValueError(
                f"run.trackers has {name}, and its package is not installed: pip install "
                f"{_PACKAGES[name]}, or 'unicl_fast[trackers]'"
            )


class Trackers:
    """The trackers of a run, on rank 0; made before metrics.jsonl loses lines that are cut off."""

    def __init__(
        self,
        names: Sequence[TrackerName],
        run_folder: Path,
        *,
        run_id: str,
        config: Mapping[str, Any],
        start_step: int,
        lines: Iterable[Mapping[str, float]],
    ) -> None:
        """`lines` are those that metrics.jsonl has, also of steps after `start_step`.

        At step 0 they are of another run, which ended before its first checkpoint.
        """
        self._state_path = run_folder / STATE_NAME
        self._state = state = _read_state(self._state_path, run_id)
        lines = list(lines) if start_step else []
        before: dict[str, dict[str, int]] = state["sent"]
        self._sent: dict[str, dict[str, int]] = {
            name: before.get(name, {}) for name in names if name not in _KNOW_THEIR_STEPS
        }
        for name in before.keys() & self._sent.keys():
            sent = self._sent[name]
            for line in lines:
                sent |= {key: max(sent.get(key, 0), int(line["step"])) for key in line}
        state["sent"] = self._sent
        self._sheet: Path | None = run_folder / "contact-sheet.png" if start_step == 0 else None
        as_run: dict[str, Any] = {"run_id": run_id, "config": config}
        builders: dict[TrackerName, Callable[[], Tracker]] = {
            "tensorboard": functools.partial(TensorBoard, run_folder, start_step=start_step),
            "wandb": functools.partial(WeightsAndBiases, run_folder, **as_run),
            "trackio": functools.partial(Trackio, run_folder, **as_run),
            "mlflow": functools.partial(Mlflow, run_folder, keep=self._keep, **as_run),
        }
        self._keep({})
        self._workers = [_Worker(name, builders[name]) for name in names]
        for worker in self._workers:
            if worker.name == "mlflow":
                worker.call(lambda tracker: _log_lines(tracker, lines))

    def log(self, values: Mapping[str, float]) -> None:
        """Hands a line over; `step` is among the values."""
        step = int(values["step"])
        for worker in self._workers:
            sent = self._sent.get(worker.name, {})
            line = {name: value for name, value in values.items() if step > sent.get(name, 0)}
            worker.call(functools.partial(_log_lines, lines=[line | {"step": step}]))
            if self._sheet is not None and self._sheet.is_file():
                worker.call(operator.methodcaller("upload", self._sheet, step=step))
        self._sheet = None

    def close(self) -> None:
        """Waits for what is under way; a tracker that does not come to an end is left behind."""
        deadline = time.monotonic() + _SECONDS_TO_CLOSE
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def _keep(self, names: Mapping[str, str]) -> dict[str, str]:
        """Remembers what a tracker calls this run; returns what was remembered."""
        known: dict[str, str] = self._state["names"]
        known.update(names)
        try:
            write_text_atomically(self._state_path, json.dumps(self._state, indent=1) + "\n")
        except OSError as error:
            logger.error(
                "%s cannot be written: %s; after a resume, trackers may show steps twice",
                self._state_path, error,
            )  # fmt: skip
        return known


def _log_lines(tracker: Tracker, lines: Iterable[Mapping[str, float]]) -> None:
    for line in lines:
        shown = {encodable(name): value for name, value in line.items() if name != "step"}
        if shown:
            tracker.log(shown, step=int(line["step"]))


def _read_state(path: Path, run_id: str) -> dict[str, Any]:
    """Reads `trackers.json`; nothing comes of it where it is of another run, or damaged."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["run_id"] == run_id:
            sent = {
                str(name): {str(key): int(step) for key, step in steps.items()}
                for name, steps in state["sent"].items()
            }
            names = {str(name): str(value) for name, value in state["names"].items()}
            return {"run_id": run_id, "names": names, "sent": sent}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is left out: %r; trackers may show steps twice", path, error)
    return {"run_id": run_id, "names": {}, "sent": {}}


class _Worker:
    """One tracker and the thread that talks to it."""

    def __init__(self, name: TrackerName, build: Callable[[], Tracker]) -> None:
        self.name, self._build = name, build
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._failed = self._is_full = False
        self._thread = threading.Thread(target=self._work, name=f"unicl-{name}", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[Tracker], None]) -> None:
        """Does it in the thread, later."""
        if self._failed:
            return
        was_full, self._is_full = self._is_full, self._calls.qsize() >= _MOST_WAITING
        if not self._is_full:
            self._calls.put(work)
        elif not was_full:
            logger.error("%s does not keep up: lines are left out there", self.name)

    def close(self) -> None:
        """Asks for the end."""
        self._calls.put(None)

    def join(self, seconds: float) -> None:
        """Waits for the end."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.error(
                "%s has not taken the last %d lines within %.0f s: they are left out there",
                self.name, self._calls.qsize(), _SECONDS_TO_CLOSE,
            )  # fmt: skip

    def _work(self) -> None:
        try:
            tracker = self._build()
            while (work := self._calls.get()) is not None:
                work(tracker)
            tracker.close()
        except BaseException as error:  # SystemExit too: some packages end the process
            self._failed = True
            logger.error("NO MORE LINES to %s: %r; training continues", self.name, error)


class TensorBoard:
    """Files in RUN/tensorboard."""

    def __init__(self, run_folder: Path, *, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_folder / "tensorboard"), purge_step=start_step + 1)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)

    def upload(self, image: Path, *, step: int) -> None:
        """Nothing: the image lies beside these files."""

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at wandb.ai, at a server of your own, or offline in RUN/wandb."""

    def __init__(self, run_folder: Path, *, run_id: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id,
            name=run_folder.name,
            resume="allow",
            dir=str(run_folder),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        # its own steps only rise: a second line of one step, after a resume, would be dropped
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._run.log(dict(values) | {_STEP: step})

    def upload(self, image: Path, *, step: int) -> None:
        self._run.log({image.stem: self._wandb.Image(str(image)), _STEP: step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A local SQLite file, or a Space."""

    def __init__(self, run_folder: Path, *, run_id: str, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run_folder.name}-{run_id[:8]}",
            config=dict(config),
            resume="allow",
            embed=False,
        )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._run.log(dict(values), step=step)

    def upload(self, image: Path, *, step: int) -> None:
        self._run.log({image.stem: self._trackio.Image(str(image))}, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run in the experiment of a tracking server or a local database."""

    def __init__(
        self,
        run_folder: Path,
        *,
        run_id: str,
        config: Mapping[str, Any],
        keep: Callable[[Mapping[str, str]], Mapping[str, str]],
    ) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        self._run = keep({}).get("mlflow", "")
        self._known: dict[str, int] = {}
        if self._run:
            self._client.update_run(self._run, status="RUNNING")
            for metric in self._client.get_run(self._run).data.metrics:
                history = self._client.get_metric_history(self._run, metric)
                self._known[metric] = max(one.step for one in history)
            return
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tags = {"unicl_fast.run_id": run_id}
        run = self._client.create_run(number, run_name=run_folder.name, tags=tags)
        self._run = run.info.run_id
        keep({"mlflow": self._run})
        self._client.log_dict(self._run, dict(config), "config.json")

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        now = round(1000 * time.time())
        named = {_OUTSIDE_MLFLOW.sub("_", name): value for name, value in values.items()}
        new = {n: value for n, value in named.items() if step > self._known.get(n, 0)}
        if new:
            metrics = [self._metric(name, value, now, step) for name, value in new.items()]
            self._client.log_batch(self._run, metrics=metrics)
            self._known |= dict.fromkeys(new, step)

    def upload(self, image: Path, *, step: int) -> None:
        self._client.log_artifact(self._run, str(image))

    def close(self) -> None:
        self._client.set_terminated(self._run)
