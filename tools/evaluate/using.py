"""`unicl-eval classify`, `embed`, `search` and `serve`: a trained model on images."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
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
from unicl_fast.evaluation.features import (
    ModelOnRanks,
    require_layer,
    require_text_encoder,
)
from unicl_fast.evaluation.inference import Model, load_model
from unicl_fast.evaluation.search import Found, SearchIndex, open_index
from unicl_fast.evaluation.serving import MOST_CLASSES, Server
from unicl_fast.system.atomic_files import replacing, write_text_atomically
from unicl_fast.system.line import line
from unicl_fast.system.wording import count_of, encodable, print_text
from unicl_fast.text.class_lists import read_class_names, read_templates

from .options import Classify, Embed, ModelCommand, Search, Serve, Use
from .protocols import command_model, features_folder


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
        with open_data(command.data, ranks=on_ranks.ranks, takes_loose=True) as data:
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


def run_search(command: Search) -> None:
    """Encodes on all ranks; rank 0 answers."""
    for file in filter(os.path.isfile, command.query):  # before a model is loaded
        raise ValueError(f"{file} is a file, not a text: --image {file} searches by it")
    folder = features_folder(command.features, command.checkpoint)
    with contextlib.ExitStack() as stack:
        on_ranks = stack.enter_context(command_model(command))
        if command.query or not command.image:
            require_text_encoder(on_ranks.model, "search by texts")  # before images are encoded
        index = stack.enter_context(open_index(on_ranks, command.data, folder=folder))
        if not on_ranks.ranks.is_main:
            return
        for path in command.image:
            _print_found(str(path), index.by_images([path], top=command.top)[0])
        asked = command.query
        for text in asked if asked or command.image else _typed(index):
            _print_found(text, index.by_texts([text], top=command.top)[0])


def _typed(index: SearchIndex) -> Iterator[str]:
    """Texts from the terminal or the standard input, until it ends."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{count_of(len(index), 'image')}; type what to search for (Ctrl-D ends)")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            if text := input("search> " if is_terminal else "").strip():
                yield text


def _print_found(query: str, found: Sequence[Found]) -> None:
    lines = [query]
    for one in found:
        labels = f" [{', '.join(one.labels)}]" if one.labels else ""
        where = f"{one.source}/{one.name}"
        lines.append(f"  {one.score:.3f}  {one.caption or one.name}{labels}  {where}")
    print_text("\n".join(lines), sys.stdout)


def run_serve(command: Serve) -> None:
    """Serves until Ctrl-C. Raises OSError if the port is taken."""
    with contextlib.ExitStack() as stack:
        with line(f"loading {command.checkpoint}"):
            model = load_model(command.checkpoint, weights=command.weights, device=command.device)
        index = None
        if command.data:
            folder = features_folder(command.features, command.checkpoint)
            on_ranks = dataclasses.replace(ModelOnRanks.of(model), progress=True)
            index = stack.enter_context(open_index(on_ranks, command.data, folder=folder))
        named = () if index is None else index.dataset.manifest.class_names
        classes = command.classes or tuple(dict.fromkeys(named))[:MOST_CLASSES]
        classes = classes if len(classes) > 1 else ("cat", "dog", "bird")
        model.require_classes(classes)
        name = str(command.checkpoint)
        try:
            server = Server(model, name=name, classes=classes, port=command.port, index=index)
        except OSError as error:
            raise OSError(
                f"port {command.port}: {error.strerror}; --port 0 takes a free one"
            ) from None
        with server:
            print(f"{server.address} (Ctrl-C ends it)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
            print()


RUNS: dict[type[ModelCommand], Callable[[Any], None]] = {
    Classify: run_classify,
    Embed: run_embed,
    Search: run_search,
    Serve: run_serve,
}
