"""Evaluations of a model on a packed data set, put together from loader, model and metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation.classification import ClassificationResult
from unicl_fast.evaluation.encode import (
    Layer,
    device_of,
    encode_token_rows,
    require_text_encoder,
)
from unicl_fast.evaluation.features import collect_rows, extract_features
from unicl_fast.evaluation.retrieval import RetrievalResult, retrieval
from unicl_fast.evaluation.zero_shot import zero_shot_accuracy, zero_shot_classifier
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.evaluation_loader import EvaluationLoader


def evaluate_zero_shot(
    model: UniCL,
    dataset: PackedDataset,
    *,
    class_names: Sequence[str] = (),
    templates: Sequence[str] = (),
    rows_of_classes: npt.NDArray[np.int64] | None = None,
    ranks: Ranks | None = None,
    batch_size: int = 256,
    progress: bool = False,
    confusion: bool = False,
) -> ClassificationResult:
    """Zero-shot accuracy on a packed data set, or that of a model trained by cross-entropy.

    Args:
        model: in evaluation mode.
        dataset: with labels.
        class_names: instead of the data set's own.
        templates: instead of the data set's own.
        rows_of_classes: for cross-entropy, which of the model's rows each class has [k].
        ranks: who shares the work.
        batch_size: images encoded at once by each rank.
        progress: show progress bars.
        confusion: also count which class is taken for which.

    Raises:
        ValueError: no class names, or not as many as the data set has.
    """
    ranks = ranks or Ranks()
    own_names = dataset.manifest.class_names
    if class_names and len(class_names) != len(own_names):
        raise ValueError(
            f"{dataset.folder} has {len(own_names)} classes, {len(class_names)} names were given"
        )
    class_names = tuple(class_names) or own_names
    if not class_names:
        raise ValueError(f"{dataset.folder} has no classes: zero-shot needs labelled images")
    if rows_of_classes is not None and model.class_rows is not None:
        classifier = model.class_rows.detach()[torch.from_numpy(rows_of_classes)]
    else:
        classifier = zero_shot_classifier(
            model,
            class_names=class_names,
            templates=tuple(templates) or dataset.manifest.templates,
            progress=progress,
        )
    loader = loader_for(model, dataset, ranks=ranks, batch_size=batch_size)
    return zero_shot_accuracy(
        model,
        loader,
        classifier,
        labels_of=lambda sample: dataset.labels_of(sample).tolist(),
        class_names=class_names,
        ranks=ranks,
        num_batches=len(loader) if progress else None,
        confusion=confusion,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalFeatures:
    """What retrieval compares, on the host."""

    image_features: Tensor
    """[n d], unit norm."""
    text_features: Tensor
    """[m d], unit norm."""
    image_of_text: Tensor
    """int64 [m]: row of `image_features`."""
    samples: NDArray[np.int64]
    """[n]: which samples of the data set the images are."""

    def rank(self, device: torch.device) -> RetrievalResult:
        """Recalls in both directions, computed on a device."""
        return retrieval(
            self.image_features.to(device),
            self.text_features.to(device),
            self.image_of_text.to(device),
        )


def encode_captioned(
    model: UniCL,
    dataset: PackedDataset,
    *,
    ranks: Ranks | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> RetrievalFeatures | None:
    """Features of images and captions; samples without captions are left out.

    Args:
        model: in evaluation mode.
        dataset: with captions.
        ranks: who shares the work.
        batch_size: images, and captions, encoded at once by each rank.
        progress: show progress bars.

    Returns:
        None on all ranks but rank 0.

    Raises:
        ValueError: no sample has a caption, or the model has no text encoder.
    """
    ranks = ranks or Ranks()
    require_text_encoder(model, "retrieval")
    counts = dataset.samples["captions_count"].astype(np.int64)
    captioned = np.flatnonzero(counts)
    if not len(captioned):
        raise ValueError(
            f"{dataset.folder} has no captions: retrieval needs a data set packed with a caption "
            "column; for labels there is unicl-eval zero-shot"
        )
    images = extract_all(model, dataset, ranks=ranks, batch_size=batch_size, progress=progress)
    rows = [
        dataset.caption_tokens(sample, which)
        for sample in captioned.tolist()
        for which in range(counts[sample])
    ]
    own_rows = rows[ranks.rank :: ranks.world_size]
    own = None
    if own_rows:
        own = encode_token_rows(model, own_rows, batch_size=batch_size, progress=progress).cpu()
    texts = collect_rows(own, num_rows=len(rows), ranks=ranks)
    if images is None or texts is None:
        return None
    return RetrievalFeatures(
        image_features=images[torch.from_numpy(captioned)],
        text_features=texts,
        image_of_text=torch.from_numpy(np.repeat(np.arange(len(captioned)), counts[captioned])),
        samples=captioned,
    )


def extract_all(
    model: UniCL,
    dataset: PackedDataset,
    *,
    layer: Layer = "projection",
    ranks: Ranks | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor | None:
    """Features [n d] of all images of a data set, on the host; None on all ranks but rank 0."""
    ranks = ranks or Ranks()
    loader = loader_for(model, dataset, ranks=ranks, batch_size=batch_size)
    return extract_features(
        model,
        loader,
        num_samples=len(dataset),
        layer=layer,
        ranks=ranks,
        num_batches=len(loader) if progress else None,
    )


def loader_for(
    model: UniCL, dataset: PackedDataset, *, ranks: Ranks, batch_size: int
) -> EvaluationLoader:
    """This rank's part of a data set, as the model sees images and where it is."""
    return EvaluationLoader(
        dataset,
        model.config.data,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=device_of(model),
    )
