"""`unicl-convert`: models of any source in other libraries' formats, or in ours.

Reads the arguments and sets the exit code; `commands` has the commands.
"""

from collections.abc import Sequence

import tyro

from unicl_fast.distributed.launch import stop
from unicl_fast.system.machine import check_current_folder
from unicl_fast.system.program import begin_program

from ..numbers import plain_numbers
from .commands import COMMANDS, Conversion


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input."""
    argv = begin_program() if argv is None else list(argv)
    if argv and argv[0] == "open_clip":  # the package's spelling
        argv = ["open-clip", *argv[1:]]
    command: Conversion = tyro.extras.subcommand_cli_from_dict(
        dict(COMMANDS),
        args=argv,
        registry=plain_numbers(),
        prog="unicl-convert",
        description=(
            "Converts models, ours or others', to other libraries' formats or ours. The files are "
            "read again and compared before OUT appears. docs/checkpoints.md has a table of the "
            "formats."
        ),
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    try:
        check_current_folder()
        command.run()
    except (ValueError, FileNotFoundError) as error:
        stop("unicl-convert", error, code=2)
    except (OSError, RuntimeError) as error:
        stop("unicl-convert", error, code=1)


if __name__ == "__main__":
    main()
