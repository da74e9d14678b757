"""Encodes images and texts with a model, on one rank or many.

Ranks share the images of a data set: rank r of w encodes the samples r, r + w, r + 2 w, ...

Features of images can be stored as those of training are. An evaluation sees the middle of an
image, so the files are others than a run's. A model whose encoder is frozen is then evaluated again
in the time of its head, and of a changed data set only new images are encoded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import msgspec
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unicl_fast.batch import EvaluationLoader, send
from unicl_fast.conversion.initial import load_encoders
from unicl_fast.dataset.feature_files import read_features
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.launch import configure_logging, refused_together
from unicl_fast.distributed.ranks import (
    Ranks,
    from_rank_0,
    gather_integers,
    rank_0_alone,
    tensors_to_rank_0,
)
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.evaluation.choices import Layer
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.precision import Precision, set_device_arithmetic
from unicl_fast.models.unicl import UniCL, weights_digest
from unicl_fast.system.bar import Bar
from unicl_fast.system.line import line
from unicl_fast.system.machine import choose_device
from unicl_fast.system.phases import EvaluationStopped, heartbeat_and_check_stop
from unicl_fast.text.token_rows import hashes_of
from unicl_fast.text.tokenizer import pad_rows
from unicl_fast.training.data import fits_vocabulary, tokenizer_of
from unicl_fast.training.encoding import encoder_input, in_pieces, loaded_at_once
from unicl_fast.training.kept_rows import all_stored, kept_rows
from unicl_fast.training.settle import settle, settle_decoding
from unicl_fast.training.stored_features import feature_key, stored_text_features

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 4096  # projected at once: 20 MB of 1,280 numbers
_ALONE = Ranks()
_G = TypeVar("_G")
_T = TypeVar("_T")


@runtime_checkable
class LoadedModel(Protocol):
    """A model as `unicl_fast.load_model` returns it."""

    encoders: UniCL


@dataclass(frozen=True, slots=True)
class ModelOnRanks:
    """A model in evaluation mode, and how ranks encode data sets with it."""

    model: UniCL
    ranks: Ranks = Ranks()  # noqa: RUF009 - frozen
    batch_size: int = 256  # images encoded at once by each rank
    progress: bool = False  # whether progress bars are shown
    folder: Path | None = None
    """Stores features of the image encoder, which are then looked for; None stores nothing."""
    text_folder: Path | None = None
    """Keeps features of the text encoder."""

    @classmethod
    def of(cls, model: LoadedModel | ModelOnRanks) -> ModelOnRanks:
        """Wraps a loaded model in this process; a model on ranks is returned unchanged."""
        if isinstance(model, ModelOnRanks):
            return model
        encoders = model.encoders
        encoders.config = settle_decoding(encoders.config, device_of(encoders), _ALONE)
        shown = sys.stderr.isatty()
        return cls(encoders, progress=shown, text_folder=text_folder_of(encoders))

    def loader(
        self, dataset: PackedDataset, samples: Sequence[int] | None = None
    ) -> EvaluationLoader:
        """This rank's part of a data set or of some samples, for the model, on its device."""
        # here, so that the protocols work with other loaders without DALI
        from unicl_fast.pipelines.evaluation_loader import EvaluationLoader as DaliLoader

        device = device_of(self.model)
        return DaliLoader(
            dataset, self.model.config.data, batch_size=loaded_at_once(self.batch_size, device),
            rank=self.ranks.rank, world_size=self.ranks.world_size, device=device, samples=samples,
        )  # fmt: skip

    def features(
        self, dataset: PackedDataset, *, layer: Layer = "projection", folder: Path | None = None
    ) -> Float[Tensor, "n d"] | None:
        """Features of a data set's images, in its order, on rank 0's host; fp32 or fp64.

        The encoder's are stored in `folder`, by default the model's, and projected from there. A
        folder that cannot be written is a warning of a single process. Raises EvaluationStopped on
        all ranks if a stop was requested.
        """
        rows = None
        if (place := folder or self.folder) is not None:
            try:
                _, rows = self.stored(dataset, place, layer="encoder", says_found=bool(folder))
            except OSError as error:
                if self.ranks.world_size > 1:
                    raise
                logger.warning("features are not kept: %s cannot be written: %s", place, error)
        if rows is None:
            return self.encode(self.loader(dataset), num_samples=len(dataset), layer=layer)
        if not self.ranks.is_main:
            return None
        if layer == "encoder":
            return torch.from_numpy(np.array(rows))
        starts = range(0, len(rows), _ROWS_AT_ONCE)
        return torch.cat([self.projected(rows[one : one + _ROWS_AT_ONCE]) for one in starts])

    def stored(
        self, dataset: PackedDataset, folder: Path, *, layer: Layer, says_found: bool = False
    ) -> tuple[str, NDArray[Any]]:
        """The key and the features [n w] of a data set, mapped from a file that all ranks make.

        `says_found` logs that they were there.

        Raises:
            SharedRefusal: the file is damaged.
            OSError: the folder cannot be written.
            EvaluationStopped: a stop was requested; raised on all ranks.
        """
        model, ranks = self.model, self.ranks
        family, key = from_rank_0([*keys_of_features(model, dataset, layer=layer)], ranks)
        if says_found and ranks.is_main and all_stored(folder, key, len(dataset)):
            logger.info("features of %s: found again", dataset.location)
        dtype = "float64" if model.config.efficiency.precision == "fp64" else "float32"
        is_space = layer == "projection" and model.has_space

        def encode(new: Sequence[int]) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
            is_encoded = False
            if layer == "projection":
                encoder = keys_of_features(model, dataset, layer="encoder")[1]
                is_encoded = ranks.is_main and all_stored(folder, encoder, len(dataset))
            if from_rank_0(is_encoded, ranks):
                known = read_features(folder, encoder, num_samples=len(dataset), check=False).rows
                mine = np.array(new[ranks.rank :: ranks.world_size], np.int64)  # also of none
                for some in np.array_split(mine, len(mine) // _ROWS_AT_ONCE + 1):
                    yield some, self.projected(known[some]).numpy().astype(dtype, copy=False)
                return
            loader = self.loader(dataset, new)
            for numbers, features in self.encoded(loader, num_samples=len(new), layer=layer):
                yield numbers.numpy(), features.numpy().astype(dtype, copy=False)

        rows = kept_rows(
            folder, key, family=family, items=np.ascontiguousarray(dataset.samples["xxh3"]),
            width=model.config.model.embed_dim if is_space else feature_width(model.image_encoder),
            dtype=dtype, encode=encode, ranks=ranks,
        )  # fmt: skip
        return key, rows

    def projected(self, rows: Float[np.ndarray, "k w"]) -> Float[Tensor, "k d"]:
        """Encoder features mapped into the common space, on the host."""
        return encode_images(self.model, torch.from_numpy(np.array(rows))).cpu()

    def encode(
        self, loader: EvaluationLoader, *, num_samples: int, layer: Layer = "projection"
    ) -> Float[Tensor, "n d"] | None:
        """As `features`, from a loader of this rank's part of a data set."""
        parts: list[Tensor] = []
        ids: list[int] = []
        for samples, features in self.encoded(loader, num_samples=num_samples, layer=layer):
            parts.append(features)
            ids += samples.tolist()
        assert ids == list(range(self.ranks.rank, num_samples, self.ranks.world_size))
        mine = torch.cat(parts) if parts else None
        return collect_rows(mine, num_rows=num_samples, ranks=self.ranks)

    def encoded(
        self, loader: EvaluationLoader, *, num_samples: int, layer: Layer = "projection"
    ) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, "b d"]]]:
        """As `encode`, but yields each batch's sample numbers and features on this rank's host."""
        mine = len(range(self.ranks.rank, num_samples, self.ranks.world_size))
        stopped = False
        with Bar(desc="encode images", total=mine, shown=self.progress) as bar:
            for batch in loader:
                if stopped := not heartbeat_and_check_stop():
                    break
                features = encode_images(self.model, batch.images, layer=layer)
                yield batch.sample_ids, features.cpu()
                bar.update(len(batch.sample_ids))
        if any(gather_integers(int(stopped), self.ranks)):
            raise EvaluationStopped

    def on_rank_0(self, judge: Callable[[_G], _T], gathered: _G | None, kind: Any) -> _T:
        """Calls `judge` on rank 0, with `gathered`; all ranks get its result, or raise its error.

        `kind` is the type of the result: a dataclass, or a dict that can hold some.
        """
        result: Any = None
        with refused_together(self.ranks), rank_0_alone(self.ranks):
            if gathered is not None:
                result = judge(gathered)
        if self.ranks.world_size == 1:
            return cast(_T, result)
        result = from_rank_0(msgspec.to_builtins(result), self.ranks)
        return cast(_T, msgspec.convert(result, kind))


@contextlib.contextmanager
def model_on_ranks(
    checkpoint: str | Path, *, device: str = "auto", batch_size: int = 256
) -> Iterator[ModelOnRanks]:
    """A model on the ranks that torchrun, SLURM or `--nproc` started, which share the work.

    Arguments as for `unicl_fast.load_model`; `batch_size` is per rank. Rank 0 shows progress.
    """
    chosen = choose_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    with process_group(chosen) as ranks:
        configure_logging(ranks)
        # a run may have written another one since this rank looked
        checkpoint = from_rank_0(str(checkpoint), ranks)
        with line(f"loading {checkpoint}"):
            model = load_encoders(checkpoint)
        on_device(model, chosen, ranks)
        model.config = settle_decoding(model.config, chosen, ranks)
        yield ModelOnRanks(
            model, ranks, batch_size=batch_size, progress=ranks.is_main,
            text_folder=text_folder_of(model),
        )  # fmt: skip


def on_device(model: UniCL, device: torch.device, ranks: Ranks = _ALONE) -> UniCL:
    """Moves a model to a device, with the arithmetic and memory format of its training."""
    model.to(device)
    model.config = settle(model.config, device=device, ranks=ranks)
    set_device_arithmetic(model.config.efficiency, device)
    model.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def text_folder_of(model: UniCL) -> Path | None:
    """The folder in which the model's run keeps features of its frozen text encoder, if any."""
    folder = model.config.efficiency.stored_features
    is_there = folder and "text" in model.config.optim.freeze and os.access(folder, os.W_OK)
    return Path(folder) if is_there else None


def keys_of_features(model: UniCL, dataset: PackedDataset, *, layer: Layer) -> tuple[str, str]:
    """The names of all stored features of a model, and of those of a data set."""
    of = functools.partial(
        feature_key, model, view=model.config.data.evaluation_resize, layer=layer,
        weights=weights_digest(model, "image_" if layer == "projection" else "image_encoder."),
    )  # fmt: skip
    return of(None), of(dataset)


def device_of(model: UniCL) -> torch.device:
    return next(model.image_encoder.parameters()).device


def require_text_encoder(model: UniCL, what: str) -> None:
    """ValueError if the model cannot encode texts, which `what` needs, with our tokenizer."""
    if model.text_encoder is None:
        raise ValueError(
            f"{what} compares images with texts, and this model has no text encoder, since it "
            "was trained without one: use linear-probe or knn"
        )
    size, tokenizer = model.config.model.vocab_size, tokenizer_of(model.config)
    if not fits_vocabulary(tokenizer, size):
        raise ValueError(
            f"{what} tokenizes texts by {tokenizer.name} of {tokenizer.vocab_size:,} tokens, and "
            f"this model has another one, of {size:,}: use linear-probe or knn"
        )


def require_layer(model: UniCL, layer: Layer) -> None:
    """ValueError for features after a projection that the model does not have."""
    if layer == "projection" and not model.has_space:
        raise ValueError(
            "this model, trained by cross-entropy, has no projection: use the encoder's features "
            "(--layer encoder)"
        )


def require_finite(*features: Tensor) -> None:
    """ValueError for the features of a broken model."""
    if not all(bool(one.isfinite().all()) for one in features):
        raise ValueError("features hold values that are not finite: the model is broken")


@torch.no_grad()
def encode_images(
    model: UniCL, images: Tensor, *, layer: Layer = "projection"
) -> Float[Tensor, "b d"]:
    """Features of images uint8 [b h w c], computed in the model's training precision.

    The encoder's are returned in fp32 at least; the projection's have unit norm.
    """
    encode = model.encode_image if layer == "projection" else model.image_encoder
    config, given = model.config, send(images, device_of(model))
    with Precision(config.efficiency.precision).autocast(given.device.type):
        parts = [encode(encoder_input(piece, config)) for piece in in_pieces(given)]
    features = torch.cat(parts)
    return features.to(torch.promote_types(torch.float32, features.dtype))


@torch.no_grad()
def encode_token_rows(
    model: UniCL,
    rows: Sequence[NDArray[Any]],
    *,
    batch_size: int = 512,
    layer: Layer = "projection",
    progress: bool = False,
    folder: Path | None = None,
) -> Float[Tensor, "m d"]:
    """Features of m texts: token ids with start and end tokens, unpadded.

    The projection's have unit norm. A `folder` keeps the encoder's, as a run's
    `efficiency.stored_features` does.
    """
    if not rows:
        raise ValueError("there are no texts to encode")
    precision = Precision(model.config.efficiency.precision)
    device = device_of(model)
    if folder is not None:
        tokens = pad_rows(rows, max(map(len, rows)), np.dtype(np.uint32))
        stored = stored_text_features(model, tokens, folder, ranks=_ALONE, progress=progress)
        found = stored.take(stored.find(hashes_of(tokens))).to(device)
        if layer == "encoder":
            return found
        with precision.autocast(device.type):
            return model.encode_text(found)
    # texts of similar length together, since padding costs as much as text
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    encode = model.encode_text if layer == "projection" else model.text_encoder
    features = []
    with Bar(desc="encode texts", total=len(rows), shown=progress) as bar:
        for start in range(0, len(rows), batch_size):
            heartbeat_and_check_stop()  # stops only between images, when all ranks learn of it
            chosen = [rows[row].astype(np.int64) for row in order[start : start + batch_size]]
            tokens = pad_sequence([torch.from_numpy(row) for row in chosen], batch_first=True)
            with precision.autocast(device.type):
                features.append(encode(tokens.to(device)))
            bar.update(len(chosen))
    return torch.cat(features)[torch.tensor(order).argsort()]


def collect_rows(
    mine: Float[Tensor, "m d"] | None, *, num_rows: int, ranks: Ranks
) -> Float[Tensor, "n d"] | None:
    """Interleaves the ranks' rows on rank 0; other ranks get None.

    `mine` are this rank's, on the host; None if it has none.
    """
    if ranks.world_size == 1:
        return mine
    gathered = tensors_to_rank_0({} if mine is None else {str(ranks.rank): mine}, ranks)
    if not gathered:
        return None
    first = gathered["0"]
    whole = first.new_empty(num_rows, first.shape[1])
    for rank, rows in gathered.items():
        whole[int(rank) :: ranks.world_size] = rows
    return whole
