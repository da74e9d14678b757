"""`unicl-bench run`: the limit of a run, what to do about it, and how long the run will take.

unicl-bench run --preset P --data DIR_OR_URL... [--nproc N] [--seconds 60] [--out FOLDER]
    [--apply] [OPTIONS of unicl-pretrain]
"""

from __future__ import annotations

import dataclasses
import json
import os
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

from ..numbers import plain_numbers
from ..pretrain import parse_arguments, split_config
from .deadline import Deadline
from .measuring import result_text

if TYPE_CHECKING:  # it imports torch, which reads the environment once
    from .model import Measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Says what limits a run of unicl-pretrain, what to change, and how long it takes.

    Also accepts all options of unicl-pretrain, such as --preset and --efficiency.precision.
    """

    data: tuple[str, ...] = ()
    """Packed data sets, each DIR or DIR=WEIGHT, as --data.train; DIR can be a URL."""
    nproc: int = 1
    """Ranks to start on this machine."""
    seconds: float = 60.0
    """Time to measure for. The program ends after at most twice that and 60 seconds; with --apply
    each further pass can need as long again."""
    apply: bool = False
    """Follow the best advice that changes no result, measure it again, keep it if it helps, and so
    on; print the options to use."""
    out: Path | None = None
    """Folder for the report: report.html and report.json."""
    options: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Options of unicl-pretrain."""
    given: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """All options as given, for the ranks."""

    @classmethod
    def parse(cls, options: Sequence[str], *, prog: str) -> Run:
        """Parses its own options, and leaves the others to unicl-pretrain."""
        chosen, rest = tyro.cli(
            cls, args=list(options), prog=prog, return_unknown_args=True, registry=plain_numbers()
        )
        return dataclasses.replace(chosen, options=tuple(rest), given=tuple(options))

    def run(self) -> None:
        """Measures and reports. Raises as `unicl-pretrain` does."""
        require(self.seconds > 0, f"--seconds must be positive, not {self.seconds:g}")
        if self.out is not None:
            make_folder(self.out)  # fails before anything is measured
        if self.nproc > 1 and "WORLD_SIZE" not in os.environ:
            start_ranks("unicl_fast.tools.bench", nproc=self.nproc, argv=["run", *self.given])
        train = ["--data.train", *self.data] if self.data else []
        with tempfile.TemporaryDirectory(prefix="unicl-bench-") as folder:
            scratch = Path(folder)
            arguments = [*self.options, *train, "--out", str(scratch / "run")]
            config = split_config(parse_arguments(arguments))
            deadline = Deadline(self.seconds, scratch=scratch, conclude=self.conclude)
            with deadline.enforced():
                # before torch is imported, which reads it once
                choose_environment(config.run.device)
                from .diagnose import measure

                measure(config, deadline, applies=self.apply, scratch=scratch)
        if deadline.found is not None:
            self.conclude(deadline.found)

    def conclude(self, found: Measured) -> None:
        """Prints and writes the report."""
        from .report import as_dict, make_page, report_lines

        print("\n".join(report_lines(found)), flush=True)
        if self.apply and not found.applied:
            print("APPLIED nothing: no measured change gains enough; use the options as they are")
        if self.out is not None:
            text = result_text(self, "timm", "nvidia-dali-cuda120", **as_dict(found))
            page = make_page(found, json.loads(text)["machine"])
            for name, content in {"report.html": page, "report.json": text}.items():
                write_text_atomically(self.out / name, without_secrets(content))
            print(f"written to {self.out}: report.html, report.json")
