"""All kinds of sources in one build, from real images; what a path is taken for; a new kind."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_sources import read_source, write_tar, write_zip
from pack_runs import build_set, jpeg, samples_of

from unicl_fast.packing.sources import read_sources as registry

CIFAR_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905


def test_one_build_from_all_kinds(shared_data: Path, tmp_path: Path) -> None:
    """Ten images of CIFAR-10 as Parquet, tar, and map of a zip, byte for byte."""
    with zipfile.ZipFile(shared_data / "cifar10" / "cifar10-test.zip") as archive:
        files = [archive.read(f"test/{name}/0001.jpg") for name in CIFAR_NAMES]
    features = {"label": {"_type": "ClassLabel", "names": CIFAR_NAMES}}
    table = pa.table({"img": files, "label": list(range(10))}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, tmp_path / "test-00000-of-00001.parquet", row_group_size=4)
    members = {f"{number}.jpg": file for number, file in enumerate(files)}
    write_tar(tmp_path / "0.tar", members | {f"{n}.cls": b"%d" % n for n in range(10)})
    write_zip(tmp_path / "val.zip", members)
    (tmp_path / "val_map.txt").write_text("".join(f"{n}.jpg\t{n}\n" for n in range(10)))
    (tmp_path / "names.txt").write_text("\n".join(CIFAR_NAMES))
    sources = [tmp_path / name for name in ("test-00000-of-00001.parquet", "0.tar", "val_map.txt")]
    out, names = tmp_path / "out", str(tmp_path / "names.txt")
    build_set(sources, out, class_names=names)
    assert not list(tmp_path.glob("out.*"))  # what was unpacked is gone
    found = sorted((one.image, one.labels) for one in samples_of(out))
    assert found == sorted((file, [CIFAR_NAMES[n]]) for n, file in enumerate(files) for _ in "123")


@pytest.mark.parametrize("extra", ["a.tar", "cat.parquet", "train_map.txt"])
def test_class_folders_with_other_things_in_them_stay_class_folders(
    tmp_path: Path, extra: str
) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / extra).write_bytes(b"{}")
    (tmp_path / "self").symlink_to("self")
    source = read_source(tmp_path)
    assert [item.name for item in source.items] == ["cat/1.jpg", "self"]
    assert sum(source.passed_over.values()) == 1


OWN = """
from unicl_fast.packing.sources.items import Item
from unicl_fast.packing.sources.source_kind import SourceKind
from unicl_fast.packing.sources.spool import Source
from unicl_fast.packing.sources.trees import open_tree

def read(place, options, spool):
    source = Source(name=place.name, items=spool.new_items(), labels_are_names=False)
    tree = open_tree(place.path.parent)
    for line in place.path.read_text().splitlines():
        name, caption = line.split(" = ")
        source.items.append(Item(name, tree.find(name), [caption]))
    return source

KIND = SourceKind(recognises=lambda place: place.name.endswith(".pairs"), read=read)
"""


def test_a_kind_is_a_file_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("unicl_fast.packing.sources.pairs")
    exec(OWN, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "SOURCES", ("pairs", *registry.SOURCES))
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "list.pairs").write_text("1.jpg = a cat")
    build_set([tmp_path / "list.pairs"], tmp_path / "out")
    assert [(one.image, one.captions) for one in samples_of(tmp_path / "out")] == [
        (jpeg(1), ("a cat",))
    ]
