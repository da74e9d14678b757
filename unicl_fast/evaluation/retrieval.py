"""Caption retrieval: does an image find its captions, and a caption its image?

Recall at k as on Flickr and COCO: an image counts if any of its captions is among the k most
similar of all captions; a caption counts if its image is among the k most similar images.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.distributed.ranks import from_rank_0, rank_0_alone
from unicl_fast.evaluation.data import EvaluationData, open_data
from unicl_fast.evaluation.features import (
    ModelOnRanks,
    collect_rows,
    device_of,
    encode_token_rows,
    model_on_ranks,
    require_finite,
    require_text_encoder,
)
from unicl_fast.evaluation.report import interval_text, percent, wilson_interval, write_results
from unicl_fast.evaluation.requests import Retrieval
from unicl_fast.objectives.loss import sigmoid_contrastive_loss, unified_contrastive_loss
from unicl_fast.system.wording import count_of, markdown_table
from unicl_fast.training.figures import FAINT, INK, drawing, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KS = (1, 5, 10)
_CHUNK = 1024
_RIGHT, _WRONG = "#1a7f37", "#b42318"
_SIDE, _CAPTIONS = 2.9, 1.3
"""Height of an image, and of three captions under it, in inches."""
_LEGEND = "Green is right. Places count from the most similar; the similarity is in brackets."


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """One direction at one k. Rates in 0 to 1."""

    k: int
    num_queries: int
    num_found: int
    chance: float
    """The average rate of random rankings."""

    @property
    def rate(self) -> float:
        return self.num_found / self.num_queries

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval, a little narrow for captions: those of one image are not independent."""
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
        values: dict[str, Any] = {"num_images": self.num_images, "num_captions": self.num_captions}
        for name in ("image_to_text", "text_to_image"):
            for recall in getattr(self, name):
                key = f"{name}_recall_at_{recall.k}"
                values |= {key: recall.rate, f"{key}_interval_95": recall.interval}
                values[f"{key}_chance"] = recall.chance
        return values

    def to_markdown(self) -> str:
        """The recalls in percent with their 95 % intervals and chance, as a table."""
        rows = [
            [title, str(one.k), percent(one.rate), interval_text(one.interval), percent(one.chance)]
            for title, recalls in (
                ("image -> text", self.image_to_text),
                ("text -> image", self.text_to_image),
            )
            for one in recalls
        ]
        table = markdown_table(["direction", "at", "%", "95 % interval", "chance"], rows)
        return (
            f"{table}\n\n{count_of(self.num_images, 'image')}, "
            f"{count_of(self.num_captions, 'caption')}"
        )


def retrieval(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    image_of_text: Int[Tensor, " m"],
) -> RetrievalResult:
    """Ranks every caption for every image and the other way round, by features of unit norm.

    `image_of_text` is the image (its row) of each caption; every image has one at least.

    Raises:
        ValueError: an image without a caption, or features that are not finite.
    """
    n, m = len(image_features), len(text_features)
    captions_of_image = torch.bincount(image_of_text, minlength=n)
    if n == 0 or int(captions_of_image.min()) == 0:
        raise ValueError("retrieval needs images that have a caption each")
    require_finite(image_features, text_features)
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

    def recalls(better: list[Tensor], chance_at: Callable[[int], float]) -> tuple[Recall, ...]:
        num_better = torch.cat(better)
        found = [int((num_better < k).sum()) for k in KS]
        return tuple(
            Recall(k=k, num_queries=len(num_better), num_found=num_found, chance=chance_at(k))
            for k, num_found in zip(KS, found, strict=True)
        )

    return RetrievalResult(
        num_images=n,
        num_captions=m,
        image_to_text=recalls(
            better_texts, lambda k: sum(_chance(m, int(c), k) for c in captions_of_image) / n
        ),
        text_to_image=recalls(better_images, lambda k: _chance(n, 1, k)),
    )


def _chance(total: int, wanted: int, k: int) -> float:
    """Chance that k of `total` drawn at random hold one of the `wanted`."""
    return 1 - math.comb(total - wanted, min(k, total)) / math.comb(total, min(k, total))


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalFeatures:
    """Images and captions to compare, on the host."""

    image_features: Tensor
    """[n d], unit norm."""
    text_features: Tensor
    """[m d], unit norm."""
    image_of_text: Tensor
    """int64 [m]: row of `image_features`."""
    samples: NDArray[np.int64]
    """[n]: samples of the data set that the images are."""


def encode_captioned(on_ranks: ModelOnRanks, dataset: PackedDataset) -> RetrievalFeatures | None:
    """Features of images and captions, on rank 0; samples without captions are left out."""
    model, ranks = on_ranks.model, on_ranks.ranks
    require_text_encoder(model, "retrieval")
    counts = dataset.samples["captions_count"].astype(np.int64)
    captioned = np.flatnonzero(counts)
    if not len(captioned):
        raise ValueError(
            f"{dataset.location} has no captions: retrieval needs a data set packed with a caption "
            "column; for labels there is unicl-eval zero-shot"
        )
    images = on_ranks.features(dataset)
    rows = [
        dataset.caption_tokens(sample, which)
        for sample in captioned.tolist()
        for which in range(counts[sample])
    ]
    own = None
    if own_rows := rows[ranks.rank :: ranks.world_size]:
        own = encode_token_rows(
            model, own_rows, batch_size=on_ranks.batch_size, progress=on_ranks.progress
        ).cpu()
    texts = collect_rows(own, num_rows=len(rows), ranks=ranks)
    if images is None or texts is None:
        return None
    return RetrievalFeatures(
        image_features=images[torch.from_numpy(captioned)],
        text_features=texts,
        image_of_text=torch.from_numpy(np.repeat(np.arange(len(captioned)), counts[captioned])),
        samples=captioned,
    )


def evaluate_captions(on_ranks: ModelOnRanks, dataset: PackedDataset) -> dict[str, float]:
    """The held-out loss and the recalls of a data set with captions; on all ranks.

    The loss is the contrastive one of training, with as large a batch (`held_out_loss`);
    `recall_at_1` is the mean of both directions.

    Raises:
        ValueError: no captions, or a model without texts or with features that are not finite.
        EvaluationStopped: it was asked to stop, on all ranks.
    """
    model, ranks = on_ranks.model, on_ranks.ranks
    found = encode_captioned(on_ranks, dataset)
    values: dict[str, float] = {}
    with rank_0_alone(ranks):
        if found is not None:
            device = device_of(model)
            features = [
                one.to(device)
                for one in (found.image_features, found.text_features, found.image_of_text)
            ]
            result = retrieval(*features)
            tokens = [
                dataset.caption_tokens(sample, 0).tobytes() for sample in found.samples.tolist()
            ]
            number_of = {text: number for number, text in enumerate(dict.fromkeys(tokens))}
            values["loss"] = held_out_loss(
                *features,
                class_ids=torch.tensor([number_of[text] for text in tokens], device=device),
                scale=float(model.logit_scale.detach().exp()),
                bias=None if model.logit_bias is None else float(model.logit_bias.detach()),
                batch_size=model.config.run.global_batch_size,
            )
            both = result.image_to_text[0].rate + result.text_to_image[0].rate
            values["recall_at_1"] = both / 2
            for name in ("image_to_text", "text_to_image"):
                for recall in getattr(result, name):
                    values[f"{name}_recall_at_{recall.k}"] = recall.rate
    return from_rank_0(values, ranks)


def held_out_loss(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    image_of_text: Int[Tensor, " m"],
    *,
    class_ids: Int[Tensor, " n"],
    scale: float,
    bias: float | None = None,
    batch_size: int,
) -> float:
    """The mean loss of whole batches in the data set's order, each image with its first caption.

    A `bias` asks for the sigmoid form. `image_of_text` rises. Images of equal `class_ids` are
    positives. What is left after the last whole batch is left out, since the loss grows with the
    batch; fewer images than one batch are a batch.
    """
    n = len(image_features)
    first = torch.searchsorted(image_of_text, torch.arange(n, device=image_of_text.device))
    size = min(batch_size, n)
    loss = unified_contrastive_loss
    if bias is not None:
        loss = functools.partial(sigmoid_contrastive_loss, bias=bias)
    losses = [
        loss(
            image_features[start : start + size],
            text_features[first[start : start + size]],
            class_ids[start : start + size],
            scale,
        )
        for start in range(0, n - size + 1, size)
    ]
    return float(torch.stack(losses).mean())


def run(command: Retrieval) -> None:
    """Encodes on all ranks; rank 0 compares, prints and writes."""
    with model_on_ranks(command) as on_ranks, open_data(command.data, ranks=on_ranks.ranks) as data:
        found = encode_captioned(on_ranks, data.dataset)
        with rank_0_alone(on_ranks.ranks):
            if found is not None:
                _report(command, found, data, device=device_of(on_ranks.model))


def _report(
    command: Retrieval, found: RetrievalFeatures, data: EvaluationData, *, device: torch.device
) -> None:
    """Compares, prints, writes and draws."""
    result = retrieval(
        found.image_features.to(device),
        found.text_features.to(device),
        found.image_of_text.to(device),
    )
    print(result.to_markdown())
    write_results(
        command, {"data": command.data, "name": data.name} | result.to_json(), result.to_markdown()
    )
    if command.figures is not None:
        for name, draw in (
            ("captions-found.png", _draw_captions_found),
            ("images-found.png", _draw_images_found),
        ):
            with drawing(command.figures / name):
                draw(found, data.dataset, command.figures / name)
                print(f"written to {command.figures / name}")


def _draw_captions_found(found: RetrievalFeatures, dataset: PackedDataset, path: Path) -> None:
    """Draws 12 images over the 3 captions they find, with cosines; its own are green, as a PNG.

    Where none is its own, its best one follows with its place.
    """
    chosen = _spread(len(found.samples), 12)
    columns = 4
    rows = -(-len(chosen) // columns)
    height = rows * (_SIDE + _CAPTIONS)
    figure = new_figure(1.05 * _SIDE * columns, height)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.subplots_adjust(
        *(0.01, _CAPTIONS / height, 0.99, 1 - 0.05 / height), wspace=0.05, hspace=_CAPTIONS / _SIDE
    )
    scores = found.image_features[chosen] @ found.text_features.T
    order = scores.argsort(dim=1, descending=True, stable=True)
    is_own = found.image_of_text[order] == torch.tensor(chosen)[:, None]
    first_own = is_own.int().argmax(dim=1).tolist()
    shown_places = [[0, 1, place if place > 2 else 2] for place in first_own]
    shown_places = [[p for p in row if p < scores.shape[1]] for row in shown_places]
    rows_of_texts = [order[row, places].tolist() for row, places in enumerate(shown_places)]
    texts = _read_captions(found, dataset, sorted({text for row in rows_of_texts for text in row}))
    for number, (axis, image) in enumerate(zip(axes, chosen, strict=False)):
        _show_image(axis, dataset, int(found.samples[image]))
        for line, (place, text) in enumerate(
            zip(shown_places[number], rows_of_texts[number], strict=True)
        ):
            right = bool(is_own[number, place])
            words = f"{place + 1:,}. ({float(scores[number, text]):.2f}) {texts[text]}"
            shown = "\n".join(textwrap.wrap(words, 46, max_lines=2, placeholder=" ..."))
            axis.annotate(
                shown,
                *((0, 0), (0, -5 - 24 * line)),
                xycoords="axes fraction", textcoords="offset points", va="top", fontsize=8,
                color=_RIGHT if right else _WRONG,
            )  # fmt: skip
    for axis in axes[len(chosen) :]:
        axis.set_axis_off()
    figure.text(0.01, 0.06 / height, _LEGEND, fontsize=8, color=INK)
    save_figure(figure, path)


def _draw_images_found(found: RetrievalFeatures, dataset: PackedDataset, path: Path) -> None:
    """Draws 8 captions over the 5 images they find, with cosines; its own has a green frame.

    Where none is its own, that one stands in the last place, under the number of its own.
    """
    chosen = _spread(len(found.text_features), 8)
    columns = min(5, len(found.image_features))
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.21)  # inches, for the captions over the rows
    figure = new_figure(2.1 * columns, 2.5 * len(chosen), layout=layout)
    grid = figure.subplots(len(chosen), columns, squeeze=False)
    scores = found.text_features[chosen] @ found.image_features.T
    order = scores.argsort(dim=1, descending=True, stable=True)
    texts = _read_captions(found, dataset, chosen)
    for row, (axes, text) in enumerate(zip(grid, chosen, strict=True)):
        own = int(found.image_of_text[text])
        place = order[row].tolist().index(own)
        places = [*range(columns - 1), max(place, columns - 1)]
        for axis, number in zip(axes, places, strict=True):
            image = int(order[row, number])
            _show_image(axis, dataset, int(found.samples[image]))
            right = image == own
            axis.set_xlabel(
                f"{number + 1:,}. ({float(scores[row, image]):.2f})",
                fontsize=8, color=_RIGHT if right else FAINT,
            )  # fmt: skip
            for spine in axis.spines.values():
                spine.set(color=_RIGHT if right else FAINT, linewidth=4 if right else 1)
        above = axes[0].annotate(
            textwrap.shorten(texts[text], 24 * columns, placeholder=" ..."),
            *((0, 1), (0, 5)),
            xycoords="axes fraction", textcoords="offset points", fontsize=9, color=INK,
        )  # fmt: skip
        above.set_in_layout(False)  # or its column becomes as wide as half of the text
    figure.supxlabel(_LEGEND, x=0.01, ha="left", fontsize=8, color=INK)
    save_figure(figure, path)


def _read_captions(
    found: RetrievalFeatures, dataset: PackedDataset, numbers: Iterable[int]
) -> dict[int, str]:
    """Texts of captions by their number among all captions of the images compared."""
    first = torch.searchsorted(found.image_of_text, torch.arange(len(found.samples)))
    texts = {}
    with contextlib.closing(SampleReader(dataset)) as reader:
        for number in numbers:
            owner = int(found.image_of_text[number])
            captions = reader.read_description(int(found.samples[owner])).captions
            texts[number] = captions[number - int(first[owner])]
    return texts


def _spread(total: int, count: int) -> list[int]:
    """So many numbers below `total`, evenly spread."""
    count = min(total, count)
    return [number * total // count for number in range(count)]


def _show_image(axis: Axes, dataset: PackedDataset, sample: int) -> None:
    data = dataset.image_bytes(sample, verify=True)
    with Image.open(io.BytesIO(data.tobytes())) as image:
        # all squares, so that rows and columns are even
        axis.imshow(np.asarray(ImageOps.pad(image.convert("RGB"), (320, 320), color="white")))
    axis.set_xticks([])
    axis.set_yticks([])
