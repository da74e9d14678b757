"""Croissant metadata: of the packed bytes only, and read by mlcroissant where that is installed."""

import hashlib
import json
from pathlib import Path

import pytest
from pack_runs import build_set, write_photos

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.data import all_descriptions


@pytest.fixture
def packed(tmp_path: Path, checked: list[str]) -> Path:
    photos = write_photos(tmp_path / "photos", range(12), ("cat", "dog"))
    build_set([str(photos)], str(tmp_path / "packed"), shard_bytes=30_000, license="CC0")
    return tmp_path / "packed"


def test_metadata_name_the_packed_bytes_and_belong_to_the_data_set(packed, pack, tmp_path):
    """A shard that was damaged since packing is refused: its SHA-256 would vouch for it."""
    pack("croissant", packed, "--url", "https://example.org/photos/")
    found = json.loads((packed / "croissant.json").read_text())
    assert found["name"] == "packed"
    assert found["license"] == "CC0"
    assert found["description"] == "images: 12, captions: 0"
    shards = [one for one in found["distribution"] if one["@type"] == "cr:FileObject"]
    assert len(shards) > 1
    for one in shards:
        contents = (packed / one["@id"]).read_bytes()
        assert one["sha256"] == hashlib.sha256(contents).hexdigest()
        assert one["contentUrl"] == f"https://example.org/photos/{one['@id']}"
    pack("verify", packed, "--no-decode")
    pack("upload", packed, "--out", f"file://{tmp_path}/store")
    assert (tmp_path / "store" / "croissant.json").is_file()
    # pixels of a raw data set are in no tar, and captioned images have no classes
    build_set([str(packed)], str(tmp_path / "raw"), format="raw", resize="square:8")
    pack("croissant", tmp_path / "raw")
    found = json.loads((tmp_path / "raw" / "croissant.json").read_text())
    assert [one["@id"] for one in found["recordSet"]] == ["texts", "classes"]
    assert "images-files" not in {one["@id"] for one in found["distribution"]}
    shard = packed / shards[0]["@id"]
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    assert "the manifest says" in pack("croissant", packed, code=2)


def test_mlcroissant_reads_every_image_and_its_json(packed, pack, tmp_path, monkeypatch):
    monkeypatch.setenv("CROISSANT_CACHE", str(tmp_path / "cache"))  # by names of shards: ours alike
    mlcroissant = pytest.importorskip("mlcroissant", reason="pip install mlcroissant")
    pack("croissant", packed)
    dataset = mlcroissant.Dataset(packed / "croissant.json")
    assert not dataset.metadata.ctx.issues.errors
    texts, images = (
        {int(one[f"{name}/key"]): one[f"{name}/{field}"] for one in dataset.records(name)}
        for name, field in (("texts", "json"), ("images", "image"))
    )  # shards come in any order
    with PackedDataset(packed) as own:
        names = own.manifest.class_names
        assert len(texts) == len(images) == len(own)
        for number, described in enumerate(all_descriptions(own)):
            read = json.loads(texts[number])
            assert (tuple(read["labels"]), read["name"]) == (described.labels, described.name)
            row = own.samples[number]
            assert images[number].size == (row["width"], row["height"])
    assert tuple(one["classes/name"] for one in dataset.records("classes")) == names
