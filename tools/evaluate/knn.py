"""`unicl-eval knn`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from unicl_fast.system.checked_fields import LARGEST_FLOAT

from .command import Number
from .frozen_features import FrozenFeatures


@dataclass(frozen=True, kw_only=True)
class Knn(FrozenFeatures):
    """Classification by the k nearest training images, weighted as DINO does; exact."""

    k: tuple[Number, ...] = (10, 20)
    """Numbers of neighbours, each reported; at most the number of training images."""
    temperature: Annotated[float, Meta(ge=1e-12, le=LARGEST_FLOAT)] = 0.07
    """A neighbour's weight is exp(cosine / temperature)."""

    def check(self) -> None:
        super().check()
        if not self.k:
            raise ValueError("--k needs at least one number of neighbours")

    def run(self) -> None:
        from unicl_fast.evaluation.probes import nearest_neighbours
        from unicl_fast.evaluation.report import classification_table

        from .figures import draw_confusion

        sets, described = self.extract()
        if not sets:
            return
        train, test = sets
        metric = described["metric"]
        results = nearest_neighbours(
            train, test, ks=self.k, temperature=self.temperature, progress=True
        )
        rows = [(f"k = {k}", metric, result) for k, result in results.items()]
        print(table := classification_table(rows, mean=False))  # a mean over k would mean nothing
        found = [{"k": k} | result.to_json() for k, result in results.items()]
        self.write(described | {"temperature": self.temperature, "results": found}, table)
        if self.figures is not None:
            best = max(results, key=lambda k: results[k].value(metric))
            title = f"{test.name}, {best} nearest neighbours"
            draw_confusion(results[best], self.figures, "knn", title=title)
