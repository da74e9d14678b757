"""Zero-shot classification: an image gets the class whose prompts are most similar to it.

A class's row is the mean of its normalised prompt embeddings, normalised again (Radford et al.,
arXiv 2103.00020, section 3.1.4).
"""

from __future__ import annotations

from collections.abc import Sequence
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
    require_text_encoder,
)
from unicl_fast.evaluation.levels import LevelsResult, classify_at_levels
from unicl_fast.evaluation.report import (
    ClassificationCounts,
    ClassificationResult,
    PrecisionResult,
    average_precisions,
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
    batch_size: int = 512,
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
    features = encode_token_rows(
        model, rows, batch_size=batch_size, progress=progress, folder=folder
    )
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
    batch_size: int = 256,
) -> ClassificationResult:
    """Predicts the class of the most similar row; ValueError if no image has a label."""
    counts = ClassificationCounts(class_names)
    rows = classifier.to(features.dtype).T
    for start in range(0, len(features), batch_size):
        images = slice(start, start + batch_size)
        scores = features[images].to(rows.device) @ rows
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices
        counts.add(best.tolist(), labels[images])
    return counts.result(what="zero-shot")


def evaluate_zero_shot(
    on_ranks: ModelOnRanks,
    dataset: PackedDataset,
    *,
    rows_of_classes: NDArray[np.int64] | None = None,
) -> ClassificationResult:
    """Accuracy on a packed data set; all ranks call it and get the result.

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

    def judge(features: Tensor) -> ClassificationResult:
        return classify(
            # a 1 for the bias, which is the last column of the model's rows
            features if rows_of_classes is None else F.pad(features, (0, 1), value=1.0),
            classifier,
            labels=all_labels(dataset),
            class_names=manifest.class_names,
            batch_size=on_ranks.batch_size,
        )

    return on_ranks.on_rank_0(judge, on_ranks.features(dataset), ClassificationResult)


def _require_classes(dataset: PackedDataset) -> None:
    if not dataset.manifest.class_names:
        raise ValueError(f"{dataset.location} has no classes: zero-shot needs labelled images")


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroShotResult:
    name: str
    metric: Metric  # the metric that is reported first
    classes: ClassificationResult
    num_templates: int
    num_quarantined: int  # files refused when the data was packed; no other count includes them
    levels: LevelsResult | None
    precision: PrecisionResult | None

    @property
    def value(self) -> float:
        """The metric, in 0 to 1."""
        return self.classes.value(self.metric)

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"name": self.name, "metric": self.metric}
        values["num_templates"] = self.num_templates
        values |= self.classes.to_json() | {"num_quarantined": self.num_quarantined}
        for key, more in (("hierarchy", self.levels), ("average_precision", self.precision)):
            if more is not None:
                values[key] = more.to_json()
        return values

    def to_table(self) -> str:
        parts = [self.classes, self.levels, self.precision]
        text = "\n\n".join(part.to_table() for part in parts if part is not None)
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
            levels = precision = None
            if tree is not None:
                levels = classify_at_levels(
                    features, classifier_of, labels=labels, class_names=names, hierarchy=tree
                )
            if average_precision:
                scores = features @ classifier.to(features).T
                precision = average_precisions(scores, labels, names)
            size = on_ranks.batch_size
            classes = classify(
                features, classifier, labels=labels, class_names=names, batch_size=size
            )
            return ZeroShotResult(
                name=opened.name, metric=choose_metric(metric, str(data)), classes=classes,
                levels=levels, precision=precision, num_templates=len(opened.templates),
                num_quarantined=dataset.manifest.num_quarantined,
            )  # fmt: skip

        return on_ranks.on_rank_0(judge, on_ranks.features(dataset), ZeroShotResult)
