"""Packed data sets as sources: a build of them is the build that all their sources would have."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import copy_of, flip_byte, mend_checksums
from inline_checks import check_inline
from pack_runs import build_set, faults_of, jpeg, samples_of, write_photos
from packed_sets import sample_of, write_set

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.images import check as check_module
from unicl_fast.packing.build import BuildSummary
from unicl_fast.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True, scope="module")
def checked() -> Any:
    """In this process, as far as possible: what workers do is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        yield check_inline(patch)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Class folders, and a list with captions and labels: `dog` is in both; one bad image each."""
    root = tmp_path_factory.mktemp("sources")
    write_photos(root / "photos", range(30), ("cat", "dog", "sea_lion"))
    (root / "photos" / "cat" / "page.jpg").write_text("<html>")
    rows = []
    (root / "pairs").mkdir()
    for number in range(20):
        (root / "pairs" / f"{number}.jpg").write_bytes(jpeg(100 + number))
        row: dict[str, Any] = {"image": f"{number}.jpg", "captions": [f"image {number}", "so"]}
        rows.append(row | ({"label": ("ape", "dog")[number % 2]} if number % 3 else {}))
    (root / "pairs" / "cut.jpg").write_bytes(jpeg(1)[:300] + b"\xff\xd9")
    rows.append({"image": "cut.jpg", "caption": "cut"})
    (root / "pairs" / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {"photos": root / "photos", "pairs": root / "pairs" / "list.jsonl"}


def build(*places: Path, out: Path, **options: Any) -> BuildSummary:
    return build_set(places, out, **options)


@pytest.fixture(scope="module")
def packed(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each source packed, as files and raw, and both in one build."""
    out = tmp_path_factory.mktemp("packed")
    for format in ("", "raw"):
        options = {"format": "raw"} if format else {}
        build(sources["photos"], out=out / f"{format}photos", license="CC0-1.0", **options)
        build(sources["pairs"], out=out / f"{format}pairs", shard_bytes=20_000, **options)
        build(*sources.values(), out=out / f"{format}both", **options)
    return {path.name: path for path in out.iterdir()}


def quarantined(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "quarantine.csv").open(newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


@pytest.mark.parametrize("format", ["", "raw"])
def test_a_build_of_packed_sets_is_the_build_of_their_sources(
    packed, tmp_path, format, monkeypatch
):
    places = [packed[f"{format}photos"], packed[f"{format}pairs"]]
    options: dict[str, Any] = {"format": "raw"} if format else {}
    with monkeypatch.context() as patch:
        if not format:  # files whose checksums are right are copied, and not decoded
            patch.setattr(check_module, "_decode", None)
        summary = build(*places, out=tmp_path / "set", shard_bytes=20_000, **options)
    both = packed[f"{format}both"]
    assert samples_of(tmp_path / "set") == samples_of(both)
    assert sorted(quarantined(tmp_path / "set")) == sorted(quarantined(both))
    assert summary.manifest.class_names == ("cat", "dog", "sea lion", "ape")
    assert summary.num_reencoded == 0
    assert not faults_of(tmp_path / "set")
    ours, theirs = Manifest.load(tmp_path / "set"), Manifest.load(both)
    assert ours.templates == theirs.templates
    assert ours.source == tuple(map(str, places))
    assert ours.license == "CC0-1.0; not stated for a part"
    assert "license" not in (both / "manifest.json").read_text()
    with PackedDataset(tmp_path / "set") as dataset:
        assert 3 < (dataset.samples["captions_count"][:25] > 0).sum() < 22  # shuffled over both


def test_packed_sets_go_with_other_sources_and_are_changed_when_that_is_asked_for(
    sources, packed, tmp_path
):
    build(packed["photos"], packed["rawpairs"], out=tmp_path / "mixed", license="MIT")
    kinds = {one.image[:2] for one in samples_of(tmp_path / "mixed")}
    assert kinds == {b"\xff\xd8", b"\x89P"}  # JPEGs stay, pixels become PNGs
    build(packed["photos"], sources["pairs"], out=tmp_path / "set")
    assert samples_of(tmp_path / "set") == samples_of(packed["both"])
    summary = build(packed["both"], out=tmp_path / "small", resize="short:12", format="webp")
    assert summary.num_reencoded == 50
    for name, license in (("mixed", "MIT"), ("small", "")):
        assert not faults_of(tmp_path / name)
        assert Manifest.load(tmp_path / name).license == license
    # WebPs are none of the plain images that a build keeps, unless they are packed already
    build(tmp_path / "small", out=tmp_path / "kept", resize="short:12")
    assert samples_of(tmp_path / "kept") == samples_of(tmp_path / "small")


def test_damage_is_left_out_by_name(packed, tmp_path):
    with PackedDataset(packed["pairs"]) as dataset:
        damaged = copy_of(dataset, tmp_path / "pairs")
        places = {
            index: (damaged / dataset.shard_of(index), dataset.offset_of(index)) for index in (4, 6)
        }
    names = contents_in_order(packed["pairs"])
    flip_byte(damaged, 2)
    for index, what in {4: b'"image ', 6: b".json"}.items():  # neither has a checksum of its own
        shard, offset = places[index]
        data = bytearray(shard.read_bytes())
        data[data.index(what, offset) + len(what)] ^= 1
        shard.write_bytes(data)
    summary = build(packed["photos"], damaged, out=tmp_path / "set")
    assert (summary.manifest.num_samples, summary.quarantined[:9]) == (47, "4 damaged")
    rows = [row for row in quarantined(tmp_path / "set") if str(damaged) in row[3]]
    assert [row[2] for row in rows] == ["damaged"] * 3
    said = {row[3].split(": ", 1)[1]: row[:2] for row in rows}
    assert said.pop("the image's bytes are not those that were packed (checksum)") == names[2]
    assert said.pop("its captions are not those that were packed (tokens)") == names[4]
    ((reason, place),) = said.items()  # of the one whose JSON, which has its name, is damaged
    assert "tar header" in reason
    assert place == ("pairs", "0000000006")
    assert not faults_of(tmp_path / "set")


def contents_in_order(folder: Path) -> list[tuple[str, str]]:
    """Source and name of each sample; images may be damaged."""
    with PackedDataset(folder) as dataset:
        reader = SampleReader(dataset)
        texts = [reader.read_description(index) for index in range(len(dataset))]
        reader.close()
    return [(text.source, text.name) for text in texts]


def test_captions_of_another_tokenizer_are_tokenized_anew(packed, tmp_path):
    """By another vocabulary, by packages that clean texts otherwise, or cut shorter."""
    folders = []
    for number, length in enumerate((6, 77)):
        tokenizer = Tokenizer(length)
        captions = ["one two three four five six", "one"]
        tokens = tokenizer.encode(captions)
        if number:
            tokens[0] = tokens[1]
        folders.append(tmp_path / str(number))
        sample = sample_of(
            jpeg(1), 0, height=24, width=32, captions=captions, tokens=tokens, labels=[],
            source="", name=str(number),
        )  # fmt: skip
        write_set(
            folders[-1], [sample], tokenizer=tokenizer.name, context_length=length,
            vocabulary_hash=tokenizer.vocabulary_hash, class_names=[], templates=[],
        )  # fmt: skip
    with PackedDataset(packed["pairs"]) as dataset:
        folders.append(copy_of(dataset, tmp_path / "pairs"))
    change_manifest(folders[-1], vocabulary_hash="12")
    build(*folders, out=tmp_path / "set")
    assert not faults_of(tmp_path / "set")
    short, long = samples_of(tmp_path / "set")[:2]
    assert short.tokens == long.tokens == [ids.tolist() for ids in Tokenizer().encode(captions)]


def change_manifest(folder: Path, **fields: object) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | fields))
    mend_checksums(folder, "manifest.json")


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"templates": ["only {}"]}, [], "say by --templates which to use"),
        ({"num_labels": 3}, [], "labels.npy"),
        ({}, ["--where", "a=b"], "a packed data set, which has no columns: leave --where"),
        ("manifest.json", [], "is not a packed data set"),
        ("samples.npy", [], "samples.npy"),
        ("shard-000000.tar", [], "shard-000000.tar"),
        ("source,name\n", [], "no quarantine.csv of unicl-pack"),
        ("source,name,kind,message\na,b\n", [], "line 2: 2 fields of 4"),
        ("source,name,kind,message\n", [], "0 rows, the manifest says 1"),
        ("source,name,kind,message\n\xff", [], "quarantine.csv cannot be read"),
    ],
)
def test_what_is_damaged_or_does_not_go_together_is_refused_in_a_sentence(
    packed, tmp_path, change, arguments, message, pack
):
    with PackedDataset(packed["photos"]) as dataset:
        other = copy_of(dataset, tmp_path / "other")
    if isinstance(change, dict):
        change_manifest(other, **change)
    elif change.startswith("source"):
        (other / "quarantine.csv").write_bytes(change.encode("latin-1"))
    else:
        (other / change).unlink()
    words = (packed["photos"], other, *arguments, "--out", tmp_path / "set")
    said = pack("build", *words, code=2)
    assert message in said
    assert "Traceback" not in said
    assert os.listdir(tmp_path) == ["other"]


def test_templates_may_be_given_where_they_differ(packed, tmp_path):
    with PackedDataset(packed["photos"]) as dataset:
        other = copy_of(dataset, tmp_path / "other")
    change_manifest(other, templates=["only {}"])
    build(packed["pairs"], other, out=tmp_path / "given", templates="simple")
    assert Manifest.load(tmp_path / "given").templates == ("a photo of a {}.",)
    build(other, out=tmp_path / "own")
    assert Manifest.load(tmp_path / "own").templates == ("only {}",)


def test_hierarchies_are_joined_or_refused_if_they_differ(sources, tmp_path):
    for name, parents in {"photos": {"cat": "mammal"}, "pairs": {"ape": "mammal"}}.items():
        tree = tmp_path / f"{name}.json"
        tree.write_text(json.dumps(parents | {"dog": "pet" if name == "pairs" else "mammal"}))
        build(sources[name], out=tmp_path / name, hierarchy=tree)
    with pytest.raises(ValueError, match="puts the class 'dog' under 'pet', another data set"):
        build(tmp_path / "photos", tmp_path / "pairs", out=tmp_path / "both")
    tree.write_text(json.dumps({"ape": "mammal", "mammal": "animal"}))
    build(sources["pairs"], out=tmp_path / "new", hierarchy=tree)
    build(tmp_path / "photos", tmp_path / "new", out=tmp_path / "both")
    manifest = Manifest.load(tmp_path / "both")
    assert manifest.class_names == ("cat", "dog", "sea lion", "ape")
    assert manifest.hierarchy.names == ("mammal", "animal")
    assert manifest.hierarchy.parents == (4, 4, -1, 4, 5, -1)
    build(tmp_path / "photos", tmp_path / "pairs", out=tmp_path / "given", hierarchy=tree)
    assert Manifest.load(tmp_path / "given").hierarchy != manifest.hierarchy


def test_classes_of_one_name_stay_apart_also_under_given_names(tmp_path):
    """The built-in names of ImageNet have two missiles, one of them the projectile."""
    names, tree = tmp_path / "names.txt", tmp_path / "tree.json"
    names.write_text("n1\tmissile\nn2\tmissile\nn3\tdog\n")
    tree.write_text(json.dumps({"n1": "rocket", "n2": "weapon", "n3": "animal", "weapon": "tool"}))
    folders = []
    for number in range(2):
        for key in ("n1", "n2", "n3"):
            path = tmp_path / f"photos-{number}" / key / "1.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(jpeg(10 * number + int(key[1])))
        folders.append(tmp_path / str(number))
        options = {"class_names": str(names), "hierarchy": tree}
        build(path.parents[1], out=folders[-1], **options)
    build(*folders, out=tmp_path / "both")
    build(tmp_path / "photos-0", folders[1], out=tmp_path / "named", **options)
    first = Manifest.load(folders[0])
    for name in ("both", "named"):
        manifest = Manifest.load(tmp_path / name)
        assert manifest.class_names == ("missile", "missile", "dog")
        assert manifest.hierarchy == first.hierarchy
        with PackedDataset(tmp_path / name) as dataset:
            assert np.bincount(dataset.labels).tolist() == [2, 2, 2]
