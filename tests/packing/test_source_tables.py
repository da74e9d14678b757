"""Parquet lists, also those of Hugging Face."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_sources import outcomes, read, read_source, texts
from inline_checks import check_inline
from pack_runs import jpeg

from unicl_fast.packing.sources import tables as source_tables
from unicl_fast.packing.sources import trees as trees
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.spool import Spool

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["0", "cat"], "_type": "ClassLabel"},
    "tags": {"feature": {"names": ["big", "small"], "_type": "ClassLabel"}, "_type": "Sequence"},
}


def images(*numbers: int, path: str | None = None) -> pa.Array:
    """Hugging Face's struct of an image."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": jpeg(number), "path": path} for number in numbers], kind)


def table(count: int = 6, **columns: Any) -> pa.Table:
    labels = [number % 2 for number in range(count)]
    return pa.table({"image": images(*range(count)), "label": labels, **columns})


def described(found: pa.Table) -> pa.Table:
    """With the description that `datasets` puts into a file."""
    text = json.dumps({"info": {"features": FEATURES}})
    return found.replace_schema_metadata({"huggingface": text})


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spool:
    """With files read in this process: a new one costs a second, and two tests are about it."""
    check_inline(monkeypatch)
    return Spool(tmp_path / "spool")


def test_images_in_parquet_with_names_for_numbers(tmp_path, spool):
    found = described(table(tags=[[0], [1, 0], None, [], [1], [1]]))
    pq.write_table(found, tmp_path / "a.parquet", row_group_size=4)
    source = read_source(tmp_path / "a.parquet", spool=spool)
    assert texts(source)["a.parquet:1"] == ([], ["cat"])
    assert source.labels_are_names  # though one is "0"
    assert [read(item) for item in source.items] == [jpeg(number) for number in range(6)]
    tags = ListOptions(label_column="tags", where=["label=1"])
    source = read_source(tmp_path / "a.parquet", tags, spool)
    assert texts(source) == {"a.parquet:1": ([], ["small", "big"]), "a.parquet:5": ([], ["small"])}
    assert outcomes(source)["a.parquet:3"] == "no text"
    assert source.passed_over == {"rows that --where left out": 3}
    source = read_source(tmp_path / "a.parquet", ListOptions(min_score=["label=1"]), spool)
    assert sorted(outcomes(source).values()) == ["low score"] * 3 + ["read"] * 3


def test_paths_in_files_of_several_folders_take_a_root(tmp_path, spool):
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").write_bytes(jpeg(number))
        rows = pa.table({"path": [f"{folder}/1.jpg"], "caption": [folder]})
        pq.write_table(rows, tmp_path / folder / "list.parquet")
    pattern = f"{tmp_path}/*/list.parquet"
    with pytest.raises(ValueError, match=r"a/list.parquet, row 0, .*'a/1.jpg'.*--image-root"):
        read_source(pattern, spool=spool)
    source = read_source(pattern, ListOptions(image_root=str(tmp_path)), spool)
    assert texts(source) == {"a/1.jpg": (["a"], []), "b/1.jpg": (["b"], [])}


def test_what_img2dataset_and_others_call_their_columns(tmp_path, spool):
    rows = {
        "jpg": [jpeg(1), None],
        "caption": ["one", "two"],
        "key": ["0", "1"],
        "status": ["success", "failed_to_download"],
        "error_message": [None, "404"],
        "url": ["http://x", "http://y"],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = read_source(tmp_path / "a.parquet", spool=spool)
    assert texts(source) == {"a.parquet:0": (["one"], [])}
    assert source.passed_over == {"failed downloads of img2dataset": 1}
    pq.write_table(pa.table({"URL": ["http://x"], "TEXT": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="They are addresses: download them with img2dataset"):
        read_source(tmp_path / "a.parquet", spool=spool)
    image = pa.array([jpeg(1), None]).dictionary_encode()
    odd = pa.table({"image": image, "say": ["x", "y"], "status": ["sold", "new"]})
    pq.write_table(odd, tmp_path / "a.parquet")
    options = ListOptions(image_column="image", caption_column="say", label_column="status")
    found = outcomes(read_source(tmp_path / "a.parquet", options, spool))
    assert found == {"a.parquet:0": "read", "a.parquet:1": "missing"}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"image": [b"x"], "label": [1]}, ListOptions(caption_column="c"), "no column 'c'"),
        ({"image": [1.5], "label": [1]}, ListOptions(), "of type double; expected bytes"),
        (
            {"a": [b"x"], "b": [b"y"], "label": [1]},
            ListOptions(image_column=["a", "b"]),
            "of the columns a, b some hold images, and only paths are read from several: name one",
        ),
        (
            {"image": [b"x"], "label": [1]},
            ListOptions(where=["label=2"]),
            "no rows that can be read: rows that --where left out",
        ),
    ],
)
def test_tables_without_the_columns_say_what_they_have(tmp_path, spool, columns, options, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        read_source(tmp_path / "a.parquet", options, spool)


def test_folders_as_on_the_hub_hold_one_split_or_several(tmp_path, spool):
    (tmp_path / "set" / "data").mkdir(parents=True)
    for name, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("test", 1)):
        path = tmp_path / "set" / "data" / f"{name}.parquet"
        pq.write_table(described(table(count)), path)
    path.rename(path.with_name("test-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match=r"several splits: test, train; name one, .*set/train"):
        read_source(tmp_path / "set", spool=spool)
    source = read_source(tmp_path / "set" / "train", spool=spool)
    assert source.name == "set/train"
    assert len(source.items) == 5
    with pytest.raises(ValueError, match="no split 'val'; it has test, train"):
        read_source(tmp_path / "set" / "val", spool=spool)
    # a pattern is no split of the folder that its files lie in
    assert len(read_source(f"{path.parent}/*.parquet", spool=spool).items) == 6
    assert len(read_source(f"{path.parent}/test*", spool=spool).items) == 1
    path.with_name("test-00000-of-00001.parquet").unlink()
    assert len(read_source(tmp_path / "set", spool=spool).items) == 5


def test_labels_beyond_the_names_and_values_of_other_types_are_named(tmp_path, spool):
    found = described(pa.table({"image": images(*range(5)), "label": [0, 2, -2, 2**40, -1]}))
    pq.write_table(found, tmp_path / "a.parquet")
    source = read_source(tmp_path / "a.parquet", spool=spool)
    assert list(outcomes(source).values()) == ["read", *["bad row"] * 3, "no text"]
    copied = (tmp_path / "spool" / "000002").stat().st_size
    assert copied == len(jpeg(0)) + len(jpeg(4))  # not those of bad rows
    odd = pa.table({"image": images(0, 1), "caption": [b"x", None], "label": [1.5, 2.0]})
    pq.write_table(odd, tmp_path / "a.parquet")
    found = outcomes(read_source(tmp_path / "a.parquet", spool=spool))
    assert set(found.values()) == {"bad row"}


def break_page(path: Path) -> None:
    """Damages the images of the second row group of three."""
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)


def test_a_damaged_row_group_costs_its_rows_and_a_cut_file_the_file(tmp_path, spool):
    for name in ("a", "b", "c"):
        pq.write_table(table(9), tmp_path / f"{name}.parquet", row_group_size=3)
    break_page(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-10])
    found = outcomes(read_source(tmp_path, spool=spool))
    assert found.pop("a.parquet rows 3 to 5") == "damaged"
    assert found.pop("b.parquet from row 0") == "damaged"
    assert set(found) == {f"{name}.parquet:{row}" for name in "ac" for row in range(9)} - {
        *(f"a.parquet:{row}" for row in (3, 4, 5))
    }
    assert set(found.values()) == {"read"}
    with pytest.raises(ValueError, match=r"b\.parquet has no rows that can be read: "):
        read_source(tmp_path / "b.parquet", spool=spool)
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.parquet .* can be read: the file is empty"):
        read_source(tmp_path / "b.parquet", spool=spool)


def test_rows_that_share_the_fate_of_a_damaged_one_are_named_once(tmp_path, spool):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    names = pa.array([b"0.jpg", b"1.jpg", b"\xff.jpg", b"3.jpg"])
    paths = pa.Array.from_buffers(pa.string(), 4, names.buffers())  # a text that is not UTF-8
    rows = pa.table({"path": paths, "label": [1, 2, 1, 1]})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=3)
    options = ListOptions(where=["label=1"])
    source = read_source(tmp_path / "a.parquet", options, spool)
    assert outcomes(source) == {"3.jpg": "read", "a.parquet rows 0 to 2": "damaged"}
    assert not source.passed_over


def test_a_file_that_ends_its_process_costs_what_comes_after(tmp_path, monkeypatch):
    """One value of 20 MB that a dictionary repeats: read out, 20 GB."""
    monkeypatch.setattr(source_tables, "_MEMORY_BYTES", 200_000_000)
    spool = Spool(tmp_path / "spool")
    value = b"x" * 20_000_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([value]))
    pq.write_table(pa.table({"image": column, "label": [1] * 1000}), tmp_path / "b.parquet")
    pq.write_table(table(3), tmp_path / "a.parquet")
    pq.write_table(table(3), tmp_path / "c.parquet")
    source = read_source(tmp_path, spool=spool)
    found = outcomes(source)
    assert found.pop("b.parquet from row 0") == "too large"
    assert set(found) == {f"{name}.parquet:{row}" for name in "ac" for row in range(3)}


def test_without_pyarrow_the_extra_is_named(tmp_path, spool, monkeypatch):
    pq.write_table(table(3), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install .*\[sources\]"):
        read_source(tmp_path / "a.parquet", spool=spool)
