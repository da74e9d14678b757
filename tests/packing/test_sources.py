"""What a user may have is read as it stands, and nothing of it is lost in silence."""

import json
import re
import sys
import zipfile
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from foreign_sources import outcomes, read, read_source, texts, write_tar, write_zip
from pack_runs import build_set, jpeg, samples_of

from unicl_fast.packing.label_space import (
    LabelSpace,
    collect_label_space,
    read_label_space,
    refuse_numbers,
)
from unicl_fast.packing.sources import read_sources as registry
from unicl_fast.packing.sources.entries import MAX_FILE_BYTES, EntryError, FileEntry, Problem
from unicl_fast.packing.sources.items import Item
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.rows import MAX_CAPTION_BYTES
from unicl_fast.packing.sources.spool import Source


def make_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def by_name(source: Source) -> dict[str, Item]:
    return {item.name: item for item in source.items}


def test_files_of_too_many_bytes_are_refused_also_if_their_size_is_unknown():
    without_size = FileEntry("/proc/self/status", 0)
    assert b"Threads:" in without_size.read()
    with pytest.raises(EntryError, match="at most 10 bytes are read"):
        without_size.read(max_bytes=10)


def test_class_is_the_folder_that_holds_the_image(tmp_path):
    make_files(tmp_path, "old/big_cat/1.jpg", "old/dog/2.PNG", "new/dog/3", "dog/4.odd")
    items = by_name(read_source(tmp_path))
    assert {name: item.labels for name, item in items.items()} == {
        "old/big_cat/1.jpg": ["big_cat"],
        "old/dog/2.PNG": ["dog"],
        "new/dog/3": ["dog"],
        "dog/4.odd": ["dog"],
    }
    assert read(items["new/dog/3"]) == b"new/dog/3"
    # other files are counted
    make_files(tmp_path, "dog/notes.txt", "b/list.CSV", "dog/.hidden", ".git/x.jpg", "2.jpg")
    source = read_source(tmp_path)
    assert source.passed_over == {".txt files": 1, ".csv files": 1, "hidden files": 2}
    assert outcomes(source) == dict.fromkeys(items, "read") | {"2.jpg": "no class"}


def test_a_list_follows_links_as_class_folders_do(tmp_path):
    make_files(tmp_path, "far/1.jpg", "far/cat/2.jpg", "set/dog/3.jpg")
    root = tmp_path / "set"
    (root / "cat").symlink_to(tmp_path / "far" / "cat")
    (root / "dog" / "1.jpg").symlink_to(tmp_path / "far" / "1.jpg")
    names = {item.name for item in read_source(root).items}
    assert names == {"cat/2.jpg", "dog/1.jpg", "dog/3.jpg"}
    # names that leave the root by themselves, through a link or not, are another matter
    outside = [f"{tmp_path}/far/1.jpg", "../far/1.jpg", "cat/../1.jpg", f"{root}/cat/../1.jpg"]
    named = [*names, f"{root}/cat/2.jpg"]
    rows = [json.dumps({"image": name, "caption": "x"}) for name in [*named, *outside]]
    (root / "list.jsonl").write_text("\n".join(rows))
    assert outcomes(read_source(root / "list.jsonl")) == {
        **dict.fromkeys(named, "read"),
        **dict.fromkeys(outside, "outside"),
    }


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_is_read_like_the_folder_in_it(tmp_path, method):
    names = ["train/cat/1.jpg", "train/dog/2.jpg", "zoo/dog/3.jpg", "__MACOSX/cat/_1.jpg"]
    write_zip(tmp_path / "set.zip", {name: name.encode() * 50 for name in names}, method)
    whole = read_source(tmp_path / "set.zip")
    assert [item.name for item in whole.items] == names[:3]
    part = by_name(read_source(tmp_path / "set.zip" / "train"))
    assert {name: item.labels for name, item in part.items()} == {
        "cat/1.jpg": ["cat"],
        "dog/2.jpg": ["dog"],
    }
    if method == zipfile.ZIP_LZMA:
        with pytest.raises(EntryError, match="compression method 14"):
            read(part["dog/2.jpg"])
    else:
        assert read(part["dog/2.jpg"]) == b"train/dog/2.jpg" * 50
    with pytest.raises(FileNotFoundError, match="at its top are: __MACOSX, train, zoo"):
        read_source(tmp_path / "set.zip" / "trian")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_an_imagefolder_is_read_as_its_metadata_says(tmp_path, kind):
    make_files(tmp_path / "train", "1.jpg", "cat/2.jpg", "3.jpg", "4.png")
    rows = [("1.jpg", "one", "cat"), ("cat/2.jpg", "two", "dog"), ("3.jpg", "three", "cat")]
    if kind == "jsonl":
        fields = [{"file_name": name, "text": text, "label": label} for name, text, label in rows]
        text = "\n".join(map(json.dumps, fields))
    else:
        text = "\n".join(map(",".join, [("file_name", "text", "label"), *rows]))
    (tmp_path / "train" / f"metadata.{kind}").write_text(text)
    source = read_source(tmp_path / "train")
    assert [(item.name, item.captions, item.labels) for item in source.items] == [
        (name, [text], [label]) for name, text, label in rows
    ]
    assert source.name == "train"
    assert read(list(source.items)[1]) == b"cat/2.jpg"
    assert source.passed_over == {f"images that metadata.{kind} does not name": 1}
    with (tmp_path / "train" / f"metadata.{kind}").open("a") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # large lists are lists too, though no image is so large
    with pytest.raises(ValueError, match="holds train/metadata"):
        read_source(tmp_path)
    (tmp_path / "train" / f"metadata.{kind}").write_text(text)
    # one floor too high: its only class would be "train"
    with pytest.raises(ValueError, match=f"unicl-pack build {tmp_path}/train --out"):
        read_source(tmp_path)


def test_other_files_called_metadata_leave_class_folders_alone(tmp_path):
    make_files(tmp_path, "cat/1.jpg", "dog/2.jpg")
    (tmp_path / "metadata.csv").write_text("old_file_name,licence\n1.jpg,CC\n")
    (tmp_path / "cat" / "metadata.jsonl").write_text('{"width": 3}')
    source = read_source(tmp_path)
    assert [item.labels for item in source.items] == [["cat"], ["dog"]]
    assert source.passed_over == {".csv files": 1, ".jsonl files": 1}
    for name in ("metadata.csv", "metadata.jsonl"):  # of two that are, neither is chosen
        (tmp_path / name).write_text('file_name,"text"\n')
    with pytest.raises(ValueError, match="name one of them"):
        read_source(tmp_path)


def test_texts_beside_the_images_of_a_flat_folder_are_their_captions(tmp_path):
    make_files(tmp_path, "a.b.jpg", "2.PNG", "3.jpg", "4.jpg", ".hidden.jpg", "x.json")
    for name, text in (("a.b", "\ufeffa cat\n"), ("2", "two"), ("3", " "), ("9", "nothing")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "4.txt").write_bytes(b"\xff\xfe")
    source = read_source(tmp_path)
    captions = {item.name: item.captions for item in source.items if item.problem is None}
    assert captions == {"a.b.jpg": ["a cat"], "2.PNG": ["two"]}
    problems = {item.name: item.problem.kind for item in source.items if item.problem}
    assert problems == {"3.jpg": "no text", "4.jpg": "bad row"}
    assert read(by_name(source)["a.b.jpg"]) == b"a.b.jpg"
    names = ("hidden files", ".json files", ".txt files without an image")
    assert source.passed_over == dict.fromkeys(names, 1)


@pytest.mark.parametrize(
    ("content", "packed", "above"),
    [
        *product(("cat/1.jpg", "1.jpg"), ("folder", "zip"), ("", "a/b/")),
        ("metadata.jsonl", "folder", ""),
    ],
)
def test_several_splits_are_not_joined(tmp_path, content, packed, above):
    names = [f"{above}{split}/{content}" for split in ("test", "train", "Validation")]
    place = tmp_path / "photos"
    make_files(place, *names, "readme.txt")
    if packed == "zip":
        place = write_zip(tmp_path / "photos.zip", {name: name.encode() for name in names})
    with pytest.raises(ValueError, match="Validation, test, train") as caught:
        read_source(place)
    place = place / above
    assert f"unicl-pack build {place}/train --out" in str(caught.value)
    if content == "cat/1.jpg":
        assert [item.labels for item in read_source(f"{place}/train").items] == [["cat"]]


def test_a_split_alone_or_a_list_in_a_zip_is_no_class(tmp_path):
    make_files(tmp_path / "a", "train/cat/1.jpg", "other/dog/2.jpg")
    assert [item.labels for item in read_source(tmp_path / "a").items] == [["dog"], ["cat"]]
    make_files(tmp_path / "b", "train/1.jpg", "train/2.jpg")
    with pytest.raises(ValueError, match=r"'train', .* split.*train/cat/1\.jpg"):
        read_source(tmp_path / "b")
    metadata = b'{"file_name": "1.jpg", "text": "x"}'
    write_zip(tmp_path / "p.zip", {"in/1.jpg": b"one", "in/metadata.jsonl": metadata})
    with pytest.raises(ValueError, match="unpack it"):
        read_source(tmp_path / "p.zip")


def test_patterns_in_quotes_name_files_or_are_refused_with_what_to_write(tmp_path):
    for number in range(3):
        members = {f"{number}.jpg": b"x", f"{number}.txt": b"text"}
        write_tar(tmp_path / f"shard-{number}.tar", members)
    source = read_source(f"{tmp_path}/shard-*.tar")
    assert [item.name for item in source.items] == [f"shard-{n}.tar/{n}" for n in range(3)]
    make_files(tmp_path, "photos/1.jpg", "photos/2.jpg", "photos/cat[1]/3.jpg")
    with pytest.raises(ValueError, match=r"matches 2 files .*Name the folder"):
        read_source(f"{tmp_path}/photos/*.jpg")
    with pytest.raises(ValueError, match="matches 3 files"):
        read_source(f"{tmp_path}/photos/*")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_source(f"{tmp_path}/photos/*.png")
    assert len(read_source(f"{tmp_path}/photos/cat[1]").items) == 1


def test_csv_rows_of_one_image_are_one_sample(tmp_path):
    make_files(tmp_path, "im/1.jpg", "im/2.jpg")
    (tmp_path / "list.csv").write_text(
        "\ufeffimage,caption,label\n"
        'im/1.jpg,"a cat, asleep",cat\n'
        "im/1.jpg,a sleeping cat,cat\n"
        "im/2.jpg,,dog\n"
        "im/1.jpg,a sleeping cat,animal\n",
        encoding="utf-8",
    )
    source = read_source(tmp_path / "list.csv")
    assert texts(source) == {
        "im/1.jpg": (["a cat, asleep", "a sleeping cat"], ["cat", "animal"]),
        "im/2.jpg": ([], ["dog"]),
    }
    assert read(by_name(source)["im/2.jpg"]) == b"im/2.jpg"
    (tmp_path / "list.tsv").write_text("image\tlabel\nim/2.jpg\tdog, or cat\n")
    assert texts(read_source(tmp_path / "list.tsv")) == {"im/2.jpg": ([], ["dog, or cat"])}


def test_a_caption_of_too_many_bytes_is_refused_by_name_and_kept_nowhere(tmp_path):
    make_files(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    longest = "é" * (MAX_CAPTION_BYTES // 2)
    rows = [
        {"image": "1.jpg", "captions": ["a dog", longest + "!"]},
        {"image": "2.jpg", "caption": longest},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    items = by_name(read_source(tmp_path / "list.jsonl"))
    assert items["1.jpg"].captions == ["a dog"]
    message = "line 1: captions holds 100,001 bytes; captions of at most 100,000 are read"
    assert items["1.jpg"].problem == Problem("too long", message)
    assert (items["2.jpg"].captions, items["2.jpg"].problem) == ([longest], None)

    (tmp_path / "list.jsonl").unlink()
    (tmp_path / "1.txt").write_text(longest + "!", encoding="utf-8")
    (tmp_path / "2.txt").write_text(longest, encoding="utf-8")
    items = by_name(read_source(tmp_path))
    assert items["2.jpg"].captions == [longest]
    problem = items["1.jpg"].problem
    assert "100,001 bytes; files of at most 100,000 are read" in problem.message


def test_rows_of_a_low_score_are_listed_by_their_line(tmp_path):
    """By line, since another row can keep the image."""
    make_files(tmp_path, *(f"{number}.jpg" for number in range(4)))
    scores = [(0, 0.3), (1, 0.1), (2, None), (3, "0.15"), (0, 0.1)]
    rows = [{"image": f"{n}.jpg", "caption": f"{n}: {clip}", "clip": clip} for n, clip in scores]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = read_source(tmp_path / "list.jsonl", ListOptions(min_score=["clip=0.15"]))
    found = {item.name: item.problem and item.problem.message for item in source.items}
    assert found == {
        **{"0.jpg": None, "3.jpg": None, "line 2": "1.jpg: clip is 0.1, below 0.15"},
        **{"line 3": "2.jpg: clip is None, below 0.15", "line 5": "0.jpg: clip is 0.1, below 0.15"},
    }
    assert by_name(source)["0.jpg"].captions == ["0: 0.3"]


def test_paths_of_windows_are_read_and_counted(tmp_path):
    make_files(tmp_path, "data/images/1.jpg", "data/images/2.jpg", "odd\\name.jpg")
    names = ["data\\images\\1.jpg", "data/images\\2.jpg", "odd\\name.jpg", "data\\images\\3.jpg"]
    text = "path,label\n" + "".join(f"{name},x\n" for name in names)
    (tmp_path / "list.csv").write_text(text)
    source = read_source(tmp_path / "list.csv")
    assert list(outcomes(source)) == names
    assert list(outcomes(source).values()) == ["read", "read", "read", "missing"]
    assert source.notes == {"paths with \\ read as if it were /": 2}


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("{n}.jpg", "It is in ROOT/set/photos: add --image-root ROOT/set/photos"),
        ("set\\photos\\{n}.jpg", "It is in ROOT: add --image-root ROOT"),
        ("ROOT/far/{n}.jpg", "It is in /: add --image-root /"),
        ("C:\\me\\photos\\{n}.jpg", "photos/0.jpg' is there: remove 'C:/me' from"),
        ("../photos/{n}.jpg", "Write the paths without .."),
        ("https://host/{n}.jpg", "They are addresses: download them with img2dataset"),
        ("elsewhere/x{n}.jpg", "Give the folder or zip in which the paths start: --image-root"),
    ],
)
def test_a_list_of_missing_images_ends_after_a_thousand_with_advice(tmp_path, name, advice):
    make_files(tmp_path, "far/0.jpg", *(f"set/photos/{number}.jpg" for number in range(3)))
    name, advice = (text.replace("ROOT", str(tmp_path)) for text in (name, advice))
    for count, said in ((1500, "1,000 images"), (1, "1 image")):
        rows = (json.dumps({"image": name.format(n=n), "label": "x"}) for n in range(count))
        (tmp_path / "set" / "list.jsonl").write_text("\n".join(rows))
        with pytest.raises(ValueError, match=re.escape(advice)) as caught:
            read_source(tmp_path / "set" / "list.jsonl")
        assert f"list.jsonl: not one of {said} is there, such as" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", ListOptions(), "empty"),
        ("image,caption\n", ListOptions(), "no rows"),
        ("image,caption,caption\n1,a,b\n", ListOptions(), "the column 'caption' several times"),
        ("photo,caption\n1,a\n", ListOptions(), "--image-column"),
        ("image,words\n1,a\n", ListOptions(), "--caption-column or --label-column"),
        ("image,caption\n1,a\n", ListOptions(label_column="kind"), "'kind' .--label-column"),
        ("image,caption\n1,a\n", ListOptions(where=["split=x"]), "--where"),
        ("image,caption\n1,a\n", ListOptions(where=["caption"]), "COLUMN=VALUE"),
        ("image,caption\n1,a\n", ListOptions(where=["caption=b"]), "no rows with caption=b"),
        ("image,caption\n1,a\n", ListOptions(min_score=["clip=5"]), "'clip' .--min-score"),
        ("image,caption\n1,a\n", ListOptions(min_score=["clip"]), "COLUMN=NUMBER, not 'clip'"),
        ("image,caption\n1,a\n", ListOptions(min_score=["clip=nan"]), "COLUMN=NUMBER, not"),
    ],
)
def test_lists_that_cannot_be_read_say_what_to_do(tmp_path, text, options, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_source(tmp_path / "list.csv", options)


def test_places_that_are_no_source_say_so(tmp_path):
    make_files(tmp_path, "letter.txt", "empty/letter.txt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        read_source(tmp_path / "letter.txt")
    with pytest.raises(ValueError, match="no images"):
        read_source(tmp_path / "empty")


def test_labels_are_found_by_key_name_folder_spelling_and_number(tmp_path):
    (tmp_path / "names.txt").write_text("n01\tbig cat\nn02\tdog\n7\tbird\n")
    space = read_label_space(str(tmp_path / "names.txt"))
    assert space.names == ("big cat", "dog", "bird")
    found = [space.number_of(x) for x in ("n02", "big cat", "big_cat", "7", 7, "1", 2)]
    assert found == [1, 0, 0, 2, 2, 1, 2]
    for label in ("cow", "3", 3, -5):
        with pytest.raises(ValueError, match=str(label)):
            space.number_of(label)
    for text, message in (("n1\tcat\ndog\n", "1 of 2 lines"), ("n1\tcat\nn1\tdog\n", "twice")):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_label_space(str(tmp_path / "names.txt"))


@pytest.mark.slow
def test_imagenets_names_are_built_in_and_names_that_occur_twice_need_keys():
    space = read_label_space("imagenet")
    assert (len(space.names), space.number_of("n01440764"), space.names[0]) == (1000, 0, "tench")
    space = LabelSpace(("crane", "crane"), ("bird", "machine"))
    assert space.number_of("machine") == 1
    with pytest.raises(ValueError, match="crane"):
        space.number_of("crane")


def test_labels_found_become_names_in_sorted_order_but_for_numbers_of_lists():
    space = collect_label_space(["sea_lion", "ant", "sea lion"])
    assert space.names == ("ant", "sea lion")
    assert space.number_of("sea_lion") == 1
    for label in ("3", 3):
        with pytest.raises(ValueError, match="--class-names"):
            refuse_numbers(["cat", label], "list.csv")
    assert collect_label_space(["0", "1"]).names == ("0", "1")
    with pytest.raises(ValueError, match="rename"):
        collect_label_space(["caf\udce9"])


@pytest.mark.parametrize("extra", ["a.tar", "cat.parquet", "train_map.txt"])
def test_class_folders_with_other_things_in_them_stay_class_folders(tmp_path, extra):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / extra).write_bytes(b"{}")
    (tmp_path / "self").symlink_to("self")
    source = read_source(tmp_path)
    assert [item.name for item in source.items] == ["cat/1.jpg", "self"]
    assert sum(source.passed_over.values()) == 1


OWN = """
from unicl_fast.packing.sources.items import Item
from unicl_fast.packing.sources.read_sources import SourceKind
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


@pytest.mark.usefixtures("checked")
def test_a_kind_is_a_file_and_a_line(tmp_path, monkeypatch):
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
