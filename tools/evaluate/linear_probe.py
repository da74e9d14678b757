"""`unicl-eval linear-probe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unicl_fast.system.checked_fields import Count, NonNegative
from unicl_fast.system.wording import count_of

from .command import Number
from .frozen_features import FrozenFeatures

if TYPE_CHECKING:
    from unicl_fast.evaluation.choices import Metric
    from unicl_fast.evaluation.labelled import LabelledFeatures


@dataclass(frozen=True, kw_only=True)
class LinearProbe(FrozenFeatures):
    """Linear probe: scikit-learn's logistic regression on frozen features, on the CPU.

    C is searched from 1e-6 on in half decades; then training and held-out images are fitted
    together. --shots makes it few-shot: several draws, their mean and spread.
    """

    validation: str = ""
    """Labelled images to choose C by; by default a fifth of each class of --train is held out. If
    that is fewer than 4 images a class on average, C is chosen by cross-validation over --train in
    2 to 5 folds, as many as the smallest class has images. If no class has two images, C is 1."""
    c: NonNegative = 0.0
    """Inverse strength of the penalty, scikit-learn's C; 0 searches it."""
    shots: tuple[Number, ...] = ()
    """Few-shot: training images of each class, such as 1 2 4 8 16. C is chosen by --validation or
    by up to 4 others of each class (with fewer than one other a class on average, by
    cross-validation over the shots), and the fit only uses the shots."""
    draws: Number = 3
    """Few-shot: draws of images for each number of shots."""
    seed: Count = 0
    """Seed of the split and the draws."""

    def check(self) -> None:
        super().check()
        if self.shots and self.validation and self.c:
            raise ValueError(
                f"--validation chooses C, and --c {self.c:g} fixes it: with --shots, which are all "
                "that is fitted, give one of the two"
            )
        if self.shots and self.figures is not None:
            raise ValueError(
                "--figures draws the mistakes of one classifier, and --shots fits many: leave one "
                "of them out"
            )

    def measure(
        self, sets: list[LabelledFeatures], *, metric: Metric, suffix: str
    ) -> tuple[dict[str, Any], str]:
        from unicl_fast.evaluation.probes import linear_probe
        from unicl_fast.evaluation.report import classification_table

        train, test, *more = sets
        settings: dict[str, Any] = {"validation": more[0] if more else None, "c": self.c}
        settings |= {"metric": metric, "seed": self.seed, "progress": True}
        if self.shots:
            return self._few_shot(train, test, settings)
        result = linear_probe(train, test, **settings)
        print(result.to_table())
        self.draw(result.classes, f"linear-probe{suffix}", title=f"{test.name}, linear probe")
        return result.to_json(), classification_table([(test.name, metric, result.classes)])

    def _few_shot(
        self, train: LabelledFeatures, test: LabelledFeatures, settings: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        import numpy as np

        from unicl_fast.evaluation.probes import few_shot_probes, few_shot_table

        found = few_shot_probes(train, test, shots=self.shots, draws=self.draws, **settings)
        print(table := few_shot_table(found))
        print(
            f"{count_of(self.draws, 'draw')} each, {len(test):,} test samples, "
            f"{count_of(len(train.class_names), 'class')}"
        )
        smallest = int(np.unique(train.labels, return_counts=True)[1].min())
        if smallest < max(self.shots):
            print(f"the smallest class has {smallest} training samples, and all are used")
        values = {"num_draws": self.draws, "smallest_class": smallest}
        return values | {"shots": [one.to_json() for one in found]}, table
