"""`unicl-pretrain`: packed data sets to a trained UniCL model.

Reads the arguments and starts ranks (`--nproc`, or takes those of torchrun or SLURM); the rest is
`training_run`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from unicl_fast.config import TrainConfig
from unicl_fast.distributed.launch import end_with_torchrun, explain, is_own_rank, start_ranks, stop
from unicl_fast.distributed.signals import (
    EXIT_ABORTED,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_WRONG_INPUT,
    Interrupted,
    exit_immediately_on_signals,
)
from unicl_fast.presets import PRESETS, build_preset

_DEFAULT_PRESET = "swin-tiny"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainArguments(TrainConfig):
    """Trains a UniCL model on packed data sets (see unicl-pack).

    Example: unicl-pretrain --preset cifar10-small --data.train packed/cifar10 --out runs/cifar10
    """

    out: Path
    """The run folder: config.json, metrics.jsonl, contact-sheet.png, curves.png, checkpoints/ and
    tensorboard/; quarantine.csv if samples of the data are bad."""
    preset: str = _DEFAULT_PRESET
    """What all other settings start from."""
    nproc: int = 1
    """Ranks to start on this machine; leave it at 1 under torchrun or SLURM."""
    resume: str = "never"
    """auto goes on from the newest checkpoint in --out that is not damaged, if there is one; or a
    checkpoint's path."""
    max_restarts: int = 0
    """How often the ranks that this program starts may be started again, from the newest
    checkpoint, after one of them has died. (torchrun has a flag of that name for its own ranks.)"""
    ledger: bool = False
    """Write down what every step was fed, in --out/ledger, for unicl-ledger to prove. A run that
    has a ledger goes on with it in any case."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input, and as docs/architecture.md says otherwise."""
    # first of all: whoever wants the machine back may say so at any time
    with exit_immediately_on_signals("unicl-pretrain"):
        end_with_torchrun()
        _main(sys.argv[1:] if argv is None else list(argv))


def _main(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv)
    config = split_config(arguments)
    if arguments.nproc < 1:
        error = ValueError(f"--nproc must be at least 1, not {arguments.nproc}")
        stop("unicl-pretrain", error, code=EXIT_WRONG_INPUT)
    if arguments.max_restarts < 0:
        error = ValueError(f"--max-restarts must not be negative, not {arguments.max_restarts}")
        stop("unicl-pretrain", error, code=EXIT_WRONG_INPUT)
    # torch and timm take seconds to import: --help and a mistyped flag need not wait for them
    from unicl_fast.distributed.rendezvous import adopt_slurm_ranks
    from unicl_fast.system.host_memory import keep_freed_memory

    from .pretrain_run import check_request, pretrain

    run_folder, nproc, resume = arguments.out, arguments.nproc, arguments.resume
    adopt_slurm_ranks()
    if "WORLD_SIZE" in os.environ:
        if arguments.max_restarts and not is_own_rank():
            error = ValueError(
                "--max-restarts is for ranks that --nproc starts; these were started by torchrun "
                "or srun: give it to torchrun, or let the scheduler start the job again with "
                "--resume auto"
            )
            stop("unicl-pretrain", error, code=EXIT_WRONG_INPUT)
    elif nproc > 1 or arguments.max_restarts:
        try:  # one sentence instead of one from each rank
            check_request(config, run_folder=run_folder, nproc=nproc, resume=resume)
        except (ValueError, FileNotFoundError) as error:
            stop("unicl-pretrain", error, code=EXIT_WRONG_INPUT)
        start_ranks(
            "unicl_fast.tools.pretrain",
            nproc=nproc,
            argv=argv,
            max_restarts=arguments.max_restarts,
        )
    keep_freed_memory()
    try:
        pretrain(config, run_folder=run_folder, resume=resume, ledger=arguments.ledger)
    except (ValueError, FileNotFoundError) as error:
        stop("unicl-pretrain", error, code=EXIT_WRONG_INPUT)
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"unicl-pretrain: {error}; go on with --resume auto", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        stop(
            "unicl-pretrain",
            Interrupted("ended at once; checkpoints are from before"),
            code=EXIT_ABORTED,
        )
    except (FloatingPointError, OSError, RuntimeError) as error:
        stop("unicl-pretrain", explain(error), code=EXIT_FAULT)


def parse_arguments(argv: Sequence[str]) -> PretrainArguments:
    """The preset first, then every other flag on top of it."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", default=_DEFAULT_PRESET)
    name = finder.parse_known_args(argv)[0].preset
    try:
        preset = build_preset(name)
    except ValueError as error:
        stop("unicl-pretrain", error, code=EXIT_WRONG_INPUT)
    groups = {field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)}
    import tyro  # here, so that signals are heard before it is imported

    default = PretrainArguments(**groups, preset=name, out=tyro.MISSING)
    return tyro.cli(
        PretrainArguments,
        default=default,
        args=argv,
        prog="unicl-pretrain",
        description=f"{PretrainArguments.__doc__}\n\nPresets: {', '.join(PRESETS)}. The defaults "
        f"below are those of {name}.",
    )


def split_config(arguments: PretrainArguments) -> TrainConfig:
    """The run's settings without what only the command line knows."""
    groups = {
        field.name: getattr(arguments, field.name) for field in dataclasses.fields(TrainConfig)
    }
    return TrainConfig(**groups)


if __name__ == "__main__":
    main()
