"""`unicl-eval knn`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from unicl_fast.system.checked_fields import LARGEST_FLOAT

from .command import Number
from .frozen_features import FrozenFeatures

if TYPE_CHECKING:
    from unicl_fast.evaluation.choices import Metric
    from unicl_fast.evaluation.labelled import LabelledFeatures


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

    def measure(
        self, sets: list[LabelledFeatures], *, metric: Metric, suffix: str
    ) -> tuple[dict[str, Any], str]:
        from unicl_fast.evaluation.probes import nearest_neighbours
        from unicl_fast.evaluation.report import classification_table

        results = nearest_neighbours(*sets, ks=self.k, temperature=self.temperature, progress=True)
        rows = [(f"k = {k}", metric, result) for k, result in results.items()]
        print(table := classification_table(rows, mean=False))  # a mean over k would mean nothing
        best = max(results, key=lambda k: results[k].value(metric))
        title = f"{sets[1].name}, {best} nearest neighbours"
        self.draw(results[best], f"knn{suffix}", title=title)
        found = [{"k": k} | result.to_json() for k, result in results.items()]
        return {"temperature": self.temperature, "results": found}, table
