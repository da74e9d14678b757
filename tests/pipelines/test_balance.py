"""Balanced epochs: at most so many of a class, none twice, each sample of a class as often."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from property_tests import examples

from unicl_fast.config import DataConfig
from unicl_fast.dataset.arrays import CAPTION_DTYPE, SAMPLE_DTYPE
from unicl_fast.pipelines.plan.balance import balance_classes
from unicl_fast.pipelines.plan.concepts import find_named, read_concepts
from unicl_fast.pipelines.plan.plan import PlanSource, TrainPlan
from unicl_fast.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer()


def source_of(labels: list[list[int]], *, name: str = "data") -> PlanSource:
    """A sample for each list of labels, whose labels stand in the reverse order of the samples."""
    samples = np.zeros(len(labels), dtype=SAMPLE_DTYPE)
    samples["height"] = samples["width"] = 100
    samples["captions_count"] = 1
    counts = np.array([len(one) for one in labels])
    samples["labels_count"] = counts
    samples["labels_start"] = counts.sum() - np.cumsum(counts)
    flat = [label for one in labels[::-1] for label in one]
    return PlanSource(
        name=name, samples=samples, labels=np.array(flat, dtype=np.int32), num_templates=3,
        class_ids=np.arange(50),
    )  # fmt: skip


def plan_of(
    *sources: PlanSource, batch: int, balance: int, named: Any = None, **options: Any
) -> TrainPlan:
    return TrainPlan(
        [
            dataclasses.replace(
                source, balance=balance_classes(source.samples, source.labels, balance, named)
            )
            for source in sources
        ],
        data=DataConfig(balance=balance),
        global_batch_size=batch,
        **({"seed": 0} | options),
    )


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    num_unlabelled=st.integers(0, 5),
    most=st.integers(1, 30),
    first_epoch=st.integers(0, 10**7),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
@examples(60)
def test_an_epoch_has_so_many_of_each_class_and_none_twice(
    sizes: list[int],
    num_unlabelled: int,
    most: int,
    first_epoch: int,
    seed: int,
    data: st.DataObject,
) -> None:
    """From any epoch on, on any ranks; over the epochs all samples of a class come as often."""
    labels = [[label] for label, size in enumerate(sizes) for _ in range(size)]
    labels += [[]] * num_unlabelled
    order = np.random.default_rng(seed).permutation(len(labels))
    source = source_of([labels[i] for i in order])
    classes = np.array([(labels[i] or [-1])[0] for i in order])
    drawn = {label: min(size, most) for label, size in enumerate(sizes)}
    epoch_size = sum(drawn.values()) + num_unlabelled
    world_size = data.draw(st.sampled_from([1, 2, 3]))
    if epoch_size < world_size:
        return
    batch = world_size * data.draw(st.integers(1, epoch_size // world_size))
    plan = plan_of(source, batch=batch, balance=most, seed=seed)
    assert plan.epoch_sizes == [epoch_size]
    num_epochs = 5
    start, end = first_epoch * epoch_size, (first_epoch + num_epochs) * epoch_size
    steps = range(start // batch, -(-end // batch))
    seen = np.concatenate(
        [
            plan.batch(step, rank=rank, world_size=world_size).sample_ids
            for step in steps
            for rank in range(world_size)
        ]
    )
    epochs = seen[start - steps[0] * batch :][: end - start].reshape(num_epochs, epoch_size)
    times = np.zeros(len(labels), dtype=np.int64)
    for epoch in epochs:
        assert len(np.unique(epoch)) == epoch_size
        found = np.bincount(classes[epoch] + 1, minlength=len(sizes) + 1)
        assert found.tolist() == [num_unlabelled, *drawn.values()]
        times[epoch] += 1
    for label in range(len(sizes)):
        of_class = times[classes == label]
        assert of_class.max() - of_class.min() <= 1


@given(
    labels=st.lists(st.lists(st.integers(0, 6), max_size=3, unique=True), min_size=1, max_size=60),
    most=st.integers(1, 20),
)
def test_a_sample_of_several_labels_counts_for_the_rarest(
    labels: list[list[int]], most: int
) -> None:
    counts = np.bincount([label for one in labels for label in one], minlength=7)
    rarest = [min(one, key=lambda label: (counts[label], label)) if one else -1 for one in labels]
    source = source_of(labels)
    balance = balance_classes(source.samples, source.labels, most)
    expected = 0
    for label in set(rarest):
        size = rarest.count(label)
        limited = label >= 0 and counts[label] > most
        expected += -(-size * most // counts[label]) if limited else size
    assert balance.num_draws == expected
    positions = np.arange(balance.num_draws)
    for epoch in (0, 1, 10**12):
        found = balance.samples(np.full_like(positions, epoch), positions, key=epoch)
        assert len(np.unique(found)) == balance.num_draws
        assert {i for i, label in enumerate(rarest) if label < 0 or counts[label] <= most} <= set(
            found.tolist()
        )


def test_epochs_differ_and_take_turns() -> None:
    """60 of one class by tens: six epochs hold each once, in another order than the samples'."""
    source = source_of([[0]] * 60 + [[1]] * 5)
    plan = plan_of(source, batch=15, balance=10)
    epochs = [plan.batch(step, rank=0, world_size=1).sample_ids for step in range(6)]
    common = [epoch[epoch < 60] for epoch in epochs]
    assert np.array_equal(np.sort(np.concatenate(common)), np.arange(60))
    assert not np.array_equal(np.sort(common[0]), np.arange(10))
    other = plan_of(source, batch=15, balance=10, seed=1).batch(0, rank=0, world_size=1)
    assert set(other.sample_ids.tolist()) != set(epochs[0].tolist())


def test_weights_and_progress_count_the_draws_of_balanced_epochs() -> None:
    sources = [source_of([[0]] * 90 + [[1]] * 10), source_of([[]] * 20)]
    plan = plan_of(*sources, batch=4, balance=10)
    assert plan.epoch_sizes == [20, 20]
    assert plan.weights == (1, 1)
    assert plan.epochs(10) == [1, 1]
    with pytest.raises(ValueError, match="has 20 samples in an epoch, fewer than its part"):
        plan_of(sources[0], batch=21, balance=10)
    with pytest.raises(ValueError, match=r"data.shuffle_window .* set one of them to 0"):
        DataConfig(balance=10, shuffle_window=100)


WORDS = ["red", "dog", "kdog", "dogs", "fish", "ber", "\u00fcber", "antidisestablishment", "7"]


@given(
    captions=st.lists(
        st.lists(st.lists(st.sampled_from([*WORDS, "a", "the"]), max_size=6), max_size=3),
        min_size=1,
        max_size=8,
    ),
    phrases=st.lists(
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=3), min_size=1, max_size=8
    ),
)
@example(captions=[[["a", "kdog"]], [["dogs", "red"], ["red", "dog"]]], phrases=[["dog"]])
@examples(60)
def test_captions_name_concepts_word_by_word(
    captions: list[list[list[str]]], phrases: list[list[str]]
) -> None:
    """Against the words themselves, which the tokenizer cuts into several tokens or keeps whole."""
    samples, stored, tokens = stored_captions(captions)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "concepts.txt")
        path.write_text("\n".join([" ".join(phrase) for phrase in phrases] + ["", " "]), "utf-8")
        concepts = read_concepts(path)
        path.write_text("\n".join(" ".join(phrase).upper() for phrase in phrases[::-1]), "utf-8")
        assert read_concepts(path).digest == concepts.digest
    counts, named = find_named(samples, stored, tokens, concepts)
    phrase_of = {
        tuple(TOKENIZER.encode([" ".join(phrase)])[0][1:-1].tolist()): tuple(phrase)
        for phrase in phrases
    }
    pairs = itertools.pairwise(concepts.starts)
    known = [phrase_of[tuple(concepts.tokens[start:end].tolist())] for start, end in pairs]
    found = np.split(named, np.cumsum(counts)[:-1])
    for texts, concepts_of_sample in zip(captions, found, strict=True):
        expected = {
            phrase
            for phrase in known
            for words in texts
            for first in range(len(words))
            if tuple(words[first : first + len(phrase)]) == phrase
        }
        assert len(concepts_of_sample) == len(expected)
        assert {known[one] for one in concepts_of_sample} == expected


def stored_captions(captions: list[list[list[str]]]) -> tuple[Any, Any, Any]:
    """Samples, captions and tokens as they are stored."""
    rows = TOKENIZER.encode([" ".join(words) for texts in captions for words in texts])
    samples = np.zeros(len(captions), dtype=SAMPLE_DTYPE)
    samples["captions_count"] = counts = np.array(list(map(len, captions)))
    samples["captions_start"] = np.cumsum(counts) - counts
    stored = np.zeros(len(rows), dtype=CAPTION_DTYPE)
    stored["tokens_length"] = lengths = np.array(list(map(len, rows)), dtype=np.int64)
    stored["tokens_start"] = np.cumsum(lengths) - lengths
    return samples, stored, np.concatenate([*rows, np.empty(0, np.uint16)])


@given(
    labels=st.lists(st.lists(st.integers(0, 3), max_size=2, unique=True), min_size=1, max_size=40),
    most=st.integers(1, 12),
    seed=st.integers(0, 1000),
    first_epoch=st.integers(0, 10**7),
)
@examples(60)
def test_what_captions_name_counts_as_a_class(
    labels: list[list[int]], most: int, seed: int, first_epoch: int
) -> None:
    """An epoch is the same on any ranks, holds none twice, and so many of each rarest concept."""
    random = np.random.default_rng(seed)
    named = [sorted(set(random.integers(0, 4, random.integers(0, 3)).tolist())) for _ in labels]
    counts, flat = np.array(list(map(len, named))), [one for each in named for one in each]
    source, found = source_of(labels), (counts, np.array(flat, dtype=np.int64))
    largest = max((label for one in labels for label in one), default=-1)
    concepts = [
        one + [largest + 1 + k for k in more] for one, more in zip(labels, named, strict=True)
    ]
    sizes = Counter(one for each in concepts for one in each)
    rarest = [min(each, key=lambda one: (sizes[one], one)) if each else -1 for each in concepts]
    plan = plan_of(source, batch=1, balance=most, named=found, seed=seed)
    (size,) = plan.epoch_sizes
    start = first_epoch * size
    epoch = np.concatenate(
        [plan.batch(start + i, rank=0, world_size=1).sample_ids for i in range(size)]
    )
    assert len(np.unique(epoch)) == size
    again = plan_of(source, batch=size, balance=most, named=found, seed=seed)
    ranks = [
        again.batch(first_epoch, rank=rank, world_size=size).sample_ids for rank in range(size)
    ]
    assert np.array_equal(np.concatenate(ranks), epoch)
    held = Counter(rarest[sample] for sample in epoch)
    for concept, number in Counter(rarest).items():
        limited = concept >= 0 and sizes[concept] > most
        expected = -(-number * most // sizes[concept]) if limited else number
        assert held[concept] == expected <= max(most, number if not limited else 0)


def test_lists_of_concepts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="names none; it should have one a line"):
        read_concepts(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_concepts(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match=r"set data.balance too"):
        DataConfig(balance_concepts="words.txt")
