"""Packed data sets as the programs use them: opened, described, and evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from unicl_fast.config import DataConfig
from unicl_fast.dist import Ranks
from unicl_fast.evaluation.encode import encode_pictures, encode_token_rows
from unicl_fast.evaluation.retrieval import RetrievalResult, retrieval
from unicl_fast.evaluation.zero_shot import (
    ZeroShotResult,
    zero_shot_accuracy,
    zero_shot_classifier,
)
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.loader import EvaluationLoader
from unicl_fast.prompts import ClassPrompts
from unicl_fast.shards import PackedDataset
from unicl_fast.tokenizer import Tokenizer


def open_sources(specs: Sequence[str]) -> tuple[list[PackedDataset], list[float] | None]:
    """Opens DIR or DIR=SHARE each.

    Returns:
        The data sets and their shares; None where no share was given.

    Raises:
        ValueError: some have a share and some have none.
        FileNotFoundError: not a packed data set.
    """
    folders, shares = [], []
    for spec in specs:
        folder, _, share = spec.rpartition("=")
        try:
            shares.append(float(share) if folder else None)
        except ValueError:  # a folder with = in its name
            folder, share = "", spec
            shares.append(None)
        folders.append(folder or share)
    given = [share for share in shares if share is not None]
    if given and len(given) < len(shares):
        raise ValueError(
            f"data.train: give every data set a share (DIR=SHARE) or none, not {' '.join(specs)}"
        )
    return [PackedDataset(folder) for folder in folders], given or None


def build_prompts(datasets: Sequence[PackedDataset], data: DataConfig) -> ClassPrompts:
    """The prompts of all classes of all data sets, by the config's rule for label spaces."""
    return ClassPrompts(
        [(dataset.manifest.class_names, dataset.manifest.templates) for dataset in datasets],
        Tokenizer(),
        label_space=data.label_space,
    )


def describe_sources(
    datasets: Sequence[PackedDataset], shares: Sequence[float] | None
) -> dict[str, Any]:
    """What a run is trained on, for its checkpoints: contents, not places, so data may be moved."""
    manifests = [dataset.manifest for dataset in datasets]
    return {
        "shares": list(shares) if shares else None,
        "sources": [
            {
                "num_samples": manifest.num_samples,
                "shards": [shard.xxh3 for shard in manifest.shards],
                "num_classes": len(manifest.class_names),
            }
            for manifest in manifests
        ],
        "vocabulary_hash": [manifest.vocabulary_hash for manifest in manifests],
        "class_names": [list(manifest.class_names) for manifest in manifests],
        "templates": [list(manifest.templates) for manifest in manifests],
    }


def check_tokenizer(dataset: PackedDataset, *, context_length: int) -> None:
    """Refuses token ids that the model would misread.

    Raises:
        ValueError: packed with another vocabulary or longer texts than the model takes.
    """
    manifest, tokenizer = dataset.manifest, Tokenizer()
    if manifest.vocabulary_hash != tokenizer.vocabulary_hash:
        raise ValueError(
            f"{dataset.folder} was packed with the tokenizer {manifest.tokenizer} of vocabulary "
            f"{manifest.vocabulary_hash[:16]}, this version has {tokenizer.name} "
            f"{tokenizer.vocabulary_hash[:16]}: pack it again"
        )
    if manifest.context_length > context_length:
        raise ValueError(
            f"{dataset.folder} holds texts of up to {manifest.context_length} tokens, the model "
            f"takes {context_length}: set model.context_length={manifest.context_length}"
        )


def evaluate_zero_shot(
    model: UniCL,
    dataset: PackedDataset,
    *,
    class_names: Sequence[str] = (),
    templates: Sequence[str] = (),
    ranks: Ranks | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> ZeroShotResult:
    """Zero-shot accuracy on a packed data set.

    Args:
        model: in evaluation mode.
        dataset: with labels.
        class_names: instead of the data set's own.
        templates: instead of the data set's own.
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
