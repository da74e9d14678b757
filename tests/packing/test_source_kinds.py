"""All kinds of sources in one build, from real images; and what a place is taken for."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_sources import jpeg, write_tar

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.packing.build import build_dataset
from unicl_fast.packing.sources.read_sources import read_source

CIFAR_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905


def test_one_build_from_all_kinds(shared_data: Path, tmp_path: Path) -> None:
    """Ten images of CIFAR-10 in three wrappings, and three of COCO with captions and labels."""
    with zipfile.ZipFile(shared_data / "cifar10" / "cifar10-test.zip") as archive:
        files = [archive.read(f"test/{name}/0001.jpg") for name in CIFAR_NAMES]
    numbers = list(range(10))
    features = {"label": {"_type": "ClassLabel", "names": CIFAR_NAMES}}
    table = pa.table({"img": files, "label": numbers}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    sources = [
        *coco_files(shared_data / "captions" / "coco", tmp_path),
        tmp_path / "hub",
        tmp_path / "tars",
        tmp_path / "val_map.txt",
    ]
    for name in ("hub", "tars"):
        (tmp_path / name).mkdir()
    pq.write_table(table, tmp_path / "hub" / "test-00000-of-00001.parquet", row_group_size=4)
    write_tar(
        tmp_path / "tars" / "0.tar",
        [
            member
            for number, file in enumerate(files)
            for member in ((f"{number}.jpg", file), (f"{number}.cls", b"%d" % number))
        ],
    )
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        for number, file in enumerate(files):
            archive.writestr(f"{number}.jpg", file)
    lines = [f"{number}.jpg\t{number}\n" for number in numbers]
    (tmp_path / "val_map.txt").write_text("".join(lines))
    categories = sorted({name for row in coco_rows(shared_data) for name in row["labels"]})
    names = CIFAR_NAMES + [name for name in categories if name not in CIFAR_NAMES]
    (tmp_path / "names.txt").write_text("\n".join(names))

    summary = build_dataset(
        sources,
        tmp_path / "out",
        class_names=str(tmp_path / "names.txt"),
        workers=1,
        progress=False,
    )

    assert (summary.num_samples, summary.num_quarantined) == (3 + 3 * 10, 0)
    assert not list(tmp_path.glob("out.*"))  # what was unpacked is gone
    with PackedDataset(tmp_path / "out") as dataset:
        found: dict[bytes, list[int]] = {}
        for index in range(len(dataset)):
            image = dataset.image_bytes(index, verify=True).tobytes()
            found.setdefault(image, []).extend(dataset.labels_of(index).tolist())
    for number, file in enumerate(files):
        assert found.pop(file) == [number] * 3  # byte for byte: hub, tars, map
    for row in coco_rows(shared_data):
        data = (shared_data / "captions" / "coco" / row["image"]).read_bytes()
        assert [names[label] for label in found.pop(data)] == row["labels"]
    assert not found


def coco_rows(shared_data: Path) -> list[dict]:
    lines = (shared_data / "captions" / "coco" / "captions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:3]]


def coco_files(data: Path, folder: Path) -> list[Path]:
    """The rows as COCO's own files, and the images where COCO has them."""
    rows = coco_rows(data.parents[1])
    (folder / "annotations").mkdir()
    (folder / "train2017").symlink_to(data / "images")
    names = sorted({name for row in rows for name in row["labels"]})
    images = [
        {"id": number, "file_name": Path(row["image"]).name} for number, row in enumerate(rows)
    ]
    captions = [
        {"image_id": number, "caption": caption}
        for number, row in enumerate(rows)
        for caption in row["captions"]
    ]
    instances = [
        {"image_id": number, "category_id": names.index(name), "iscrowd": 0}
        for number, row in enumerate(rows)
        for name in row["labels"] * 2
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    made = {
        "captions": {"images": images, "annotations": captions},
        "instances": {"images": images, "categories": categories, "annotations": instances},
    }
    for kind, content in made.items():
        (folder / "annotations" / f"{kind}_train2017.json").write_text(json.dumps(content))
    return [folder / "annotations" / f"{kind}_train2017.json" for kind in made]


@pytest.mark.parametrize("extra", ["a.tar", "cat.parquet", "train_map.txt"])
def test_class_folders_with_other_things_in_them_stay_class_folders(
    tmp_path: Path, extra: str
) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / extra).write_bytes(b"{}")
    (tmp_path / "self").symlink_to("self")
    source = read_source(str(tmp_path))
    assert [item.name for item in source.items] == ["cat/1.jpg", "self"]
    assert sum(source.passed_over.values()) == 1
