"""Rows that are stored once: what a killed process leaves is continued, and never changed."""

import json
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from unicl_fast.dataset.feature_files import KnownRows, bits_of, read_features
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.system import atomic_files
from unicl_fast.text.token_rows import hashes_of
from unicl_fast.training import kept_rows as room
from unicl_fast.training.kept_rows import kept_rows, storing

ROWS = np.arange(6, dtype="<f4").reshape(3, 2)


def write_rows(folder: Path, key: str, rows: np.ndarray) -> None:
    """Stores all rows that another process has not."""
    with storing(folder, {key: 3}, Ranks()) as store, store.writing(width=2, dtype="float32"):
        new = np.flatnonzero(~store.stored[key])
        store.write(key, new, rows[new])
        store.record()


def test_rows_are_stored_once_they_are_recorded_and_others_can_be_added(tmp_path):
    for killed in (True, False):
        with storing(tmp_path, {"key": 3}, Ranks()) as store, store.writing(width=2, dtype="f4"):
            assert not store.stored["key"].any()
            store.write("key", np.array([0]), ROWS[:1])
            store.leave_out("key", np.array([2]))
            if not killed:
                store.record()
                store.write("key", np.array([1]), -ROWS[1:2])  # and killed here
    found = read_features(tmp_path, "key", num_samples=3)
    assert found.stored.tolist() == [True, False, True]
    assert np.array_equal(found.row(0), ROWS[0])
    assert found.row(1) is None
    assert found.row(2) is None
    with storing(tmp_path, {"key": 3}, Ranks()) as store, store.writing(width=2, dtype="f4"):
        for _ in range(2):
            store.write("key", np.array([1]), ROWS[1:2])
            store.leave_out("key", np.array([2]))
        store.record()
    assert np.array_equal(read_features(tmp_path, "key", num_samples=3).row(1), ROWS[1])


def test_of_two_that_store_the_same_rows_the_second_waits_and_reads(tmp_path, monkeypatch):
    """It begins when the first has written its rows, and not yet said so."""
    describe, second, waits = room.describe_rows, [], []

    def let_the_other_begin(*of: object) -> None:
        if not second:
            second.append(Thread(target=write_rows, args=(tmp_path, "key", ROWS + 1)))
            second[0].start()
            while not waits:
                pass
        describe(*of)

    monkeypatch.setattr(room, "describe_rows", let_the_other_begin)
    monkeypatch.setattr(atomic_files, "mark_progress", lambda: waits.append(True))
    write_rows(tmp_path, "key", ROWS)
    second[0].join()
    found = read_features(tmp_path, "key", num_samples=3)
    assert np.array_equal(found.rows, ROWS)
    assert found.stored.all()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("field", ["stored", "unreadable", "dtype"])
def test_a_description_that_was_changed_is_refused(tmp_path, field):
    write_rows(tmp_path, "key", ROWS)
    path = tmp_path / "key.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "AAAA"}))
    with pytest.raises(ValueError, match=r"key\.npy are damaged: .*remove key\.npy and key\.json"):
        read_features(tmp_path, "key", num_samples=3)


def test_features_of_another_model_under_this_one_s_name_are_refused(tmp_path):
    write_rows(tmp_path, "other", ROWS)
    for kind in ("json", "npy"):
        (tmp_path / f"other.{kind}").rename(tmp_path / f"key.{kind}")
    with pytest.raises(ValueError, match="another model's or data set's, other; remove key"):
        read_features(tmp_path, "key", num_samples=3)


def keep_texts(folder: Path, key: str, family: str, tokens: list[list[int]], *values: int) -> None:
    rows = bits_of(torch.tensor(values).view(-1, 1).bfloat16())
    kept_rows(
        folder, key, family=family, items=hashes_of(np.array(tokens, np.uint16)), width=1,
        encode=lambda new: [(np.array(new), rows[new])], ranks=Ranks(), dtype="bfloat16",
    )  # fmt: skip


@pytest.mark.usefixtures("unchecked_shapes")
def test_texts_are_found_by_their_tokens_over_files_and_paddings(tmp_path):
    keep_texts(tmp_path, "a", "family", [[5, 9, 0], [5, 7, 9]], 1, 2)
    keep_texts(tmp_path, "b", "family", [[5, 8, 8, 9]], 3)
    keep_texts(tmp_path, "c", "other", [[5, 9]], 4)
    found = KnownRows(tmp_path, "family")
    asked = hashes_of(np.array([[5, 8, 8, 9], [5, 9, 0, 0], [5, 7, 9, 0], [5, 7, 0, 0]], np.uint32))
    numbers = found.find(asked)
    assert numbers[3] == -1
    values = found.take(numbers[:3])
    assert values.dtype == torch.bfloat16
    assert values.flatten().tolist() == [3, 1, 2]
    assert KnownRows(tmp_path, "none").find(asked).tolist() == [-1] * 4
    path = tmp_path / "b.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"are damaged: its xxh3 is .* remove b\.npy"):
        KnownRows(tmp_path, "family")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="are damaged"):
        KnownRows(tmp_path, "family", check=False)


@pytest.mark.usefixtures("unchecked_shapes")
def test_of_changed_items_only_new_ones_are_encoded(tmp_path):
    encoded: list[int] = []

    def rows_of(items: list[int], key: str, family: str = "f", fails: int = -1) -> list[float]:
        def encode(new):
            if fails in (values := [items[number] for number in new]):
                raise KeyboardInterrupt
            encoded.extend(values)
            yield np.array(new), np.array([[one, 1] for one in values], np.float32)

        found = kept_rows(
            tmp_path, key, family=family, items=np.array(items, np.uint64), width=2,
            encode=encode, ranks=Ranks(), at_once=8,
        )  # fmt: skip
        return found[:, 0].tolist()

    first = list(range(20))
    with pytest.raises(KeyboardInterrupt):
        rows_of(first, "a", fails=16)
    assert encoded == first[:16], "which are recorded"
    assert rows_of(first, "a") == first
    changed = [99, *first[2:], 5, 50]  # added, deleted, doubled, moved
    assert rows_of(changed, "b") == changed
    assert encoded == [*first, 99, 50]
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {"b"}, "90 % are in b"
    assert rows_of(first[10:], "c") == first[10:]
    assert rows_of(changed, "b") == changed
    assert encoded == [*first, 99, 50]
    rows_of([1, 2], "d", family="g")
    assert encoded[-2:] == [1, 2], "other weights"
    kept = next(tmp_path.glob("b.npy"))
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="are damaged"):
        rows_of([*changed, 7], "e")
    assert not list(tmp_path.glob(".*")), "leftovers"


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_a_killed_process_has_recorded_stays_beside_the_rest(tmp_path):
    """As texts: the next process encodes the others, nearly all, into another file."""
    items = np.arange(20, dtype=np.uint64)

    def keep(key: str, count: int) -> None:
        known = KnownRows(tmp_path, "f")
        lacking = items[known.find(items) < 0]
        assert len(lacking) == count

        def encode(new):
            if key == "killed" and new != [0]:
                raise KeyboardInterrupt
            yield np.array(new), lacking[new, None].astype(np.float32)

        kept_rows(
            tmp_path, key, family="f", items=lacking, width=1, encode=encode, ranks=Ranks(),
            at_once=1, known=known,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        keep("killed", 20)
    keep("rest", 19)
    found = KnownRows(tmp_path, "f")
    assert found.take(found.find(items)).flatten().tolist() == items.tolist()
