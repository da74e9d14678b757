"""`unicl-bench run`: what limits a run, what to do about it, and how long it will take.

    unicl-bench run --preset P --data DIR_OR_URL... [--nproc N] [--seconds 60] [--out FOLDER]
        [--apply] [--against OLD.json] [OPTIONS of unicl-pretrain]

The run is built as that program builds it, in a folder that is removed at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unicl_fast.distributed.launch import start_ranks
from unicl_fast.system.atomic_files import make_folder, write_text_atomically
from unicl_fast.system.checked_fields import require
from unicl_fast.system.machine import choose_environment
from unicl_fast.system.wording import without_secrets
from unicl_fast.tools.pretrain import parse_arguments, split_config

from ..harness import Stage
from .deadline import Deadline
from .earlier import Comparison, KeptReport, as_kept, compare, read_report

if TYPE_CHECKING:  # it imports torch, which reads the environment once
    from .report import Diagnosis


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
    """Time to measure for. It ends, in any case, after twice that and 60 seconds; with --apply
    each further pass may take as long again."""
    apply: bool = False
    """Follow the best advice that changes no result, measure it again, keep it if it helps, and so
    on; print the options to use."""
    out: Path | None = None
    """Folder for the report: report.html and report.json."""
    against: Path | None = None
    """The report.json of an earlier run to compare with; ends with 1 on a regression."""
    tolerance: float = 0.05
    """Part of the rate by which a run may be slower, beyond the spread of both, with --against."""
    folder: Path | None = None
    """Folder on the disk that checkpoints go to; by default a temporary one."""
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
        """Measures and reports; ends with 1 on a regression. Raises as `unicl-pretrain` does."""
        require(self.seconds > 0, f"--seconds must be positive, not {self.seconds:g}")
        require(0 <= self.tolerance < 1, f"--tolerance must be in 0 to 1, not {self.tolerance:g}")
        # files that cannot be read or written are refused before anything is measured
        earlier = None if self.against is None else read_report(self.against)
        if self.out is not None:
            make_folder(self.out)
        if self.nproc > 1 and "WORLD_SIZE" not in os.environ:
            start_ranks("unicl_fast.benchmarks.run", nproc=self.nproc, argv=["run", *self.given])
        train = ["--data.train", *self.data] if self.data else []
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="unicl-bench-") as scratch:
            arguments = [*self.options, *train, "--out", str(Path(scratch) / "run")]
            config = split_config(parse_arguments(arguments))
            deadline = Deadline(self.seconds, scratch=Path(scratch), conclude=functools.partial(
                self.conclude, earlier
            ))  # fmt: skip
            with deadline.enforced():
                # before torch is imported, which reads it once
                choose_environment(config.run.device)
                from .session import measure

                measure(
                    config,
                    deadline.budget,
                    applies=self.apply,
                    rounds=self.rounds,
                    samples=self.samples,
                    scratch=Path(scratch),
                    note=functools.partial(setattr, deadline, "found"),
                )
        if deadline.found is not None and self.conclude(earlier, deadline.found):
            sys.exit(1)

    def conclude(self, earlier: KeptReport | None, found: Diagnosis) -> bool:
        """Prints and writes the report; returns whether there is a regression."""
        from .report import report_lines

        print("\n".join(report_lines(found)), flush=True)
        text = self.result_text({}, "timm", "nvidia-dali-cuda120", **found.as_dict())
        comparison = None
        if earlier is not None and self.against is not None:
            comparison = compare(
                earlier, as_kept(text), name=self.against.name, tolerance=self.tolerance
            )
            result = json.loads(text) | {"against": dataclasses.asdict(comparison)}
            text = json.dumps(result, indent=1) + "\n"
            lines = ["", comparison.table(), comparison.verdict, *comparison.warnings]
            print("\n".join(lines), flush=True)
        if self.json is not None:
            self.json.write_text(text, encoding="utf-8")
        if self.out is not None:
            self._write(found, text, comparison)
        return comparison is not None and comparison.is_regression

    def _write(self, found: Diagnosis, text: str, comparison: Comparison | None) -> None:
        from .page import make_page

        assert self.out is not None
        page = make_page(found, json.loads(text)["machine"], comparison=comparison)
        for name, content in {"report.html": page, "report.json": text}.items():
            write_text_atomically(self.out / name, without_secrets(content))
        print(f"written to {self.out}: report.html, report.json")
