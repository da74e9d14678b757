"""Zero-shot classification: an image's class is the one whose prompts it is most similar to.

The classifier of a class is the mean of its normalised prompt embeddings, normalised again
(Radford et al., arXiv 2103.00020, section 3.1.4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import rank_0_alone
from unicl_fast.evaluation.data import EvaluationData, open_data, short_names
from unicl_fast.evaluation.features import (
    ModelOnRanks,
    encode_images,
    encode_token_rows,
    model_on_ranks,
    require_text_encoder,
)
from unicl_fast.evaluation.levels import LevelsResult, classify_at_levels
from unicl_fast.evaluation.report import (
    ClassificationResult,
    PrecisionResult,
    average_precisions,
    classification_table,
    draw_confusion,
    write_results,
)
from unicl_fast.evaluation.requests import Metric, MetricChoice, ZeroShot
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.wording import count_of
from unicl_fast.text.class_lists import fill_template
from unicl_fast.text.tokenizer import Tokenizer


@torch.no_grad()
def zero_shot_classifier(
    model: UniCL,
    *,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 512,
    progress: bool = False,
) -> Float[Tensor, "k d"]:
    """One unit-norm row for each class, from templates with one `{}` each.

    Raises:
        ValueError: the model has no text encoder.
    """
    require_text_encoder(model, "zero-shot classification")
    prompts = [fill_template(template, name) for name in class_names for template in templates]
    rows = Tokenizer(model.config.model.context_length).encode(prompts)
    features = encode_token_rows(model, rows, batch_size=batch_size, progress=progress)
    each = features.view(len(class_names), len(templates), -1)
    return F.normalize(each.mean(dim=1), dim=-1)


def scores_by(model: UniCL, classifier: Float[Tensor, "k d"]) -> Callable[[Tensor], Tensor]:
    """A function from images uint8 [b h w c] to their scores [b k], for `classify`."""

    def scores_of(images: Tensor) -> Tensor:
        features = encode_images(model, images)
        return features @ classifier.to(features.dtype).T

    return scores_of


def evaluate_zero_shot(
    on_ranks: ModelOnRanks,
    dataset: PackedDataset,
    *,
    class_names: Sequence[str] = (),
    templates: Sequence[str] = (),
    rows_of_classes: NDArray[np.int64] | None = None,
    confusion: bool = False,
) -> ClassificationResult:
    """Zero-shot accuracy on a packed data set, or that of a model trained by cross-entropy.

    Class names, as many, and templates are instead of the data set's own. For cross-entropy,
    `rows_of_classes` [k] says which of the model's rows each class has. `confusion` also counts
    which class is taken for which.

    Raises:
        ValueError: no classes, or no sample has a label.
    """
    model = on_ranks.model
    class_names = tuple(class_names) or dataset.manifest.class_names
    if not class_names:
        raise ValueError(f"{dataset.location} has no classes: zero-shot needs labelled images")
    if rows_of_classes is not None and model.class_rows is not None:
        classifier = model.class_rows.detach()[torch.from_numpy(rows_of_classes)]
    else:
        classifier = zero_shot_classifier(
            model,
            class_names=class_names,
            templates=tuple(templates) or dataset.manifest.templates,
            progress=on_ranks.progress,
        )
    return on_ranks.classify(
        on_ranks.loader(dataset),
        scores_by(model, classifier),
        labels_of=lambda sample: dataset.labels_of(sample).tolist(),
        class_names=class_names,
        what="zero-shot",
        confusion=confusion,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Evaluated:
    """The result of one data set, and what is written of it."""

    name: str
    metric: Metric
    result: ClassificationResult
    class_names: Sequence[str]
    values: dict[str, Any]


def run(command: ZeroShot) -> None:
    """Evaluates one data set after the other, each reported as soon as it is done."""
    with model_on_ranks(command) as on_ranks:
        found = _evaluate_each(command, on_ranks)
        if not on_ranks.ranks.is_main:
            return
        table = classification_table([(one.name, one.metric, one.result) for one in found])
        values = [one.values for one in found]
        if len(found) == 1:
            write_results(command, values[0], table)
        else:
            print(f"\n{table}")
            write_results(command, {"mean": _mean(found), "data_sets": values}, table)
        for one in found:
            title = f"{one.name}, zero-shot"
            draw_confusion(one.result, one.class_names, command.figures, one.name, title=title)


def _mean(found: Sequence[_Evaluated]) -> float:
    return sum(one.result.value(one.metric) for one in found) / len(found)


def _evaluate_each(command: ZeroShot, on_ranks: ModelOnRanks) -> list[_Evaluated]:
    """Evaluates every data set of a command; rank 0 prints."""
    names = short_names(command.data)
    class_names = command.for_each("class_names", default="")
    templates = command.for_each("templates", default="")
    metrics: list[MetricChoice] = command.for_each("metric", default="auto")
    found: list[_Evaluated] = []
    for number, (spec, name) in enumerate(zip(command.data, names, strict=True)):
        with open_data(
            spec,
            ranks=on_ranks.ranks,
            metric=metrics[number],
            class_names=class_names[number],
            templates=templates[number],
            name=name,
        ) as data:
            result = evaluate_zero_shot(
                on_ranks,
                data.dataset,
                class_names=data.class_names,
                templates=data.templates,
                confusion=command.figures is not None,
            )
            levels, precision = _from_features(command, on_ranks, data)
            num_quarantined = data.dataset.manifest.num_quarantined
        values: dict[str, Any] = {"data": spec, "name": name, "metric": data.metric}
        values["num_templates"] = len(data.templates)
        values |= result.to_json() | {"num_quarantined": num_quarantined}
        if levels is not None:
            values["hierarchy"] = levels.to_json()
        if precision is not None:
            values["average_precision"] = precision.to_json()
        found.append(
            _Evaluated(
                name=name,
                metric=data.metric,
                result=result,
                class_names=data.class_names,
                values=values,
            )
        )
        if not on_ranks.ranks.is_main:
            continue
        print((f"\n{name}\n" if len(names) > 1 else "") + result.to_table())
        for more in (levels, precision):
            if more is not None:
                print(f"\n{more.to_table()}")
        if num_quarantined:
            refused = count_of(num_quarantined, "file")
            print(f"refused when packing, and not counted above: {refused}")
    return found


def _from_features(
    command: ZeroShot, on_ranks: ModelOnRanks, data: EvaluationData
) -> tuple[LevelsResult | None, PrecisionResult | None]:
    """Levels and average precision, where asked for, on rank 0; None on the other ranks.

    Raises:
        ValueError: levels are asked for, and the data has no hierarchy.
    """
    hierarchy, dataset = data.dataset.manifest.hierarchy, data.dataset
    if command.hierarchy and hierarchy is None:
        raise ValueError(
            f"--hierarchy: {data.name} has no hierarchy of classes; pack it by unicl-pack build "
            "--hierarchy FILE"
        )
    if not (command.hierarchy or command.average_precision):
        return None, None
    features = on_ranks.features(dataset)
    levels = precision = None
    with rank_0_alone(on_ranks.ranks):
        if features is None:
            return None, None
        labels = data.labels()

        def classifier_of(class_names: Sequence[str]) -> Tensor:
            return zero_shot_classifier(
                on_ranks.model,
                class_names=class_names,
                templates=data.templates,
                progress=on_ranks.progress,
            )

        if command.hierarchy and hierarchy is not None:
            levels = classify_at_levels(
                features,
                classifier_of,
                labels=labels,
                class_names=data.class_names,
                hierarchy=hierarchy,
            )
        if command.average_precision:
            scores = features @ classifier_of(data.class_names).to(features).T
            precision = average_precisions(scores, labels, data.class_names)
    return levels, precision
