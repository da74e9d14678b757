"""The base of evaluations that learn from features of labelled images."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unicl_fast.evaluation.choices import Layer, MetricChoice

from ..numbers import OneDataSet
from .command import Evaluation

if TYPE_CHECKING:
    from unicl_fast.evaluation.choices import Metric
    from unicl_fast.evaluation.labelled import LabelledFeatures


@dataclass(frozen=True, kw_only=True)
class FrozenFeatures(Evaluation):
    train: OneDataSet
    """Labelled images to learn from: what zero-shot's --data accepts."""
    data: OneDataSet
    """Labelled images to test on. Classes are matched to those of --train by name."""
    metric: MetricChoice = "auto"
    """The metric to report first, by which a linear probe also chooses C; auto as in zero-shot."""
    layer: Layer = "encoder"
    """Features before the projection into the space of texts, as in CLIP's linear probes, or after
    it (unit norm), which a model trained by cross-entropy lacks."""
    features: str = "auto"
    """Folder that keeps features, by a checksum of weights and images: auto is features/ in the run
    (for a model on the hub, in the user's cache), none keeps nothing."""

    def check(self) -> None:
        from unicl_fast.evaluation.probes import require_scikit_learn

        super().check()
        require_scikit_learn()

    @abc.abstractmethod
    def measure(
        self, sets: list[LabelledFeatures], *, metric: Metric, suffix: str
    ) -> tuple[dict[str, Any], str]:
        """Prints the result on the samples of one label column; only on rank 0.

        Returns values for the JSON and a table; `suffix` belongs to names of figures.
        """

    def run(self) -> None:
        from unicl_fast.evaluation.data import choose_metric
        from unicl_fast.evaluation.labelled import by_column, labelled_features
        from unicl_fast.evaluation.report import json_by_column

        folder = self.features_folder(self.features)
        with self.model() as on_ranks:
            sets = labelled_features(on_ranks, *self.data_sets(), layer=self.layer, folder=folder)
        if not sets:  # beyond rank 0
            return
        metric = choose_metric(self.metric, self.data)
        if not (columns := by_column(*sets)):
            raise ValueError(f"{self.train} and {self.data} have labels of no column in common")
        found, tables = dict[str, dict[str, Any]](), list[str]()
        for column, parts in columns.items():
            if column:
                print(f"\n{column}")
            suffix = f"-{column}" if column else ""
            found[column], table = self.measure(parts, metric=metric, suffix=suffix)
            tables += [*filter(None, [column]), table]
        train, test, *_ = sets
        values = {"train": self.train, "data": self.data, "name": test.name, "layer": self.layer}
        sizes = {"num_train": len(train), "num_test": len(test)}
        sizes |= {"num_features": train.features.shape[1]}
        described = values | sizes | {"metric": metric}
        self.write(described | json_by_column(found), "\n\n".join(tables))
