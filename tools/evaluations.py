"""Evaluations of a model on a packed data set, put together from loader, model and metric."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from unicl_fast.dist import Ranks
from unicl_fast.evaluation.encode import encode_pictures, encode_token_rows
from unicl_fast.evaluation.retrieval import RetrievalResult, retrieval
from unicl_fast.evaluation.zero_shot import (
    ZeroShotResult,
    zero_shot_accuracy,
    zero_shot_classifier,
)
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.evaluation_loader import EvaluationLoader
from unicl_fast.shards import PackedDataset


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
) -> ZeroShotResult:
    """Zero-shot accuracy on a packed data set, or that of a model trained by cross-entropy.

    Args:
        model: in evaluation mode.
        dataset: with labels.
        class_names: instead of the data set's own.
        templates: instead of the data set's own.
        rows_of_classes: for cross-entropy, which of the model's rows each class has [k].
        ranks: who shares the work.
        batch_size: pictures encoded at once by each rank.
        progress: show progress bars.

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
        raise ValueError(f"{dataset.folder} has no classes: zero-shot needs labelled pictures")
    if rows_of_classes is not None and model.class_rows is not None:
        classifier = model.class_rows.detach()[torch.from_numpy(rows_of_classes)]
    else:
        classifier = zero_shot_classifier(
            model,
            class_names=class_names,
            templates=tuple(templates) or dataset.manifest.templates,
            progress=progress,
        )
    loader = EvaluationLoader(
        dataset,
        model.config.data,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=model.logit_scale.device,
    )
    return zero_shot_accuracy(
        model,
        loader,
        classifier,
        labels_of=lambda sample: dataset.labels_of(sample).tolist(),
        class_names=class_names,
        ranks=ranks,
        num_batches=len(loader) if progress else None,
    )


@torch.no_grad()
def evaluate_retrieval(
    model: UniCL, dataset: PackedDataset, *, batch_size: int = 256, progress: bool = False
) -> RetrievalResult:
    """Caption retrieval on a packed data set; samples without captions are left out.

    Args:
        model: in evaluation mode.
        dataset: with captions.
        batch_size: pictures, and captions, encoded at once.
        progress: show progress bars.

    Raises:
        ValueError: no sample has a caption.
    """
    counts = dataset.samples["captions_count"].astype(np.int64)
    captioned = np.flatnonzero(counts)
    if not len(captioned):
        raise ValueError(
            f"{dataset.folder} has no captions: retrieval needs a data set packed with a caption "
            "column; for labels there is unicl-eval zero-shot"
        )
    loader = EvaluationLoader(
        dataset, model.config.data, batch_size=batch_size, device=model.logit_scale.device
    )
    image_features = torch.cat(
        [
            encode_pictures(model, batch.images)
            for batch in tqdm(loader, desc="encode pictures", disable=not progress)
        ]
    )[torch.from_numpy(captioned)]
    image_of_text = torch.from_numpy(np.repeat(np.arange(len(captioned)), counts[captioned]))
    rows = [
        dataset.caption_tokens(sample, which)
        for sample in captioned.tolist()
        for which in range(counts[sample])
    ]
    return retrieval(
        image_features,
        encode_token_rows(model, rows, batch_size=batch_size, progress=progress),
        image_of_text.to(image_features.device),
    )


def move_to_device(model: UniCL, device: torch.device) -> UniCL:
    """The model on a device, its convolutions in the memory format it was trained with."""
    model.to(device)
    if model.config.efficiency.channels_last:
        model.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
