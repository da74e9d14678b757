"""`unicl-bench run`: what limits a run, what to do about it, and how long it will take.

    unicl-bench run --preset P --data DIR_OR_URL... [--nproc N] [--seconds 60] [--json FILE]
        [OPTIONS of unicl-pretrain]

The run is built as that program builds it, in a folder that is removed at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unicl_fast.config import TrainConfig, config_to_dict
from unicl_fast.distributed.launch import start_ranks
from unicl_fast.system.atomic_files import temporary_folder
from unicl_fast.system.checked_fields import require
from unicl_fast.system.machine import choose_device, choose_environment, keep_freed_memory
from unicl_fast.system.program import logging_at
from unicl_fast.tools.pretrain import parse_arguments, split_config

from ..harness import Stage

if TYPE_CHECKING:  # it imports torch, which reads the environment once
    from .bench import Bench

_START_SECONDS = 60.0
"""For imports, data and model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Stage):
    """Says what limits a run of unicl-pretrain, what to change, and how long it takes.

    All options of unicl-pretrain are taken too, such as --preset and --efficiency.precision.
    """

    data: tuple[str, ...] = ()
    """Packed data sets, each DIR or DIR=WEIGHT, where DIR may be a URL; as --data.train."""
    nproc: int = 1
    """Ranks to start on this machine."""
    seconds: float = 60.0
    """Time to measure for. It ends, in any case, after twice that and 60 seconds."""
    folder: Path | None = None
    """Folder for temporary files, such as the cache of a store; by default the system's."""
    rounds: int = 3
    """Turns of the run, and of each change; a change that loses in its first turn gets one."""
    samples: int = 0
    """Length of the run whose time is given; 0 takes run.samples or run.steps, or 32 epochs."""
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
        with temporary_folder("unicl-bench-", root=self.folder) as scratch:
            arguments = [*self.options, *train, "--out", str(scratch / "run")]
            config = split_config(parse_arguments(arguments))
            # before torch is imported, which reads it once
            choose_environment(config.run.device)
            # a loader that does not come back cannot be interrupted in Python
            most = _START_SECONDS + 2 * self.seconds
            faulthandler.dump_traceback_later(most, exit=True, file=2)
            try:
                with on_bench(config, scratch) as bench:
                    self._measure(bench)
            finally:
                faulthandler.cancel_dump_traceback_later()

    def _measure(self, bench: Bench) -> None:
        from .diagnose import Diagnoser
        from .report import Diagnosis, report_lines

        is_main, run = bench.ranks.is_main, bench.config.run
        say = functools.partial(print, file=sys.stderr) if is_main else lambda _: None
        diagnoser = Diagnoser(bench, seconds=self.seconds, rounds=self.rounds, say=say)
        measured = diagnoser.diagnose()
        samples = self.samples or run.total_steps * run.global_batch_size
        config = config_to_dict(bench.config)
        found = Diagnosis(measured=measured, hours=samples / measured.rate / 3600, config=config)
        if is_main:
            print("\n".join(report_lines(found)), flush=True)
            self.write_result({}, "timm", "nvidia-dali-cuda120", **found.as_dict())


@contextlib.contextmanager
def on_bench(config: TrainConfig, scratch: Path) -> Iterator[Bench]:
    """The run of a config on this rank's bench; `scratch` is an empty folder of this rank."""
    import torch

    from unicl_fast.distributed.rendezvous import process_group

    from .bench import Bench

    keep_freed_memory()
    device = choose_device(config.run.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with (
        logging_at("unicl_fast", logging.ERROR),  # what each part says at its start
        process_group(device, timeout_seconds=config.run.timeout_seconds) as ranks,
        contextlib.closing(Bench(config, folder=scratch, ranks=ranks, device=device)) as bench,
    ):
        # each measurement collects garbage first: 0.3 s, if it looked at all that stays
        gc.collect()
        gc.freeze()
        try:
            yield bench
        finally:
            gc.unfreeze()
