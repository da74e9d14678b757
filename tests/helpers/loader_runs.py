"""Batches of loaders, compared with those of sound data."""

import csv
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unicl_fast.batch import Batch, Loader
from unicl_fast.config import DataConfig, RunConfig, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import Tokenizer

BATCH = 12


def config_of(*, batch: int = BATCH, **data: Any) -> TrainConfig:
    """Settings of a run on small crops."""
    return TrainConfig(
        data=DataConfig(image_size=32, evaluation_resize=36, threads=2, **data),
        run=RunConfig(global_batch_size=batch, seed=3),
    )


def prompts_of(datasets: Sequence[PackedDataset], tokenizer: Tokenizer) -> ClassPrompts:
    """The prompts of data sets by their names and templates."""
    manifests = [dataset.manifest for dataset in datasets]
    return ClassPrompts([(m.class_names, m.templates) for m in manifests], tokenizer)


def take(loader: Loader, *, start: int = 0, count: int) -> list[Batch]:
    """Some batches, on the host, of a loader that is closed then."""
    host = torch.device("cpu")
    batches = [batch.to(host) for batch in itertools.islice(loader.batches(start), count)]
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies are not waited for
    loader.close()
    return batches


def batches_of(
    datasets: Sequence[PackedDataset],
    prompts: ClassPrompts,
    *,
    config: TrainConfig,
    start: int = 0,
    count: int = 12,
    weights: Sequence[float] | None = None,
    **ranks: int,
) -> list[Batch]:
    """Some batches of a loader of these data sets."""
    from unicl_fast.pipelines.train_loader import TrainLoader  # needs DALI

    loader = TrainLoader(config, datasets, weights, prompts, **ranks)
    return take(loader, start=start, count=count)


def remembering(loader: Any, bad: set[tuple[int, int]]) -> Any:
    """A `TrainLoader`, as if it had met the bad samples (data set and number) already."""
    for source, sample in sorted(bad):
        loader.steps.bad.mark(source, sample, "found by the test")
    return loader


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a run's quarantine.csv."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_equal(one: Batch, other: Batch) -> None:
    """Every field of the batches, of their texts and of their targets."""
    for left, right in ((one, other), (one.texts, other.texts), (one.targets, other.targets)):
        values, others = (_fields(part) for part in (left, right))
        for name, value in values.items():
            assert np.array_equal(value, others[name]), (one.step, name)


def _fields(part: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(part)} - {"texts", "targets"}
    return {name: getattr(part, name) for name in names}


def assert_same(batches: Sequence[Batch], others: Sequence[Batch]) -> None:
    for one, other in zip(batches, others, strict=True):
        assert_equal(one, other)


def texts_of(batch: Batch) -> torch.Tensor:
    """Token rows and class ids by sample, whatever the order of distinct texts."""
    return torch.cat(
        [batch.texts.tokens[batch.texts.index], batch.targets.class_ids[:, None]], dim=1
    )


def assert_joined(parts: Sequence[Batch], whole: Batch) -> None:
    """The ranks' batches of a step are the global one."""
    for name in ("images", "global_index", "sample_ids", "scheduled_ids", "source_ids"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name)), name
    assert torch.equal(torch.cat(list(map(texts_of, parts))), texts_of(whole))


def count_replaced(
    batches: Sequence[Batch], expected: Sequence[Batch], bad: set[tuple[int, int]]
) -> int:
    """Checks that the bad ones, and nothing else, are others than those of sound data."""
    count = 0
    for batch, whole in zip(batches, expected, strict=True):
        assert batch.step == whole.step
        assert batch.sample_ids is not None
        assert torch.equal(batch.scheduled_ids, whole.sample_ids)
        assert torch.equal(batch.source_ids, whole.source_ids)
        assert torch.equal(batch.global_index, whole.global_index)
        sources = batch.source_ids.tolist()
        planned = zip(sources, batch.scheduled_ids.tolist(), strict=True)
        is_bad = torch.tensor([pair in bad for pair in planned])
        assert torch.equal(batch.sample_ids != batch.scheduled_ids, is_bad)
        assert not bad & set(zip(sources, batch.sample_ids.tolist(), strict=True))
        assert torch.equal(batch.images[~is_bad], whole.images[~is_bad])
        assert torch.equal(texts_of(batch)[~is_bad], texts_of(whole)[~is_bad])
        count += int(is_bad.sum())
    return count
