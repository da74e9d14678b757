"""Trackers get the lines of metrics.jsonl too: TensorBoard, W&B, trackio, MLflow.

Each tracker has a thread of its own, which also imports and opens its package. No network keeps a
step waiting, and an error is logged and ends that tracker, not the run.

A resumed run continues the same curve. Steps that were done before a kill and are done again are
not sent again: the lines that metrics.jsonl had of them are kept in `trackers.json`, name by name.
TensorBoard purges them itself, and MLflow is asked what it has, so that it also gets lines that a
kill took on their way. A tracker that is added to a run gets its whole curve.

Servers, projects and keys are the packages' own environment variables, such as WANDB_PROJECT,
WANDB_MODE=offline, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
"""

from __future__ import annotations

import json
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
from unicl_fast.system.atomic_files import write_text_atomically
from unicl_fast.system.installation import install_command
from unicl_fast.system.untrusted_files import read_json
from unicl_fast.system.wording import encodable

logger = logging.getLogger(__name__)

STATE_NAME = "trackers.json"
PROJECT = "unicl_fast"
"""The project, or experiment, where no environment variable names one."""
_KNOW_THEIR_STEPS = ("tensorboard", "mlflow")
"""Trackers that replace, or leave out, what they have already."""
_SECONDS_TO_CLOSE = 60.0
_MOST_WAITING = 10_000
"""Lines that wait for a tracker that does not keep up; further ones are left out."""
_OUTSIDE_MLFLOW = re.compile(r"[^\w\-. :/]", re.ASCII)


class TrackedRun(NamedTuple):
    """A run as its trackers see it."""

    folder: Path
    run_id: str
    config: Mapping[str, Any]
    """Without secrets."""
    purge_step: int
    """The first step that is sent again, for a tracker that replaces what it has."""


class Tracker(NamedTuple):
    """The calls that a run makes; each may raise."""

    log: Callable[[Mapping[str, Any], int], object]
    """Adds the numbers of a step to the curves."""
    close: Callable[[], object]
    """Sends what is left."""


def require_trackers(names: Iterable[TrackerName]) -> None:
    """Refuses (ValueError) trackers whose packages are not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f"run.trackers has {name}, and its package is not installed: pip install {name}, "
                f"or {install_command('trackers')}"
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
        lines = list(lines) if start_step else []
        before = _read_state(run_folder / STATE_NAME, run_id)
        sent = dict(before or {})
        self._workers = []
        for name in names:
            is_new = before is not None and name not in before
            sent[name] = dict(sent.get(name, {}))
            for line in lines:
                sent[name] |= {k: max(sent[name].get(k, 0), int(line["step"])) for k in line}
            purge_step = 1 if is_new else start_step + 1
            has = {} if is_new or name in _KNOW_THEIR_STEPS else dict(sent[name])
            worker = _Worker(name, TrackedRun(run_folder, run_id, config, purge_step), has)
            if is_new or name == "mlflow":
                worker.log(lines)
            self._workers.append(worker)
        _write_state(run_folder / STATE_NAME, {"run_id": run_id, "sent": sent})

    def log(self, values: Mapping[str, float]) -> None:
        """Hands a line over; `step` is among the values."""
        for worker in self._workers:
            worker.log([values])

    def close(self) -> None:
        """Waits for what is under way; a tracker that does not come to an end is left behind."""
        deadline = time.monotonic() + _SECONDS_TO_CLOSE
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))


def _read_state(path: Path, run_id: str) -> dict[str, dict[str, int]] | None:
    """Newest step that each tracker got, by name; None where it is not known for this run."""
    try:
        state = read_json(path)
        if state["run_id"] == run_id:
            return {
                str(name): {str(key): int(step) for key, step in steps.items()}
                for name, steps in state["sent"].items()
            }
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is left out: %r; trackers may show steps twice", path, error)
    return None


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    try:
        write_text_atomically(path, json.dumps(state, indent=1) + "\n")
    except OSError as error:
        logger.error(
            "%s cannot be written: %s; after a resume, trackers may show steps twice", path, error
        )


class _Worker:
    """One tracker and the thread that talks to it."""

    def __init__(self, name: TrackerName, run: TrackedRun, sent: dict[str, int]) -> None:
        self._name, self._run, self._sent = name, run, sent
        self._calls: queue.SimpleQueue[Callable[[Tracker], object] | None] = queue.SimpleQueue()
        self._failed = self._is_full = False
        self._thread = threading.Thread(target=self._work, name=f"unicl-{name}", daemon=True)
        self._thread.start()

    def log(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Sends what the tracker does not have, later, in the thread."""

        def send(tracker: Tracker) -> None:
            for line in lines:
                step = int(line["step"])
                new = [name for name in line if step > self._sent.get(name, 0) and name != "step"]
                if new:
                    tracker.log({encodable(name): line[name] for name in new}, step)
                    self._sent |= dict.fromkeys(new, step)

        if self._failed:
            return
        was_full, self._is_full = self._is_full, self._calls.qsize() >= _MOST_WAITING
        if not self._is_full:
            self._calls.put(send)
        elif not was_full:
            logger.error("%s does not keep up: lines are left out there", self._name)

    def close(self) -> None:
        self._calls.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.error(
                "%s has not taken the last %d lines within %.0f s: they are left out there",
                self._name, self._calls.qsize(), _SECONDS_TO_CLOSE,
            )  # fmt: skip

    def _work(self) -> None:
        try:
            tracker = OPENERS[self._name](self._run)
            while (work := self._calls.get()) is not None:
                work(tracker)
            tracker.close()
        except BaseException as error:  # SystemExit too: some packages end the process
            self._failed = True
            logger.error("NO MORE LINES to %s: %r; training continues", self._name, error)


def _open_tensorboard(run: TrackedRun) -> Tracker:
    """Files in RUN/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.purge_step)

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
        # its metadata has the command line and git's remote, which may hold passwords
        settings=wandb.Settings(console="off", silent=True, x_disable_meta=True),
    )  # fmt: skip
    # its own steps only rise: a second line of one step, after a resume, would be dropped
    opened.define_metric("step")
    opened.define_metric("*", step_metric="step")

    def log(values: Mapping[str, Any], step: int) -> None:
        opened.log({**values, "step": step})

    return Tracker(log, opened.finish)


def _open_trackio(run: TrackedRun) -> Tracker:
    """A local SQLite file, or a Space."""
    import trackio

    opened: Any = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{run.folder.name}-{run.run_id[:8]}",
        config=dict(run.config), resume="allow", embed=False,
    )  # fmt: skip

    def log(values: Mapping[str, Any], step: int) -> None:
        opened.log(dict(values), step=step)

    return Tracker(log, opened.finish)


def _open_mlflow(run: TrackedRun) -> Tracker:
    """A run in the experiment of a tracking server or a local database, found by its tag."""
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client, tag = MlflowClient(), f"{PROJECT}.run_id"
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    there = client.get_experiment_by_name(name)
    number = there.experiment_id if there else client.create_experiment(name)
    found = client.search_runs([number], f"tags.`{tag}` = '{run.run_id}'")
    opened = (
        found or [client.create_run(number, run_name=run.folder.name, tags={tag: run.run_id})]
    )[0]
    key = opened.info.run_id
    if not found:
        client.log_dict(key, dict(run.config), "config.json")
    client.update_run(key, status="RUNNING")
    newest = {
        metric: max(one.step for one in client.get_metric_history(key, metric))
        for metric in opened.data.metrics
    }

    def log(values: Mapping[str, Any], step: int) -> None:
        named = {_OUTSIDE_MLFLOW.sub("_", name): value for name, value in values.items()}
        new = [name for name in named if step > newest.get(name, 0)]
        now = round(1000 * time.time())
        client.log_batch(key, metrics=[Metric(name, named[name], now, step) for name in new])
        newest.update(dict.fromkeys(new, step))

    return Tracker(log, lambda: client.set_terminated(key))


OPENERS: dict[TrackerName, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _open_tensorboard, "wandb": _open_wandb, "trackio": _open_trackio,
    "mlflow": _open_mlflow,
}  # fmt: skip
