"""`unicl-eval embed`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unicl_fast.evaluation.choices import Layer

from .command import Use, require_ending

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from unicl_fast.dataset.reader import PackedDataset


@dataclass(frozen=True, kw_only=True)
class Embed(Use):
    """Writes the features of images to one file, for search, clustering or another model.

    Example: unicl-eval embed --checkpoint runs/first --data photos/ --out features.parquet
    """

    out: Path
    """.npy for an array [images, width] in the data set's order, or .parquet with a row per image:
    its source, name, labels and feature (needs the extra `sources`)."""
    layer: Layer = "projection"
    """projection: unit-norm features, comparable with texts'; encoder: features before it."""

    def check(self) -> None:
        super().check()
        require_ending(self.out, ".npy", ".parquet")
        if self.out.suffix == ".parquet":
            import pyarrow  # noqa: F401

    def run(self) -> None:
        import numpy as np

        from unicl_fast.system.atomic_files import replacing
        from unicl_fast.system.wording import count_of

        with self.encoded(self.layer) as (_, dataset, features):
            if features is None:
                return
            rows = features.float().numpy()
            with replacing(self.out) as partial:
                if self.out.suffix == ".npy":
                    with partial.open("wb") as file:
                        np.save(file, rows)
                else:
                    _write_parquet(partial, dataset, rows)
        print(f"{self.out}: {count_of(len(rows), 'image')}, {rows.shape[1]} numbers each")


def _write_parquet(path: Path, dataset: PackedDataset, rows: NDArray[Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    from unicl_fast.evaluation.data import all_descriptions
    from unicl_fast.system.wording import encodable

    described = all_descriptions(dataset)
    names = dataset.manifest.class_names
    features = pyarrow.FixedSizeListArray.from_arrays(rows.reshape(-1), rows.shape[1])
    columns = {
        "source": [encodable(one.source) for one in described],
        "name": [encodable(one.name) for one in described],
        "labels": [[names[label] for label in one.labels] for one in described],
        "feature": features,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
