"""Measures a run on the bench: all of it together, its stages, and changes until time is up.

All ranks do the same at the same time: what depends on measurements is decided by rank 0.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from unicl_fast.batch import Batch
from unicl_fast.distributed.ranks import from_rank_0, gather_objects
from unicl_fast.system.machine import cpu_times

from ..harness import in_turns
from .advise import advise, find_limit, waits_for_storage
from .bench import Bench, Contestant, Turn
from .loader_parts import feed_stages, graph_stages
from .model import Change, Cost, Measured, RankFigures, Stage, Trial, median
from .variants import candidates

_HOPELESS = -0.03
"""A change whose first round loses more than this part of the rate gets no others."""
_OVERTIME = 0.7
"""Part of the seconds by which the first change may take longer: without one there is no advice."""
_AGAIN = 0.25
"""Part of the seconds that is kept to measure the best change again."""
_LONGER = 2.0
"""Times the usual turn, in which a change is measured again before it is believed."""
_LOSS = "loss and its gradient"
"""The part of a step in which ranks wait for each other."""


class Diagnoser:
    """One rank's diagnosis of a run; all ranks call the same methods together."""

    def __init__(
        self, bench: Bench, *, seconds: float, rounds: int, say: Callable[[str], object]
    ) -> None:
        """`say` is called with what is measured next."""
        self.bench, self.seconds, self._rounds, self._say = bench, seconds, rounds, say
        self._turn = min(1.0, seconds / 80)
        self._begun, self._cpu = time.perf_counter(), cpu_times()

    @property
    def _left(self) -> float:
        """Seconds that are left; negative when it takes longer."""
        return self.seconds - (time.perf_counter() - self._begun)

    def diagnose(self) -> Measured:
        measured, batch = self._together_and_separately()
        stages = self._stages(measured, batch)
        measured = dataclasses.replace(
            measured,
            stages=tuple(stages),
            ranks=self._figures_of_ranks(measured.loader, stages),
            largest_batch=self.bench.largest_batch(),
        )
        return self._with_changes(measured)

    # The run as it is.

    def _together_and_separately(self) -> tuple[Measured, Batch]:
        """Turns of the run, and of its loader and its step by themselves; a batch."""
        bench, turn = self.bench, self._turn
        self._say("the run as it is")
        first = bench.turn(bench.now, seconds=turn)
        batch = bench.kept_batch()
        pace = first.cost.wall * bench.local_batch
        count = from_rank_0(max(1, min(200, round(turn / pace))), bench.ranks)
        works: dict[str, Callable[[], Any]] = {
            "step": lambda: bench.step_cost(batch, count=count),
            "loader": lambda: bench.loader_cost(seconds=turn),
            "whole": lambda: bench.turn(bench.now, seconds=2 * turn),
        }
        turns = in_turns(works, rounds=self._rounds, most_seconds=self.seconds / 4)
        loader, step = median(turns["loader"]), median(turns["step"])
        return self._measured(turns["whole"], loader=loader, step=step), batch

    def _measured(self, turns: Sequence[Turn], *, loader: Cost, step: Cost) -> Measured:
        bench = self.bench
        wall = sum(turn.cost.wall * turn.steps for turn in turns) * bench.local_batch
        return Measured(
            device=bench.device.type,
            cores=bench.cores,
            threads=bench.config.data.threads,
            compute_threads=torch.get_num_threads(),
            world_size=bench.ranks.world_size,
            local_batch=bench.local_batch,
            loader=loader,
            step=step,
            whole=median(turn.cost for turn in turns),
            waiting=sum(turn.parts["data_wait"] for turn in turns) / wall,
            reading=min(1.0, sum(turn.reading for turn in turns) / wall),
            others_cores=self._others_cores(),
            stages=tuple(self._stages_of_turns(turns)),
            gpus=torch.cuda.device_count() if bench.device.type == "cuda" else 0,
            ranks_per_machine=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )

    def _others_cores(self) -> float:
        """Cores that other processes have taken so far, for each rank of this machine."""
        own, _, busy = (now - then for now, then in zip(cpu_times(), self._cpu, strict=True))
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        seconds = time.perf_counter() - self._begun
        return max(0.0, busy - own * ranks) / ranks / seconds

    # Its stages.

    def _stages_of_turns(self, turns: Sequence[Turn]) -> list[Stage]:
        """The parts of a step that the trainer itself times."""
        bench = self.bench
        images = bench.local_batch * sum(turn.steps for turn in turns)
        micro = bench.config.efficiency.micro_batch_size
        encoding = "forward and backward"
        if 0 < micro < bench.local_batch:
            encoding += f" in micro-batches of {micro}"
        parts: dict[str, tuple[Any, ...]] = {
            encoding: ("forward", "loss", "backward", "communication"),
            "clip and update": ("optimizer",),
        }
        stages = []
        for name, names in parts.items():
            wall = sum(turn.parts[part] for turn in turns for part in names) / images
            cpu = wall * min(bench.cores, torch.get_num_threads())
            stages.append(Stage(name=name, cost=Cost(wall=wall, cpu=cpu), side="step"))
        return stages

    def _stages(self, measured: Measured, batch: Batch) -> list[Stage]:
        bench, turn = self.bench, self._turn
        self._say("the loader's stages")
        stages = feed_stages(bench, seconds=turn / 2)
        if not waits_for_storage(measured):  # in which time it could hardly be measured
            stages += graph_stages(bench, seconds=turn)
        self._say("the step's parts")
        parts = bench.step_stages(batch, seconds=2 * turn)
        more = (*(parts or measured.stages), bench.copy_stage(batch), bench.collectives())
        return stages + [stage for stage in more if stage is not None]

    def _figures_of_ranks(self, loader: Cost, stages: Sequence[Stage]) -> tuple[RankFigures, ...]:
        """The seconds that each rank takes by itself, from all ranks."""
        ranks = self.bench.ranks
        step = sum(
            stage.cost.wall
            for stage in stages
            if stage.side == "step" and stage.name not in (_LOSS, "collectives")
        )
        every = gather_objects([ranks.rank, loader.wall, step], ranks)
        return tuple(RankFigures(rank=int(r), loader=one, step=other) for r, one, other in every)

    # Changes.

    def _with_changes(self, measured: Measured) -> Measured:
        """Measures changes, those first that relieve what limits the run, until time is up."""
        left_out: list[str] = []
        limit = find_limit(measured)
        every = sorted(candidates(self.bench), key=lambda one: _urgency(limit.stage, one))
        # others may have measured something else
        fields = from_rank_0([dataclasses.asdict(one) for one in every], self.bench.ranks)
        longest = 0.0
        for number, change in enumerate(Change(**one) for one in fields):
            least = _AGAIN * self.seconds + longest / 2
            if not self._is_time_left(least if number else -_OVERTIME * self.seconds):
                left_out.append(f"{change.option}: no time was left, --seconds was "
                                f"{self.seconds:g}")  # fmt: skip
                continue
            begun = time.perf_counter()
            found = self.trial(change, by_cpu=measured.by_cpu)
            longest = max(longest, time.perf_counter() - begun)
            if isinstance(found, Trial):
                measured = dataclasses.replace(measured, trials=(*measured.trials, found))
            else:
                left_out.append(found)
        return dataclasses.replace(
            self._with_the_best_again(measured),
            not_measured=tuple(left_out),
            others_cores=self._others_cores(),
        )

    def _with_the_best_again(self, measured: Measured) -> Measured:
        """The best change in longer turns: that it came out first has flattered it."""
        best = next((one.change.option for one in advise(measured)[0]), "")
        option = from_rank_0(best, self.bench.ranks)
        kept = [trial for trial in measured.trials if trial.change.option != option]
        if len(kept) == len(measured.trials) or not self._is_time_left(0.0):
            return measured
        (change,) = (one.change for one in measured.trials if one.change.option == option)
        again = self.trial(change, by_cpu=measured.by_cpu, turns=_LONGER)
        if isinstance(again, Trial):
            measured = dataclasses.replace(measured, trials=(*kept, again))
        return measured

    def _is_time_left(self, least: float) -> bool:
        return from_rank_0(self._left > least, self.bench.ranks)

    def trial(self, change: Change, *, by_cpu: bool, turns: float = 1.0) -> Trial | str:
        """A change in turns with the run as it is; or why it was not measured.

        A turn takes `turns` times the usual one.
        """
        self._say(change.option)
        try:
            with self.bench.changed(change) as then:
                return self._in_turns(change, then, seconds=self._turn * turns, by_cpu=by_cpu)
        except ValueError as error:
            return f"{change.option}: {error}"
        except torch.OutOfMemoryError:
            return f"{change.option}: does not fit into the memory next to the run's own model"

    def _in_turns(self, change: Change, then: Contestant, *, seconds: float, by_cpu: bool) -> Trial:
        bench = self.bench
        bench.turn(then, seconds=seconds / 4)  # the first turn also fetches memory and code
        taken: dict[bool, list[Cost]] = {False: [], True: []}
        for round_ in range(1 + self._rounds):
            # what drifts in one direction favours neither
            for is_then in (False, True) if round_ % 2 else (True, False):
                one = then if is_then else bench.now
                taken[is_then].append(bench.turn(one, seconds=seconds).cost)
            trial = Trial(change=change, now=tuple(taken[False]), then=tuple(taken[True]))
            is_hopeless = round_ == 0 and trial.gains(by_cpu=by_cpu)[0] < _HOPELESS
            is_late = self._left < -_OVERTIME * self.seconds
            if from_rank_0(is_hopeless or is_late, bench.ranks):
                break
        # the first round chose which changes are measured further: it would flatter them
        first = int(len(trial.now) > 1)
        return dataclasses.replace(trial, now=trial.now[first:], then=trial.then[first:])


def _urgency(limit: str, change: Change) -> int:
    """0 for changes of the stage that limits, 1 for others of the same side, 2 for the rest."""
    if limit.startswith(change.stage):
        return 0
    of_step = limit.startswith(("image", "text", "loss", "clip", "forward", "normalise"))
    return 1 if change.side == "both" or (change.side in ("step", "nothing")) == of_step else 2
