"""`unicl-eval zero-shot`, `retrieval`, `linear-probe` and `knn`: what they print and write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from unicl_fast.conversion.sources import find_own, weights_checksum
from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.evaluation.data import choose_metric, open_data
from unicl_fast.evaluation.features import ModelOnRanks, model_on_ranks
from unicl_fast.evaluation.labelled import LabelledFeatures, labelled_features
from unicl_fast.evaluation.probes import (
    linear_probe,
    nearest_neighbours,
)
from unicl_fast.evaluation.report import classification_table
from unicl_fast.evaluation.retrieval import (
    RetrievalFeatures,
    RetrievalResult,
    encode_captioned,
)
from unicl_fast.evaluation.zero_shot import zero_shot
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.system.wording import without_secrets
from unicl_fast.training.data import distinct_names, log_cut_captions

from .figures import draw_confusion
from .options import (
    COMMANDS,
    Evaluation,
    FrozenFeatures,
    Knn,
    LinearProbe,
    ModelCommand,
    RankedCommand,
    Retrieval,
    ZeroShot,
)


def command_model(command: RankedCommand) -> AbstractContextManager[ModelOnRanks]:
    """The model of a command on its device; its ranks share the work."""
    return model_on_ranks(
        command.checkpoint,
        weights=command.weights,
        device=command.device,
        batch_size=command.batch_size,
    )


def features_folder(given: str, checkpoint: Path) -> Path | None:
    """The folder that --features stands for; None for none."""
    if given != "auto":
        return None if given == "none" else Path(given)
    found = find_own(str(checkpoint))
    if found is None:  # a model of others, or of the hub
        return CacheOptions().place / "features"
    run = found.parent  # of RUN/checkpoints/step-N, RUN/best, ...
    return (run.parent if run.name == "checkpoints" else run) / "features"


def write_results(command: Evaluation, values: Mapping[str, Any], table: str) -> None:
    """Writes the JSON and the Markdown that a command asks for.

    The JSON names the protocol, and the file of weights by its checksum, by which a model card
    finds the figures of its own model (`unicl_fast.conversion.figures`).
    """
    described = {
        "protocol": next(name for name, kind in COMMANDS.items() if kind is type(command)),
        "checkpoint": str(command.checkpoint),
        "weights": command.weights,
        "weights_xxh3": weights_checksum(command.checkpoint, weights=command.weights),
        **values,
    }
    for path, content in (
        (command.json, without_secrets(json.dumps(described, indent=1))),
        (command.markdown, table.rstrip()),
    ):
        if path is not None:
            make_folder(path.parent)
            path.write_text(content + "\n", encoding="utf-8")
            print(f"written to {path}")


def run_zero_shot(command: ZeroShot) -> None:
    """Evaluates one data set after the other, each reported as soon as it is done."""
    found = []
    names = distinct_names(command.data)
    options = {"class_names": "", "templates": "", "metric": "auto"}
    settings = {option: command.for_each(option, default) for option, default in options.items()}
    with command_model(command) as on_ranks:
        is_main = on_ranks.ranks.is_main
        for number, name in enumerate(names):
            one = zero_shot(
                on_ranks,
                command.data[number],
                name=name,
                hierarchy=command.hierarchy,
                average_precision=command.average_precision,
                **{option: values[number] for option, values in settings.items()},
            )
            found.append(one)
            if is_main:
                print((f"\n{name}\n" if len(names) > 1 else "") + one.to_table())
    if not is_main:
        return
    table = classification_table([(one.name, one.metric, one.classes) for one in found])
    values = [{"data": data} | one.to_json() for data, one in zip(command.data, found, strict=True)]
    if len(found) == 1:
        write_results(command, values[0], table)
    else:
        print(f"\n{table}")
        mean = sum(one.value for one in found) / len(found)
        write_results(command, {"mean": mean, "data_sets": values}, table)
    if command.figures is not None:
        for one in found:
            title = f"{one.name}, zero-shot"
            draw_confusion(one.classes, command.figures, one.name, title=title)


def run_retrieval(command: Retrieval) -> None:
    """Encodes on all ranks; rank 0 compares, prints, writes and draws."""
    with (
        command_model(command) as on_ranks,
        open_data(command.data, ranks=on_ranks.ranks, takes_loose=True) as data,
    ):
        log_cut_captions(data.dataset, on_ranks.model.config.model.context_length)
        found = encode_captioned(on_ranks, data.dataset)
        result = on_ranks.on_rank_0(RetrievalFeatures.ranked, found, RetrievalResult)
        if found is None:
            return
        print(table := result.to_table())
        described = {"data": command.data, "name": data.name}
        write_results(command, described | result.to_json(), table)


def run_linear_probe(command: LinearProbe) -> None:
    """Extracts features on all ranks; rank 0 fits, prints and writes."""
    sets, described = _extract(command)
    if not sets:
        return
    train, test, *more = sets
    result = linear_probe(
        train,
        test,
        validation=more[0] if more else None,
        c=command.c,
        metric=described["metric"],
        seed=command.seed,
        progress=True,
    )
    print(result.to_table())
    table = classification_table([(test.name, result.metric, result.classes)])
    write_results(command, described | result.to_json(), table)
    if command.figures is not None:
        title = f"{test.name}, linear probe"
        draw_confusion(result.classes, command.figures, "linear-probe", title=title)


def run_knn(command: Knn) -> None:
    """Extracts features on all ranks; rank 0 searches, prints and writes."""
    sets, described = _extract(command)
    if not sets:
        return
    train, test = sets
    metric = described["metric"]
    results = nearest_neighbours(
        train, test, ks=command.k, temperature=command.temperature, progress=True
    )
    rows = [(f"k = {k}", metric, result) for k, result in results.items()]
    print(table := classification_table(rows, mean=False))  # a mean over k would mean nothing
    found = [{"k": k} | result.to_json() for k, result in results.items()]
    described |= {"temperature": command.temperature, "results": found}
    write_results(command, described, table)
    if command.figures is not None:
        best = max(results, key=lambda k: results[k].value(metric))
        title = f"{test.name}, {best} nearest neighbours"
        draw_confusion(results[best], command.figures, "knn", title=title)


def _extract(command: FrozenFeatures) -> tuple[list[LabelledFeatures], dict[str, Any]]:
    """Features of the data sets of a command, and the first values of its report; rank 0 only."""
    folder = features_folder(command.features, command.checkpoint)
    with command_model(command) as on_ranks:
        sets = labelled_features(on_ranks, *command.data_sets(), layer=command.layer, folder=folder)
    if not sets:
        return [], {}
    return sets, {
        "train": command.train,
        "data": command.data,
        "name": sets[1].name,
        "layer": command.layer,
        "num_train": len(sets[0]),
        "num_test": len(sets[1]),
        "num_features": sets[0].features.shape[1],
        "metric": choose_metric(command.metric, command.data),
    }


RUNS: dict[type[ModelCommand], Callable[[Any], None]] = {
    ZeroShot: run_zero_shot,
    Retrieval: run_retrieval,
    LinearProbe: run_linear_probe,
    Knn: run_knn,
}
