"""The choices of evaluations. This module imports nothing heavy, since `--help` shows them."""

from typing import Literal

Metric = Literal["top1", "mean_per_class"]
MetricChoice = Literal["auto", "top1", "mean_per_class"]
Layer = Literal["encoder", "projection"]
"""The image encoder's features, or their unit-norm projection into the space shared with texts,
which a model trained by cross-entropy does not have."""
Signal = Literal["images", "predicted", "titles", "words"]
"""A search compares a text with features of images, with words predicted from them, with features
of titles, and with their words."""
SIGNALS: tuple[Signal, ...] = ("images", "predicted", "titles", "words")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine for itself, which no other can reach."""
