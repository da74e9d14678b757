"""Caption retrieval: does an image find its captions, and a caption its image?

Recall at k as on Flickr and COCO: an image counts if any of its captions is among the k most
similar of all captions; a caption counts if its image is among the k most similar images.
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.distributed.ranks import rank_0_alone
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
from unicl_fast.system.wording import count_of, markdown_table
from unicl_fast.training.figures import FAINT, INK, drawing, save_figure

KS = (1, 5, 10)
_CHUNK = 1024
_RIGHT, _WRONG = "#1a7f37", "#b42318"
_SIDE, _CAPTIONS = 2.9, 1.15
"""Height of an image, and of three captions under it, in inches."""


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
            f"{dataset.folder} has no captions: retrieval needs a data set packed with a caption "
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
    """Draws 12 images over the 3 captions they find; an image's own are green, as a PNG."""
    chosen = _spread(len(found.samples), 12)
    columns = 4
    rows = -(-len(chosen) // columns)
    height = rows * (_SIDE + _CAPTIONS)
    figure = Figure(figsize=(1.05 * _SIDE * columns, height))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.subplots_adjust(
        *(0.01, _CAPTIONS / height, 0.99, 1 - 0.05 / height), wspace=0.05, hspace=_CAPTIONS / _SIDE
    )
    scores = found.image_features[chosen] @ found.text_features.T
    best = scores.topk(min(3, scores.shape[1])).indices
    texts = _read_captions(found, dataset, best.unique().tolist())
    for axis, image, row in zip(axes, chosen, best.tolist(), strict=False):
        _show_image(axis, dataset, int(found.samples[image]))
        for line, text in enumerate(row):
            right = int(found.image_of_text[text]) == image
            shown = "\n".join(textwrap.wrap(texts[text], 44, max_lines=2))
            axis.annotate(
                f"{line + 1}. {shown}",
                *((0, 0), (0, -5 - 24 * line)),
                xycoords="axes fraction", textcoords="offset points", va="top", fontsize=7,
                color=_RIGHT if right else _WRONG,
            )  # fmt: skip
    for axis in axes[len(chosen) :]:
        axis.set_axis_off()
    save_figure(figure, path)


def _draw_images_found(found: RetrievalFeatures, dataset: PackedDataset, path: Path) -> None:
    """Draws 8 captions over the 5 images they find; its own has a green frame, as a PNG."""
    chosen = _spread(len(found.text_features), 8)
    columns = min(5, len(found.image_features))
    figure = Figure(figsize=(2.1 * columns, 2.35 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), columns, squeeze=False)
    best = (found.text_features[chosen] @ found.image_features.T).topk(columns).indices
    texts = _read_captions(found, dataset, chosen)
    for axes, text, images in zip(grid, chosen, best.tolist(), strict=True):
        for axis, image in zip(axes, images, strict=True):
            _show_image(axis, dataset, int(found.samples[image]))
            right = image == int(found.image_of_text[text])
            for spine in axis.spines.values():
                spine.set(color=_RIGHT if right else FAINT, linewidth=4 if right else 1)
        axes[0].set_title(
            textwrap.shorten(texts[text], 26 * columns, placeholder=" ..."),
            loc="left", fontsize=8, color=INK,
        )  # fmt: skip
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
