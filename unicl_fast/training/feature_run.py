"""Lets a run whose encoders are frozen feed their stored features instead of images and texts."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from unicl_fast.batch import Batch
from unicl_fast.dataset.feature_files import KnownRows
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import sum_over_ranks
from unicl_fast.models.unicl import Tower
from unicl_fast.pipelines.feature_loader import FeatureLoader
from unicl_fast.pipelines.texts import gather_every_text
from unicl_fast.system.phases import START_PATIENCE, mark
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.token_rows import distinct_texts
from unicl_fast.training.stages import PlannedLoader, in_stages
from unicl_fast.training.stored_features import stored_image_features, stored_text_features
from unicl_fast.training.trainer import Trainer

_MEASURED = 65_536
"""Samples that give the statistics; 20,000 give a mean within a hundredth of the deviation."""


def feed_features(
    trainer: Trainer,
    loaders: Sequence[PlannedLoader],
    *,
    datasets: Sequence[PackedDataset],
    weights: Sequence[float] | None,
    prompts: ClassPrompts,
    build_loader: Callable[..., PlannedLoader],
    on_first_batch: Callable[[Batch], None],
    is_fresh: bool,
    progress: bool,
) -> None:
    """Replaces the loader of a run by one of stored features, which are encoded now if needed.

    `loaders` are those of the run's stages; `build_loader` builds one of other settings for the
    same data. A fresh run also measures the features that `model.standardise` needs. All ranks call
    it; raises as `stored_image_features`.
    """
    config, spans = trainer.config, trainer.config.run.spans
    progress = progress and trainer.ranks.is_main
    last = config.settings_of_stages[-1]
    num_draws: int | None = config.run.draws_before(trainer.total_steps)
    if num_draws is not None and num_draws >= sum(map(len, datasets)):
        once = {"shuffle_window": 0, "sample_weights": "none"}  # an epoch has each image once
        last, num_draws, weights = last.changed(data=once), None, None
    images = stored_image_features(
        trainer.model, datasets, num_draws=num_draws, on_first_batch=on_first_batch,
        build_loader=lambda: build_loader(last, prompts=prompts, weights=weights),
        ranks=trainer.ranks, progress=progress,
    )  # fmt: skip

    def feed(texts: KnownRows | None) -> list[FeatureLoader]:
        device, pairs = trainer.device, zip(loaders, spans, strict=True)
        return [
            FeatureLoader(one.steps, images, texts, end_step=span.end_step, device=device)
            for one, span in pairs
        ]

    texts = None
    if "text" in config.optim.freeze and config.objective.uses_texts:
        texts = _stored_texts(trainer, datasets, prompts, feed(None), progress=progress)
    trainer.loader = in_stages(feed(texts), config.run)
    if config.model.standardise and is_fresh:
        _set_statistics(trainer, has_texts=texts is not None)


def _stored_texts(
    trainer: Trainer,
    datasets: Sequence[PackedDataset],
    prompts: ClassPrompts,
    loaders: Sequence[FeatureLoader],
    *,
    progress: bool,
) -> KnownRows:
    """Features of all texts, or of those that a short run draws."""
    config, ranks = trainer.config, trainer.ranks
    mark("looking for the texts of the run", patience=START_PATIENCE)
    num_texts = len(prompts.tokens) + sum(len(one.captions) for one in datasets)
    if config.run.draws_before(trainer.total_steps) > num_texts:
        tokens = gather_every_text(
            datasets, prompts, text=config.data.text, context_length=config.model.context_length,
            rank=ranks.rank, world_size=ranks.world_size,
        )  # fmt: skip
    else:
        parts = zip(loaders, config.run.spans, strict=True)
        tokens = distinct_texts(*(one.texts_from(span.first_step) for one, span in parts))
    folder = Path(config.efficiency.stored_features)
    return stored_text_features(trainer.model, tokens, folder, ranks=ranks, progress=progress)


def _set_statistics(trainer: Trainer, *, has_texts: bool) -> None:
    """Standardises by the run's first samples, unless the initial weights brought statistics."""
    mark("measuring the features", patience=START_PATIENCE)
    sums: dict[Tower, Tensor] = {}
    size = trainer.config.run.global_batch_size
    steps = min(trainer.total_steps, -(-_MEASURED // size))
    with contextlib.closing(trainer.loader):
        for batch in itertools.islice(trainer.loader.batches(0), steps):
            rows: dict[Tower, Tensor] = {"image": batch.images}
            if has_texts:
                rows["text"] = batch.texts.tokens[batch.texts.index]
            for tower, part in rows.items():
                values = part.double()
                ones = torch.ones_like(values[:1])
                own = torch.cat([ones * len(values), values.sum(0, True), (values**2).sum(0, True)])
                sums[tower] = sums[tower] + own if tower in sums else own
    for tower, own in sums.items():
        factor = trainer.model.head(tower).factor
        if factor is None or not bool((factor == 1).all()):
            continue
        count, total, squares = sum_over_ranks(own, trainer.ranks)
        mean = total / count
        deviation = (squares / count - mean**2).clamp(min=0).sqrt()
        trainer.model.set_statistics(tower, mean, deviation)
