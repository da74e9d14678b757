"""What limits a run, what to do about it, and how long it will take.

    unicl-bench run --preset P --data DIR_OR_URL... [--nproc N] [--seconds 60] [OPTIONS]

OPTIONS are those of `unicl-pretrain`. The run is built as that program builds it, in a folder that
is removed at the end. Its parts are measured alone and together, and then changes of its settings,
each in turns with the run as it is. The rate of a change is what the model of model.py gives for
it; `--try` makes the change that promises the most, and reports the rate that came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from unicl_fast.config import TrainConfig, config_to_dict
from unicl_fast.distributed.launch import start_ranks
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.system.checked_fields import require
from unicl_fast.system.machine import choose_device, choose_environment, keep_freed_memory
from unicl_fast.tools.pretrain import parse_arguments, split_config
from unicl_fast.training.data import longest_text

from ..harness import Stage
from .advise import Advice, advise, find_limit
from .bench import Bench
from .clocks import in_turns, median, median_ratio
from .diagnose import Budget, diagnose
from .model import Measured
from .outlook import largest_batch, on_ranks
from .report import report_lines

_TRIED_STEPS = 8
_EPOCHS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Stage):
    """What limits a run of unicl-pretrain, what to change, and how long it takes.

    All options of unicl-pretrain are taken too, such as --preset and --efficiency.precision.
    """

    data: tuple[str, ...] = ()
    """Packed data sets, each DIR or DIR=WEIGHT, where DIR may be a URL; as --data.train."""
    nproc: int = 1
    """Ranks to start on this machine."""
    seconds: float = 60.0
    """Time to measure for; start and end come on top."""
    try_it: Annotated[bool, tyro.conf.arg(name="try")] = False
    """Make the change that promises the most, and report the rate that comes."""
    rounds: int = 3
    """Turns of --try."""
    samples: int = 0
    """Length of the run that is planned; 0 takes run.samples or run.steps, or 32 epochs."""
    price_per_hour: float = 0.0
    """Price of one rank for an hour."""
    failures_per_day: float = 0.02
    """Failures of one rank in a day, for the cadence of checkpoints."""
    options: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Options of unicl-pretrain."""
    given: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """All options as they were given, for the ranks."""

    @classmethod
    def parse(cls, options: Sequence[str], *, prog: str) -> Run:
        """Takes its own options, and leaves the others to unicl-pretrain."""
        chosen, rest = tyro.cli(cls, args=list(options), prog=prog, return_unknown_args=True)
        return dataclasses.replace(chosen, options=tuple(rest), given=tuple(options))

    def run(self) -> None:
        """Measures and reports. Raises as `unicl-pretrain` does."""
        require(self.seconds > 0, f"--seconds must be positive, not {self.seconds:g}")
        if self.nproc > 1 and "WORLD_SIZE" not in os.environ:
            start_ranks("unicl_fast.benchmarks.run", nproc=self.nproc, argv=["run", *self.given])
        train = ["--data.train", *self.data] if self.data else []
        with tempfile.TemporaryDirectory(prefix="unicl-bench-") as scratch:
            arguments = [*self.options, *train, "--out", str(Path(scratch) / "run")]
            config = split_config(parse_arguments(arguments))
            choose_environment(config.run.device)
            keep_freed_memory()
            self._measure(config, Path(scratch))

    def _measure(self, config: TrainConfig, scratch: Path) -> None:
        with on_bench(config, scratch) as bench:
            is_main = bench.ranks.is_main
            budget = Budget(self.seconds, is_shown=is_main)
            with contextlib.closing(budget):
                start = seconds_since_start()
                measured = diagnose(bench, budget, folder=scratch / "trial", start_seconds=start)
            useful, idle = advise(measured)
            tried = self._try(bench, useful, measured, scratch) if self.try_it else None
            if is_main:
                self._report(bench, measured, useful, idle, tried)

    def _report(
        self,
        bench: Bench,
        measured: Measured,
        useful: list[Advice],
        idle: list[Advice],
        tried: dict[str, Any] | None,
    ) -> None:
        config, limit = bench.config, find_limit(measured)
        samples = self.samples or config.run.total_steps * config.run.global_batch_size
        plans = on_ranks(
            measured,
            samples=samples,
            price_per_hour=self.price_per_hour,
            failures_per_day=self.failures_per_day,
        )
        batch = largest_batch(
            config,
            world_size=bench.ranks.world_size,
            device_bytes=bench.free_bytes,
            device_type=bench.device.type,
            longest_text=longest_text(bench.parts.datasets, bench.parts.prompts),
        )
        lines = report_lines(
            measured, limit, useful, idle, plans,
            largest_batch=batch, priced=self.price_per_hour > 0,
        )  # fmt: skip
        print("\n".join(lines), flush=True)
        if tried is not None:
            print(
                f"TRIED {tried['option']}: {tried['predicted']:,.0f} images/s were predicted, "
                f"{tried['measured']:,.0f} came ({tried['now']:,.0f} without it in the same turns)"
            )
        self.write_result(
            {},
            "timm",
            "nvidia-dali-cuda120",
            measured=measured.as_dict(),
            limit=dataclasses.asdict(limit),
            advice=[dataclasses.asdict(one) for one in useful],
            does_not_matter=[dataclasses.asdict(one) for one in idle],
            plan=[dataclasses.asdict(one) for one in plans],
            largest_batch=batch,
            tried=tried,
            config=config_to_dict(config),
        )

    def _try(
        self, bench: Bench, useful: list[Advice], measured: Measured, scratch: Path
    ) -> dict[str, Any] | None:
        """Runs with the best change that settings or data can make, in turns with the run now."""
        for number, advice in enumerate(useful):
            if advice.variant.set or advice.variant.data:
                return try_out(
                    bench, advice, measured, scratch / f"tried-{number}",
                    rounds=self.rounds, seconds=self.seconds / 12,
                )  # fmt: skip
        return None


def try_out(
    bench: Bench,
    advice: Advice,
    measured: Measured,
    folder: Path,
    *,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """The rate that a change gives in the trainer's own loop, beside that of the run as it is."""
    variant = advice.variant
    config = bench.changed(variant.set)
    if variant.data:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, train=variant.data)
        )
    other = Bench(config, folder=folder, ranks=bench.ranks, device=bench.device)
    with contextlib.closing(other):
        turns = in_turns(
            {
                "now": lambda: bench.whole(steps_in(bench, measured.rate, seconds)),
                "then": lambda: other.whole(steps_in(other, advice.images_per_second, seconds)),
            },
            rounds=rounds,
        )
    now, then = median(turns["now"]), median(turns["then"])
    # the machine may be slower now than it was for the diagnosis: the ratio is what was predicted
    gain = 1 / median_ratio(turns["then"], turns["now"]).wall
    return {
        "option": variant.option,
        "predicted": advice.images_per_second,
        "measured": measured.world_size / then.wall,
        "now": measured.world_size / now.wall,
        "predicted_gain": advice.images_per_second / measured.rate,
        "measured_gain": gain,
    }


def steps_in(bench: Bench, rate: float, seconds: float) -> int:
    """Steps in so many seconds at a rate of all ranks, at least as many as a turn needs."""
    return max(_TRIED_STEPS, round(seconds * rate / bench.config.run.global_batch_size))


@contextlib.contextmanager
def on_bench(config: TrainConfig, scratch: Path) -> Iterator[Bench]:
    """The run of a config on this rank's bench; caches of object stores begin empty."""
    logging.getLogger("unicl_fast").setLevel(logging.WARNING)
    device = choose_device(config.run.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cache = dataclasses.replace(config.data, cache_folder=str(scratch / "cache"))
    config = dataclasses.replace(config, data=cache)
    with process_group(device, timeout_seconds=config.run.timeout_seconds) as ranks:
        bench = Bench(config, folder=scratch / "run", ranks=ranks, device=device)
        with contextlib.closing(bench):
            yield bench


def seconds_since_start() -> float:
    """Seconds since this process was started; Linux only."""
    text = Path("/proc/self/stat").read_text(encoding="utf-8")
    ticks = int(text[text.rindex(")") + 2 :].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
