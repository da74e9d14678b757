"""`unicl-eval`: evaluates a trained model, or uses it on images."""

import os
from collections.abc import Sequence

import tyro

from unicl_fast.distributed.launch import end_with_torchrun, explain, start_ranks, stop
from unicl_fast.system.line import line
from unicl_fast.system.machine import check_current_folder, choose_environment, keep_freed_memory
from unicl_fast.system.program import begin_program, quick_imports

from ..numbers import plain_numbers
from .command import Command, RankedCommand
from .registry import command_classes


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input."""
    end_with_torchrun()
    argv = begin_program() if argv is None else list(argv)
    command: Command = tyro.extras.subcommand_cli_from_dict(
        command_classes(),
        args=argv,
        registry=plain_numbers(),
        prog="unicl-eval",
        description="Evaluates or uses a trained model. unicl-eval COMMAND --help explains each; "
        "docs/evaluation.md has the protocols.",
    )
    try:
        check_current_folder()
        choose_environment(command.device)
        # torch and DALI need seconds to import, for which --help and mistyped options do not wait
        from unicl_fast.distributed.rendezvous import adopt_slurm_ranks

        with line("unicl-eval is starting"), quick_imports():
            command.check()
            command = command.settled()
        has_ranks = "WORLD_SIZE" in os.environ
        if isinstance(command, RankedCommand) and command.nproc > 1 and not has_ranks:
            argv += ["--checkpoint", str(command.checkpoint)]
            start_ranks("unicl_fast.tools.evaluate", nproc=command.nproc, argv=argv, resumes=False)
        adopt_slurm_ranks()
        keep_freed_memory()
        command.run()
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        stop("unicl-eval", error, code=2)
    except (OSError, RuntimeError) as error:  # an image, a disk or a device that failed
        stop("unicl-eval", explain(error), code=1)


if __name__ == "__main__":
    main()
