"""The command line: one experiment by name, with its options."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import tyro

from unicl_fast.system.program import begin_program

from .first_weights import Clash, FirstWeights
from .full_size import FullSize
from .labels import Hierarchies, LongTail, SeveralLabels
from .second_terms import Distillation, Words
from .small_size import LabelsAndCaptions, Objectives, Switches, Templates
from .stored_features import StoredFeatures
from .time_to_accuracy import TimeToAccuracy

_EXPERIMENTS: dict[str, Callable[..., Any]] = {
    "objectives": Objectives,
    "labels-and-captions": LabelsAndCaptions,
    "long-tail": LongTail,
    "several-labels": SeveralLabels,
    "hierarchies": Hierarchies,
    "first-weights": FirstWeights,
    "clash": Clash,
    "distillation": Distillation,
    "words": Words,
    "templates": Templates,
    "switches": Switches,
    "full-size": FullSize,
    "stored-features": StoredFeatures,
    "time-to-accuracy": TimeToAccuracy,
}


def main() -> None:
    """Entry point; exits with 2 on wrong input, 1 where a run failed."""
    experiment = tyro.extras.subcommand_cli_from_dict(
        _EXPERIMENTS,
        args=begin_program(),
        prog="python -m unicl_fast.benchmarks.experiments",
        description=sys.modules[__package__].__doc__,
    )
    try:
        experiment.run()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, RuntimeError) else 2)


if __name__ == "__main__":
    main()
