"""The results of a race: means over seeds, intervals, CPU seconds to an accuracy, plot, verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter
from scipy import stats

from unicl_fast.system.wording import markdown_table

LEVEL = 0.95
START = "before training"
"""The contestant that is what all start from."""
_COLORS = ("#2563a8", "#d9480f", "#2b8a3e", "#862e9c", "#5c5f66", "#c2255c", "#0b7285", "#e67700")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One run: what it cost, and its scores in percent by name."""

    contestant: str
    images: int
    """Images seen in training."""
    lr: float
    seed: int
    cpu_seconds: float
    """User and system time of all processes of the training program, from its start to its end."""
    wall_seconds: float
    peak_bytes: int
    """Most memory that these processes held together."""
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval, whose ends are nan where one value says nothing of it."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's interval of the mean of independent values."""
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, math.nan, math.nan)
        reach = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values)
        reach /= math.sqrt(len(values))
        return cls(mean, mean - reach, mean + reach)

    @classmethod
    def of_difference(cls, one: Sequence[float], other: Sequence[float]) -> Interval:
        """Welch's interval of the difference of two means, which assumes no equal spreads."""
        mean = statistics.fmean(one) - statistics.fmean(other)
        if min(len(one), len(other)) < 2:
            return cls(mean, math.nan, math.nan)
        if statistics.pvariance(one) == statistics.pvariance(other) == 0:
            return cls(mean, mean, mean)
        found = stats.ttest_ind(one, other, equal_var=False).confidence_interval(LEVEL)
        return cls(mean, float(found.low), float(found.high))

    def __format__(self, spec: str) -> str:
        if math.isnan(self.low):
            return format(self.mean, spec)
        return f"{self.mean:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


@dataclass(frozen=True, slots=True)
class Point:
    """The runs of one contestant and length, over the seeds."""

    images: int
    cpu_seconds: float
    scores: Mapping[str, tuple[float, ...]]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Point:
        return cls(
            outcomes[0].images,
            statistics.fmean(one.cpu_seconds for one in outcomes),
            {name: tuple(one.scores[name] for one in outcomes) for name in outcomes[0].scores},
        )


def curve_of(outcomes: Sequence[Outcome], contestant: str) -> list[Point]:
    """A contestant's points by rising length."""
    own = [one for one in outcomes if one.contestant == contestant]
    lengths = sorted({one.images for one in own})
    return [Point.of([one for one in own if one.images == images]) for images in lengths]


def seconds_to(curve: Sequence[Point], name: str, score: float) -> float:
    """CPU seconds after which a curve reaches a score; nan where it never does.

    Between two lengths the score is taken to rise with the logarithm of the CPU seconds. Where the
    shortest run has it already, the answer is that run's time, which is too long.
    """
    means = [statistics.fmean(point.scores[name]) for point in curve]
    place = next((number for number, mean in enumerate(means) if mean >= score), None)
    if place is None:
        return math.nan
    around = slice(max(0, place - 1), place + 1)
    logarithms = [math.log(point.cpu_seconds) for point in curve[around]]
    return math.exp(np.interp(score, means[around], logarithms))


def verdict(outcomes: Sequence[Outcome], ours: str, theirs: str) -> str:
    """One sentence for each score: at equal images, and the CPU seconds to their last score."""
    sentences = []
    own, other = curve_of(outcomes, ours), curve_of(outcomes, theirs)
    last, final = own[-1], other[-1]
    for name in [one for one in final.scores if one in last.scores]:
        gain = Interval.of_difference(last.scores[name], final.scores[name])
        goal = statistics.fmean(final.scores[name])
        part = seconds_to(own, name, goal) / final.cpu_seconds
        reached = (
            f"{ours} reaches the {goal:.1f} % of {theirs} in {part:.2f} of its CPU seconds"
            if not math.isnan(part)
            else f"{ours} does not reach the {goal:.1f} % of {theirs}"
        )
        sentences.append(
            f"{name}: {reached}; after {last.images:,} images it is at "
            f"{statistics.fmean(last.scores[name]):.1f} %, {gain:+.1f} points."
        )
    return "\n".join(sentences)


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row for each contestant and length, with means and 95 % intervals over seeds."""
    names, rows = _names(outcomes), []
    for contestant in dict.fromkeys(one.contestant for one in outcomes):
        for point in curve_of(outcomes, contestant):
            key = contestant, point.images
            runs = [one for one in outcomes if (one.contestant, one.images) == key]
            peak = max(one.peak_bytes for one in runs) / 1e9
            found = {name: f"{Interval.of(values):.1f}" for name, values in point.scores.items()}
            cells = [contestant, f"{point.images:,}", f"{runs[0].lr:g}"]
            cells += [f"{point.cpu_seconds:.0f}", f"{peak:.1f}"]
            rows.append(cells + [found.get(name, "") for name in names])
    return markdown_table(["contestant", "images", "rate", "CPU s", "memory, GB", *names], rows)


def _names(outcomes: Sequence[Outcome]) -> list[str]:
    """All scores; models without texts lack some."""
    return list(dict.fromkeys(name for one in outcomes for name in one.scores))


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draws each score against CPU seconds and images; a dot a run, a line a contestant.

    The start is a dotted line.
    """
    names = _names(outcomes)
    runs = [one for one in outcomes if one.contestant != START]
    figure = Figure(figsize=(8.0, 2.9 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(names), 2, squeeze=False, sharey="row")
    fields = (("cpu_seconds", "CPU seconds of training"), ("images", "images seen in training"))
    for row, name in enumerate(names):
        for axes, (field, label) in zip(grid[row], fields, strict=True):
            _draw_score(axes, [one for one in runs if name in one.scores], name, field)
            for start in [one for one in outcomes if one.contestant == START]:
                axes.axhline(start.scores[name], color="black", ls=":", lw=1, label=START)
            axes.set_xlabel(label, fontsize=8)
        grid[row][0].set_ylabel(f"{name}, %", fontsize=8)
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _draw_score(axes: Axes, outcomes: Sequence[Outcome], name: str, field: str) -> None:
    contestants = list(dict.fromkeys(one.contestant for one in outcomes))
    for color, contestant in zip(_COLORS * len(contestants), contestants, strict=False):
        curve = curve_of(outcomes, contestant)
        xs = [getattr(point, field) for point in curve]
        means = [statistics.fmean(point.scores[name]) for point in curve]
        axes.plot(xs, means, "-", color=color, label=contestant, linewidth=1.5)
        own = [one for one in outcomes if one.contestant == contestant]
        axes.plot(
            [getattr(one, field) for one in own],
            [one.scores[name] for one in own],
            "o",
            color=color,
            alpha=0.6,
            markersize=3.5,
        )
    axes.set_xscale("log")
    axes.margins(x=0.08)
    lengths = sorted({one.images for one in outcomes})
    # powers of ten would be too few; where these are as well, LogLocator takes others
    axes.xaxis.set_major_locator(
        FixedLocator(lengths) if field == "images" else LogLocator(subs=(1, 2, 5))
    )
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
