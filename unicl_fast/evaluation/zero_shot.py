"""Zero-shot classification: an image gets the class whose prompts are most similar to it.

A class's row is the mean of its normalised prompt embeddings, normalised again (Radford et al.,
arXiv 2103.00020, section 3.1.4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks, gather_rows
from unicl_fast.evaluation.choices import Metric, MetricChoice
from unicl_fast.evaluation.data import all_labels, choose_metric, open_data
from unicl_fast.evaluation.features import (
    LoadedModel,
    ModelOnRanks,
    encode_token_rows,
    require_finite,
    require_text_encoder,
)
from unicl_fast.evaluation.levels import LevelsResult, classify_at_levels
from unicl_fast.evaluation.report import (
    ClassificationCounts,
    ClassificationResult,
    PrecisionResult,
    average_precisions,
    classification_table,
    json_by_column,
    labels_by_column,
)
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.wording import count_of
from unicl_fast.text.class_lists import fill_template
from unicl_fast.training.data import tokenizer_of


@torch.no_grad()
def zero_shot_classifier(
    model: UniCL,
    class_names: Sequence[str],
    *,
    templates: Sequence[str],
    progress: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    folder: Path | None = None,
) -> Float[Tensor, "k d"]:
    """One unit-norm row for each class, from templates with one `{}` each.

    All `ranks` call it together and get all rows; each encodes the prompts of some classes.
    A `folder` keeps the text encoder's features. Raises ValueError for a model without a text
    encoder.
    """
    require_text_encoder(model, "zero-shot classification")
    size = -(-len(class_names) // ranks.world_size)
    # all ranks send equally many rows: one that is left without a class encodes a spare one
    own = class_names[ranks.rank * size :][:size] or class_names[:1]
    prompts = [fill_template(template, name) for name in own for template in templates]
    rows = tokenizer_of(model.config).encode(prompts)
    features = encode_token_rows(model, rows, progress=progress, folder=folder)
    each = features.view(len(own), len(templates), -1)
    classifier = F.normalize(each.mean(dim=1), dim=-1)
    padded = F.pad(classifier, (0, 0, 0, size - len(own)))
    return gather_rows(padded, ranks)[: len(class_names)]


def classify(
    features: Float[Tensor, "n d"],
    classifier: Float[Tensor, "k d"],
    *,
    labels: Sequence[Sequence[int]],
    class_names: Sequence[str],
    columns: Mapping[str, Sequence[int]],
    batch_size: int = 256,
) -> dict[str, ClassificationResult]:
    """Predicts the class of the most similar row, for each label column among its classes.

    `columns` are as in `Manifest.columns`. Raises ValueError if no image has a label.
    """
    require_finite(features, classifier)
    found = {}
    for column, own in labels_by_column(labels, columns).items():
        counts, numbers = ClassificationCounts(class_names), torch.tensor(columns[column])
        rows = classifier[numbers].to(features.dtype).T
        for start in range(0, len(features), batch_size):
            images = slice(start, start + batch_size)
            scores = features[images].to(rows.device) @ rows
            best = scores.topk(min(5, scores.shape[1]), dim=1).indices.cpu()
            counts.add(numbers[best].tolist(), own[images])
        found[column] = counts.result(what="zero-shot")
    return found


def evaluate_zero_shot(
    on_ranks: ModelOnRanks,
    dataset: PackedDataset,
    *,
    rows_of_classes: NDArray[np.int64] | None = None,
) -> dict[str, ClassificationResult]:
    """Accuracy on a packed data set by label column; all ranks call it and get the results.

    For a model trained by cross-entropy, `rows_of_classes` [k] is the model's row of each class.

    Raises:
        ValueError: no classes, or no sample has a label.
        EvaluationStopped: a stop was requested; raised on all ranks.
    """
    model, manifest = on_ranks.model, dataset.manifest
    _require_classes(dataset)
    if rows_of_classes is not None:
        classifier = model.learnt["class_rows"].detach()[torch.from_numpy(rows_of_classes)]
    else:
        classifier = zero_shot_classifier(
            model, manifest.class_names, templates=manifest.templates,
            progress=on_ranks.progress, ranks=on_ranks.ranks, folder=on_ranks.text_folder,
        )  # fmt: skip

    def judge(features: Tensor) -> dict[str, ClassificationResult]:
        return classify(
            # a 1 for the bias, which is the last column of the model's rows
            features if rows_of_classes is None else F.pad(features, (0, 1), value=1.0),
            classifier,
            labels=all_labels(dataset),
            class_names=manifest.class_names,
            columns=manifest.columns,
            batch_size=on_ranks.batch_size,
        )

    kind = dict[str, ClassificationResult]
    return on_ranks.on_rank_0(judge, on_ranks.features(dataset), kind)


def _require_classes(dataset: PackedDataset) -> None:
    if not dataset.manifest.class_names:
        raise ValueError(f"{dataset.location} has no classes: zero-shot needs labelled images")


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroShotResult:
    name: str
    metric: Metric  # the metric that is reported first
    classes: dict[str, ClassificationResult]
    """By label column; by the empty name if the data have one."""
    num_templates: int
    num_quarantined: int  # files refused when the data was packed; no other count includes them
    levels: dict[str, LevelsResult]
    precision: dict[str, PrecisionResult]

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"name": self.name, "metric": self.metric}
        values["num_templates"] = self.num_templates
        more: dict[str, Mapping[str, LevelsResult | PrecisionResult]] = {
            "hierarchy": self.levels, "average_precision": self.precision
        }  # fmt: skip
        values |= json_by_column({
            column: result.to_json()
            | {key: each[column].to_json() for key, each in more.items() if column in each}
            for column, result in self.classes.items()
        })  # fmt: skip
        return values | {"num_quarantined": self.num_quarantined}

    def rows(self) -> list[tuple[str, Metric, ClassificationResult]]:
        """Rows for `classification_table`, one a label column."""
        return [
            (f"{self.name}, {column}".removesuffix(", "), self.metric, result)
            for column, result in self.classes.items()
        ]

    def to_table(self) -> str:
        """Several label columns have one line each."""
        several = list(self.classes) != [""]
        parts = [classification_table(self.rows()) if several else self.classes[""].to_table()]
        for column in self.levels | self.precision:
            more = (self.levels.get(column), self.precision.get(column))
            parts += [column, *(one.to_table() for one in more if one is not None)]
        text = "\n\n".join(filter(None, parts))
        if self.num_quarantined:
            refused = count_of(self.num_quarantined, "file")
            text += f"\nrefused when packing, and not counted above: {refused}"
        return text


def zero_shot(
    model: LoadedModel | ModelOnRanks,
    data: str | Path,
    *,
    class_names: str = "",
    templates: str = "",
    metric: MetricChoice = "auto",
    name: str = "",
    hierarchy: bool = False,
    average_precision: bool = False,
) -> ZeroShotResult:
    """Zero-shot classification of labelled images, on all ranks.

    Args:
        model: from `unicl_fast.load_model`, or a model on ranks.
        data: labelled images, written as `--data` of `unicl-eval zero-shot`.
        class_names: instead of the data's own, written as `--class-names`.
        templates: instead of the data's own, written as `--templates`.
        metric: is reported first; auto follows CLIP's protocol for the data set.
        name: for tables; by default the folder's name.
        hierarchy: also classify among the classes of each level of the data's hierarchy.
        average_precision: also compute the mean average precision of the classes.

    Raises:
        ValueError: a model without texts, or data without labels or without the hierarchy.
        EvaluationStopped: a stop was requested; raised on all ranks.
    """
    on_ranks = ModelOnRanks.of(model)
    with open_data(
        str(data), ranks=on_ranks.ranks, class_names=class_names, templates=templates, name=name
    ) as opened:
        dataset, names = opened.dataset, opened.class_names
        tree = dataset.manifest.hierarchy if hierarchy else None
        _require_classes(dataset)
        if hierarchy and tree is None:
            raise ValueError(
                f"--hierarchy: {opened.name} has no hierarchy of classes; pack it by unicl-pack "
                "build --hierarchy FILE"
            )
        every = (*names, *(tree.names if tree is not None else ()))
        rows = zero_shot_classifier(
            on_ranks.model, every, templates=opened.templates,
            progress=on_ranks.progress, ranks=on_ranks.ranks, folder=on_ranks.text_folder,
        )  # fmt: skip
        number_of = {name: number for number, name in enumerate(every)}
        classifier, labels = rows[: len(names)], all_labels(dataset)

        def classifier_of(titles: Sequence[str]) -> Tensor:
            return rows[[number_of[title] for title in titles]]

        def judge(features: Tensor) -> ZeroShotResult:
            columns, size = dataset.manifest.columns, on_ranks.batch_size
            classes = classify(
                features, classifier, labels=labels, class_names=names, columns=columns,
                batch_size=size,
            )  # fmt: skip
            levels, precision = dict[str, LevelsResult](), dict[str, PrecisionResult]()
            for column, own in labels_by_column(labels, columns).items():
                # colours beside a hierarchy of products have a single level
                if tree is not None and max(tree.parents[one] for one in columns[column]) >= 0:
                    levels[column] = classify_at_levels(
                        features, classifier_of, labels=own, numbers=columns[column],
                        class_names=names, hierarchy=tree,
                    )  # fmt: skip
                if average_precision:
                    scores = features @ classifier.to(features).T
                    precision[column] = average_precisions(scores, own, names)
            return ZeroShotResult(
                name=opened.name, metric=choose_metric(metric, str(data)), classes=classes,
                levels=levels, precision=precision, num_templates=len(opened.templates),
                num_quarantined=dataset.manifest.num_quarantined,
            )  # fmt: skip

        return on_ranks.on_rank_0(judge, on_ranks.features(dataset), ZeroShotResult)
