"""`unicl-eval`: how good a trained model is.

Reads the arguments and starts ranks; the rest is `evaluation_run` and the modules it names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import tyro

from unicl_fast.distributed.launch import end_with_torchrun, start_ranks, stop
from unicl_fast.evaluation.requests import (
    Detect,
    Evaluation,
    Finetune,
    Knn,
    LinearProbe,
    Retrieval,
    ZeroShot,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input."""
    end_with_torchrun()
    argv = sys.argv[1:] if argv is None else list(argv)
    command: Evaluation = tyro.extras.subcommand_cli_from_dict(
        {
            "zero-shot": ZeroShot,
            "linear-probe": LinearProbe,
            "knn": Knn,
            "finetune": Finetune,
            "detect": Detect,
            "retrieval": Retrieval,
        },
        args=argv,
        prog="unicl-eval",
        description="Evaluates a trained model. unicl-eval COMMAND --help explains each; "
        "docs/evaluation.md has the protocols.",
    )
    # torch and timm take seconds to import: --help and a mistyped flag need not wait for them
    from unicl_fast.distributed.rendezvous import adopt_slurm_ranks
    from unicl_fast.evaluation.run import check_request, run
    from unicl_fast.system.host_memory import keep_freed_memory

    try:
        check_request(command)
        if command.nproc > 1 and "WORLD_SIZE" not in os.environ:
            start_ranks("unicl_fast.tools.evaluate", nproc=command.nproc, argv=argv)
        adopt_slurm_ranks()
        keep_freed_memory()
        run(command)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        stop("unicl-eval", error, code=2)
    except (OSError, RuntimeError) as error:  # an image, a disk or a device that failed
        stop("unicl-eval", error, code=1)


if __name__ == "__main__":
    main()
