"""Trackers get the lines of metrics.jsonl too: TensorBoard, W&B, MLflow.

Each tracker has its own thread, which also imports and opens its package: no step waits for a
network, and an error ends that tracker, not the run. A resumed run continues each tracker's run,
found by the run's id. Steps after the checkpoint are sent again: TensorBoard replaces them, the
others can show them twice.

Servers, projects and keys are set by the packages' own environment variables, such as
WANDB_PROJECT, WANDB_MODE=offline, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
"""

import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from unicl_fast.config import TrackerName
from unicl_fast.system.installation import install_command
from unicl_fast.system.wording import encodable

logger = logging.getLogger(__name__)

PROJECT = "unicl_fast"
"""The project, or experiment, if no environment variable names one."""
_SECONDS_TO_CLOSE = 60.0
_MOST_WAITING = 10_000  # lines for a slow tracker; further ones are left out
_OUTSIDE_MLFLOW = re.compile(r"[^\w\-. :/]", re.ASCII)


class TrackedRun(NamedTuple):
    """A run as its trackers see it."""

    folder: Path
    run_id: str  # stays the same when the run resumes
    config: Mapping[str, Any]  # without secrets
    start_step: int  # steps done; a tracker's later ones are left from a start that was killed


class Tracker(NamedTuple):
    """The calls that a run makes; each can raise."""

    log: Callable[[Mapping[str, Any], int], object]  # adds the numbers of a step to the curves
    close: Callable[[], object]  # sends the rest


def require_trackers(names: Iterable[TrackerName]) -> None:
    """Refuses (ValueError) trackers whose packages are not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f"run.trackers has {name}, and its package is not installed: pip install {name}, "
                f"or {install_command('trackers')}"
            )


class Trackers:
    """The trackers of a run, on rank 0."""

    def __init__(self, names: Sequence[TrackerName], run: TrackedRun) -> None:
        """Opens them in their threads."""
        self._workers = [_Worker(name, run) for name in names]

    def log(self, values: Mapping[str, float]) -> None:
        """Hands a line over; `step` is among the values."""
        for worker in self._workers:
            worker.log(values)

    def close(self) -> None:
        """Waits until all lines are sent; a tracker that takes too long is left behind."""
        deadline = time.monotonic() + _SECONDS_TO_CLOSE
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))


class _Worker:
    """One tracker and the thread that talks to it."""

    def __init__(self, name: TrackerName, run: TrackedRun) -> None:
        self._name, self._run = name, run
        self._lines: queue.SimpleQueue[Mapping[str, float] | None] = queue.SimpleQueue()
        self._failed = self._is_full = False
        self._thread = threading.Thread(target=self._work, name=f"unicl-{name}", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float]) -> None:
        """Sends a line later, in the thread."""
        if self._failed:
            return
        was_full, self._is_full = self._is_full, self._lines.qsize() >= _MOST_WAITING
        if not self._is_full:
            self._lines.put(values)
        elif not was_full:
            logger.error("%s does not keep up: lines are left out there", self._name)

    def close(self) -> None:
        self._lines.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.error(
                "%s has not taken the last %d lines within %.0f s: they are left out there",
                self._name, self._lines.qsize(), _SECONDS_TO_CLOSE,
            )  # fmt: skip

    def _work(self) -> None:
        try:
            tracker = OPENERS[self._name](self._run)
            while (line := self._lines.get()) is not None:
                numbers = {encodable(name): line[name] for name in line if name != "step"}
                tracker.log(numbers, int(line["step"]))
            tracker.close()
        except BaseException as error:  # SystemExit too: some packages end the process
            self._failed = True
            logger.error("NO MORE LINES to %s: %r; training continues", self._name, error)


def _open_tensorboard(run: TrackedRun) -> Tracker:
    """Files in RUN/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.start_step + 1)

    def log(values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, global_step=step)

    return Tracker(log, writer.close)


def _open_wandb(run: TrackedRun) -> Tracker:
    """A run at wandb.ai, at a server of your own, or offline in RUN/wandb."""
    import wandb

    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), id=run.run_id, name=run.folder.name,
        resume="allow", dir=str(run.folder), config=dict(run.config),
        # its metadata has the command line and git's remote, which can hold passwords
        settings=wandb.Settings(console="off", silent=True, x_disable_meta=True),
    )  # fmt: skip
    # its own steps only rise: a second line of one step, after a resume, would be dropped
    opened.define_metric("step")
    opened.define_metric("*", step_metric="step")

    def log(values: Mapping[str, Any], step: int) -> None:
        opened.log({**values, "step": step})

    return Tracker(log, opened.finish)


def _open_mlflow(run: TrackedRun) -> Tracker:
    """A run in the experiment of a tracking server or a local database, found by its tag."""
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client, tag = MlflowClient(), f"{PROJECT}.run_id"
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    there = client.get_experiment_by_name(name)
    number = there.experiment_id if there else client.create_experiment(name)
    if found := client.search_runs([number], f"tags.`{tag}` = '{run.run_id}'"):
        key = found[0].info.run_id
    else:
        new = client.create_run(number, run_name=run.folder.name, tags={tag: run.run_id})
        key = new.info.run_id
        client.log_dict(key, dict(run.config), "config.json")
    client.update_run(key, status="RUNNING")

    def log(values: Mapping[str, Any], step: int) -> None:
        now = round(1000 * time.time())
        named = ((_OUTSIDE_MLFLOW.sub("_", name), value) for name, value in values.items())
        client.log_batch(key, metrics=[Metric(*one, now, step) for one in named])

    return Tracker(log, lambda: client.set_terminated(key))


OPENERS: dict[TrackerName, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
}
