"""A model over images and texts: who computes where, features, class scores.

Ranks share the images of a data set: rank r of w takes the samples r, r + w, r + 2 w, ...

A linear probe and its many fits, nearest neighbours and the first head of fine-tuning need the same
features of labelled images again and again, and only the encoder takes long. They are kept in a
folder, as `dataset.feature_files` says.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from unicl_fast.batch import EvaluationBatch, EvaluationLoader, send
from unicl_fast.checkpoints.load import find_model, load_model
from unicl_fast.dataset.feature_files import (
    feature_key,
    has_features,
    read_features,
    seal_features,
)
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.launch import configure_logging
from unicl_fast.distributed.ranks import (
    Ranks,
    from_rank_0,
    gather_integers,
    gather_objects,
    rank_0_alone,
)
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.evaluation.data import EvaluationData, open_data
from unicl_fast.evaluation.report import ClassificationCounts, ClassificationResult, rank_classes
from unicl_fast.evaluation.requests import FrozenFeatures, Layer, Metric, RankedCommand
from unicl_fast.models.precision import (
    Precision,
    resolve_precision,
    set_device_arithmetic,
)
from unicl_fast.models.unicl import UniCL, weights_digest
from unicl_fast.system.keyed_random import fold_key, uniform_tensor
from unicl_fast.system.machine import choose_device
from unicl_fast.system.progress import EvaluationStopped, WaitingForRanks, heartbeat_and_check_stop
from unicl_fast.training.data import resolve_decode_device, with_threads
from unicl_fast.training.global_loss import encoder_input

logger = logging.getLogger(__name__)

_ALONE = Ranks()
_ROWS_AT_ONCE = 8192
"""Rows that each rank sends in one collective: 25 MB of 768 numbers."""
_SPLIT, _SHOTS, _FOLDS = 1, 2, 3
"""Purposes of random numbers, so that those of one seed differ."""
_KEY_VERSION = 1
"""Version of what decides features beside `feature_key`'s facts; raised when the pipeline changes.
"""


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


@dataclass(frozen=True, slots=True)
class LabelledFeatures:
    """Samples with labels: features, the label each is fitted with, and all that count as right."""

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    """int64, the first label of each."""
    all_labels: Sequence[Sequence[int]]
    num_without_label: int = 0
    """Samples that were left out."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> LabelledFeatures:
        """Some of them, in the order of `rows`."""
        chosen = torch.from_numpy(rows).to(self.labels.device)
        labels = [self.all_labels[row] for row in rows.tolist()]
        return LabelledFeatures(self.features[chosen], self.labels[chosen], labels)

    def join(self, other: LabelledFeatures) -> LabelledFeatures:
        """Both, one after the other."""
        features = torch.cat([self.features, other.features])
        labels = torch.cat([self.labels, other.labels])
        return LabelledFeatures(features, labels, [*self.all_labels, *other.all_labels])


def with_labels(
    features: Float[Tensor, "n d"], labels: Sequence[Sequence[int]], *, what: str
) -> LabelledFeatures:
    """Features of the samples of `what` that have labels; it is a ValueError if none has one."""
    kept = [row for row, own in enumerate(labels) if own]
    if not kept:
        raise ValueError(f"no sample of {what} has a label")
    return LabelledFeatures(
        features if len(kept) == len(labels) else features[torch.tensor(kept)],
        torch.tensor([labels[row][0] for row in kept], device=features.device),
        [labels[row] for row in kept],
        num_without_label=len(labels) - len(kept),
    )


def split_validation(
    labels: NDArray[np.int64], *, fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of training and of validation samples, rising; the seed draws a part of each class.

    A class gives round(fraction * its samples), but keeps one at least for training.
    """
    parts = [
        rows[: min(round(fraction * len(rows)), len(rows) - 1)]
        for rows in _shuffled_classes(labels, fold_key(seed, _SPLIT))
    ]
    validation = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def split_folds(
    labels: NDArray[np.int64], *, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows to fit on and rows held out, for each fold of a cross-validation.

    There are as many folds as the smallest class has samples, from 2 to 5, and each holds out its
    part of every class. A class's only sample is never held out; without a class of two there are
    no folds.
    """
    classes = _shuffled_classes(labels, fold_key(seed, _FOLDS))
    count = max(2, min(5, min(map(len, classes))))
    several = [rows for rows in classes if len(rows) > 1]
    held_out = [np.sort(np.concatenate([rows[fold::count] for rows in several]))
                for fold in range(count) if several]  # fmt: skip
    return [(np.setdiff1d(np.arange(len(labels)), rows), rows) for rows in held_out]


def draw_shots(
    labels: NDArray[np.int64], *, shots: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of `shots` samples of each class to fit on, and min(shots, 4) others to choose C by.

    The rule of CoOp (Zhou et al., arXiv 2109.01134): validation is no larger than few-shot learning
    could afford. A class with too few samples gives all it has, to training first.
    """
    classes = _shuffled_classes(labels, fold_key(seed, _SHOTS, shots))
    aside = [rows[shots : shots + min(shots, 4)] for rows in classes]
    return np.concatenate([rows[:shots] for rows in classes]), np.concatenate(aside)


def _shuffled_classes(labels: NDArray[np.int64], key: int) -> list[NDArray[np.int64]]:
    """The rows of each class, in an order that a key decides, whatever NumPy's version."""
    order = uniform_tensor(key, torch.arange(len(labels))).argsort(stable=True).numpy()
    return [order[labels[order] == label] for label in np.unique(labels)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractedSets:
    """Features of the data sets of one command on rank 0, on the device that fits."""

    train: LabelledFeatures
    test: LabelledFeatures
    validation: LabelledFeatures | None
    class_names: tuple[str, ...]
    """Classes of the training data; the labels of all sets are numbers of these."""
    test_name: str
    metric: Metric
    """The metric that is reported first."""

    def described(self, command: FrozenFeatures) -> dict[str, object]:
        """The first values of a report."""
        return {
            "train": command.train,
            "data": command.data,
            "name": self.test_name,
            "layer": command.layer,
            "num_train": len(self.train),
            "num_test": len(self.test),
            "num_features": self.train.features.shape[1],
            "metric": self.metric,
        }


def extract_sets(
    command: FrozenFeatures, *, dtype: torch.dtype | None = None
) -> ExtractedSets | None:
    """Features and labels of the data sets of a command; None on all ranks but rank 0.

    `dtype` is the type of the features; None leaves them as they are, in fp32 or fp64.
    """
    found: list[LabelledFeatures] = []
    opened: list[EvaluationData] = []
    with model_on_ranks(command) as on_ranks:
        model, ranks = on_ranks.model, on_ranks.ranks
        require_layer(model, command.layer)
        folder, keeps = Path(command.features), command.features != "none"
        if command.features == "auto":
            run = find_model(command.checkpoint).parent  # of RUN/checkpoints/step-N, RUN/best, ...
            folder = (run.parent if run.name == "checkpoints" else run) / "features"
        weights = weights_digest(model, "image_encoder.", "image_projection")
        for spec in command.data_sets():
            with open_data(spec, ranks=ranks, metric=command.metric) as data:
                opened.append(data)
                labels = data.labels_among(opened[0])
                key = key_of_features(model, data.dataset, layer=command.layer, weights=weights)
                features, is_kept = None, from_rank_0(keeps and has_features(folder, key), ranks)
                if not is_kept:
                    features = on_ranks.features(data.dataset, layer=command.layer)
                with rank_0_alone(ranks):
                    if is_kept and ranks.is_main:
                        kept = read_features(folder, key, num_samples=len(data.dataset))
                        features = torch.from_numpy(np.array(kept.rows))
                        print(f"features of {spec}: found again")
                    elif keeps and features is not None:
                        keep_features(folder, key, features)
                    if features is not None:
                        features = features.to(device_of(model), dtype)
                        found.append(with_labels(features, labels, what=spec))
    if not found:
        return None
    return ExtractedSets(
        train=found[0],
        test=found[1],
        validation=found[2] if len(found) > 2 else None,
        class_names=opened[0].class_names,
        test_name=opened[1].name,
        metric=opened[1].metric,
    )


def key_of_features(model: UniCL, dataset: PackedDataset, *, layer: Layer, weights: str) -> str:
    """A name for the features of a data set in evaluations, whose view is a central crop."""
    return feature_key(
        model.config,
        dataset,
        weights=weights,
        device_type=device_of(model).type,
        view=model.config.data.evaluation_resize,
        version=_KEY_VERSION,
        layer=layer,
    )


def keep_features(folder: Path, key: str, features: Float[Tensor, "n d"]) -> None:
    """Stores features whole or not at all; a disk that refuses is a warning and no error."""
    aside = folder / f".{key}.{secrets.token_hex(4)}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            np.save(file, features.numpy(), allow_pickle=False)
        dtype = str(features.dtype).removeprefix("torch.")
        seal_features(aside, folder, key, dtype=dtype, unreadable=())
    except OSError as error:
        logger.warning("features are not kept: %s cannot be written: %s", folder, error)
    finally:
        with contextlib.suppress(OSError):  # where it has its name, or was never made
            aside.unlink()
