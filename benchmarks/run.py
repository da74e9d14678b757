"""`unicl-bench`: how fast the parts are, beside what one would take instead.

Each stage is a module with `Settings` and `run`. It first proves that the contestants compute the
same thing, and times nothing if they do not; then they take turns (harness.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from unicl_fast.benchmarks import (
    input_pipeline,
    loss,
    step_profile,
    target_map,
    text_encoding,
    tokenize_rate,
    training_step,
)

STAGES = {
    "input": input_pipeline,
    "targets": target_map,
    "tokenize": tokenize_rate,
    "loss": loss,
    "text": text_encoding,
    "step": training_step,
    "profile": step_profile,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input."""
    settings = tyro.extras.subcommand_cli_from_dict(
        {name: module.Settings for name, module in STAGES.items()},
        args=sys.argv[1:] if argv is None else list(argv),
        prog="unicl-bench",
        description="Measures a part beside what one would take instead: medians over rounds in "
        "which all take turns. Contestants that disagree are not timed.",
    )
    (stage,) = [module for module in STAGES.values() if isinstance(settings, module.Settings)]
    try:
        stage.run(settings)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"unicl-bench: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
