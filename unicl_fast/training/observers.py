"""Observers of a run: lines of metrics, the ledger, checkpoints, agreement of ranks.

`limits.py` has those that end a run, for bad steps and bad samples.
"""

import contextlib
import datetime
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from unicl_fast.batch import Batch, send
from unicl_fast.checkpoints.state import collect_tensors, describe_state
from unicl_fast.checkpoints.writer import CheckpointWriter
from unicl_fast.config import TrackerName
from unicl_fast.config_json import config_to_dict
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_rows
from unicl_fast.ledger.writer import Ledger
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.system.bar import Bar, log_above_bars, write_line
from unicl_fast.text.file_tokenizer import FileTokenizer
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.agreement import check_weights_agree
from unicl_fast.training.bottleneck import BottleneckWatch
from unicl_fast.training.figures import draw_contact_sheet, drawing
from unicl_fast.training.metrics import (
    METRICS_NAME,
    MetricsWriter,
    choose_best_metric,
    count_positives,
    lines_until,
    read_metrics,
)
from unicl_fast.training.mfu import seconds_at_peak
from unicl_fast.training.trackers import TrackedRun, Trackers, require_trackers
from unicl_fast.training.trainer import COMPILING_STEPS, Observer, Trainer

logger = logging.getLogger(__name__)

_CHECKED_EVERY = 1000  # steps between comparisons of the weights' bits over ranks


class RunLog(Observer):
    """metrics.jsonl, the trackers, the progress bar, and the run's bottleneck; on rank 0."""

    def __init__(
        self, trackers: Sequence[TrackerName], folder: Path | None, *, ranks: Ranks, progress: bool
    ) -> None:
        """Opens nothing yet; without a run `folder`, nothing is written."""
        if folder is not None:
            require_trackers(trackers)
        self._is_main, self._folder = ranks.is_main, folder if ranks.is_main else None
        self._shows_progress = progress and ranks.is_main
        self._metrics: MetricsWriter | None = None
        self._bar: Bar | None = None
        self._watch: BottleneckWatch | None = None
        self._seconds_at_peak: dict[int, float | None] = {}
        """The least time of a step, by the number of its stage."""
        self._results: dict[str, float] | None = None
        self._last_line = 0  # its step

    @contextlib.contextmanager
    def fitting(self, run: Trainer) -> Iterator[None]:
        """Opens the file and the trackers; drops lines of later steps, which a crash left."""
        self._last_line = run.step
        with contextlib.ExitStack() as stack:
            if self._folder is not None:
                self._metrics = self._open(run, self._folder)
                stack.callback(self._metrics.close)
                stack.callback(setattr, self, "_metrics", None)
            if self._shows_progress:
                stack.enter_context(log_above_bars())
            bar = Bar(
                total=run.total_steps, initial=run.step, desc="train", shown=self._shows_progress,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )  # fmt: skip
            self._bar = stack.enter_context(bar)
            # a user's own loader does not say how long it waits for storage
            reading, on_gpu = getattr(run.loader, "reading", None), run.device.type == "cuda"
            self._watch = BottleneckWatch(
                run.config.data, ranks=run.ranks, on_gpu=on_gpu, reading=reading
            )
            yield

    def _open(self, run: Trainer, folder: Path) -> MetricsWriter:
        make_folder(folder)
        lines = read_metrics(folder) if (folder / METRICS_NAME).is_file() else []
        self._results = {
            k: v for line in lines if line["step"] == run.step for k, v in line.items()
        }
        tracked = TrackedRun(folder, run.run_id, config_to_dict(run.given), run.step)
        trackers = Trackers(run.config.run.trackers, tracked)
        return MetricsWriter(folder, start_step=run.step, trackers=trackers)

    def on_step(self, run: Trainer, batch: Batch, *, loss: Tensor, grad_norm: Tensor) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_log(self, run: Trainer, batch: Batch, values: dict[str, float]) -> None:
        """Writes and shows the line, with the GPU's utilisation."""
        if not self._is_main:
            return
        step = int(values["step"])
        if self._metrics is not None:
            if step - run.compiled_from > COMPILING_STEPS:
                run.begin("checks")
                values |= self._utilisation(run, batch, step_seconds=values["step_seconds"])
                run.begin("other")
            self._metrics.write(values)
        if self._bar is not None:
            self._bar.set_postfix_str(_facts(values), refresh=False)  # tqdm cuts a wide one
        num_steps, self._last_line = step - self._last_line, step
        if self._watch is not None and (advice := self._watch.look(values, num_steps=num_steps)):
            logger.warning("%s", advice)

    def _utilisation(self, run: Trainer, batch: Batch, *, step_seconds: float) -> dict[str, float]:
        """`mfu` if it is known; the work of a step is counted once for each stage."""
        number = run.stage.span.number
        if number not in self._seconds_at_peak:
            self._seconds_at_peak[number] = seconds_at_peak(run.stage.config, batch, run.device)
        at_peak = self._seconds_at_peak[number]
        return {} if at_peak is None else {"mfu": at_peak / step_seconds}

    def on_evaluation(self, run: Trainer, values: Mapping[str, float]) -> None:
        if self._metrics is None:
            return
        self._metrics.write({"step": run.step, **values})
        # a program's log shows and keeps it; without one it is still shown
        say = logger.info if logger.isEnabledFor(logging.INFO) else write_line
        by_evaluation: dict[str, list[str]] = {}
        for key, value in values.items():
            name, _, figure = key.rpartition("/")
            by_evaluation.setdefault(name, []).append(f"{figure} {value:.4g}")
        for name, figures in by_evaluation.items():
            say(f"step {run.step}, {name}: {', '.join(figures)}")

    def results_of(self, step: int) -> Mapping[str, float] | None:
        """The results in the file when it was opened."""
        return self._results


def _facts(values: Mapping[str, float]) -> str:
    """The part of a line of metrics that the bar shows."""
    facts = [
        f"loss {values.get('loss', math.nan):.3f}",
        f"{values['images_per_second']:,.0f} images/s",
        f"{datetime.timedelta(seconds=round(values['eta_seconds']))} left",
        f"data wait {values['data_wait_fraction']:.0%}",
        *([f"mfu {values['mfu']:.0%}"] if "mfu" in values else []),
    ]
    return ", ".join(facts)


class DatasetNumbers(Observer):
    """Whether a mix of data sets works as intended, in each line of metrics.

    A data set in its tenth epoch (`epochs/NAME`) while others are in their first has too large a
    weight. `positives_per_row/NAME` is 1 if it teaches as CLIP does, and large if it teaches as a
    classifier does. `storage_bytes_*` are for data sets under URLs.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        epochs: Callable[[int], Sequence[float]],
        datasets: Sequence[PackedDataset] = (),
    ) -> None:
        """`epochs` returns the epochs of each data set after a number of steps.

        The traffic of `datasets` under URLs is counted.
        """
        self._names, self._epochs = list(names), epochs
        self._remote = [one for one in datasets if one.cache is not None]
        self._traffic: tuple[int, int] | None = None
        """Bytes that all ranks had read from stores at the last line, and bytes of images that they
        needed of them; None if all data sets are in folders."""

    @contextlib.contextmanager
    def fitting(self, run: Trainer) -> Iterator[None]:
        yield
        if run.ranks.is_main and self._traffic is not None:
            read, needed = self._traffic
            logger.info(
                f"read from stores: {read / 1e6:,.1f} MB, arrays included; needed: "
                f"{needed / 1e6:,.1f} MB of images"
                + (f", {read / needed:.2f} times as much" if needed else "")
            )

    def contribute(self, run: Trainer, batch: Batch, sums: dict[str, float | Tensor]) -> None:
        """Counts positives in the global batch."""
        sums |= {
            # one rank's store can be another's folder
            "stores": len(self._remote),
            "storage_bytes_read": sum(dataset.fetched_bytes for dataset in self._remote),
            "storage_bytes_needed": sum(dataset.needed_bytes for dataset in self._remote),
        }
        if batch.source_ids is None:
            return
        positives = count_positives(batch, gather_rows(batch.targets.class_ids, run.ranks))
        source_ids = send(batch.source_ids, positives.device)
        for number, name in enumerate(self._names):
            is_own = source_ids == number
            sums |= {f"rows/{name}": is_own.sum(), f"positives/{name}": (positives * is_own).sum()}

    def measure(self, run: Trainer, sums: Mapping[str, float], values: dict[str, float]) -> None:
        """Positives, the row itself included, are averaged over the rows of a data set.

        Without rows in this batch there is no such number.
        """
        epochs = zip(self._names, self._epochs(int(values["step"])), strict=True)
        values |= {f"epochs/{name}": one for name, one in epochs}
        if sums["stores"]:
            traffic = ("storage_bytes_read", "storage_bytes_needed")
            self._traffic = int(sums[traffic[0]]), int(sums[traffic[1]])
            values |= dict(zip(traffic, self._traffic, strict=True))
        for name in self._names:
            if rows := sums.get(f"rows/{name}"):
                values[f"positives_per_row/{name}"] = sums[f"positives/{name}"] / rows


class LedgerKeeper(Observer):
    """Records the samples of every step."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @contextlib.contextmanager
    def fitting(self, run: Trainer) -> Iterator[None]:
        with self._ledger.segment(run.step, run_id=run.run_id):
            yield

    def on_step(self, run: Trainer, batch: Batch, *, loss: Tensor, grad_norm: Tensor) -> None:
        self._ledger.record(batch)

    def allows_save(self, *, required: bool) -> bool:
        """Puts records on disk before the checkpoint that follows them."""
        return self._ledger.flush(required=required)


class ContactSheet(Observer):
    """Draws the first batch of a run, as the model sees it."""

    def __init__(
        self,
        path: Path | None,
        *,
        class_names: Sequence[Sequence[str]],
        tokenizer: Callable[[], Tokenizer | FileTokenizer],
    ) -> None:
        """Draws nothing yet, and with `path` None never.

        `class_names` are those of each data set; `tokenizer` returns the one of the batch's tokens.
        """
        self._path, self._class_names, self._tokenizer = path, class_names, tokenizer

    def on_step(self, run: Trainer, batch: Batch, *, loss: Tensor, grad_norm: Tensor) -> None:
        if batch.step == 0 and batch.images.ndim == 4:  # stored features cannot be drawn
            self.draw(batch)

    def draw(self, batch: Batch) -> None:
        """Draws a batch of images; errors are only logged."""
        if self._path is not None:
            with drawing(self._path):
                names, tokenizer = self._class_names, self._tokenizer()
                draw_contact_sheet(batch, self._path, names, tokenizer=tokenizer)


class SoleWriter(Observer):
    """Ends a run if another process has taken over its folder, before the next checkpoint."""

    def __init__(self, check: Callable[[], None]) -> None:
        """`check` raises if it was taken over (`atomic_files.sole_writer`)."""
        self._check = check

    def allows_save(self, *, required: bool) -> bool:
        self._check()
        return True


class WeightsAgree(Observer):
    """Ends a run in which a rank's weights have silently departed from the others'."""

    def on_step(self, run: Trainer, batch: Batch, *, loss: Tensor, grad_norm: Tensor) -> None:
        """Compares the bits of the weights, every 1,000 steps."""
        if run.ranks.world_size > 1 and run.is_due(_CHECKED_EVERY):
            run.mark("comparing the weights of all ranks", part="checks", waits_for_ranks=True)
            check_weights_agree(run.model, run.ranks, step=run.step)
            run.begin("other")


class Checkpoints(Observer):
    """Writes checkpoints into the run folder, and keeps the newest and the best."""

    def __init__(self, folder: Path, *, keep: int, ranks: Ranks) -> None:
        """Writes nothing yet; the newest `keep` stay, or all if it is 0. Rank 0 writes."""
        self._folder = folder
        self._writer = (
            CheckpointWriter(folder / "checkpoints", keep=keep) if ranks.is_main else None
        )
        self._metric: str | None = None

    @contextlib.contextmanager
    def fitting(self, run: Trainer) -> Iterator[None]:
        """Finds the best so far; waits for the last checkpoint at the end."""
        self._metric = choose_best_metric(run.config.checkpoint.best, run.evaluations)
        if self._writer is None:
            yield
            return
        lines = lines_until(self._folder, run.step)
        with self._writer.finishing():
            self._writer.begin(step=run.step, metric=self._metric, lines=lines)
            yield

    def on_save(self, run: Trainer, *, required: bool) -> None:
        """Writes a checkpoint; all ranks help to collect tensors that are divided over them."""
        if self._writer is None and not run.parallel.is_divided:
            return
        tensors = collect_tensors(model=run.model, optimizer=run.optimizer, ranks=run.ranks)
        if self._writer is None:
            return
        state = describe_state(
            run.model, given=config_to_dict(run.given), optimizer=run.optimizer,
            scaler=run.scaler, data=run.data, run_id=run.run_id,
        )  # fmt: skip
        self._writer.write(tensors, state, step=run.step, required=required)

    def on_evaluated(self, run: Trainer, values: Mapping[str, float], *, all_done: bool) -> None:
        """Keeps the checkpoint of this step, written now if necessary, unless another is better."""
        # results from before a resume were read from the lines
        if not all_done and self._metric not in values:
            return
        best = None if self._writer is None else self._writer.better_than_best(run.step, values)
        # a step that evaluates need not be one that saves
        if run.saved_step != run.step and from_rank_0(best is not None, run.ranks):
            run.save(required=False)
        if self._writer is not None and best is not None:
            self._writer.keep_as_best(best)
