"""Caption retrieval: does an image find its captions, and a caption its image?

Recall at k as on Flickr and COCO: an image counts if any of its captions is among the k most
similar captions; a caption counts if its image is among the k most similar images. Equal captions
belong to all their images.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.data import open_data
from unicl_fast.evaluation.features import (
    LoadedModel,
    ModelOnRanks,
    collect_rows,
    device_of,
    encode_token_rows,
    require_finite,
    require_text_encoder,
)
from unicl_fast.evaluation.report import interval_text, percent, wilson_interval
from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.objectives.loss_sigmoid import sigmoid_contrastive_loss
from unicl_fast.system.wording import count_of, markdown_table
from unicl_fast.training.data import check_tokenizer, log_cut_captions

KS = (1, 5, 10)
_CHUNK = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """One direction at one k. Rates in 0 to 1; `chance` is the rate of random rankings."""

    k: int
    num_queries: int
    num_found: int
    chance: float

    @property
    def rate(self) -> float:
        return self.num_found / self.num_queries

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval; slightly narrow for captions, since an image's are not independent."""
        return wilson_interval(self.num_found, self.num_queries)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalResult:
    num_images: int
    num_captions: int
    num_texts: int  # distinct captions
    image_to_text: tuple[Recall, ...]
    text_to_image: tuple[Recall, ...]

    def by_name(self) -> dict[str, Recall]:
        return {
            f"{direction}_recall_at_{one.k}": one
            for direction in ("image_to_text", "text_to_image")
            for one in getattr(self, direction)
        }

    def to_json(self) -> dict[str, Any]:
        counts = ("num_images", "num_captions", "num_texts")
        values: dict[str, Any] = {name: getattr(self, name) for name in counts}
        for name, one in self.by_name().items():
            values |= {name: one.rate, f"{name}_interval_95": one.interval}
            values[f"{name}_chance"] = one.chance
        return values

    def to_table(self) -> str:
        titles = {"image -> text": self.image_to_text, "text -> image": self.text_to_image}
        rows = [
            [title, str(one.k), percent(one.rate), interval_text(one.interval), percent(one.chance)]
            for title, recalls in titles.items()
            for one in recalls
        ]
        table = markdown_table(["direction", "at", "%", "95 % interval", "chance"], rows)
        different = f", {self.num_texts:,} different" * (self.num_texts < self.num_captions)
        return (
            f"{table}\n\n{count_of(self.num_images, 'image')}, "
            f"{count_of(self.num_captions, 'caption')}{different}"
        )


def rank_captions(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    image_of_text: Int[Tensor, " m"],
    text_ids: Int[Tensor, " m"] | None = None,
) -> RetrievalResult:
    """Ranks every caption for every image and the other way round, by features of unit norm.

    `image_of_text` is the row of each caption's image. Captions with equal `text_ids` (from 0 on)
    are the same text; None: all differ.

    Raises:
        ValueError: an image without a caption, or features that are not finite.
    """
    n, m = len(image_features), len(text_features)
    if n == 0 or int(torch.bincount(image_of_text, minlength=n).min()) == 0:
        raise ValueError("retrieval needs images that have a caption each")
    require_finite(image_features, text_features)
    if text_ids is None:
        text_ids = torch.arange(m, device=image_of_text.device)
    to_text = Counter[tuple[int, int]]()
    for start in range(0, n, _CHUNK):
        images = torch.arange(start, min(start + _CHUNK, n), device=image_of_text.device)
        scores = image_features[start : start + _CHUNK] @ text_features.T
        to_text.update(_ranks(scores, own_texts(images, image_of_text, text_ids)))
    to_image = rank_images(
        lambda rows: text_features[rows] @ image_features.T, image_of_text, text_ids
    )
    return RetrievalResult(
        num_images=n, num_captions=m, num_texts=len(text_ids.unique()),
        image_to_text=_recalls(to_text, num_candidates=m),
        text_to_image=to_image,
    )  # fmt: skip


def rank_images(
    scores_of: Callable[[slice], Float[Tensor, "k n"]],
    image_of_text: Int[Tensor, " m"],
    text_ids: Int[Tensor, " m"],
) -> tuple[Recall, ...]:
    """Ranks all images for each text by `scores_of` some texts; else as `rank_captions`."""
    num_images, found = int(image_of_text.max()) + 1, Counter[tuple[int, int]]()
    for start in range(0, len(text_ids), _CHUNK):
        rows = slice(start, start + _CHUNK)
        own = own_images(text_ids[rows], image_of_text, text_ids, num_images=num_images)
        found.update(_ranks(scores_of(rows), own))
    return _recalls(found, num_candidates=num_images)


def own_texts(
    images: Int[Tensor, " k"], image_of_text: Int[Tensor, " m"], text_ids: Int[Tensor, " m"]
) -> Bool[Tensor, "k m"]:
    """Whether each caption is, or equals, one of the image's."""
    mine = (image_of_text == images.unsqueeze(1)).float()
    has = mine.new_zeros(len(images), int(text_ids.max()) + 1).index_add_(1, text_ids, mine) > 0
    return has[:, text_ids]


def own_images(
    asked: Int[Tensor, " k"],
    image_of_text: Int[Tensor, " m"],
    text_ids: Int[Tensor, " m"],
    *,
    num_images: int,
) -> Bool[Tensor, "k n"]:
    """Whether each image has a caption with the text id `asked`."""
    same = (text_ids == asked.unsqueeze(1)).float()
    return same.new_zeros(len(asked), num_images).index_add_(1, image_of_text, same) > 0


def _ranks(scores: Tensor, own: Tensor) -> Iterable[tuple[int, int]]:
    """For each row of scores: how many others beat the best of its own, and how many it owns.

    A tie counts against us, so that a collapsed model has no recall.
    """
    best_own = scores.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
    better = ((scores >= best_own) & ~own).sum(dim=1)
    return zip(better.tolist(), own.sum(dim=1).tolist(), strict=True)


def _recalls(ranks: Counter[tuple[int, int]], *, num_candidates: int) -> tuple[Recall, ...]:
    total, recalls = ranks.total(), []
    for k in KS:
        found = sum(count for (better, _), count in ranks.items() if better < k)
        lucky = sum(count * _chance(num_candidates, own, k) for (_, own), count in ranks.items())
        recalls.append(Recall(k=k, num_queries=total, num_found=found, chance=lucky / total))
    return tuple(recalls)


def _chance(total: int, wanted: int, k: int) -> float:
    """The probability that k random ones of `total` include one of the `wanted`."""
    return 1 - math.comb(total - wanted, min(k, total)) / math.comb(total, min(k, total))


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalFeatures:
    """Images and captions to compare: unit-norm features, on the model's device."""

    image_features: Tensor  # [n d]
    text_features: Tensor  # [m d]
    image_of_text: Tensor  # int64 [m]: row of `image_features`
    text_ids: Tensor  # int64 [m]: from 0 on, equal for equal captions
    samples: NDArray[np.int64]  # [n]: the images' sample numbers in the data set

    def ranked(self) -> RetrievalResult:
        return rank_captions(
            self.image_features, self.text_features, self.image_of_text, self.text_ids
        )


def encode_captioned(on_ranks: ModelOnRanks, dataset: PackedDataset) -> RetrievalFeatures | None:
    """Features of the samples with captions, on rank 0."""
    model, ranks = on_ranks.model, on_ranks.ranks
    require_text_encoder(model, "retrieval")
    check_tokenizer(dataset, model.config)
    counts = dataset.samples["captions_count"].astype(np.int64)
    captioned = np.flatnonzero(counts)
    if not len(captioned):
        raise ValueError(
            f"{dataset.location} has no captions: retrieval needs a data set packed with a caption "
            "column; for labels use unicl-eval zero-shot"
        )
    images = on_ranks.features(dataset)
    length = model.config.model.context_length
    rows = [
        dataset.caption_tokens(sample, which, context_length=length)
        for sample in captioned.tolist()
        for which in range(counts[sample])
    ]
    own = None
    if own_rows := rows[ranks.rank :: ranks.world_size]:
        own = encode_token_rows(
            model,
            own_rows,
            batch_size=on_ranks.batch_size,
            progress=on_ranks.progress,
            folder=on_ranks.text_folder,
        ).cpu()
    texts = collect_rows(own, num_rows=len(rows), ranks=ranks)
    if images is None or texts is None:
        return None
    owners = torch.from_numpy(np.repeat(np.arange(len(captioned)), counts[captioned]))
    device = device_of(model)
    number_of = {text: number for number, text in enumerate({row.tobytes(): None for row in rows})}
    text_ids = torch.tensor([number_of[row.tobytes()] for row in rows])
    return RetrievalFeatures(
        image_features=images[torch.from_numpy(captioned)].to(device),
        text_features=texts.to(device), samples=captioned,
        image_of_text=owners.to(device), text_ids=text_ids.to(device),
    )  # fmt: skip


def retrieval(model: LoadedModel | ModelOnRanks, data: str | Path) -> RetrievalResult:
    """Caption retrieval in both directions, on all ranks.

    Args:
        model: from `unicl_fast.load_model`, or a model on ranks.
        data: images with captions, written as `--data` of `unicl-eval retrieval`.

    Raises:
        ValueError: no captions, or a model without texts or with features that are not finite.
        EvaluationStopped: a stop was requested; raised on all ranks.
    """
    on_ranks = ModelOnRanks.of(model)
    with open_data(str(data), ranks=on_ranks.ranks, takes_loose=True) as opened:
        log_cut_captions(opened.dataset, on_ranks.model.config.model.context_length)
        found = encode_captioned(on_ranks, opened.dataset)
        return on_ranks.on_rank_0(RetrievalFeatures.ranked, found, RetrievalResult)


def evaluate_captions(on_ranks: ModelOnRanks, dataset: PackedDataset) -> dict[str, float]:
    """The held-out loss and the recalls of a data set with captions; on all ranks.

    The loss is training's contrastive one, at the same batch size (`held_out_loss`); `recall_at_1`
    is the mean of both directions. Raises as `retrieval`.
    """
    model = on_ranks.model
    bias = model.learnt.get("logit_bias")

    def judge(found: RetrievalFeatures) -> dict[str, float]:
        result = found.ranked()
        loss = held_out_loss(
            found.image_features, found.text_features, found.image_of_text,
            text_ids=found.text_ids, scale=model.learnt["logit_scale"].exp().item(),
            bias=None if bias is None else bias.item(),
            batch_size=model.config.run.global_batch_size,
        )  # fmt: skip
        both = result.image_to_text[0].rate + result.text_to_image[0].rate
        rates = {name: one.rate for name, one in result.by_name().items()}
        return {"loss": loss, "recall_at_1": both / 2} | rates

    return on_ranks.on_rank_0(judge, encode_captioned(on_ranks, dataset), dict[str, float])


def held_out_loss(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    image_of_text: Int[Tensor, " m"],
    *,
    text_ids: Int[Tensor, " m"],
    scale: float,
    bias: float | None = None,
    batch_size: int,
) -> float:
    """The mean loss of whole batches in the data set's order, each image with its first caption.

    A `bias` selects the sigmoid form; `image_of_text` is sorted; captions with equal `text_ids` are
    positives of each other's images. An incomplete last batch is left out, since the loss grows
    with the batch; fewer images than one batch are one batch.
    """
    n = len(image_features)
    first = torch.searchsorted(image_of_text, torch.arange(n, device=image_of_text.device))
    size = min(batch_size, n)
    loss = unified_contrastive_loss
    if bias is not None:
        loss = functools.partial(sigmoid_contrastive_loss, bias=bias)
    text_features, text_ids = text_features[first], text_ids[first]
    losses = []
    for start in range(0, n - size + 1, size):
        rows = slice(start, start + size)
        losses.append(loss(image_features[rows], text_features[rows], text_ids[rows], scale))
    return float(torch.stack(losses).mean())
