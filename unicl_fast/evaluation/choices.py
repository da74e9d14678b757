"""The choices of evaluations. This module imports nothing heavy, since `--help` shows them."""

from __future__ import annotations

from typing import Literal

Metric = Literal["top1", "mean_per_class"]
MetricChoice = Literal["auto", "top1", "mean_per_class"]
Layer = Literal["encoder", "projection"]
"""The image encoder's features, or their unit-norm projection into the space shared with texts,
which a model trained by cross-entropy does not have."""
