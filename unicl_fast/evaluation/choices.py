"""The choices of evaluations. This module imports nothing heavy, since `--help` shows them."""

from __future__ import annotations

from typing import Literal

Metric = Literal["top1", "mean_per_class"]
MetricChoice = Literal["auto", "top1", "mean_per_class"]
Layer = Literal["encoder", "projection"]
"""Features of an image: those of the image encoder, or their unit-norm projection into the space
that texts are compared in. A model trained by cross-entropy has no such space."""
