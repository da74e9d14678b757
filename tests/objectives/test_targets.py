"""The target map follows its rules for any labels and texts, and agrees with the plain oracle."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import reference_targets as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_tests import examples

from unicl_fast.objectives.targets import (
    HostTargets,
    ImageLabels,
    collate,
    map_steps,
    map_targets,
    slice_targets,
)
from unicl_fast.text.token_rows import (
    distinct_texts,
    find_rows,
    hash_rows,
    lengths_of,
    make_table,
    position_factors,
)
from unicl_fast.text.token_rows import unique_rows as unique_rows_kernel

Rows = npt.NDArray[np.uint16]
BIG = 2**31 - 1


@dataclass
class PlainPrompts:
    """Prompts in a dictionary: trimmed row -> class."""

    classes: dict[reference.Row, int] = field(default_factory=dict)

    def lookup(self, rows: Rows) -> npt.NDArray[np.int64]:
        return np.array([self.classes.get(reference.trim(row), -1) for row in rows], dtype=np.int64)


def as_rows(*texts: list[int], length: int = 8) -> Rows:
    rows = np.zeros((len(texts), length), dtype=np.uint16)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return rows


def as_labels(*labels: int) -> npt.NDArray[np.int64]:
    return np.array(labels, dtype=np.int64)


def key_of(row: reference.Row) -> int:
    """The key of a caption that is alone in its batch."""
    rows = np.array([row or (0,)], dtype=np.uint16)
    return int(map_targets(rows, as_labels(-1)).class_ids[0])


def assert_equal(
    targets: HostTargets, rows: Rows, labels: npt.NDArray[np.int64], prompts: PlainPrompts
) -> None:
    texts, index, classes, counts = reference.map_targets(
        rows.tolist(), labels.tolist(), prompts.classes
    )
    assert [reference.trim(row) for row in targets.tokens] == texts
    assert targets.text_index.tolist() == index
    assert targets.text_class_ids.tolist() == classes
    assert targets.class_ids.tolist() == [classes[text] for text in index]
    assert targets.text_counts.tolist() == counts
    assert targets.text_lengths.max() == max(map(len, texts))
    for name in ("text_index", "class_ids", "text_class_ids", "text_counts"):
        assert getattr(targets, name).dtype == np.int64
    assert targets.tokens.dtype == np.uint16


@st.composite
def batches(draw: st.DrawFn) -> tuple[Rows, npt.NDArray[np.int64], PlainPrompts]:
    """Batches in which texts, labels and prompts often coincide."""
    length = draw(st.integers(1, 80))
    token = st.sampled_from([0, 1, 2, 49407, 65535])
    short = st.lists(token, max_size=min(length, 3))
    long = st.lists(token, min_size=length, max_size=length)
    pool = draw(st.lists(short | long, min_size=1, max_size=6))
    size = draw(st.integers(1, 40))
    texts = draw(st.lists(st.sampled_from(pool), min_size=size, max_size=size))
    label = st.sampled_from([-1, -1, -1, 0, 1, 2, 3, 4, 5, BIG])
    labels = draw(st.lists(label, min_size=size, max_size=size))
    classes = {
        reference.trim(text): draw(st.sampled_from([0, 1, 6, BIG]))
        for text in draw(st.lists(st.sampled_from(pool), max_size=3))
    }
    return as_rows(*texts, length=length), as_labels(*labels), PlainPrompts(classes)


@examples(400)
@given(batches())
def test_any_batch_gets_the_targets_of_the_oracle(batch):
    rows, labels, prompts = batch
    assert_equal(map_targets(rows, labels, prompts), rows, labels, prompts)
    assert_equal(map_targets(rows, labels), rows, labels, PlainPrompts())


def as_image_labels(image_labels: list[list[int]]) -> ImageLabels:
    return ImageLabels(
        classes=np.array([one for labels in image_labels for one in labels], dtype=np.int64),
        starts=np.cumsum([0, *map(len, image_labels)]),
    )


def by_image(image_classes: npt.NDArray[np.int64] | None, size: int) -> list[list[int]]:
    """The classes of each image, as they are listed."""
    samples, classes = image_classes
    assert sorted(samples.tolist()) == samples.tolist()
    return [classes[samples == sample].tolist() for sample in range(size)]


FIELDS = ("tokens", "text_index", "text_class_ids", "text_counts", "text_lengths")


@examples(300)
@given(batches(), st.data())
def test_images_of_several_labels_get_all_their_classes_once(batch, data):
    """And they change nothing for texts; in one batch, in steps mapped together, in a slice."""
    rows, labels, prompts = batch
    few = st.lists(st.sampled_from([0, 1, 2, 3, 6, 9, BIG]), max_size=5)
    image_labels = data.draw(st.lists(few, min_size=len(rows), max_size=len(rows)))
    lists = as_image_labels(image_labels)
    whole = map_targets(rows, labels, prompts, lists)
    plain = map_targets(rows, labels, prompts)
    for name in (*FIELDS, "class_ids"):
        assert np.array_equal(getattr(whole, name), getattr(plain, name)), name
    assert plain.image_classes is None
    found = by_image(whole.image_classes, len(rows))
    expected = reference.classes_of_images(
        rows.tolist(), labels.tolist(), prompts.classes, image_labels
    )
    for of_image, of_oracle, class_id in zip(found, expected, whole.class_ids, strict=True):
        assert of_image[0] == class_id
        assert len(of_image) == len(of_oracle)
        assert set(of_image) == of_oracle

    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    part = slice_targets(whole, start, stop)
    alone = map_targets(rows[start:stop], labels[start:stop])
    assert by_image(part.image_classes, stop - start) == found[start:stop]
    assert part.class_ids.tolist() == whole.class_ids[start:stop].tolist()
    assert part.text_class_ids[part.text_index].tolist() == part.class_ids.tolist()
    for name in ("tokens", "text_index", "text_counts", "text_lengths"):
        assert getattr(part, name).tolist() == getattr(alone, name).tolist(), name

    size = data.draw(st.sampled_from([n for n in range(1, len(rows) + 1) if len(rows) % n == 0]))
    steps = map_steps(rows, labels, prompts, size=size, image_labels=lists)
    assert len(steps) == len(rows) // size
    for step, found in enumerate(steps):
        own = slice(step * size, (step + 1) * size)
        alone = map_targets(rows[own], labels[own], prompts, as_image_labels(image_labels[own]))
        assert by_image(found.image_classes, size) == by_image(alone.image_classes, size)
        for name in FIELDS:
            assert getattr(found, name).tolist() == getattr(alone, name).tolist(), name
    assert {one.image_classes for one in map_steps(rows, labels, prompts, size=size)} == {None}


def test_labels_of_other_images_are_refused():
    rows, labels = torch.ones((2, 8)), torch.tensor([0, 1])
    images = torch.zeros((2, 4, 4, 3), dtype=torch.uint8)
    with pytest.raises(ValueError, match="image_labels are of 3 images, the batch has 2"):
        collate(images, rows, labels, image_labels=[[0], [1], [2]])


@pytest.mark.parametrize(
    ("texts", "labels", "prompts", "expected"),
    [
        pytest.param("abc", (0, 0, -1), {}, [0, 0, "c"], id="label 0 is a class"),
        pytest.param("aab", (-1, -1, -1), {}, ["a", "a", "b"], id="equal captions"),
        pytest.param("ab", (-1, 0), {"a": 0}, [0, 0], id="a caption that is a prompt"),
        pytest.param("aa", (-1, 7), {}, [7, 7], id="a caption that is a labelled text"),
        pytest.param(
            "aabbcd", (9, 5, 9, BIG, BIG, 6), {}, [5, 5, 5, 5, 5, 6], id="labels meet in a text"
        ),
        pytest.param("aab", (8, -1, 8), {"a": 3}, [3, 3, 3], id="a label meets a prompt"),
        *(pytest.param("a", (label,), {}, ["a" if label < 0 else label]) for label in (-1, 0, BIG)),
    ],
)
def test_the_rules_by_example(texts, labels, prompts, expected):
    """Texts of one token, and the classes of samples: a text's name for its key."""
    plain = PlainPrompts({(ord(text),): label for text, label in prompts.items()})
    targets = map_targets(as_rows(*([ord(text)] for text in texts)), as_labels(*labels), plain)
    wanted = [key_of((ord(one),)) if isinstance(one, str) else one for one in expected]
    assert targets.class_ids.tolist() == wanted
    assert all(key >> 62 for key, one in zip(wanted, expected, strict=True) if isinstance(one, str))


@given(st.lists(st.integers(0, 65535), max_size=77), st.integers(0, 50))
def test_padding_does_not_change_the_key_of_a_caption(text, padding):
    assert key_of((*text, *[0] * padding)) == key_of(reference.trim(text))


def test_keys_of_a_hundred_thousand_captions_are_distinct():
    numbers = np.arange(100_000)
    rows = np.zeros((len(numbers), 77), dtype=np.uint16)
    rows[:, 3], rows[:, 40], rows[:, 76] = numbers % 50, numbers // 50 % 50, numbers // 2500
    keys = map_targets(rows, np.full(len(rows), -1)).class_ids
    assert len(np.unique(keys)) == len(rows)
    # The key of a caption must be the same on every rank, so also in every process.
    assert key_of((49406, 320, 1929, 49407)) == 6288395689219992146


def test_rows_are_compared_even_if_all_hashes_are_equal():
    rows = as_rows([1], [2], [1], [3], [2], [1])
    hashes = np.zeros(len(rows), dtype=np.uint64)
    table = make_table(len(rows))
    first, index, counts, distinct, lengths = unique_rows_kernel(rows, hashes, table)
    assert np.array_equal(distinct, rows[first])
    ends = (rows[first] != 0) * np.arange(1, rows.shape[1] + 1)
    assert lengths.tolist() == ends.max(axis=1).tolist()
    assert first.tolist() == [0, 1, 3]
    assert index.tolist() == [0, 1, 0, 2, 1, 0]
    assert counts.tolist() == [3, 2, 1]
    queries = as_rows([3], [4], [1], length=80)
    assert find_rows(queries, hashes[:3], table, distinct).tolist() == [2, -1, 0]


def test_rows_that_differ_in_one_token_have_different_hashes():
    base = np.full(77, 1000, dtype=np.uint16)
    rows = np.repeat(base[None], 77 * 16, axis=0)
    for position in range(77):
        for bit in range(16):
            rows[position * 16 + bit, position] ^= 1 << bit
    assert len(np.unique(hash_rows(rows, position_factors(77)))) == len(rows)


def test_views_and_read_only_arrays_give_the_same_result():
    rows = np.random.default_rng(0).integers(0, 3, (64, 20)).astype(np.uint16)
    labels = np.random.default_rng(1).integers(-1, 5, 64)
    frozen = rows[::2, 4:9].copy()
    frozen.flags.writeable = False
    view = map_targets(rows[::2, 4:9], labels[::2])
    assert view.class_ids.tolist() == map_targets(frozen, labels[::2].copy()).class_ids.tolist()
    assert view.tokens.tolist() == map_targets(frozen, labels[::2]).tokens.tolist()


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (np.zeros((0, 77), np.uint16), np.zeros(0, np.int64), "at least one sample"),
        (np.zeros((2, 77), np.int64), np.zeros(2, np.int64), "uint16"),
        (np.zeros(77, np.uint16), np.zeros(1, np.int64), "uint16"),
        (np.zeros((2, 77), np.uint16), np.zeros(3, np.int64), r"int64 \[2\]"),
        (np.zeros((2, 77), np.uint16), np.zeros(2, np.float64), "float64"),
        (np.zeros((2, 77), np.uint16), np.array([0, -2]), "-2 to 0"),
        (np.zeros((2, 77), np.uint16), np.array([0, 2**62]), "2\\*\\*62"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(rows, labels, message):
    with pytest.raises(ValueError, match=message):
        map_targets(rows, labels)


def test_a_slice_out_of_range_is_refused():
    targets = map_targets(as_rows([1], [2]), as_labels(0, 1))
    for start, stop in ((0, 3), (1, 1), (-1, 1)):
        with pytest.raises(ValueError, match="slice of 2 samples"):
            slice_targets(targets, start, stop)


def test_distinct_texts_come_by_length_and_tokens():
    rows = np.array([[5, 9, 0], [4, 9, 0], [5, 9, 0], [9, 0, 0], [1, 1, 1]], np.uint16)
    found = distinct_texts(rows)
    assert found.tolist() == [[9, 0, 0], [4, 9, 0], [5, 9, 0], [1, 1, 1]]
    assert lengths_of(found).tolist() == [1, 2, 2, 3]
