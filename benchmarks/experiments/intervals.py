"""Means over seeds, differences between arms, and how sure one can be of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Mean:
    """Of one arm's seeds."""

    values: tuple[float, ...]
    mean: float
    deviation: float
    """Standard deviation between seeds (n - 1); nan for one seed."""

    def __str__(self) -> str:
        spread = "" if math.isnan(self.deviation) else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{spread}"

    def numbers(self) -> dict[str, Any]:
        return _as_json(asdict(self))


@dataclass(frozen=True, slots=True)
class Difference:
    """One arm minus another, in the unit of the values, and in standard deviations."""

    mean: float
    low: float
    high: float
    """95 % interval of Welch's t, which does not take both spreads for equal."""
    effect: float
    effect_low: float
    effect_high: float
    """Hedges' g, Cohen's d corrected for few samples, with its 95 % interval (Hedges, 1981)."""

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"

    def numbers(self) -> dict[str, Any]:
        return _as_json(asdict(self))


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard deviation of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Mean(tuple(values), statistics.fmean(values), deviation)


def difference_of(one: Sequence[float], other: Sequence[float]) -> Difference:
    """`one` minus `other`, at least two independent values each; g is nan where none has a spread.

    The interval of g is that of its large-sample variance, which is rough for five seeds: it says
    about how large the effect is, while Welch's interval says whether there is any.
    """
    n, m = len(one), len(other)
    interval = stats.ttest_ind(one, other, equal_var=False).confidence_interval(_LEVEL)
    mean = statistics.fmean(one) - statistics.fmean(other)
    pooled = math.sqrt(
        ((n - 1) * statistics.variance(one) + (m - 1) * statistics.variance(other)) / (n + m - 2)
    )
    effect = (mean / pooled if pooled else math.nan) * (1 - 3 / (4 * (n + m) - 9))
    reach = stats.norm.ppf((1 + _LEVEL) / 2) * math.sqrt(
        (n + m) / (n * m) + effect**2 / (2 * (n + m))
    )
    return Difference(
        mean, float(interval.low), float(interval.high), effect, effect - reach, effect + reach
    )


def _as_json(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }
