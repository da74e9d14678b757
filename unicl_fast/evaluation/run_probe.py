"""`unicl-eval linear-probe` and `knn`: what labels can be read off frozen features.

All ranks extract features, rank 0 fits and reports: a fit is a matter of seconds where extracting
took minutes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from unicl_fast.checkpoints.load import find_model
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import from_rank_0
from unicl_fast.evaluation.classification import ClassificationResult, Metric
from unicl_fast.evaluation.data import check_data, open_data
from unicl_fast.evaluation.encode import device_of, require_layer
from unicl_fast.evaluation.features import FeatureCache
from unicl_fast.evaluation.figures import draw_confusion
from unicl_fast.evaluation.knn import knn_accuracy
from unicl_fast.evaluation.linear_probe import (
    LabelledFeatures,
    LinearClassifier,
    draw_shots,
    evaluate_classifier,
    fit_logistic_regression,
    fit_probe,
    split_validation,
    with_labels,
)
from unicl_fast.evaluation.model import model_on_ranks, shows_progress
from unicl_fast.evaluation.report import (
    METRIC_NAMES,
    classification_table,
    markdown_table,
    percent,
    write_results,
)
from unicl_fast.evaluation.requests import FrozenFeatures, Knn, LayerName, LinearProbe
from unicl_fast.evaluation.run_on_dataset import extract_all
from unicl_fast.models.unicl import UniCL

_KEY_VERSION = 1
"""Of what decides features beside the settings below; raised when the pipeline changes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Extracted:
    """Features and labels of one data set on rank 0, on the device that fits."""

    name: str
    class_names: tuple[str, ...]
    samples: LabelledFeatures
    metric: Metric


def check_probe(command: FrozenFeatures) -> None:
    """Refuses what can be told to be wrong without a model.

    Raises:
        ValueError: a number out of range.
        FileNotFoundError: no data.
    """
    for spec in (command.train, command.data):
        check_data(spec)
    if isinstance(command, LinearProbe):
        if command.validation:
            check_data(command.validation)
        if not 0 < command.validation_fraction < 1:
            raise ValueError(
                f"--validation-fraction must lie in (0, 1), not {command.validation_fraction}"
            )
        if command.c < 0 or not math.isfinite(command.c):
            raise ValueError(f"--c must be positive, or 0 to search it, not {command.c}")
        if command.draws < 1 or command.max_iterations < 1:
            raise ValueError("--draws and --max-iterations must be at least 1")
        if command.shots and min(command.shots) < 1:
            raise ValueError(f"--shots must be at least 1, not {min(command.shots)}")
        if command.shots and command.validation and command.c:
            raise ValueError(
                f"--validation is to choose C by, and --c {command.c:g} fixes it: with --shots, "
                "which are fitted alone, give one of the two"
            )
        if command.seed < 0:
            raise ValueError(f"--seed must not be negative, not {command.seed}")
    elif isinstance(command, Knn):
        if not command.k or min(command.k) < 1:
            raise ValueError("--k takes numbers of neighbours, at least 1")
        if not command.temperature > 0:
            raise ValueError(f"--temperature must be positive, not {command.temperature}")


def run_linear_probe(command: LinearProbe) -> None:
    """Extracts on all ranks; rank 0 fits, prints and writes."""
    specs = [command.train, command.data]
    if command.validation:
        specs.append(command.validation)
    extracted = _extract(command, specs)
    if extracted is None:
        return
    dtype = torch.float64 if command.fit_precision == "fp64" else torch.float32
    train, test, *others = [_cast(one, dtype) for one in _in_one_space(extracted)]
    metric = extracted[1].metric if command.metric == "auto" else command.metric
    names = extracted[0].class_names
    values = _shared_values(command, train, test) | {"metric": metric}
    validation = others[0] if others else None
    if command.shots:
        table = _few_shot(
            command, train, validation, test, names=names, metric=metric, values=values
        )
    else:
        table = _full_probe(
            command,
            train,
            validation,
            test,
            names=names,
            metric=metric,
            values=values,
            name=extracted[1].name,
        )
    write_results(values, table, json_path=command.json, markdown_path=command.markdown)


def run_knn(command: Knn) -> None:
    """Extracts on all ranks; rank 0 searches, prints and writes."""
    extracted = _extract(command, [command.train, command.data])
    if extracted is None:
        return
    train, test = _in_one_space(extracted)
    names = extracted[0].class_names
    results = knn_accuracy(
        train,
        test,
        class_names=names,
        ks=command.k,
        temperature=command.temperature,
        confusion=command.figures is not None,
    )
    metric = extracted[1].metric if command.metric == "auto" else command.metric
    table = classification_table([(f"k = {k}", metric, result) for k, result in results.items()])
    table = "\n".join(table.split("\n")[: len(results) + 2])  # a mean over k would mean nothing
    print(table)
    best = max(results, key=lambda k: results[k].value(metric))
    _draw(command, results[best], names, f"{extracted[1].name}, {best} nearest neighbours")
    values = _shared_values(command, train, test) | {
        "metric": metric,
        "temperature": command.temperature,
        "results": [{"k": k} | result.to_json() for k, result in results.items()],
    }
    write_results(values, table, json_path=command.json, markdown_path=command.markdown)


def _full_probe(
    command: LinearProbe,
    train: LabelledFeatures,
    validation: LabelledFeatures | None,
    test: LabelledFeatures,
    *,
    names: tuple[str, ...],
    metric: Metric,
    values: dict[str, Any],
    name: str,
) -> str:
    """Fits on everything and tests; fills `values` and returns the table."""
    if command.c:
        both = train if validation is None else train.join(validation)
        c = command.c
        classifier = _fit_with_c(command, both, num_classes=len(names))
        num_fitted = len(both)
    else:
        if validation is None:
            labels = train.labels.cpu().numpy()
            kept, aside = split_validation(
                labels, fraction=command.validation_fraction, seed=command.seed
            )
            train, validation = train.take(kept), train.take(aside)
        with tqdm(desc="fit", unit=" fits", disable=not sys.stderr.isatty()) as bar:

            def tell(text: str) -> None:
                bar.set_postfix_str(text)
                bar.update()

            fit = fit_probe(
                train,
                validation,
                class_names=names,
                metric=metric,
                max_iterations=command.max_iterations,
                tell=tell,
            )
        classifier, c, num_fitted = fit.classifier, fit.c, len(train) + len(validation)
        values["validation"] = [
            {"c": tried, metric: value} for tried, value in fit.validation.items()
        ]
        values["num_validation"] = len(validation)
        if fit.at_edge:
            print(f"C {c:g} is at the edge of what is searched; a better one may lie beyond")
    result = evaluate_classifier(
        classifier, test, class_names=names, confusion=command.figures is not None
    )
    values |= {"c": c, "num_fitted": num_fitted} | result.to_json()
    values["num_without_label"] = test.num_without_label
    print(result.to_table())
    print(f"C {c:.4g}, fitted on {num_fitted:,} samples, features of the {command.layer}")
    _draw(command, result, names, f"{name}, linear probe")
    return classification_table([(name, metric, result)])


def _few_shot(
    command: LinearProbe,
    pool: LabelledFeatures,
    validation: LabelledFeatures | None,
    test: LabelledFeatures,
    *,
    names: tuple[str, ...],
    metric: Metric,
    values: dict[str, Any],
) -> str:
    """Draws, fits and tests; fills `values` and returns the table.

    Raises:
        ValueError: C is to be chosen, and the shots leave nothing to choose it by.
    """
    labels = pool.labels.cpu().numpy()
    counts = np.bincount(labels)
    smallest = int(counts[counts > 0].min())
    if not command.c and validation is None and max(command.shots) >= counts.max():
        raise ValueError(
            f"no class has more than {max(command.shots)} training samples, so none are left to "
            "choose C by: take fewer --shots, give other images by --validation, or C by --c"
        )
    values["shots"] = []
    rows = []
    work = [(shots, draw) for shots in command.shots for draw in range(command.draws)]
    found: dict[int, list[float]] = {shots: [] for shots in command.shots}
    chosen: dict[int, list[float]] = {shots: [] for shots in command.shots}
    for shots, draw in tqdm(work, desc="few-shot", disable=not sys.stderr.isatty()):
        kept, aside = draw_shots(labels, shots=shots, seed=command.seed + draw)
        train = pool.take(kept)
        if command.c:
            c = command.c
            classifier = _fit_with_c(command, train, num_classes=len(names))
        else:
            fit = fit_probe(
                train,
                pool.take(aside) if validation is None else validation,
                class_names=names,
                metric=metric,
                refit=False,
                max_iterations=command.max_iterations,
            )
            classifier, c = fit.classifier, fit.c
        result = evaluate_classifier(classifier, test, class_names=names)
        found[shots].append(result.value(metric))
        chosen[shots].append(c)
    for shots in command.shots:
        draws = np.array(found[shots])
        spread = float(draws.std(ddof=1)) if len(draws) > 1 else None
        values["shots"].append(
            {
                "shots": shots,
                "mean": float(draws.mean()),
                "standard_deviation": spread,
                "draws": draws.tolist(),
                "c": chosen[shots],
            }
        )
        rows.append(
            [
                str(shots),
                percent(float(draws.mean())),
                "" if spread is None else percent(spread),
                f"{percent(float(draws.min()))} to {percent(float(draws.max()))}",
            ]
        )
    header = ["shots", f"{METRIC_NAMES[metric]}, %", "standard deviation", "range"]
    table = markdown_table(header, rows)
    print(table)
    print(f"{command.draws} draws each, {len(test):,} test samples, {len(names)} classes")
    if smallest < max(command.shots):
        print(f"the smallest class has {smallest} training samples, and gave all it has")
    values |= {"num_draws": command.draws, "smallest_class": smallest}
    return table


def _extract(command: FrozenFeatures, specs: Sequence[str]) -> list[_Extracted] | None:
    """Features and labels of each data set; None on all ranks but rank 0."""
    extracted = []
    with model_on_ranks(command) as (model, ranks):
        require_layer(model, command.layer)
        cache = FeatureCache(_cache_folder(command))
        device = device_of(model)
        weights = weights_checksum(model)
        for spec in specs:
            with open_data(spec, ranks=ranks) as data:
                key = feature_key(model, data.dataset, layer=command.layer, weights=weights)
                features = None
                if from_rank_0(cache.has(key), ranks):
                    if ranks.is_main:
                        features = cache.load(key, num_samples=len(data.dataset))
                        print(f"features of {spec}: found again")
                else:
                    features = extract_all(
                        model,
                        data.dataset,
                        layer=command.layer,
                        ranks=ranks,
                        batch_size=command.batch_size,
                        progress=shows_progress(ranks),
                    )
                    if features is not None:
                        cache.store(key, features)
                if features is None:
                    continue
                labels = [data.dataset.labels_of(i).tolist() for i in range(len(data.dataset))]
                extracted.append(
                    _Extracted(
                        name=data.name,
                        class_names=data.class_names,
                        samples=with_labels(features.to(device), labels, what=spec),
                        metric=data.metric,
                    )
                )
    return extracted or None


def _in_one_space(extracted: Sequence[_Extracted]) -> list[LabelledFeatures]:
    """The labels of all data sets as places among the classes of the first.

    Raises:
        ValueError: a class that the first has not.
    """
    first = extracted[0]
    places = {name: place for place, name in enumerate(first.class_names)}
    result = []
    for one in extracted:
        if one.class_names == first.class_names:
            result.append(one.samples)
            continue
        if len(places) < len(first.class_names):
            raise ValueError(
                f"{first.name} has several classes of one name, and {one.name} has another list: "
                "pack both with the same --class-names"
            )
        strangers = [name for name in one.class_names if name not in places]
        if strangers:
            raise ValueError(
                f"{one.name} has the class {strangers[0]!r}"
                + (f" and {len(strangers) - 1} others" if len(strangers) > 1 else "")
                + f", which the training data {first.name} has not: pack both with the same "
                "--class-names"
            )
        table = [places[name] for name in one.class_names]
        all_labels = [[table[label] for label in own] for own in one.samples.all_labels]
        result.append(
            LabelledFeatures(
                one.samples.features,
                torch.tensor([own[0] for own in all_labels], device=one.samples.labels.device),
                all_labels,
                num_without_label=one.samples.num_without_label,
            )
        )
    return result


def weights_checksum(model: UniCL) -> str:
    """XXH3 of everything that turns images into features, as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(("image_encoder.", "image_projection")):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def feature_key(model: UniCL, dataset: PackedDataset, *, layer: LayerName, weights: str) -> str:
    """A name for the features of a data set: equal if and only if they would be."""
    data, efficiency = model.config.data, model.config.efficiency
    images: NDArray[np.uint64] = np.ascontiguousarray(dataset.samples["xxh3"])
    facts = {
        "version": _KEY_VERSION,
        "weights": weights,
        "layer": layer,
        "images": [xxhash.xxh3_64_hexdigest(images.tobytes()), len(dataset)],
        "encoder": model.config.model.image_encoder,
        "view": [data.image_size, data.evaluation_resize, data.interpolation, data.resample],
        "normalisation": [*data.mean, *data.std],
        "precision": efficiency.precision,
        "device": device_of(model).type,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _fit_with_c(
    command: LinearProbe, samples: LabelledFeatures, *, num_classes: int
) -> LinearClassifier:
    """The fit where C is given instead of searched."""
    return fit_logistic_regression(
        samples.features,
        samples.labels,
        num_classes=num_classes,
        c=command.c,
        max_iterations=command.max_iterations,
    )


def _cache_folder(command: FrozenFeatures) -> Path | None:
    if command.features == "none":
        return None
    if command.features != "auto":
        return Path(command.features)
    checkpoint = find_model(command.checkpoint)
    in_run = checkpoint.parent.name == "checkpoints"
    return (checkpoint.parent.parent if in_run else checkpoint.parent) / "features"


def _cast(samples: LabelledFeatures, dtype: torch.dtype) -> LabelledFeatures:
    return LabelledFeatures(
        samples.features.to(dtype),
        samples.labels,
        samples.all_labels,
        num_without_label=samples.num_without_label,
    )


def _shared_values(
    command: FrozenFeatures, train: LabelledFeatures, test: LabelledFeatures
) -> dict[str, Any]:
    return {
        "checkpoint": str(command.checkpoint),
        "weights": command.weights,
        "train": command.train,
        "data": command.data,
        "layer": command.layer,
        "num_train": len(train),
        "num_test": len(test),
        "num_features": train.features.shape[1],
    }


def _draw(
    command: FrozenFeatures, result: ClassificationResult, names: Sequence[str], title: str
) -> None:
    if command.figures is None:
        return
    assert result.confusion is not None
    kind = "linear-probe" if isinstance(command, LinearProbe) else "knn"
    path = command.figures / f"confusion-{kind}.png"
    draw_confusion(result.confusion, names, path, title=title)
    print(f"written to {path}")
