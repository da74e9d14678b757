"""The options that the loops of this folder have in common."""

import argparse
import dataclasses

from unicl_fast.config import EfficiencyConfig, TrainConfig
from unicl_fast.presets import build_preset


def read_options(parser: argparse.ArgumentParser) -> tuple[TrainConfig, argparse.Namespace]:
    """Adds the common options to a loop's own, and reads all; returns also the run's settings."""
    parser.add_argument("data", nargs="+", help="data sets that unicl-pack build wrote")
    parser.add_argument("--preset", default="mixed-small")
    parser.add_argument("--steps", type=int, default=100, help="of the whole run")
    parser.add_argument("--stop-at", type=int, help="a step before its end")
    given = parser.parse_args()
    preset = build_preset(given.preset)
    data = dataclasses.replace(preset.data, train=tuple(given.data))
    run = dataclasses.replace(preset.run, samples=0, steps=given.steps)
    config = dataclasses.replace(preset, data=data, run=run, efficiency=EfficiencyConfig())
    given.stop_at = given.stop_at or given.steps
    return config, given
