"""Files of features: what a killed process leaves is continued, and never changed."""

import json

import numpy as np
import pytest
import torch
from feature_folders import write_features

from unicl_fast.dataset.feature_files import (
    RowsWriter,
    has_features,
    make_rows,
    read_features,
    seal_rows,
    sole_storer,
)
from unicl_fast.dataset.text_files import (
    distinct_texts,
    lengths_of,
    read_text_features,
    write_text_features,
)

ROWS = np.arange(6, dtype="<f4").reshape(3, 2)


def test_rows_are_stored_once_they_are_sealed_and_others_can_be_added(tmp_path):
    with sole_storer(tmp_path, "key"):
        make_rows(tmp_path, "key", num_samples=3, width=2, kind="<f4")
        assert not has_features(tmp_path, "key")  # as after a kill at this point
        make_rows(tmp_path, "key", num_samples=3, width=2, kind="<f4")
        writer = RowsWriter(tmp_path, "key")
        writer.write(np.array([0]), ROWS[:1])
        stored = np.array([True, False, True])
        seal_rows(tmp_path, "key", dtype="float32", stored=stored, unreadable=[2])
        writer.write(np.array([1]), ROWS[1:2])  # and killed here
        writer.close()
    found = read_features(tmp_path, "key", num_samples=3)
    assert found.stored.tolist() == stored.tolist()
    assert np.array_equal(found.row(0), ROWS[0])
    assert found.row(1) is None
    assert found.row(2) is None
    make_rows(tmp_path, "key", num_samples=3, width=2, kind="<f4")  # keeps what is there
    seal_rows(tmp_path, "key", dtype="float32", stored=np.ones(3, np.bool_), unreadable=[2])
    assert np.array_equal(read_features(tmp_path, "key", num_samples=3).row(1), ROWS[1])


@pytest.mark.parametrize("field", ["stored", "unreadable", "dtype"])
def test_a_description_that_was_changed_is_refused(tmp_path, field):
    write_features(tmp_path, "key", ROWS)
    path = tmp_path / "key.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "AAAA"}))
    with pytest.raises(ValueError, match=r"key\.npy are damaged: .*remove key\.npy and key\.json"):
        read_features(tmp_path, "key", num_samples=3)


def test_features_of_another_model_under_this_one_s_name_are_refused(tmp_path):
    write_features(tmp_path, "other", ROWS)
    for kind in ("json", "npy"):
        (tmp_path / f"other.{kind}").rename(tmp_path / f"key.{kind}")
    with pytest.raises(ValueError, match="another model's or data set's, other; remove key"):
        read_features(tmp_path, "key", num_samples=3)


def test_texts_are_found_by_their_tokens_over_files_and_paddings(tmp_path):
    first = np.array([[5, 9, 0], [5, 7, 9]], np.uint16)
    second = np.array([[5, 8, 8, 9]], np.uint32)
    write_text_features(tmp_path, "key", first, torch.tensor([[1.0], [2.0]]).bfloat16())
    write_text_features(tmp_path, "key", second, torch.tensor([[3.0]]).bfloat16())
    write_text_features(tmp_path, "other", first[:1], torch.tensor([[4.0]]))
    found = read_text_features(tmp_path, "key")
    asked = np.array([[5, 8, 8, 9], [5, 9, 0, 0], [5, 7, 9, 0], [5, 7, 0, 0]], np.uint16)
    numbers = found.find(asked)
    assert numbers[3] == -1
    values = found.take(numbers[:3])
    assert values.dtype == torch.bfloat16
    assert values.flatten().tolist() == [3, 1, 2]
    assert read_text_features(tmp_path, "none").find(asked).tolist() == [-1] * 4


def test_texts_of_a_damaged_file_are_refused(tmp_path):
    write_text_features(tmp_path, "key", np.array([[5, 9]], np.uint16), torch.ones(1, 2))
    (path,) = tmp_path.glob("text-key-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"are damaged: its xxh3 is .* remove it"):
        read_text_features(tmp_path, "key")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="are damaged"):
        read_text_features(tmp_path, "key", check=False)


def test_distinct_texts_come_by_length_and_tokens():
    rows = np.array([[5, 9, 0], [4, 9, 0], [5, 9, 0], [9, 0, 0], [1, 1, 1]], np.uint16)
    found = distinct_texts(rows)
    assert found.tolist() == [[9, 0, 0], [4, 9, 0], [5, 9, 0], [1, 1, 1]]
    assert lengths_of(found).tolist() == [1, 2, 2, 3]
