"""Search of a packed data set by texts and by example images.

    model = unicl_fast.load_model("runs/first")
    with open_index(model, "packed/shop") as shop:
        shop.by_texts(["red apples"])[0][0].caption

The images are encoded once, each batch straight into a file named by a checksum of weights and
images. A search is exact and reads the file block by block: neither holds all features in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.dataset import feature_files
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import from_rank_0, gather_integers, rank_0_alone
from unicl_fast.evaluation.data import open_data
from unicl_fast.evaluation.features import LoadedModel, ModelOnRanks, require_layer
from unicl_fast.evaluation.inference import ImageLike, Model
from unicl_fast.evaluation.labelled import key_of_features
from unicl_fast.images.codec import encode_png, open_image, pixels_of
from unicl_fast.models.unicl import weights_digest
from unicl_fast.system.atomic_files import temporary_folder

_BLOCK_BYTES = 64 << 20  # bytes of features compared at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """An image found by a search."""

    sample: int
    """Its number in the data set."""
    score: float
    """Cosine with the query, in -1 to 1."""
    caption: str
    """The first one, or empty."""
    labels: tuple[str, ...]
    """Class names."""
    source: str
    """The list, folder or archive it was packed from."""
    name: str
    """Its path in the source."""


class SearchIndex:
    """A model and the features of a data set's images."""

    def __init__(
        self, model: Model, dataset: PackedDataset, features: Float[np.ndarray, "n d"]
    ) -> None:
        """`features` have unit norm and the data set's order, and can be a mapped file."""
        self.model, self.dataset, self._features = model, dataset, features
        self._reader = SampleReader(dataset)

    def __len__(self) -> int:
        return len(self._features)

    def by_texts(self, texts: Sequence[str], *, top: int = 12) -> list[list[Found]]:
        """The `top` images most similar to each text, best first.

        Raises ValueError if the model has no text encoder, no texts are given, or top < 1.
        """
        return self._nearest(self.model.embed_texts(texts), top=top)

    def by_images(self, images: Sequence[ImageLike], *, top: int = 12) -> list[list[Found]]:
        """As `by_texts`, for paths, Pillow images or arrays; raises as `Model.embed_images`."""
        return self._nearest(self.model.embed_images(images), top=top)

    def image_file(self, sample: int) -> bytes:
        """An image's JPEG, PNG or WebP file; raises DamagedSampleError, IndexError."""
        data = self.dataset.image_bytes(range(len(self))[sample], verify=True).tobytes()
        return encode_png(pixels_of(open_image(data))) if data.startswith(b"P6") else data

    def close(self) -> None:
        self._reader.close()

    def _nearest(self, queries: Float[np.ndarray, "q d"], *, top: int) -> list[list[Found]]:
        if top < 1:
            raise ValueError(f"top must be positive, not {top}")
        values, samples = nearest_rows(queries, self._features, top=top)
        return [
            [self._describe(sample, value) for sample, value in zip(*one, strict=True)]
            for one in zip(samples.tolist(), values.tolist(), strict=True)
        ]

    def _describe(self, sample: int, score: float) -> Found:
        description = self._reader.read_description(sample)
        names = self.dataset.manifest.class_names
        return Found(
            sample=sample, score=score, caption=next(iter(description.captions), ""),
            labels=tuple(names[label] for label in description.labels),
            source=description.source, name=description.name,
        )  # fmt: skip


def nearest_rows(
    queries: Float[np.ndarray, "q d"],
    rows: Float[np.ndarray, "n d"],
    *,
    top: int,
    block_bytes: int = _BLOCK_BYTES,
) -> tuple[Float[Tensor, "q k"], Tensor]:
    """Scores and numbers of the `top` rows with the largest product with each query, best first.

    One block of rows is in memory at a time. Equal rows keep their order.
    """
    wanted = torch.from_numpy(queries).float()
    size = max(1, block_bytes // (4 * rows.shape[1]))
    best, places = torch.empty(len(wanted), 0), torch.empty(len(wanted), 0, dtype=torch.int64)
    for start in range(0, len(rows), size):
        block = torch.from_numpy(np.array(rows[start : start + size], dtype=np.float32))
        numbers = torch.arange(start, start + len(block)).expand(len(wanted), -1)
        best = torch.cat([best, wanted @ block.T], dim=1)
        places = torch.cat([places, numbers], dim=1)
        order = best.argsort(dim=1, descending=True, stable=True)[:, :top]
        best, places = best.gather(1, order), places.gather(1, order)
    return best, places


@contextlib.contextmanager
def open_index(
    model: LoadedModel | ModelOnRanks, data: str | Path, *, folder: Path | None = None
) -> Iterator[SearchIndex]:
    """Encodes the images of a data set, or finds their features again; all ranks call it.

    Args:
        model: from `unicl_fast.load_model`, or a model on ranks, which share the work.
        data: images, written as `--data` of `unicl-eval search`.
        folder: stores the features, visible to all ranks; None stores them until the index closes.

    Raises:
        ValueError: the model has no common space (trained by cross-entropy), stored features are
            damaged, or the data cannot be read.
        OSError: the folder cannot be written.
        EvaluationStopped: a stop was requested; raised on all ranks.
    """
    on_ranks = ModelOnRanks.of(model)
    require_layer(on_ranks.model, "projection")
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_data(str(data), ranks=on_ranks.ranks, takes_loose=True))
        if folder is None:
            own = stack.enter_context(temporary_folder("unicl-index-"))
            folder = Path(from_rank_0(str(own), on_ranks.ranks))
        features = _stored(on_ranks, opened.dataset, folder)
        index = SearchIndex(Model(on_ranks.model), opened.dataset, features)
        yield stack.enter_context(contextlib.closing(index))


def _stored(on_ranks: ModelOnRanks, dataset: PackedDataset, folder: Path) -> NDArray[Any]:
    """The features of a data set, mapped from a file, which is made if needed."""
    model, ranks = on_ranks.model, on_ranks.ranks
    weights = weights_digest(model, "image_")
    key = key_of_features(model, dataset, layer="projection", weights=weights)
    key = from_rank_0(key, ranks)
    if not from_rank_0(feature_files.has_features(folder, key), ranks):
        _encode_into(folder, key, on_ranks, dataset)
    with refused_together(ranks):
        # one rank is enough: the check reads the whole file
        size, check = len(dataset), ranks.is_main
        return feature_files.read_features(folder, key, num_samples=size, check=check).rows


def _encode_into(folder: Path, key: str, on_ranks: ModelOnRanks, dataset: PackedDataset) -> None:
    """Encodes a data set into the file of that key, on all ranks."""
    ranks, num_samples = on_ranks.ranks, len(dataset)
    shape = {"num_samples": num_samples, "width": on_ranks.model.config.model.embed_dim}
    with contextlib.ExitStack() as stack:
        with rank_0_alone(ranks):
            if ranks.is_main:
                stack.enter_context(feature_files.sole_storer(folder, key))
                feature_files.make_rows(folder, key, **shape, kind="<f4")
        writer = stack.enter_context(contextlib.closing(feature_files.RowsWriter(folder, key)))
        loader = on_ranks.loader(dataset)
        for samples, features in on_ranks.encoded(loader, num_samples=num_samples):
            writer.write(samples.numpy(), features.float().numpy())
        writer.flush()
        gather_integers(0, ranks)  # once all have written
        with rank_0_alone(ranks):
            if ranks.is_main:
                every = np.ones(num_samples, np.bool_)
                feature_files.seal_rows(folder, key, dtype="float32", stored=every, unreadable=())
