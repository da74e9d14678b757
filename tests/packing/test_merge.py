"""`unicl-pack merge` gives what one build of all sources would have given."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from damage import copy_of, flip_byte, mend_checksums
from pack_runs import jpeg, run_pack

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.dataset.writer import DatasetWriter, PackedSample
from unicl_fast.packing.build import build_dataset
from unicl_fast.packing.folder_check import Fault
from unicl_fast.packing.merge import MergeSummary, join_classes, merge_datasets
from unicl_fast.packing.verify import verify_dataset
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.tools.pack.__main__ import main


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Class folders, and a list with captions and labels: `dog` is in both."""
    root = tmp_path_factory.mktemp("sources")
    for number in range(30):
        place = root / "photos" / ("cat", "dog", "sea_lion")[number % 3]
        place.mkdir(exist_ok=True, parents=True)
        (place / f"{number:03d}.jpg").write_bytes(jpeg(number))
    (root / "photos" / "cat" / "page.jpg").write_text("<html>")
    rows = []
    (root / "pairs").mkdir()
    for number in range(20):
        (root / "pairs" / f"{number}.jpg").write_bytes(jpeg(100 + number))
        row: dict[str, Any] = {"image": f"{number}.jpg", "captions": [f"image {number}", "so"]}
        rows.append(row | ({"label": ("ape", "dog")[number % 2]} if number % 3 else {}))
    (root / "pairs" / "cut.jpg").write_bytes(jpeg(1)[:300] + b"\xff\xd9")
    rows.append({"image": "cut.jpg", "caption": "cut"})
    text = "\n".join(json.dumps(row) for row in rows)
    (root / "pairs" / "list.jsonl").write_text(text)
    return {"photos": root / "photos", "pairs": root / "pairs" / "list.jsonl"}


@pytest.fixture(scope="module")
def raw(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As `packed`, with images kept as pixels, 32 x 24 each."""
    out = tmp_path_factory.mktemp("raw")
    for name, paths in {**{name: [path] for name, path in sources.items()},
                        "both": list(sources.values())}.items():  # fmt: skip
        build_dataset(paths, out / name, format="raw", workers=1, progress=False)
    return {name: out / name for name in (*sources, "both")}


@pytest.fixture(scope="module")
def packed(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each source packed, and both in one build."""
    out = tmp_path_factory.mktemp("packed")
    for name, source in sources.items():
        license = "CC0-1.0" if name == "photos" else ""
        build_dataset(
            [source], out / name, license=license, workers=1, shard_bytes=20_000, progress=False
        )
    build_dataset(list(sources.values()), out / "both", workers=1, progress=False)
    return {name: out / name for name in (*sources, "both")}


def contents(folder: Path) -> list[tuple[object, ...]]:
    """Every sample by its name, with everything that is known of it, labels as names."""
    found: list[tuple[object, ...]] = []
    with PackedDataset(folder) as dataset:
        reader = SampleReader(dataset)
        for index in range(len(dataset)):
            text = reader.read(index).description
            tokens = [
                dataset.caption_tokens(index, which).tolist() for which in range(len(text.captions))
            ]
            names = [dataset.manifest.class_names[label] for label in dataset.labels_of(index)]
            image = dataset.image_bytes(index, verify=True).tobytes()
            row = dataset.samples[index]
            size = (int(row["height"]), int(row["width"]))
            found.append((text.source, text.name, image, size, text.captions, tokens, names))
        reader.close()
    return sorted(found, key=lambda sample: sample[:2])


def quarantined(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "quarantine.csv").open(newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def faults_of(folder: Path) -> list[Fault]:
    faults: list[Fault] = []
    verify_dataset(folder, note=faults.append, decode=False, progress=False)
    return faults


def merge(*folders: Path, out: Path, **options: Any) -> MergeSummary:
    return merge_datasets(folders, out, progress=False, **options)


def test_a_merge_is_one_build_of_all_sources(packed: dict[str, Path], tmp_path: Path) -> None:
    summary = merge(packed["photos"], packed["pairs"], out=tmp_path / "set")
    assert contents(tmp_path / "set") == contents(packed["both"])
    assert sorted(quarantined(tmp_path / "set")) == sorted(quarantined(packed["both"]))
    assert summary.class_names == ("cat", "dog", "sea lion", "ape")
    assert not faults_of(tmp_path / "set")
    with PackedDataset(tmp_path / "set") as merged, PackedDataset(packed["both"]) as both:
        assert merged.manifest.templates == both.manifest.templates
        assert merged.manifest.source == both.manifest.source
        assert merged.manifest.license == "CC0-1.0; not stated for a part"
        assert "license" not in (packed["both"] / "manifest.json").read_text()
        has_caption = merged.samples["captions_count"] > 0
    assert 3 < has_caption[:25].sum() < 22  # shuffled over both


def test_a_merge_that_is_done_is_complete_for_the_same_command(
    packed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    shutil.copytree(packed["photos"], tmp_path / "photos")
    command = ("merge", tmp_path / "photos", packed["pairs"], "--out", out)
    assert run_pack(*command, capsys=capsys)[0] == 0
    before = contents(out)
    code, printed = run_pack(*command, capsys=capsys)
    assert (code, "complete already" in printed) == (0, True), printed
    assert contents(out) == before
    code, printed = run_pack(*command, "--duplicates", "join", capsys=capsys)
    assert (code, "made with other options:\n  --duplicates" in printed) == (2, True), printed
    (tmp_path / "photos" / "checksums.txt").unlink()
    code, printed = run_pack(*command, capsys=capsys)
    assert (code, "made with other sources:" in printed) == (2, True), printed


@pytest.mark.parametrize("name", ["file", "file/set"])
def test_a_file_as_the_output_is_named(
    packed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "file").touch()
    for command in (("merge", packed["photos"]), ("build", tmp_path)):
        code, printed = run_pack(*command, "--out", tmp_path / name, capsys=capsys)
        assert code == 2
        assert f"{tmp_path}/file" in printed
        assert "name another" in printed
        assert "Errno" not in printed
    assert os.listdir(tmp_path) == ["file"]


def test_a_merge_of_raw_sets_is_one_raw_build(raw: dict[str, Path], tmp_path: Path) -> None:
    summary = merge(raw["photos"], raw["pairs"], out=tmp_path / "set")
    assert contents(tmp_path / "set") == contents(raw["both"])
    assert not faults_of(tmp_path / "set")
    with PackedDataset(tmp_path / "set") as merged, PackedDataset(raw["both"]) as both:
        assert merged.image_shape == (24, 32, 3)
        assert merged.manifest.pixels is not None
        assert both.manifest.pixels is not None
        assert merged.manifest.pixels.num_bytes == both.manifest.pixels.num_bytes
        shards = sum(shard.num_bytes for shard in merged.manifest.shards)
        assert summary.num_bytes == shards + merged.manifest.pixels.num_bytes


def test_damaged_pixels_are_left_out_and_named(raw: dict[str, Path], tmp_path: Path) -> None:
    with PackedDataset(raw["pairs"]) as dataset:
        damaged = copy_of(dataset, tmp_path / "pairs")
    name = contents_of_texts(damaged)[4][1]
    data = bytearray((damaged / "pixels.npy").read_bytes())
    data[512 + 4 * 24 * 32 * 3] ^= 1
    (damaged / "pixels.npy").write_bytes(data)
    summary = merge(damaged, out=tmp_path / "set")
    assert (summary.num_samples, summary.num_damaged) == (19, 1)
    (row,) = [row for row in quarantined(tmp_path / "set") if str(damaged) in row[3]]
    assert row[:3] == ("list.jsonl", name, "damaged")
    assert "(pixels.npy, offset 9728)" in row[3]
    assert not faults_of(tmp_path / "set")


def test_equal_pixels_become_one_sample_whatever_is_said_of_them(tmp_path: Path) -> None:
    """Their descriptions, which are what samples.npy has the sizes of, are not equally long."""
    for name in ("cat", "a much longer name"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "1.jpg").write_bytes(jpeg(1))
        build_dataset(
            *([tmp_path / name], tmp_path / f"raw {name}"), format="raw", workers=1, progress=False
        )  # fmt: skip
    inputs = [tmp_path / "raw cat", tmp_path / "raw a much longer name"]
    rows = [np.load(path / "samples.npy")[0] for path in inputs]
    assert rows[0]["size"] != rows[1]["size"]
    summary = merge(*inputs, out=tmp_path / "set", duplicates="join")
    assert (summary.num_samples, summary.num_joined) == (1, 1)
    assert set(contents(tmp_path / "set")[0][6]) == {"cat", "a much longer name"}  # type: ignore[call-overload]


def test_images_of_different_kinds_are_refused(
    packed: dict[str, Path], raw: dict[str, Path], sources: dict[str, Path], tmp_path: Path
) -> None:
    build_dataset(
        *([sources["photos"]], tmp_path / "small"), format="raw", resize="square:8", workers=1,
        progress=False,
    )  # fmt: skip
    for first, second, message in (
        (packed["photos"], raw["pairs"], "photos holds image files, .*pairs pixels, 32 x 24 a"),
        (raw["pairs"], packed["photos"], "both with --format raw or both without, or do not"),
        (raw["pairs"], tmp_path / "small", "8 x 8 an image.* same --resize square:PIXELS, or"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(first, second, out=tmp_path / "set")
    assert os.listdir(tmp_path) == ["small"]


def test_the_seed_alone_decides_the_order(packed: dict[str, Path], tmp_path: Path) -> None:
    inputs = (packed["photos"], packed["pairs"])
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        merge(*inputs, out=tmp_path / name, seed=seed)
    files = {
        name: {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}
        for name in ("a", "b", "c")
    }
    assert files["a"] == files["b"]
    assert files["a"]["samples.npy"] != files["c"]["samples.npy"]
    assert contents(tmp_path / "a") == contents(tmp_path / "c")


def test_equal_names_of_different_sets_are_one_class() -> None:
    names, maps = join_classes([["crane", "crane", "dog"], [], ["cat", "dog", "crane"]])
    assert names == ("crane", "crane", "dog", "cat")
    assert [numbers.tolist() for numbers in maps] == [[0, 1, 2], [], [3, 2, 0]]
    same = ["crane", "dog", "crane"]
    assert join_classes([same, same])[0] == ("crane", "dog", "crane")


def test_damage_is_left_out_and_named(packed: dict[str, Path], tmp_path: Path) -> None:
    with PackedDataset(packed["pairs"]) as dataset:
        damaged = copy_of(dataset, tmp_path / "pairs")
        lines = {name: text for _, name, *_, text, _, _ in contents(packed["pairs"])}
        shard = dataset.shard_of(4)
    flip_byte(damaged, 2)
    data = (damaged / shard).read_bytes()
    place = data.index(b'"image ')  # the text of a caption, which has no checksum of its own
    (damaged / shard).write_bytes(data[: place + 7] + b"9" + data[place + 8 :])
    summary = merge(packed["photos"], damaged, out=tmp_path / "set")
    assert summary.num_damaged == 2
    rows = [row for row in quarantined(tmp_path / "set") if str(damaged) in row[3]]
    assert [row[2] for row in rows] == ["damaged", "damaged"]
    assert {row[3].split(": ")[-1] for row in rows} == {
        "the image's bytes are not those that were packed (checksum)",
        "its captions are not those that were packed (tokens)",
    }
    assert all(row[1] in lines for row in rows)
    assert summary.num_samples == 48
    assert not faults_of(tmp_path / "set")


def test_a_list_of_samples_is_left_out(packed: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("name,source\n3.jpg,list.jsonl\n3.jpg,elsewhere\n")
    summary = merge(packed["pairs"], out=tmp_path / "set", leave_out=str(tmp_path / "list.csv"))
    assert (summary.num_samples, summary.num_left_out) == (19, 1)
    assert "3.jpg" not in {sample[1] for sample in contents(tmp_path / "set")}


def test_equal_images_of_all_sets_become_one_sample(
    packed: dict[str, Path], tmp_path: Path
) -> None:
    """Labels in one set, captions in the other; one copy is damaged, which costs nothing."""
    rows = [
        {"image": f"{number:03d}.jpg", "captions": [f"so {number}", "so"], "label": "cat"}
        for number in range(0, 6)
    ]
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number:03d}.jpg").write_bytes(jpeg(number))
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "in" / "more.jsonl").write_text(text)
    build_dataset([tmp_path / "in" / "more.jsonl"], tmp_path / "more", workers=1, progress=False)
    flip_byte(tmp_path / "more", 2)
    damaged = contents_of_texts(tmp_path / "more")[2][1]
    outputs = []
    for name in ("a", "b"):
        summary = merge(packed["photos"], tmp_path / "more", out=tmp_path / name, duplicates="join")
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert outputs[0] == outputs[1]
    assert (summary.num_samples, summary.num_joined, summary.num_damaged) == (30, 5, 1)
    found = {sample[2]: sample[4:] for sample in contents(tmp_path / "a")}
    for number in range(6):
        captions, tokens, labels = found[jpeg(number)]
        own = ("cat", "dog", "sea lion")[number % 3]
        if f"{number:03d}.jpg" == damaged:
            assert (captions, labels) == ((), [own])
        else:
            assert set(captions) == {f"so {number}", "so"}
            assert set(labels) == {own, "cat"}
            assert tokens == [ids.tolist() for ids in Tokenizer().encode(captions)]
    kinds = [row[2] for row in quarantined(tmp_path / "a") if "the same bytes as" in row[3]]
    assert kinds == ["duplicate"] * 5
    assert not faults_of(tmp_path / "a")


@pytest.mark.slow
def test_texts_beyond_what_one_sample_can_have_stay_with_another(tmp_path: Path) -> None:
    texts = {
        "a": [f"a {number}" for number in range(40_000)],
        "b": [f"b {number}" for number in range(40_000)],
        "c": ["c 1", "c 2"],
    }
    ids = np.array([49406, 320, 49407], np.uint16)
    for name, captions in texts.items():
        with DatasetWriter(tmp_path / name) as writer:
            writer.add(
                PackedSample(
                    image=jpeg(1), extension="jpg", height=24, width=32,
                    xxh3=xxhash.xxh3_64_intdigest(jpeg(1)), captions=captions,
                    tokens=[ids] * len(captions), name=name,
                )
            )  # fmt: skip
            writer.finish(
                tokenizer="clip-bpe", vocabulary_hash="0", context_length=77, class_names=[],
                templates=[], source=["here"], seed=0, tool_version="0.1.0",
            )  # fmt: skip
    for seed in range(2):
        out = tmp_path / f"set {seed}"
        summary = merge(*(tmp_path / name for name in texts), out=out, seed=seed, duplicates="join")
        assert (summary.num_samples, summary.num_joined) == (2, 1)
        found = {str(sample[1]): set(sample[4]) for sample in contents(out)}  # type: ignore[call-overload]
        assert sorted(text for one in found.values() for text in one) == sorted(
            text for captions in texts.values() for text in captions
        )
        (row,) = quarantined(out)
        holder = row[3].removeprefix("the same bytes as ").split(" ")[0]
        assert set(texts[row[1]]) <= found[holder]


def contents_of_texts(folder: Path) -> list[tuple[str, str]]:
    """Source and name of each sample, in order; images may be damaged."""
    with PackedDataset(folder) as dataset:
        reader = SampleReader(dataset)
        texts = [reader.read_description(index) for index in range(len(dataset))]
        reader.close()
    return [(text.source, text.name) for text in texts]


def test_captions_that_were_cut_are_cut_later(tmp_path: Path) -> None:
    for length in (6, 77):
        tokenizer = Tokenizer(length)
        with DatasetWriter(tmp_path / str(length)) as writer:
            captions = ["one two three four five six", "one"]
            sample = PackedSample(
                image=jpeg(1), extension="jpg", height=24, width=32, xxh3=0, captions=captions,
                tokens=tokenizer.encode(captions), name=str(length),
            )  # fmt: skip
            writer.add(dataclasses.replace(sample, xxh3=xxhash.xxh3_64_intdigest(jpeg(1))))
            writer.finish(
                tokenizer=tokenizer.name, vocabulary_hash=tokenizer.vocabulary_hash,
                context_length=length, class_names=[], templates=[], source=["here"], seed=0,
                tool_version="0.1.0",
            )  # fmt: skip
    merge(tmp_path / "6", tmp_path / "77", out=tmp_path / "set")
    assert not faults_of(tmp_path / "set")
    short, long = contents(tmp_path / "set")
    assert short[5] == long[5]


def change_manifest(folder: Path, **fields: object) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | fields))
    mend_checksums(folder, "manifest.json")


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"vocabulary_hash": "12"}, [], "their tokens mean different things"),
        ({"templates": ["only {}"]}, [], "say by --templates which to take"),
        ({"num_labels": 3}, [], "labels.npy"),
        ({}, ["PHOTOS"], "once more"),
        ({}, ["NOWHERE"], "not a packed data set"),
        ({}, ["--leave-out", "NOWHERE"], "there is no file"),
        ({}, ["--leave-out", "LIST"], "the columns source and name"),
        ({}, ["--seed", "-1"], "--seed"),
    ],
)
def test_what_does_not_go_together_is_refused(
    packed: dict[str, Path],
    tmp_path: Path,
    fields: dict[str, object],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with PackedDataset(packed["photos"]) as dataset:
        other = copy_of(dataset, tmp_path / "other")
    if fields:
        change_manifest(other, **fields)
    (tmp_path / "list.txt").write_text("3.jpg\n")
    places = {"PHOTOS": packed["photos"], "NOWHERE": tmp_path / "no", "LIST": tmp_path / "list.txt"}
    words = [str(places.get(word, word)) for word in arguments]
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(packed["photos"]), str(other), *words, "--out", str(tmp_path / "set")])
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert sorted(os.listdir(tmp_path)) == ["list.txt", "other"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data_set,shard,key,offset,reason\na,b,c,d,e\n", "no quarantine.csv of unicl-pack"),
        ("source,name,kind,message\na,b\n", "line 2: 2 fields of 4"),
    ],
)
def test_a_foreign_list_of_what_was_left_out_is_refused_in_a_sentence(
    packed: dict[str, Path], tmp_path: Path, text: str, message: str
) -> None:
    with PackedDataset(packed["photos"]) as dataset:
        other = copy_of(dataset, tmp_path / "other")
    (other / "quarantine.csv").write_text(text)
    mend_checksums(other, "quarantine.csv")
    with pytest.raises(ValueError, match=message):
        merge(other, out=tmp_path / "set")
    assert os.listdir(tmp_path) == ["other"]


def test_templates_may_be_given_where_they_differ(packed: dict[str, Path], tmp_path: Path) -> None:
    with PackedDataset(packed["photos"]) as dataset:
        other = copy_of(dataset, tmp_path / "other")
    change_manifest(other, templates=["only {}"])
    main(["merge", str(packed["pairs"]), str(other), "--templates", "simple",
          "--out", str(tmp_path / "set")])  # fmt: skip
    with PackedDataset(tmp_path / "set") as merged:
        assert merged.manifest.templates == ("a photo of a {}.",)


@pytest.mark.dist
def test_a_stopped_merge_leaves_nothing(packed: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys, time; from unicl_fast.dataset.writer import DatasetWriter as W;"
        "from unicl_fast.tools.pack.__main__ import main; add = W.add;"
        "W.add = lambda *a: (add(*a), time.sleep(1));"
        "main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "merge", str(packed["photos"]), "--out", str(tmp_path / "x")],
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("x.partial-*/shard-*.tar")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"Traceback" not in errors
    assert not os.listdir(tmp_path)


def test_hierarchies_are_joined_or_refused_if_they_differ(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    for name, parents in {"photos": {"cat": "mammal"}, "pairs": {"ape": "mammal"}}.items():
        tree = tmp_path / f"{name}.json"
        tree.write_text(json.dumps(parents | {"dog": "pet" if name == "pairs" else "mammal"}))
        build_dataset([sources[name]], tmp_path / name, hierarchy=tree, workers=1, progress=False)
    both = [tmp_path / "photos", tmp_path / "pairs"]
    with pytest.raises(ValueError, match="puts the class 'dog' under 'pet', another data set"):
        merge_datasets(both, tmp_path / "both", progress=False)
    tree.write_text(json.dumps({"ape": "mammal", "mammal": "animal"}))
    build_dataset([sources["pairs"]], tmp_path / "new", hierarchy=tree, workers=1, progress=False)
    merge_datasets([both[0], tmp_path / "new"], tmp_path / "both", progress=False)
    with PackedDataset(tmp_path / "both") as dataset:
        manifest = dataset.manifest
    assert manifest.class_names == ("cat", "dog", "sea lion", "ape")
    assert manifest.hierarchy is not None
    assert manifest.hierarchy.names == ("mammal", "animal")
    assert manifest.hierarchy.parents == (4, 4, -1, 4, 5, -1)


def test_classes_of_one_name_keep_their_places_in_a_hierarchy(tmp_path: Path) -> None:
    """The built-in names of ImageNet have two missiles, one of them the projectile."""
    names, tree = tmp_path / "names.txt", tmp_path / "tree.json"
    names.write_text("n1\tmissile\nn2\tmissile\nn3\tdog\n")
    tree.write_text(json.dumps({"n1": "rocket", "n2": "weapon", "n3": "animal", "weapon": "tool"}))
    folders = [tmp_path / "first", tmp_path / "second"]
    for number, folder in enumerate(folders):
        for key in ("n1", "n2", "n3"):
            path = tmp_path / f"photos-{number}" / key / "1.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(jpeg(10 * number + int(key[1])))
        build_dataset(
            [path.parents[1]], folder, class_names=names, hierarchy=tree, workers=1, progress=False
        )
    merge_datasets(folders, tmp_path / "both", progress=False)
    first, both = (Manifest.load(folder) for folder in (folders[0], tmp_path / "both"))
    assert both.class_names == ("missile", "missile", "dog")
    assert both.hierarchy == first.hierarchy
