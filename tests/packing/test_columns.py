"""Weights of samples: read, stored, checked and shown."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import mend_checksums
from foreign_sources import write_tar
from object_stores import upload
from pack_runs import build_set, contents, faults_of, jpeg, left_out, write_photos

from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader

WEIGHTS = [3, 2.5, -1, 0, "nan", "many", "", "1e31", 7]
"""The first two and the last are good."""
GOOD = [(2.5, "photo 1"), (3, "photo 0"), (7, "photo 8")]


def write(kind: str, folder: Path) -> Path:
    """A list with these weights, or a tar."""
    path, rows = folder / f"list.{kind}", list[dict[str, Any]]()
    for number, weight in enumerate(WEIGHTS):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        rows.append({"path": f"{number}.jpg", "title": f"photo {number}", "clicks": weight})
    if kind == "csv":
        lines = ["path,title,clicks", *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines))
    elif kind == "parquet":
        columns = {name: [row[name] for row in rows] for name in ("path", "title")}
        numbers = [3, 2.5, -1, 0, float("nan"), float("inf"), None, 1e31, 7]
        pq.write_table(pa.table({**columns, "clicks": numbers}), path)
    else:
        texts = {f"{n}.json": json.dumps(row).encode() for n, row in enumerate(rows)}
        write_tar(path, {f"{n}.jpg": jpeg(n) for n in range(9)} | texts)
    return path


def weights_of(out: Path) -> list[tuple[float, str]]:
    """Weights and first captions of all samples, sorted."""
    with PackedDataset(out) as dataset, contextlib.closing(SampleReader(dataset)) as reader:
        assert dataset.weights is not None
        captions = [reader.read_description(index).captions for index in range(len(dataset))]
        pairs = zip(dataset.weights.tolist(), captions, strict=True)
        return sorted((weight, one[0] if one else "") for weight, one in pairs)


@pytest.mark.parametrize("kind", ["csv", "parquet", "tar"])
@pytest.mark.usefixtures("checked")
def test_a_column_of_weights_is_stored_and_bad_ones_are_named(kind, tmp_path):
    out = tmp_path / "out"
    options = {"caption_column": "title", "weight_column": "clicks"}
    build_set([write(kind, tmp_path)], out, **options)
    assert weights_of(out) == GOOD
    assert [kind for kind, _ in left_out(out).values()] == ["bad row"] * 6
    assert all("the weight in " in message for _, message in left_out(out).values())
    assert not faults_of(out)


@pytest.mark.usefixtures("checked")
def test_rows_of_an_image_have_their_mean_and_other_sources_one(tmp_path, pack):
    photos = write_photos(tmp_path / "photos", [1, 2])
    (tmp_path / "3.jpg").write_bytes(jpeg(3))
    table = tmp_path / "list.csv"
    table.write_text("file,caption,label,clicks\n3.jpg,a cat,cat,1\n3.jpg,two cats,cat,4\n")
    plain, out = tmp_path / "plain", tmp_path / "out"
    build_set([table, photos], plain)
    assert not [name for name, data in contents(plain).items() if b"weight" in name.encode() + data]
    for source, column, fault in (
        (photos, "clicks", "no SOURCE has a sample with a weight"),
        (plain, "clicks", "has no columns"),
        (table, "sales", r"no column 'sales' \(--weight-column\)"),
    ):
        with pytest.raises(ValueError, match=fault):
            build_set([source], out, weight_column=column)
    build_set([table, photos], out, weight_column="clicks")
    assert weights_of(out) == [(1, ""), (1, ""), (2.5, "a cat")]
    assert "| weight" in pack("inspect", out, "--no-near", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["spreads"]["weight"]
    assert (found["smallest"], found["mean"], found["largest"]) == (1, 1.5, 2.5)
    again, in_place = tmp_path / "again", tmp_path / "in-place"
    build_set([out, plain], again)  # packed again, with one that has no weights
    assert [weight for weight, _ in weights_of(again)] == [1, 1, 1, 1, 1, 2.5]
    build_set([table, photos], in_place, weight_column="clicks", in_place=True)
    assert not faults_of(again) + faults_of(in_place)
    url, cache = upload(out, "faulty://bucket/weights"), CacheOptions(folder=tmp_path / "cache")
    with PackedDataset(url, fraction=0.7, cache=cache) as remote:
        assert remote.weights is not None
        assert len(remote.weights) == len(remote) == 2


@pytest.mark.usefixtures("checked")
def test_changed_weights_are_found(tmp_path):
    out = tmp_path / "out"
    build_set([write("csv", tmp_path)], out, caption_column="title", weight_column="clicks")
    path = out / "weights.npy"
    sound = path.read_bytes()
    for value, fault in ((9, "9.0 in weights.npy"), (-1, "row 2 is not a positive number")):
        path.write_bytes(sound[:-4] + np.float32(value).tobytes())
        with pytest.raises(ValueError, match=r"weights\.npy"):
            PackedDataset(out)
        mend_checksums(out, "weights.npy")
        assert fault in faults_of(out)[0].message
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"weights\.npy is missing"):
        PackedDataset(out)
