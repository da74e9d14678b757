"""Which label column a class belongs to is recorded, and kept by what packs data sets again."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_sources import write_tar
from pack_runs import build_set, jpeg

from unicl_fast.dataset.manifest import Manifest

pytestmark = pytest.mark.usefixtures("checked")

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
