"""Zero-shot classification: a picture's class is the one whose prompts it is most like.

The classifier of a class is the mean of its normalised prompt embeddings, normalised again
(Radford et al., arXiv 2103.00020, section 3.1.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from unicl_fast.batch import EvaluationLoader
from unicl_fast.dist import Ranks
from unicl_fast.evaluation.encode import encode_pictures, encode_token_rows
from unicl_fast.evaluation.progress import EvaluationStopped, may_go_on
from unicl_fast.models.unicl import UniCL
from unicl_fast.prompts import fill_template
from unicl_fast.stages import WaitingForRanks
from unicl_fast.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroShotResult:
    """Counts of one pass, exact over all ranks, and what follows from them. Rates in 0 to 1."""

    num_samples: int
    num_correct: int
    num_correct_top5: int
    num_without_label: int
    """Samples of the data set that have no label and were left out."""
    per_class: list[tuple[str, int, int]]
    """Name, samples and correct ones of each class that has samples."""

    @property
    def top1(self) -> float:
        return self.num_correct / self.num_samples

    @property
    def top5(self) -> float:
        return self.num_correct_top5 / self.num_samples

    @property
    def mean_per_class(self) -> float:
        return sum(right / count for _, count, right in self.per_class) / len(self.per_class)

    @property
    def mean_per_class_interval(self) -> tuple[float, float]:
        """95 % interval of the mean over classes, from each class's binomial variance.

        The variance is taken at (right + 1) / (count + 2), so that a class of which all or none
        were right is not thought to be known exactly.
        """
        rates = [((right + 1) / (count + 2), count) for _, count, right in self.per_class]
        variance = sum(rate * (1 - rate) / count for rate, count in rates)
        half = 1.96 * math.sqrt(variance) / len(rates)
        return max(0.0, self.mean_per_class - half), min(1.0, self.mean_per_class + half)

    @property
    def top1_interval(self) -> tuple[float, float]:
        return wilson_interval(self.num_correct, self.num_samples)

    @property
    def top5_interval(self) -> tuple[float, float]:
        return wilson_interval(self.num_correct_top5, self.num_samples)

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types; rates in 0 to 1."""
        return {
            "num_samples": self.num_samples,
            "num_without_label": self.num_without_label,
            "num_classes": len(self.per_class),
            "top1": self.top1,
            "top1_interval_95": self.top1_interval,
            "top5": self.top5,
            "top5_interval_95": self.top5_interval,
            "mean_per_class": self.mean_per_class,
            "mean_per_class_interval_95": self.mean_per_class_interval,
            "per_class": [
                {"class": name, "num_samples": count, "top1": right / count}
                for name, count, right in self.per_class
            ],
        }

    def to_table(self) -> str:
        """The rates in percent with their 95 % intervals, as text."""
        rows = [
            ("top-1", self.top1, self.top1_interval),
            ("top-5", self.top5, self.top5_interval),
            ("mean per class", self.mean_per_class, self.mean_per_class_interval),
        ]
        lines = [f"{'':16}{'%':>7}   95 % interval"]
        lines += [
            f"{name:16}{100 * rate:7.2f}   {100 * low:.2f} to {100 * high:.2f}"
            for name, rate, (low, high) in rows
        ]
        lines.append(f"{self.num_samples} samples, {len(self.per_class)} classes")
        if self.num_without_label:
            lines.append(f"{self.num_without_label} samples without a label were left out")
        return "\n".join(lines)


def wilson_interval(num_right: int, num_tried: int, *, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927); z = 1.96 for 95 %."""
    rate = num_right / num_tried
    centre = rate + z * z / (2 * num_tried)
    half = z * math.sqrt(rate * (1 - rate) / num_tried + z * z / (4 * num_tried**2))
    scale = 1 + z * z / num_tried
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@torch.no_grad()
def zero_shot_classifier(
    model: UniCL,
    *,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 512,
    progress: bool = False,
) -> Float[Tensor, "k d"]:
    """One unit-norm row for each class.

    Args:
        model: in evaluation mode.
        class_names: k names.
        templates: texts with one `{}` each.
        batch_size: prompts encoded at once.
        progress: show a progress bar.
    """
    prompts = [fill_template(template, name) for name in class_names for template in templates]
    rows = Tokenizer(model.config.model.context_length).encode(prompts)
    features = encode_token_rows(model, rows, batch_size=batch_size, progress=progress)
    each = features.view(len(class_names), len(templates), -1)
    return F.normalize(each.mean(dim=1), dim=-1)


@torch.no_grad()
def zero_shot_accuracy(
    model: UniCL,
    loader: EvaluationLoader,
    classifier: Float[Tensor, "k d"],
    *,
    labels_of: Callable[[int], Sequence[int]],
    class_names: Sequence[str],
    ranks: Ranks | None = None,
    num_batches: int | None = None,
) -> ZeroShotResult:
    """Classifies what the loader yields.

    Args:
        model: in evaluation mode.
        loader: over all ranks, each sample once.
        classifier: from `zero_shot_classifier`.
        labels_of: labels of a sample of the data set; with several, any of them is right and the
            first is the class it counts for. Samples without labels are left out and counted.
        class_names: k names.
        ranks: whose counts are added up.
        num_batches: for the progress bar; None shows none.

    Raises:
        ValueError: no sample has a label.
        EvaluationStopped: it was asked to leave off, on all ranks.
    """
    # labelled, right, right in five, without label, ranks that left off
    counts = torch.zeros(5, dtype=torch.int64)
    per_class = torch.zeros(len(class_names), 2, dtype=torch.int64)
    for batch in tqdm(loader, desc="classify", total=num_batches, disable=num_batches is None):
        if not may_go_on():
            counts[4] = 1
            break
        best = _predict(model, batch.images, classifier)
        for sample, ranking in zip(batch.sample_ids.tolist(), best, strict=True):
            labels = [int(label) for label in labels_of(sample)]
            if not labels:
                counts[3] += 1
                continue
            right = ranking[0] in labels
            counts += torch.tensor([1, right, not set(labels).isdisjoint(ranking), 0, 0])
            per_class[labels[0]] += torch.tensor([1, right])
    if ranks is not None and ranks.world_size > 1:
        with WaitingForRanks():
            dist.all_reduce(counts, group=ranks.host_group)
            dist.all_reduce(per_class, group=ranks.host_group)
    if counts[4]:
        raise EvaluationStopped
    if counts[0] == 0:
        raise ValueError("no sample of this data set has a label: zero-shot needs some")
    return ZeroShotResult(
        num_samples=int(counts[0]),
        num_correct=int(counts[1]),
        num_correct_top5=int(counts[2]),
        num_without_label=int(counts[3]),
        per_class=[
            (name, int(count), int(right))
            for name, (count, right) in zip(class_names, per_class.tolist(), strict=True)
            if count
        ],
    )


def _predict(model: UniCL, images: Tensor, classifier: Float[Tensor, "k d"]) -> list[list[int]]:
    features = encode_pictures(model, images)
    scores = features @ classifier.to(features.dtype).T
    return scores.topk(min(5, classifier.shape[0]), dim=1).indices.tolist()
