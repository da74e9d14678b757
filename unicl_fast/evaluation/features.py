"""A model over images and texts: who computes where, features, class scores.

Ranks share the images of a data set: rank r of w takes the samples r, r + w, r + 2 w, ...
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from unicl_fast.batch import EvaluationBatch, EvaluationLoader, send
from unicl_fast.checkpoints.load import load_model
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.launch import configure_logging
from unicl_fast.distributed.ranks import (
    Ranks,
    from_rank_0,
    gather_integers,
    gather_objects,
)
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.evaluation.report import ClassificationCounts, ClassificationResult, rank_classes
from unicl_fast.evaluation.requests import Layer, RankedCommand
from unicl_fast.models.precision import (
    Precision,
    resolve_precision,
    set_device_arithmetic,
)
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.machine import choose_device
from unicl_fast.system.progress import EvaluationStopped, WaitingForRanks, heartbeat_and_check_stop
from unicl_fast.training.data import resolve_decode_device, with_threads
from unicl_fast.training.global_loss import encoder_input

_ALONE = Ranks()
_ROWS_AT_ONCE = 8192
"""Rows that each rank sends in one collective: 25 MB of 768 numbers."""


@dataclass(frozen=True, slots=True)
class ModelOnRanks:
    """A model in evaluation mode, and how ranks encode data sets with it."""

    model: UniCL
    ranks: Ranks = Ranks()  # noqa: RUF009 - frozen
    batch_size: int = 256
    """Images encoded at once by each rank."""
    progress: bool = False
    """Whether progress bars are shown."""

    def loader(self, dataset: PackedDataset) -> EvaluationLoader:
        """This rank's part of a data set, prepared as the model needs it, on its device."""
        # here, so that the protocols serve other loaders where DALI is not installed
        from unicl_fast.pipelines.loader import EvaluationLoader as DaliLoader

        return DaliLoader(
            dataset,
            with_threads(self.model.config.data, self.ranks),
            batch_size=self.batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            device=device_of(self.model),
        )

    def _batches(self, loader: EvaluationLoader, *, title: str) -> Iterator[EvaluationBatch]:
        """All batches of this rank; if any is asked to stop, all raise EvaluationStopped."""
        stopped = False
        for batch in tqdm(loader, desc=title, disable=not self.progress):
            if not heartbeat_and_check_stop():
                stopped = True
                break
            yield batch
        if any(gather_integers(int(stopped), self.ranks)):
            raise EvaluationStopped

    @torch.no_grad()
    def classify(
        self,
        loader: EvaluationLoader,
        scores_of: Callable[[Tensor], Tensor],
        *,
        labels_of: Callable[[int], Sequence[int]],
        class_names: Sequence[str],
        what: str,
        confusion: bool = False,
    ) -> ClassificationResult:
        """Classifies the images of a loader, each sample once over all ranks, and counts.

        Args:
            loader: this rank's part.
            scores_of: scores [b k] of images, uint8 [b h w c].
            labels_of: labels of a sample of the data set; see `ClassificationCounts.add`.
            class_names: k names.
            what: is evaluated, for messages.
            confusion: also count which class is taken for which.

        Raises:
            ValueError: no sample has a label.
            EvaluationStopped: it was asked to stop, on all ranks.
        """
        counts = ClassificationCounts(class_names, confusion=confusion)
        for batch in self._batches(loader, title="classify"):
            labels = (list(map(int, labels_of(sample))) for sample in batch.sample_ids.tolist())
            counts.add(rank_classes(scores_of(batch.images)), labels)
        counts.sum_over(self.ranks)
        return counts.result(what=what)

    def features(
        self, dataset: PackedDataset, *, layer: Layer = "projection"
    ) -> Float[Tensor, "n d"] | None:
        """Features of a data set's images, in its order, on rank 0's host, in fp32 or fp64.

        Raises:
            EvaluationStopped: it was asked to stop, on all ranks.
        """
        parts: list[Tensor] = []
        ids: list[int] = []
        for batch in self._batches(self.loader(dataset), title="encode images"):
            parts.append(encode_images(self.model, batch.images, layer=layer).cpu())
            ids += batch.sample_ids.tolist()
        assert ids == list(range(self.ranks.rank, len(dataset), self.ranks.world_size))
        mine = torch.cat(parts) if parts else None
        return collect_rows(mine, num_rows=len(dataset), ranks=self.ranks)


@contextlib.contextmanager
def model_on_ranks(command: RankedCommand) -> Iterator[ModelOnRanks]:
    """The model of a command on its device; its ranks share the work."""
    device = choose_device(command.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(device) as ranks:
        configure_logging(ranks)
        # a run may have written another one since this rank looked
        checkpoint = from_rank_0(str(command.checkpoint), ranks)
        model = load_model(checkpoint, weights=command.weights)
        on_device(model, device, ranks)
        model.config = resolve_decode_device(model.config, device, ranks)
        batch_size = getattr(command, "batch_size", 1)
        yield ModelOnRanks(model, ranks, batch_size=batch_size, progress=shows_progress(ranks))


def on_device(model: UniCL, device: torch.device, ranks: Ranks = _ALONE) -> UniCL:
    """Moves a model to a device, with the arithmetic and the memory format it was trained with."""
    model.to(device)
    model.config = resolve_precision(model.config, device, ranks=ranks)
    set_device_arithmetic(model.config.efficiency, device)
    if model.config.efficiency.channels_last:
        model.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def shows_progress(ranks: Ranks) -> bool:
    """Whether this process draws progress bars: rank 0, on a terminal; a log gets none."""
    return ranks.is_main and sys.stderr.isatty()


def device_of(model: UniCL) -> torch.device:
    """The device that holds the model."""
    return next(model.image_encoder.parameters()).device


def require_text_encoder(model: UniCL, what: str) -> None:
    """Refuses (ValueError) a model that was trained without texts, which `what` needs."""
    if model.text_encoder is None:
        raise ValueError(
            f"{what} compares images with texts, and this model has no text encoder, since it "
            "was trained without one: take linear-probe or knn"
        )


def require_layer(model: UniCL, layer: Layer) -> None:
    """Refuses (ValueError) features after a projection that the model does not have."""
    if layer == "projection" and model.class_rows is not None:
        raise ValueError(
            "features after the projection were asked for, and this model, trained by "
            "cross-entropy, has no projection: take those of the encoder (--layer encoder)"
        )


def require_finite(*features: Tensor) -> None:
    """Refuses (ValueError) features that a broken model made."""
    if not all(bool(one.isfinite().all()) for one in features):
        raise ValueError("features hold values that are not finite: the model is broken")


def prepare_images(model: UniCL, images: Tensor) -> Float[Tensor, "b c h w"]:
    """Normalises decoded images uint8 [b h w c] for the model's image encoder, on its device."""
    return encoder_input(send(images, device_of(model)), model.config)


@torch.no_grad()
def encode_images(
    model: UniCL, images: Tensor, *, layer: Layer = "projection"
) -> Float[Tensor, "b d"]:
    """Features of images uint8 [b h w c], in the precision the model was trained in.

    Layer "projection" gives the unit-norm features (under cross-entropy what `class_rows` is
    multiplied by, see `UniCL.encode_image`), "encoder" those before the projection, in fp32 at
    least.
    """
    normalised = prepare_images(model, images)
    with Precision(model.config.efficiency.precision).autocast(normalised.device.type):
        if layer == "projection":
            return model.encode_image(normalised)
        features: Tensor = model.image_encoder(normalised)
    return features.to(torch.promote_types(torch.float32, features.dtype))


@torch.no_grad()
def encode_token_rows(
    model: UniCL,
    rows: Sequence[NDArray[np.uint16]],
    *,
    batch_size: int = 512,
    progress: bool = False,
) -> Float[Tensor, "m d"]:
    """Unit-norm features of m texts: token ids with start and end tokens, unpadded."""
    if not rows:
        raise ValueError("there are no texts to encode")
    precision = Precision(model.config.efficiency.precision)
    device = device_of(model)
    # texts of similar length together: what is padded is computed for nothing
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    features = []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="encode texts", disable=not progress):
        heartbeat_and_check_stop()  # a stop is obeyed between images, where all ranks learn of it
        chosen = [rows[row].astype(np.int64) for row in order[start : start + batch_size]]
        tokens = pad_sequence([torch.from_numpy(row) for row in chosen], batch_first=True)
        with precision.autocast(device.type):
            features.append(model.encode_text(tokens.to(device)))
    return torch.cat(features)[torch.tensor(order).argsort()]


def collect_rows(
    mine: Float[Tensor, "m d"] | None, *, num_rows: int, ranks: Ranks
) -> Float[Tensor, "n d"] | None:
    """Puts this rank's rows, on the host, and those of the others in turn together on rank 0.

    `mine` is None where a rank has no rows. The other ranks get None.
    """
    if ranks.world_size == 1:
        return mine
    num_received = ranks.world_size if ranks.is_main else 0
    # a rank without rows knows neither their width nor their type
    kind: list[Any] | None = None if mine is None else [mine.shape[1], str(mine.dtype)]
    width, name = next(kind for kind in gather_objects(kind, ranks) if kind is not None)
    dtype = getattr(torch, name.removeprefix("torch."))
    mine = torch.empty(0, width, dtype=dtype) if mine is None else mine
    whole = torch.empty(num_rows, width, dtype=dtype) if ranks.is_main else None
    most = -(-num_rows // ranks.world_size)
    for start in range(0, most, _ROWS_AT_ONCE):
        sent = torch.zeros(min(_ROWS_AT_ONCE, most - start), width, dtype=dtype)
        part = mine[start : start + len(sent)]
        sent[: len(part)] = part
        received = [torch.empty_like(sent) for _ in range(num_received)]
        with WaitingForRanks():
            dist.gather(sent, received or None, dst=0, group=ranks.host_group)
        if whole is not None:
            rows, begin = torch.stack(received, dim=1).flatten(0, 1), start * ranks.world_size
            whole[begin : begin + len(rows)] = rows[: num_rows - begin]
    return whole
