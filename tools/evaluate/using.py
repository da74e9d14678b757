"""`unicl-eval classify`, `embed` and `serve`: a trained model on images."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import Description, SampleReader
from unicl_fast.evaluation.choices import Layer
from unicl_fast.evaluation.data import open_data
from unicl_fast.evaluation.features import require_layer
from unicl_fast.evaluation.inference import Model, load_model
from unicl_fast.evaluation.serving import Server
from unicl_fast.system.atomic_files import replacing, write_text_atomically
from unicl_fast.system.wording import count_of, encodable, print_text
from unicl_fast.text.class_lists import read_class_names, read_templates

from .options import Classify, Embed, ModelCommand, Serve, Use
from .protocols import command_model


def run_classify(command: Classify) -> None:
    """Prints or writes the most probable classes of each image, on rank 0."""
    names: Sequence[str] = command.classes
    if len(names) == 1:
        names = read_class_names(names[0])
    templates = read_templates(command.templates)
    with _features(command, layer="projection", names=names) as (model, dataset, features):
        if features is None:
            return
        found = model.rank_classes(features, names, templates=templates, top=command.top)
        descriptions = list(_descriptions(dataset))
    if command.out is None:
        for answer, description in zip(found, descriptions, strict=True):
            classes = ", ".join(f"{name} {value:.1%}" for name, value in answer.items())
            print_text(f"{description.name}: {classes}\n", sys.stdout)
        return
    rows = (
        {"source": description.source, "name": description.name, "classes": answer}
        for answer, description in zip(found, descriptions, strict=True)
    )
    write_text_atomically(command.out, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{command.out}: {count_of(len(found), 'image')}")


def run_embed(command: Embed) -> None:
    """Writes the features of all images, on rank 0."""
    with _features(command, layer=command.layer) as (_, dataset, features):
        if features is None:
            return
        rows = features.float().numpy()
        if command.out.suffix == ".npy":
            with replacing(command.out) as partial, partial.open("wb") as file:
                np.save(file, rows)
        else:
            _write_parquet(command, dataset, rows)
    print(f"{command.out}: {count_of(len(rows), 'image')}, {rows.shape[1]} numbers each")


@contextlib.contextmanager
def _features(
    command: Use, *, layer: Layer, names: Sequence[str] | None = None
) -> Iterator[tuple[Model, PackedDataset, Float[Tensor, "n d"] | None]]:
    """The model, the data set, and on rank 0 the features of all its images."""
    with command_model(command) as on_ranks:
        model = Model(on_ranks.model)
        if names is not None:
            model.require_classes(names)  # before images are encoded
        require_layer(model.encoders, layer)
        with open_data(command.data, ranks=on_ranks.ranks) as data:
            features = on_ranks.features(data.dataset, layer=layer)
            yield model, data.dataset, features
            refused = data.dataset.manifest.num_quarantined
            if on_ranks.ranks.is_main and refused:
                print(f"refused when packing, and left out: {count_of(refused, 'file')}")


def _descriptions(dataset: PackedDataset) -> Iterator[Description]:
    with contextlib.closing(SampleReader(dataset)) as reader:
        for index in range(len(dataset)):
            yield reader.read_description(index)


def _write_parquet(command: Embed, dataset: PackedDataset, rows: Float[np.ndarray, "n d"]) -> None:
    import pyarrow
    import pyarrow.parquet

    described = list(_descriptions(dataset))
    names = dataset.manifest.class_names
    features = pyarrow.FixedSizeListArray.from_arrays(rows.reshape(-1), rows.shape[1])
    table = pyarrow.table(
        {
            "source": [encodable(one.source) for one in described],
            "name": [encodable(one.name) for one in described],
            "labels": [[names[label] for label in one.labels] for one in described],
            "feature": features,
        }
    )
    with replacing(command.out) as partial:
        pyarrow.parquet.write_table(table, partial)


def run_serve(command: Serve) -> None:
    """Serves until Ctrl-C. Raises OSError if the port is taken."""
    model = load_model(command.checkpoint, weights=command.weights, device=command.device)
    model.require_classes(command.classes)
    with Server(
        model, name=str(command.checkpoint), classes=command.classes, port=command.port
    ) as server:
        print(f"{server.address} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


RUNS: dict[type[ModelCommand], Callable[[Any], None]] = {
    Classify: run_classify,
    Embed: run_embed,
    Serve: run_serve,
}
