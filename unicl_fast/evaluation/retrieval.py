"""Caption retrieval: does an image find its captions, and a caption its image?

Recall at k as on Flickr and COCO: an image counts if any of its captions is among the k most
similar of all captions; a caption counts if its image is among the k most similar images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicl_fast.evaluation.classification import wilson_interval

KS = (1, 5, 10)
_CHUNK = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """One direction at one k. Rates in 0 to 1."""

    k: int
    num_queries: int
    num_found: int
    chance: float
    """What random rankings would give on average."""

    @property
    def rate(self) -> float:
        return self.num_found / self.num_queries

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval.

        Captions of one image are not independent: for their queries it is a little narrow.
        """
        return wilson_interval(self.num_found, self.num_queries)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalResult:
    """Both directions."""

    num_images: int
    num_captions: int
    image_to_text: tuple[Recall, ...]
    text_to_image: tuple[Recall, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types; rates in 0 to 1."""
        values: dict[str, Any] = {
            "num_images": self.num_images,
            "num_captions": self.num_captions,
        }
        for name in ("image_to_text", "text_to_image"):
            for recall in getattr(self, name):
                values[f"{name}_recall_at_{recall.k}"] = recall.rate
                values[f"{name}_recall_at_{recall.k}_interval_95"] = recall.interval
                values[f"{name}_recall_at_{recall.k}_chance"] = recall.chance
        return values

    def to_table(self) -> str:
        """The recalls in percent with their 95 % intervals and chance, as text."""
        lines = [f"{'':22}{'%':>7}   {'95 % interval':18}chance"]
        for title, recalls in (
            ("image -> text", self.image_to_text),
            ("text -> image", self.text_to_image),
        ):
            for recall in recalls:
                low, high = recall.interval
                interval = f"{100 * low:.2f} to {100 * high:.2f}"
                lines.append(
                    f"{title} at {recall.k:<5} {100 * recall.rate:7.2f}   {interval:18}"
                    f"{100 * recall.chance:.2f}"
                )
        lines.append(f"{self.num_images} images, {self.num_captions} captions")
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The same as a Markdown table."""
        lines = [
            "| direction | at | % | 95 % interval | chance |",
            "| :-- | --: | --: | --: | --: |",
        ]
        for title, recalls in (
            ("image -> text", self.image_to_text),
            ("text -> image", self.text_to_image),
        ):
            for recall in recalls:
                low, high = recall.interval
                lines.append(
                    f"| {title} | {recall.k} | {100 * recall.rate:.2f} | {100 * low:.2f} to "
                    f"{100 * high:.2f} | {100 * recall.chance:.2f} |"
                )
        return "\n".join([*lines, "", f"{self.num_images} images, {self.num_captions} captions"])


def retrieval(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    image_of_text: Int[Tensor, " m"],
) -> RetrievalResult:
    """Ranks every caption for every image and the other way round.

    Args:
        image_features: [n d], unit norm.
        text_features: [m d], unit norm.
        image_of_text: int64 [m], the image of each caption; every image has one at least.

    Raises:
        ValueError: an image without a caption, or features that are not finite.
    """
    n, m = len(image_features), len(text_features)
    captions_of_image = torch.bincount(image_of_text, minlength=n)
    if n == 0 or int(captions_of_image.min()) == 0:
        raise ValueError("retrieval needs images that have a caption each")
    if not (image_features.isfinite().all() and text_features.isfinite().all()):
        raise ValueError("features hold values that are not finite: the model is broken")
    better_texts, better_images = [], []
    for start in range(0, n, _CHUNK):
        scores = image_features[start : start + _CHUNK] @ text_features.T
        owners = torch.arange(start, start + len(scores), device=scores.device)
        own = owners.unsqueeze(1) == image_of_text.unsqueeze(0)
        best_own = scores.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
        better_texts.append(((scores >= best_own) & ~own).sum(dim=1))
    for start in range(0, m, _CHUNK):
        scores = text_features[start : start + _CHUNK] @ image_features.T
        own_image = image_of_text[start : start + _CHUNK].unsqueeze(1)
        own_score = scores.gather(1, own_image)
        # a tie counts against us, so that a collapsed model has no recall
        better_images.append((scores >= own_score).sum(dim=1) - 1)
    return RetrievalResult(
        num_images=n,
        num_captions=m,
        image_to_text=_recalls(
            torch.cat(better_texts), [_chance(m, int(c), k) for k in KS for c in captions_of_image]
        ),
        text_to_image=_recalls(torch.cat(better_images), [_chance(n, 1, k) for k in KS]),
    )


def _recalls(num_better: Int[Tensor, " q"], chances: list[float]) -> tuple[Recall, ...]:
    """Recalls at `KS`; `chances` holds as many values for each k, which are averaged."""
    each = len(chances) // len(KS)
    return tuple(
        Recall(
            k=k,
            num_queries=len(num_better),
            num_found=int((num_better < k).sum()),
            chance=sum(chances[i * each : (i + 1) * each]) / each,
        )
        for i, k in enumerate(KS)
    )


def _chance(total: int, wanted: int, k: int) -> float:
    """Chance that k of `total` drawn at random hold one of the `wanted`."""
    return 1 - math.comb(total - wanted, min(k, total)) / math.comb(total, min(k, total))
