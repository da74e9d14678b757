"""`unicl-eval`: how good a trained model is.

Takes packed data sets, and folders or zips of class folders, which are packed into a temporary
folder first: so a picture reaches the model in one way only, and what cannot be decoded is
counted and named.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from unicl_fast.config import DeviceName
from unicl_fast.tools.launch import end_with_torchrun, start_ranks, stop


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Zero-shot classification: top-1, top-5 and mean per class, with 95 % intervals."""

    checkpoint: Path
    """A run folder (its newest checkpoint is taken), RUN/best, or one checkpoint folder."""
    data: str
    """A packed data set with labels (its folder or URL), or a folder or zip of class folders."""
    class_names: str = ""
    """Names instead of the data's own: a file with one a line, or imagenet."""
    templates: str = ""
    """Prompt templates instead of the data's own: a file with one a line, imagenet, or simple."""
    batch_size: int = 256
    """Pictures encoded at once by each rank."""
    json: Path | None = None
    """Also write the result, with a rate for each class, into this file."""
    weights: Literal["auto", "ema", "model"] = "auto"
    """The moving average of the weights, those of the last step, or the average if there is one."""
    nproc: int = 1
    """Ranks to start on this machine; leave it at 1 under torchrun or SLURM."""
    device: DeviceName = "auto"
    """Where the model runs."""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Caption retrieval in both directions: recall at 1, 5 and 10, with intervals and chance."""

    checkpoint: Path
    """A run folder (its newest checkpoint is taken), RUN/best, or one checkpoint folder."""
    data: str
    """A packed data set with captions: its folder or URL."""
    batch_size: int = 256
    """Pictures encoded at once."""
    json: Path | None = None
    """Also write the result into this file."""
    weights: Literal["auto", "ema", "model"] = "auto"
    """The moving average of the weights, those of the last step, or the average if there is one."""
    device: DeviceName = "auto"
    """Where the model runs."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input."""
    end_with_torchrun()
    argv = sys.argv[1:] if argv is None else list(argv)
    command = tyro.extras.subcommand_cli_from_dict(
        {"zero-shot": ZeroShot, "retrieval": Retrieval},
        args=argv,
        prog="unicl-eval",
        description="Evaluates a trained model.",
    )
    # torch and timm take seconds to import: --help and a mistyped flag need not wait for them
    from unicl_fast.dist import adopt_slurm_ranks
    from unicl_fast.pipelines.host_memory import keep_freed_memory
    from unicl_fast.tools.evaluation_run import check_request, run_retrieval, run_zero_shot

    try:
        check_request(command)
        if isinstance(command, ZeroShot) and command.nproc > 1 and "WORLD_SIZE" not in os.environ:
            start_ranks("unicl_fast.tools.evaluate", nproc=command.nproc, argv=argv)
        adopt_slurm_ranks()
        keep_freed_memory()
        run_zero_shot(command) if isinstance(command, ZeroShot) else run_retrieval(command)
    except (ValueError, FileNotFoundError) as error:
        stop("unicl-eval", error, code=2)
    except (OSError, RuntimeError) as error:  # a picture, a disk or a device that failed
        stop("unicl-eval", error, code=1)


if __name__ == "__main__":
    # by its name, so that the commands are the same classes for all modules
    from unicl_fast.tools.evaluate import main as main_by_name

    main_by_name()
