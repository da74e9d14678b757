"""Columns of weights and of labels are recorded, checked, shown, and kept when packed again."""

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
from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader

pytestmark = pytest.mark.usefixtures("checked")

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
def test_a_column_of_weights_is_stored_and_bad_ones_are_named(kind, tmp_path):
    out = tmp_path / "out"
    options = {"caption_column": "title", "weight_column": "clicks"}
    build_set([write(kind, tmp_path)], out, **options)
    assert weights_of(out) == GOOD
    assert [kind for kind, _ in left_out(out).values()] == ["bad row"] * 6
    assert all("the weight in " in message for _, message in left_out(out).values())
    assert not faults_of(out)


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


# Which label column a class belongs to.

ROWS = [
    {
        "image": f"{number}.jpg",
        "kind": ["cup", "hat", "orange"][number % 3],
        "colour": {"name": "x"} if number == 11 else [None, "red", "orange", ""][number % 4],
    }
    for number in range(24)
]
NAMED: dict[str, Any] = {"label_column": ["kind", "colour"]}
EXPECTED = {"kind": ("cup", "hat", "orange"), "colour": ("orange", "red")}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    for number in range(len(ROWS)):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(5 * number))
    (tmp_path / "shop.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path / "shop.jsonl"


def columns_of(folder: Path) -> dict[str, tuple[str, ...]]:
    manifest = Manifest.load(folder)
    assert Manifest.from_json(manifest.to_json()) == manifest
    return {
        column: tuple(manifest.class_names[number] for number in numbers)
        for column, numbers in manifest.label_columns.items()
    }


def test_lists_tables_and_tars_record_the_same_columns(shop, tmp_path):
    rows = [row for row in ROWS if not isinstance(row["colour"], dict)]
    table = {name: [row[name] for row in rows] for name in ("image", "kind", "colour")}
    pq.write_table(pa.table(table), tmp_path / "shop.parquet")
    members = {}
    for row in rows:
        members[row["image"]] = (tmp_path / row["image"]).read_bytes()
        members[row["image"].replace("jpg", "json")] = json.dumps(row).encode()
    write_tar(tmp_path / "shop.tar", members)
    for kind in ("jsonl", "parquet", "tar"):
        build_set([tmp_path / f"shop.{kind}"], tmp_path / f"of-{kind}", **NAMED)
        assert columns_of(tmp_path / f"of-{kind}") == EXPECTED, kind
    summary = build_set([tmp_path / "shop.tar"], tmp_path / "lying", in_place=True, **NAMED)
    assert columns_of(tmp_path / "lying") == EXPECTED
    note = "classes of several label columns, counted in each, such as orange"
    assert summary.notes[note] == 1


def test_one_column_leaves_the_manifest_as_it_was(shop, tmp_path):
    build_set([shop], tmp_path / "one", label_column=["kind"])
    manifest = (tmp_path / "one" / "manifest.json").read_text()
    assert "label_columns" not in manifest
    assert Manifest.load(tmp_path / "one").columns == {"": (0, 1, 2)}
    rows = [{"image": row["image"], "label" + "s" * (number % 2): row["kind"]}
            for number, row in enumerate(ROWS)]  # fmt: skip
    shop.write_text("\n".join(map(json.dumps, rows)))
    build_set([shop], tmp_path / "two-names", cells="plain")
    assert columns_of(tmp_path / "two-names") == {}, "columns of usual names are one"


def test_parts_and_joined_data_sets_keep_their_columns(shop, tmp_path, pack):
    out = tmp_path / "packed"
    words = ["build", shop, "--label-column", "kind", "colour", "--split", "0.7", "--out", out]
    assert "labels of 4 classes (kind 3, colour 2)" in pack(*words)
    assert columns_of(out / "train") == columns_of(out / "held-out") == EXPECTED
    written = ("--json", tmp_path / "all.json", "--html", tmp_path / "page.html")
    assert "of 4 classes (kind 3, colour 2)" in pack("inspect", out / "train", *written)
    found = json.loads((tmp_path / "all.json").read_text())["manifest"]
    assert found["label_columns"]["kind"] == [0, 1, 2]
    assert "(kind 3, colour 2)" in (tmp_path / "page.html").read_text()
    for number in range(3):
        (tmp_path / "folders" / ("red", "wool")[number % 2]).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "folders" / ("red", "wool")[number % 2] / f"{number}.jpg"
        path.write_bytes(jpeg(200 + number))
    build_set([out / "held-out", tmp_path / "folders", out / "train"], tmp_path / "joined")
    assert columns_of(tmp_path / "joined") == EXPECTED
    manifest = Manifest.load(tmp_path / "joined")
    assert manifest.columns["(no column)"] == (manifest.class_names.index("wool"),)


def test_a_class_beyond_the_names_is_refused(shop, tmp_path):
    build_set([shop], tmp_path / "set", **NAMED)
    path = tmp_path / "set" / "manifest.json"
    values = json.loads(path.read_text()) | {"label_columns": {"kind": [0, 4]}}
    with pytest.raises(ValueError, match="label_columns has class 4 in 'kind', class_names has 4"):
        Manifest.from_json(json.dumps(values))
