"""The command line: one experiment by name, with its options."""

from __future__ import annotations

import sys

import tyro

from . import (
    full_size,
    labels_and_captions,
    objectives,
    switches,
    templates,
)

_EXPERIMENTS = {
    "objectives": objectives,
    "labels-and-captions": labels_and_captions,
    "templates": templates,
    "switches": switches,
    "full-size": full_size,
}


def main() -> None:
    """Entry point; exits with 2 on wrong input, 1 where a run failed."""
    settings = tyro.extras.subcommand_cli_from_dict(
        {name: module.Settings for name, module in _EXPERIMENTS.items()},
        prog="python -m unicl_fast.benchmarks.experiments",
        description=sys.modules[__package__].__doc__,
    )
    [module] = [found for found in _EXPERIMENTS.values() if found.Settings is type(settings)]
    try:
        module.run(settings)
    except (ValueError, OSError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        print(f"experiments: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
