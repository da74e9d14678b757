"""A model over images and texts: who computes where, features, and class scores.

Ranks share the images of a data set: rank r of w takes the samples r, r + w, r + 2 w, ...
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from unicl_fast.batch import EvaluationBatch, EvaluationLoader
from unicl_fast.checkpoints.load import load_model
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.launch import configure_logging
from unicl_fast.distributed.ranks import Ranks, gather_integers, gather_objects, process_group
from unicl_fast.evaluation.report import ClassificationCounts, ClassificationResult, rank_classes
from unicl_fast.evaluation.requests import EncodingEvaluation, Evaluation, Layer
from unicl_fast.models.precision import Precision, normalise_images
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.machine import choose_device
from unicl_fast.system.progress import EvaluationStopped, WaitingForRanks, heartbeat_and_check_stop

_ROWS_AT_ONCE = 8192
"""Rows that each rank sends in one collective: 25 MB of 768 numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
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
            self.model.config.data,
            batch_size=self.batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            device=device_of(self.model),
        )

    def _batches(self, loader: EvaluationLoader, *, title: str) -> Iterator[EvaluationBatch]:
        """All batches of this rank; if any rank is asked to stop, all raise at the end.

        Raises:
            EvaluationStopped: on all ranks.
        """
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
        """Classifies the images of a loader and counts over all ranks.

        Args:
            loader: over all ranks, each sample once.
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
        """Features of all images of a data set, in its order.

        Returns:
            [n d] on the host, fp32 or fp64; None on all ranks but rank 0.

        Raises:
            EvaluationStopped: it was asked to stop, on all ranks.
        """
        expected = torch.arange(self.ranks.rank, len(dataset), self.ranks.world_size)
        parts: list[Tensor] = []
        done = 0
        for batch in self._batches(self.loader(dataset), title="encode images"):
            ids = batch.sample_ids
            assert torch.equal(ids, expected[done : done + len(ids)]), "samples out of order"
            parts.append(encode_images(self.model, batch.images, layer=layer).cpu())
            done += len(ids)
        mine = torch.cat(parts) if parts else None
        return collect_rows(mine, num_rows=len(dataset), ranks=self.ranks)


@contextlib.contextmanager
def model_on_ranks(command: Evaluation) -> Iterator[ModelOnRanks]:
    """The model of a command on its device; its ranks share the work.

    Convolutions have the memory format that they were trained with.
    """
    device = choose_device(command.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(device) as ranks:
        configure_logging(ranks)
        model = load_model(command.checkpoint, weights=command.weights).to(device)
        if model.config.efficiency.channels_last:
            model.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch_size = command.batch_size if isinstance(command, EncodingEvaluation) else 1
        progress = shows_progress(ranks)
        yield ModelOnRanks(model=model, ranks=ranks, batch_size=batch_size, progress=progress)


def shows_progress(ranks: Ranks) -> bool:
    """Whether this process draws progress bars: rank 0, on a terminal; a log gets none."""
    return ranks.is_main and sys.stderr.isatty()


def device_of(model: UniCL) -> torch.device:
    """The device that holds the model."""
    return next(model.image_encoder.parameters()).device


def require_text_encoder(model: UniCL, what: str) -> None:
    """Refuses a model that was trained without texts; `what` needs some, for the message.

    Raises:
        ValueError: it has no text encoder.
    """
    if model.text_encoder is None:
        raise ValueError(
            f"{what} compares images with texts, and this model has no text encoder, since it "
            "was trained without one: take linear-probe, knn, finetune or detect"
        )


def prepare_images(model: UniCL, images: Tensor) -> Float[Tensor, "b c h w"]:
    """Normalises decoded images uint8 [b h w c] for the model's image encoder, on its device."""
    config = model.config
    return normalise_images(
        images.to(device_of(model), non_blocking=True),
        mean=config.data.mean,
        std=config.data.std,
        dtype=Precision(config.efficiency.precision).compute_type,
        channels_last=config.efficiency.channels_last,
    )


@torch.no_grad()
def encode_images(
    model: UniCL, images: Tensor, *, layer: Layer = "projection"
) -> Float[Tensor, "b d"]:
    """Features of decoded images, in the precision the model was trained in.

    Args:
        model: in evaluation mode.
        images: uint8 [b h w c].
        layer: "projection" gives the unit-norm features (under cross-entropy what `class_rows` is
            multiplied by, see `UniCL.encode_image`), "encoder" those before the projection, in
            fp32 at least.
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
        chosen = [rows[row] for row in order[start : start + batch_size]]
        tokens = torch.zeros(len(chosen), len(chosen[-1]), dtype=torch.int64)
        for number, row in enumerate(chosen):
            tokens[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
        with precision.autocast(device.type):
            features.append(model.encode_text(tokens.to(device)))
    return torch.cat(features)[torch.tensor(order).argsort()]


def collect_rows(
    mine: Float[Tensor, "m d"] | None, *, num_rows: int, ranks: Ranks
) -> Float[Tensor, "n d"] | None:
    """Rows r, r + w, r + 2 w, ... of rank r of w, put together on rank 0.

    `mine` are this rank's rows, on the host, or None if it has none. The other ranks get None.
    """
    if ranks.world_size == 1:
        return mine
    # a rank without rows knows neither their width nor their type
    kinds = gather_objects(None if mine is None else (mine.shape[1], mine.dtype), ranks)
    width, dtype = next(kind for kind in kinds if kind is not None)
    mine = torch.empty(0, width, dtype=dtype) if mine is None else mine
    whole = torch.empty(num_rows, width, dtype=dtype) if ranks.is_main else None
    most = -(-num_rows // ranks.world_size)
    for start in range(0, most, _ROWS_AT_ONCE):
        sent = torch.zeros(min(_ROWS_AT_ONCE, most - start), width, dtype=dtype)
        part = mine[start : start + len(sent)]
        sent[: len(part)] = part
        received = (
            [torch.empty_like(sent) for _ in range(ranks.world_size)] if whole is not None else None
        )
        with WaitingForRanks():
            dist.gather(sent, received, dst=0, group=ranks.host_group)
        if whole is not None and received is not None:
            for rank, rows in enumerate(received):
                target = whole[rank + start * ranks.world_size :: ranks.world_size][: len(sent)]
                target.copy_(rows[: len(target)])
    return whole
