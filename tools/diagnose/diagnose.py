"""Measures a run on the bench: the whole, its stages, and changes until time is up.

All ranks do the same at the same time, so rank 0 decides what depends on measurements.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from unicl_fast.batch import Batch
from unicl_fast.distributed.ranks import from_rank_0, gather_objects
from unicl_fast.images.codec import ImageError

from .advise import advise, find_limit, usage_of
from .bench import Bench, Contestant
from .clocks import Loop, Watch
from .deadline import Budget, seconds_since_start
from .loader_parts import feed_stages, graph_stages
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
    RankFigures,
    Stage,
    Trial,
    median,
)
from .variants import candidates, data_of

_NOT_YET = Cost(wall=0.0, cpu=0.0)
_HOPELESS = -0.03  # a change whose first round loses more than this part of the rate gets no others
_OVERTIME = 0.7
"""Part of the seconds by which the first change can run over: without one there is no advice."""
_AGAIN = 0.25  # part of the seconds kept for measuring the best change again
LONGER = 2.0  # multiple of the usual turn for measuring a change again before it is believed
_LOADER_MATTERS = 0.02
"""A loop that waits longer for batches, as part of its time, skips those made during a pause."""
_LOSS = "loss and its gradient"  # the part of a step in which ranks wait for each other


class Diagnoser:
    """One rank's diagnosis of a run; all ranks call the same methods together."""

    def __init__(
        self,
        bench: Bench,
        budget: Budget,
        *,
        folder: Path,
        rounds: int,
        report: Callable[[Measured], None],
    ) -> None:
        """`folder` is for small data sets; `report` is called with each new result."""
        self.bench, self.budget, self._folder, self._report = bench, budget, folder, report
        self._rounds = rounds
        self._skip, self._least = 0, 1
        self._periodic: dict[str, Periodic] = {}
        self._watch = Watch(set(gather_objects(os.getpid(), bench.ranks)))
        self._start_seconds = seconds_since_start()
        bench.most_seconds = budget.seconds / 10

    def diagnose(self) -> Measured:
        measured, batch = self._together_and_separately()
        self._report(measured)
        stages = self._stages(measured, batch)
        measured = dataclasses.replace(
            measured,
            stages=tuple(stages),
            ranks=self._figures_of_ranks(measured.loader, stages),
            largest_batch=self.bench.largest_batch(),
        )
        self._report(measured)
        return self._with_changes(measured)

    # The run as it is.

    def _together_and_separately(self) -> tuple[Measured, Batch]:
        """Turns of the run, and of its loader and its step alone; returns a batch, too."""
        bench, turn = self.bench, self.budget.turn
        first = bench.loop(bench.now, seconds=turn, skip=1, least=1)
        self._report(self._measured([first], loader=_NOT_YET, step=_NOT_YET))
        batch = bench.kept_batch()
        self._periodic[CHECKPOINT] = bench.checkpoint(seconds=2 * turn)
        if (evaluation := bench.evaluation()) is not None:
            self._periodic[EVALUATION] = evaluation
        waits = first.parts.get("data_wait", 0.0) > _LOADER_MATTERS * first.wall
        # long enough for a checkpoint and an evaluation, if they are frequent
        periodic = sum(first.parts.get(name, 0.0) for name in (CHECKPOINT, EVALUATION))
        pace = (first.wall - periodic) / first.steps
        cadences = {name: work.every_steps for name, work in self._periodic.items()}
        due = {name: every for name, every in cadences.items() if 0 < every * pace < 4 * turn}
        least = 1 + max(due.values(), default=waits)
        # the first checkpoint does not wait for a previous one
        skip = max(due.get(CHECKPOINT, 0), bench.now.begun if waits else 0)
        count = max(1, min(200, round(turn / pace)))
        count, self._least, self._skip = from_rank_0([count, least, skip], bench.ranks)
        works: dict[str, Callable[[], Any]] = {
            "step": lambda: bench.step_cost(batch, count=count),
            "loader": lambda: bench.loader_cost(seconds=turn),
            "whole": lambda: self._turn_of_run(2 * turn),
        }
        turns = in_turns(works, rounds=self._rounds, most_seconds=self.budget.seconds / 4)
        if saves := sum(loop.saves for loop in turns["whole"]):
            # in the loop, where a checkpoint can also wait for the previous one
            seconds = sum(loop.parts.get(CHECKPOINT, 0.0) for loop in turns["whole"]) / saves
            known = self._periodic[CHECKPOINT]
            self._periodic[CHECKPOINT] = dataclasses.replace(known, seconds=seconds)
        loader, step = median(turns["loader"]), median(turns["step"])
        return self._measured(turns["whole"], loader=loader, step=step), batch

    def _measured(self, loops: Sequence[Loop], *, loader: Cost, step: Cost) -> Measured:
        bench, wall = self.bench, sum(loop.wall for loop in loops)
        cores, busiest = self._watch.look()
        return Measured(
            device=bench.device.type, world_size=bench.ranks.world_size,
            gpus=torch.cuda.device_count() if bench.device.type == "cuda" else 0,
            ranks_per_machine=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            cores=bench.cores, others_cores=cores / bench.ranks.world_size, others=busiest,
            threads=bench.config.data.threads, compute_threads=torch.get_num_threads(),
            local_batch=bench.local_batch, loader=loader, step=step,
            whole=median(self._cost_of(loop, bench.now) for loop in loops),
            waiting=sum(loop.parts.get("data_wait", 0.0) for loop in loops) / wall,
            reading=min(1.0, sum(loop.reading for loop in loops) / wall),
            periodic=tuple(self._periodic.values()), start_seconds=self._start_seconds,
            stages=tuple(self._stages_of_loop(loops)),
            decodes_files=bench.loader.reading.decodes_files,
            is_remote=any(dataset.cache is not None for dataset in bench.parts.datasets),
        )  # fmt: skip

    def _turn_of_run(self, seconds: float) -> Loop:
        bench = self.bench
        return bench.loop(bench.now, seconds=seconds, skip=self._skip, least=self._least)

    def _cost_of(self, loop: Loop, one: Contestant) -> Cost:
        """The cost of an image in a loop, with checkpoints and evaluations as the config says."""
        wall = loop.wall - loop.parts.get("checks", 0.0)
        cadences = {
            CHECKPOINT: one.config.checkpoint.every_steps,
            EVALUATION: one.config.run.evaluate_every_steps,
        }
        for name, known in self._periodic.items():
            seconds, taken = known.seconds, loop.parts.get(name, 0.0)
            if name == CHECKPOINT and loop.saves:
                seconds = taken / loop.saves
            if name == EVALUATION:
                seconds = self.bench.evaluation_seconds
            wall += (loop.steps / cadences[name] * seconds if cadences[name] else 0.0) - taken
        images = loop.steps * one.local_batch
        return Cost(wall=wall / images, cpu=loop.cpu / images)

    # Its stages.

    def _stages_of_loop(self, loops: Sequence[Loop]) -> Iterator[Stage]:
        """The stages that the loop itself times: parts of a step, and logging."""
        images = self.bench.local_batch * sum(loop.steps for loop in loops)

        def seconds_of(*parts: str) -> float:
            return sum(loop.parts.get(part, 0.0) for loop in loops for part in parts) / images

        micro = self.bench.config.efficiency.micro_batch_size
        encoding = "forward and backward"
        if 0 < micro < self.bench.local_batch:
            encoding += f" in micro-batches of {micro}"
        threads = min(self.bench.cores, torch.get_num_threads())
        for name, parts in {
            encoding: ("forward", "loss", "backward", "communication"),
            "clip and update": ("optimizer",),
        }.items():
            wall = seconds_of(*parts)
            yield Stage(name=name, cost=Cost(wall=wall, cpu=wall * threads), side="step")
        trackers = sum(loop.trackers for loop in loops) / images
        names = ", ".join(self.bench.config.run.trackers)
        wall = seconds_of("other")
        yield Stage(
            name=LOGGING, cost=Cost(wall=wall, cpu=wall + trackers), side="loop",
            note=f"with {names}" if names else "",
        )  # fmt: skip

    def _stages(self, measured: Measured, batch: Batch) -> list[Stage]:
        bench, turn = self.bench, self.budget.turn
        self.budget.phase = "the loader's stages"
        stages = feed_stages(bench, seconds=turn / 2)
        if not usage_of(measured).waits_for_storage:  # or it could hardly be measured in time
            stages += graph_stages(bench, seconds=turn)
        self.budget.phase = "the step's parts"
        parts = bench.step_stages(batch, seconds=2 * turn)
        stages += [one for one in measured.stages if one.side != "step" or not parts]
        more = (*parts, bench.copy_stage(batch), bench.collectives())
        return stages + [stage for stage in more if stage is not None]

    def _figures_of_ranks(self, loader: Cost, stages: Sequence[Stage]) -> tuple[RankFigures, ...]:
        """Each rank's seconds without waiting for others, from all ranks."""
        shared = (_LOSS, "collectives")
        own = [one for one in stages if one.side == "step" and one.name not in shared]
        seconds = [loader.wall, sum(one.cost.wall for one in own)]
        every = enumerate(gather_objects(seconds, self.bench.ranks))
        return tuple(RankFigures(rank=rank, loader=one, step=step) for rank, (one, step) in every)

    # Changes.

    def _with_changes(self, measured: Measured) -> Measured:
        """Measures changes until time is up, first those that relieve the limit."""
        bench, budget = self.bench, self.budget
        left_out: list[str] = []
        limit = find_limit(measured)
        every = sorted(candidates(bench, measured), key=lambda one: _urgency(limit.stage, one))
        # ranks can have measured different limits
        fields = from_rank_0([dataclasses.asdict(one) for one in every], bench.ranks)
        every = [Change(**one) for one in fields]
        longest = 0.0
        kept_seconds = _AGAIN * budget.seconds
        for number, change in enumerate(every):
            least = -_OVERTIME * budget.seconds if number == 0 else kept_seconds + longest / 2
            if not self._is_time_left(least):
                said = f"no time was left, --seconds was {budget.seconds:g}"
                left_out.append(f"{change.option}: {said}")
                continue
            begun = time.perf_counter()
            found = self.trial(change, by_cpu=measured.by_cpu)
            longest = max(longest, time.perf_counter() - begun)
            if isinstance(found, Trial):
                measured = dataclasses.replace(measured, trials=(*measured.trials, found))
            else:
                left_out.append(found)
            measured = dataclasses.replace(measured, not_measured=tuple(left_out))
            self._report(measured)
        measured = self._with_the_best_again(measured)
        cores, others = self._watch.look()
        cores /= bench.ranks.world_size
        left = tuple(left_out)
        return dataclasses.replace(measured, not_measured=left, others_cores=cores, others=others)

    def _with_the_best_again(self, measured: Measured) -> Measured:
        """Measures the best change in longer turns, since coming first flatters it."""
        best = next((one.change.option for one in advise(measured)[0]), "")
        option = from_rank_0(best, self.bench.ranks)
        kept = [trial for trial in measured.trials if trial.change.option != option]
        if len(kept) == len(measured.trials) or not self._is_time_left(0.0):
            return measured
        (change,) = (one.change for one in measured.trials if one.change.option == option)
        again = self.trial(change, by_cpu=measured.by_cpu, turns=LONGER)
        if isinstance(again, Trial):
            again = dataclasses.replace(again, is_again=True)
            measured = dataclasses.replace(measured, trials=(*kept, again))
        return measured

    def _is_time_left(self, least: float) -> bool:
        return from_rank_0(self.budget.left > least, self.bench.ranks)

    def trial(self, change: Change, *, by_cpu: bool, turns: float = 1.0) -> Trial | str:
        """A change in turns of `turns` times the usual length; or why it could not be measured."""
        bench, seconds = self.bench, self.budget.turn * turns
        self.budget.phase = change.option
        try:
            with (
                data_of(bench, change, self._folder, seconds=10 * self.budget.turn) as parts,
                bench.changed(change, parts) as then,
            ):
                return self._in_turns(change, then, seconds=seconds, by_cpu=by_cpu)
        except (ValueError, ImageError) as error:
            return f"{change.option}: {error}"
        except torch.OutOfMemoryError:
            return f"{change.option}: does not fit into memory beside the run's own model"

    def _in_turns(self, change: Change, then: Contestant, *, seconds: float, by_cpu: bool) -> Trial:
        bench = self.bench
        own_loader = then.loader is not bench.now.loader

        def take(is_then: bool) -> Cost:
            if not is_then:
                return self._cost_of(self._turn_of_run(seconds), bench.now)
            skip = then.begun if own_loader else self._skip
            least = self._least if change.side != "nothing" else 1 + bool(self._skip)
            loop = bench.loop(then, seconds=seconds, skip=skip, least=least)
            return self._cost_of(loop, then)

        if change.side != "nothing":  # warms up: the first turn also loads memory and code
            bench.loop(then, seconds=seconds, skip=0, least=1)
        taken: dict[bool, list[Cost]] = {False: [], True: []}
        for round_ in range(1 + self._rounds):
            # a drift in one direction favours neither
            for is_then in (False, True) if round_ % 2 else (True, False):
                taken[is_then].append(take(is_then))
            trial = Trial(change=change, now=tuple(taken[False]), then=tuple(taken[True]))
            is_hopeless = round_ == 0 and trial.gains(by_cpu=by_cpu)[0] < _HOPELESS
            is_late = self.budget.left < -_OVERTIME * self.budget.seconds
            if from_rank_0(is_hopeless or is_late, bench.ranks):
                break
        # the first round chose which changes get more rounds, so it would flatter them
        first = int(len(trial.now) > 1)
        return dataclasses.replace(trial, now=trial.now[first:], then=trial.then[first:])


def _urgency(limit: str, change: Change) -> int:
    """0 for changes of the limiting stage, 1 for others of the same side, 2 for the rest."""
    if limit.startswith(change.stage) or (limit == READ and change.side == "images"):
        return 0
    of_step = limit.startswith(("image", "text", "loss", "clip", "forward", "normalise"))
    return 1 if change.side == "both" or (change.side in ("step", "nothing")) == of_step else 2
