"""The work of `unicl-bench run`: the whole, its stages, and changes until time is up.

All ranks do the same at the same time, so rank 0 decides what depends on measurements.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from unicl_fast.config import TrainConfig
from unicl_fast.config_json import config_to_dict
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_objects
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.images.codec import ImageError
from unicl_fast.system.machine import choose_device, cpu_times, keep_freed_memory
from unicl_fast.system.program import logging_at
from unicl_fast.system.wording import count_of
from unicl_fast.training.step_clock import Part

from .advise import advise, find_limit, usage_of
from .bench import Bench, Contestant, on_bench
from .changes import candidates, data_of, decoding_stage, no_augmentation
from .deadline import Deadline
from .measuring import in_turns
from .model import (
    CHECKPOINT,
    EVALUATION,
    LOGGING,
    READ,
    Change,
    Cost,
    Measured,
    Periodic,
    Stage,
    Trial,
    median,
)
from .turns import Loop

_MOST_PASSES = 4  # of --apply
_ROUNDS = 3  # turns of the run, and of each change
_NOT_YET = Cost(wall=0.0, cpu=0.0)
_HOPELESS = -0.03  # a change whose first round loses more than this part of the rate gets no others
_OVERTIME = 0.7
"""Part of the seconds by which the first change can run over: without one there is no advice."""
_AGAIN = 0.25  # part of the seconds kept for measuring the best change again
_LONGER = 2.0  # multiple of the usual turn for measuring a change again before it is believed
_LOADER_MATTERS = 0.02
"""A loop that waits longer for batches, as part of its time, skips those made during a pause."""
_SHARED = ("loss and its gradient", "collectives")  # parts of a step that wait for other ranks


def measure(config: TrainConfig, deadline: Deadline, *, applies: bool, scratch: Path) -> None:
    """Measures a run, and applies advice; raises as `unicl-pretrain` does.

    On rank 0 `deadline.found` has each new result; `scratch` is an empty folder.
    """
    stored: Literal["", "could", "does"] = "does" if config.efficiency.stored_features else ""
    if stored:  # what takes time is encoding; standardising needs the stored features
        config = config.changed(
            efficiency={"stored_features": ""}, model={"standardise": False, "feature_noise": 0.0}
        )
    with contextlib.suppress(ValueError):
        config.changed(efficiency={"stored_features": "features"})
        stored = stored or "could"
    applied: list[dict[str, Any]] = []
    with on_ranks(config) as (ranks, device):
        for number in range(_MOST_PASSES):
            if number:
                deadline.begin_anew()
            place = Path(tempfile.mkdtemp(dir=scratch))
            with on_bench(config, place, ranks=ranks, device=device) as bench:
                deadline.begin("the run as it is")

                def note(measured: Measured) -> None:
                    if ranks.is_main:
                        deadline.found = replace(measured, stored=stored, applied=tuple(applied))

                diagnoser = Diagnoser(bench, deadline, folder=place, note=note)
                diagnoser.diagnose()
                change = diagnoser.confirm(applied if applies else None)
                if change is None:
                    return
            config = config.changed(**change.set)
            torch.set_num_threads(change.compute_threads or torch.get_num_threads())


class Diagnoser:
    """One rank's diagnosis of a run; all ranks call the same methods together."""

    measured: Measured

    def __init__(self, bench: Bench, deadline: Deadline, *, folder: Path, note: Any) -> None:
        """`folder` is for small data sets; `note` is called with each new result."""
        self.bench, self.deadline, self._folder, self._note = bench, deadline, folder, note
        self._skips = False
        self._periodic: list[Periodic] = []
        self._begun, self._spent = deadline.left, cpu_times()

    def _report(self, measured: Measured) -> None:
        """Notes a result, with the cores that other processes have used so far."""
        spent, ranks = cpu_times(), self.bench.ranks
        own = sum(gather_objects(spent.own - self._spent.own, ranks))
        busy, seconds = spent.busy - self._spent.busy - own, self._begun - self.deadline.left
        others = max(0.0, busy) / seconds / ranks.world_size
        self.measured = replace(measured, others_cores=others)
        self._note(self.measured)

    def diagnose(self) -> None:
        """Measures the run, its stages, and changes until time is up."""
        self._together_and_separately()
        self._stages()
        self._changes()

    # The run as it is.

    def _together_and_separately(self) -> None:
        """Turns of the run, of only its loader, and of only its step."""
        bench, turn = self.bench, self.deadline.turn
        first = bench.loop(bench.now, seconds=turn, skips=False)
        self._report(self._of_loops([first], loader=_NOT_YET, step=_NOT_YET))
        self._periodic = [
            bench.checkpoint(seconds=2 * turn),
            *bench.evaluation(seconds=self.deadline.seconds / 10),
        ]
        waits = first.parts["data_wait"] > _LOADER_MATTERS * first.wall
        count = max(1, min(200, round(turn * first.steps / first.wall)))
        self._skips, count = from_rank_0(waits, bench.ranks), from_rank_0(count, bench.ranks)
        works: dict[str, Any] = {
            "step": lambda: bench.step_cost(count=count),
            "loader": lambda: bench.loader_cost(bench.now, seconds=turn),
            "whole": lambda: bench.loop(bench.now, seconds=2 * turn, skips=self._skips),
        }
        turns = in_turns(works, rounds=_ROUNDS, most_seconds=self.deadline.seconds / 4)
        loader, step = median(turns["loader"]), median(turns["step"])
        self._report(self._of_loops(turns["whole"], loader=loader, step=step))

    def _of_loops(self, loops: Sequence[Loop], *, loader: Cost, step: Cost) -> Measured:
        bench, config = self.bench, self.bench.config
        whole = median(self._cost_of(loop, bench.now) for loop in loops)
        images = bench.local_batch * sum(loop.steps for loop in loops)
        seconds = sum(loop.parts["data_wait"] for loop in loops) / images
        return Measured(
            config=config_to_dict(config), device=bench.device.type,
            world_size=bench.ranks.world_size, cores=bench.cores, threads=config.data.threads,
            compute_threads=torch.get_num_threads(), local_batch=bench.local_batch,
            samples=config.run.total_steps * config.run.global_batch_size,
            num_images=sum(map(len, bench.parts.datasets)), loader=loader, step=step, whole=whole,
            waiting=seconds / whole.wall,
            reading=min(1.0, sum(loop.reading for loop in loops) / images / whole.wall),
            periodic=tuple(self._periodic), stages=tuple(self._stages_of(loops, images)),
            decodes_files=bench.loader.reading.decodes_files,
            is_remote=any(dataset.cache is not None for dataset in bench.parts.datasets),
        )  # fmt: skip

    def _cost_of(self, loop: Loop, one: Contestant) -> Cost:
        """The cost of an image in a loop, with checkpoints and evaluations as the config says."""
        step = (loop.wall - loop.parts["checks"]) / loop.steps
        every = {
            CHECKPOINT: one.config.checkpoint.every_steps,
            EVALUATION: one.config.run.evaluate_every_steps,
        }
        more = sum(work.seconds_of_step(every[work.name], step) for work in self._periodic)
        images = loop.steps * one.local_batch
        return Cost(wall=(step + more) / one.local_batch, cpu=loop.cpu / images)

    def _stages_of(self, loops: Sequence[Loop], images: int) -> Iterator[Stage]:
        """The stages that the loop itself times: parts of a step, and logging."""

        def seconds_of(*parts: Part) -> float:
            return sum(loop.parts[part] for loop in loops for part in parts) / images

        micro = self.bench.config.efficiency.micro_batch_size
        encoding = "forward and backward"
        if 0 < micro < self.bench.local_batch:
            encoding += f" in micro-batches of {micro}"
        threads = min(self.bench.cores, torch.get_num_threads())
        walls = {
            encoding: seconds_of("forward", "loss", "backward"),
            "clip and update": seconds_of("optimizer"),
        }
        for name, wall in walls.items():
            yield Stage(name=name, cost=Cost(wall=wall, cpu=wall * threads), side="step")
        trackers = sum(loop.trackers for loop in loops) / images
        names, wall = ", ".join(self.bench.config.run.trackers), seconds_of("other")
        cost, note = Cost(wall=wall, cpu=wall + trackers), f"with {names}" if names else ""
        yield Stage(name=LOGGING, cost=cost, side="loop", note=note)
        reading = sum(loop.reading for loop in loops) / images
        yield Stage(name=READ, cost=Cost(wall=reading, cpu=0.0), side="loader")

    def _stages(self) -> None:
        """Times the parts of loader and step, and compares the ranks."""
        bench, turn, measured = self.bench, self.deadline.turn, self.measured
        self.deadline.phase = "the loader's stages"
        stages = self._loader_stages()
        self.deadline.phase = "the step's parts"
        parts = bench.step_stages(seconds=2 * turn)
        of_loop = [one for one in measured.stages if one.side != "step" or not parts]
        stages += [*of_loop, *parts, *bench.collectives()]
        own = [one for one in stages if one.side == "step" and one.name not in _SHARED]
        seconds = [measured.loader.wall, sum(one.cost.wall for one in own)]
        ranks = tuple((one, step) for one, step in gather_objects(seconds, bench.ranks))
        self._report(replace(measured, stages=tuple(stages), ranks=ranks))

    def _loader_stages(self) -> list[Stage]:
        """Decoding and cropping, and what augmentation adds to it."""
        bench, seconds, whole = self.bench, self.deadline.turn, self.measured.loader
        name, more, plain = decoding_stage(bench), list[Stage](), whole
        waits = usage_of(self.measured).waits_for_storage  # then it could hardly be measured
        for change in () if from_rank_0(waits, bench.ranks) else no_augmentation(bench):
            with bench.changed(change, None) as then:
                then.loader.take()  # builds its graph
                works = {
                    "both": partial(bench.loader_cost, bench.now, seconds=seconds),
                    "plain": partial(bench.loader_cost, then, seconds=seconds),
                }
                turns = in_turns(works, rounds=_ROUNDS, most_seconds=6 * seconds)
            both, plain = median(turns["both"]), median(turns["plain"])
            cpu, wall = max(0.0, both.cpu - plain.cpu), max(0.0, both.wall - plain.wall)
            more = [Stage(name=change.stage, cost=Cost(wall=wall, cpu=cpu), side="loader")]
        rows = bench.parts.datasets[0].samples[:1000]
        height, width = (int(np.median(rows[side])) for side in ("height", "width"))
        threads = count_of(bench.config.data.threads, "thread")
        note = f"{threads}, usually {height} x {width} pixels"
        return [Stage(name=name, cost=plain, side="loader", note=note), *more]

    # Changes.

    def _changes(self) -> None:
        """Measures changes until time is up, first those that relieve the limit."""
        bench, seconds = self.bench, self.deadline.seconds
        limit, _ = find_limit(self.measured)
        every = sorted(candidates(bench, self.measured), key=lambda one: _urgency(limit, one))
        # ranks can have measured different limits
        every = [Change(**one) for one in from_rank_0([asdict(one) for one in every], bench.ranks)]
        longest = 0.0
        for number, change in enumerate(every):
            least = -_OVERTIME * seconds if number == 0 else _AGAIN * seconds + longest / 2
            found: Trial | str = f"no time was left, --seconds was {seconds:g}"
            if self._is_time_left(least):
                begun = self.deadline.left
                found = self.trial(change)
                longest = max(longest, begun - self.deadline.left)
            self._add(change, found)

    def _add(self, change: Change, found: Trial | str) -> None:
        """Notes a trial of a change instead of an earlier one, or why it could not be measured."""
        measured = self.measured
        if isinstance(found, Trial):
            others = [one for one in measured.trials if one.change.option != change.option]
            self._report(replace(measured, trials=(*others, found)))
        else:
            said = (*measured.not_measured, f"{change.option}: {found}")
            self._report(replace(measured, not_measured=said))

    def confirm(self, applied: list[dict[str, Any]] | None) -> Change | None:
        """Measures the best change in longer turns, since coming first flatters it.

        With a list of what was applied, it tries changes until one helps again, of only those
        options that do not change results. They are added to the list, and the one to keep
        is returned.
        """
        by_cpu, ranks = self.measured.by_cpu, self.bench.ranks
        least = 0.0 if applied is None else -_OVERTIME * self.deadline.seconds
        changes = {one.change.option: one for one in advise(self.measured)[0]}
        if applied is not None:
            changes = {
                option: one for option, one in changes.items()
                if one.change.side != "images" and one.change.same_results
            }  # fmt: skip
        trials = {one.change.option: one.change for one in self.measured.trials}
        for option, gain in from_rank_0([(k, v.gain) for k, v in changes.items()], ranks):
            if not self._is_time_left(least):
                break
            found = self.trial(trials[option], turns=_LONGER)
            gains = list(found.gains(by_cpu=by_cpu)) if isinstance(found, Trial) else [0.0]
            is_kept = from_rank_0(min(gains) > 0, ranks)
            if applied is not None:
                applied.append({"option": option, "gain": gain, "again": gains, "is_kept": is_kept})
            self._add(trials[option], found)
            if applied is None:
                break
            if is_kept:
                return trials[option]
        return None

    def _is_time_left(self, least: float) -> bool:
        return from_rank_0(self.deadline.left > least, self.bench.ranks)

    def trial(self, change: Change, *, turns: float = 1.0) -> Trial | str:
        """A change in turns of `turns` times the usual length; or why it could not be measured."""
        bench, turn = self.bench, self.deadline.turn
        self.deadline.phase = change.option
        try:
            with (
                data_of(bench, change, self._folder, seconds=10 * turn) as parts,
                bench.changed(change, parts) as then,
            ):
                return self._in_turns(change, then, seconds=turn * turns)
        except (ValueError, ImageError) as error:
            return str(error)
        except torch.OutOfMemoryError:
            return "does not fit into memory beside the run's own model"

    def _in_turns(self, change: Change, then: Contestant, *, seconds: float) -> Trial:
        bench = self.bench
        own_loader = then.loader is not bench.now.loader

        def take(one: Contestant) -> Cost:
            skips = self._skips or (own_loader and one is then)
            return self._cost_of(bench.loop(one, seconds=seconds, skips=skips), one)

        if change.side != "nothing":  # warms up: the first turn also loads memory and code
            bench.loop(then, seconds=seconds, skips=False)
        taken: dict[bool, list[Cost]] = {False: [], True: []}
        for round_ in range(1 + _ROUNDS):
            # a drift in one direction favours neither
            for is_then in (False, True) if round_ % 2 else (True, False):
                taken[is_then].append(take(then if is_then else bench.now))
            trial = Trial(change=change, now=tuple(taken[False]), then=tuple(taken[True]))
            is_hopeless = round_ == 0 and trial.gains(by_cpu=self.measured.by_cpu)[0] < _HOPELESS
            is_late = self.deadline.left < -_OVERTIME * self.deadline.seconds
            if from_rank_0(is_hopeless or is_late, bench.ranks):
                break
        # the first round chose which changes get more rounds, so it would flatter them
        first = int(len(trial.now) > 1)
        return replace(trial, now=trial.now[first:], then=trial.then[first:])


def _urgency(limit: str, change: Change) -> int:
    """0 for changes of the limiting stage, 1 for others of the same side, 2 for the rest."""
    if limit.startswith(change.stage) or (limit == READ and change.side == "images"):
        return 0
    of_step = limit.startswith(("image", "text", "loss", "clip", "forward", "normalise"))
    return 1 if change.side == "both" or (change.side in ("step", "nothing")) == of_step else 2


@contextlib.contextmanager
def on_ranks(config: TrainConfig) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks of a run, and this one's device."""
    keep_freed_memory()
    device = choose_device(config.run.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    observers = logging.getLogger("unicl_fast.training.observers")
    observers.addHandler(logging.NullHandler())
    with (
        logging_at("unicl_fast", logging.ERROR),  # silences the start of each part
        logging_at(observers.name, logging.INFO),  # or evaluations go to stderr
        process_group(device, timeout_seconds=config.run.timeout_seconds) as ranks,
    ):
        yield ranks, device
