"""COCO's JSON files, Karpathy's splits, JSON arrays as lists, maps of zips, and JSON in pieces."""

import json
from pathlib import Path
from typing import Any

import pytest
from foreign_sources import outcomes, read, read_source, texts, write_zip
from hypothesis import given
from hypothesis import strategies as st
from pack_runs import jpeg
from property_tests import examples

from unicl_fast.packing.sources.json_pieces import iter_elements
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.read_sources import read_sources
from unicl_fast.packing.sources.rows import LEFT_OUT
from unicl_fast.packing.sources.spool import Spool

CAPTIONS = {
    "info": {"year": 2017},
    "images": [{"id": 1, "file_name": "1.jpg", "height": 8}, {"id": 2, "file_name": "2.jpg"}],
    "licenses": [],
    "annotations": [
        {"image_id": 1, "id": 10, "caption": "one"},
        {"image_id": 2, "id": 11, "caption": "two"},
        {"image_id": 1, "id": 12, "caption": "eins"},
    ],
}
INSTANCES = {
    "annotations": [
        {"image_id": 2, "category_id": 90, "segmentation": [[1.5] * 8], "iscrowd": 0},
        {"image_id": 3, "category_id": 1},
        {"image_id": 2, "category_id": 90},
        {"image_id": 2, "category_id": 1},
    ],
    "images": [{"id": 2, "file_name": "2.jpg"}, {"id": 3, "file_name": "3.jpg"}],
    "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """COCO's own layout."""
    for folder in ("annotations", "val2017"):
        (tmp_path / folder).mkdir()
    for number in (1, 2, 3):
        (tmp_path / "val2017" / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(CAPTIONS))
    (tmp_path / "annotations" / "instances_val2017.json").write_text(
        json.dumps(INSTANCES, indent=2)
    )
    return tmp_path


def test_captions_and_instances_meet_at_the_image(coco):
    places = [str(path) for path in sorted((coco / "annotations").iterdir())]
    (source,) = read_sources(places, ListOptions(), Spool(coco / "spool"))
    assert source.name == "captions_val2017.json+instances_val2017.json"
    assert texts(source) == {
        "1.jpg": (["one", "eins"], []),
        "2.jpg": (["two"], ["toothbrush", "person"]),
        "3.jpg": ([], ["person"]),
    }
    assert [read(item) for item in source.items] == [jpeg(1), jpeg(2), jpeg(3)]
    alone = read_source(places[1], ListOptions(image_root=str(coco / "val2017")))
    assert texts(alone).keys() == {"2.jpg", "3.jpg"}
    again = [places[0], *places, places[0]]  # named several times, read once
    (once,) = read_sources(again, ListOptions(), Spool(coco / "spool"))
    assert (once.name, len(once.items)) == (source.name, 3)


def test_images_are_found_in_zips_and_in_a_folder_called_images(coco):
    place = str(coco / "annotations" / "captions_val2017.json")
    write_zip(coco / "val2017.zip", {f"val2017/{number}.jpg": jpeg(number) for number in (1, 2)})
    (coco / "val2017").rename(coco / "images")
    assert set(outcomes(read_source(place)).values()) == {"read"}
    (coco / "val2017.zip").unlink()
    assert set(outcomes(read_source(place)).values()) == {"read"}
    (coco / "images").rename(coco / "elsewhere")
    with pytest.raises(ValueError, match=f"It is in .*: add --image-root {coco}/elsewhere"):
        read_source(place)


def test_filters_of_rows_are_refused(coco):
    place = str(coco / "annotations" / "captions_val2017.json")
    message = r"(json|annotations|val2017) has no columns: leave --where and --min-score out"
    (coco / "val2017" / "1.txt").touch()
    for each in (place, coco / "annotations", coco / "val2017"):
        for options in (ListOptions(where=["split=val"]), ListOptions(min_score=["clip=0.3"])):
            with pytest.raises(ValueError, match=message):
                read_source(each, options)


def test_entries_that_lie_are_named(coco):
    images: list[Any] = [
        {"id": 1, "file_name": "1.jpg"},
        {"id": 1, "file_name": "2.jpg"},
        {"id": 3, "file_name": "3.jpg"},
        {"id": 4, "file_name": "../annotations/x.json"},
        {"id": 5, "file_name": "gone.jpg"},
        {"id": [6], "file_name": "6.jpg"},
        {"id": 7},
        8,
    ]
    annotations: list[Any] = [
        {"image_id": 1, "caption": "fine"},
        {"image_id": 3, "category_id": 5_000_000},
        {"image_id": 9, "caption": "of no image"},
        {"image_id": None, "caption": "x"},
        {"image_id": 1},
        7,
    ]
    path = coco / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    source = read_source(path)
    assert outcomes(source) == {
        **{"1.jpg": "read", "2.jpg": "ambiguous", "3.jpg": "bad row", "gone.jpg": "missing"},
        **{"../annotations/x.json": "outside", "image [6]": "bad row", "image 7": "bad row"},
        "image None": "bad row",
    }
    assert source.passed_over == {
        "annotations of images that are not listed": 1,
        "annotations that cannot be read": 3,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [], "x": 1}', "no COCO file.*it has: none"),
        ('{"annotations": [{"image_id": 1, "caption": "x"}]}', "it has: annotations"),
        (json.dumps(CAPTIONS)[:-40], "cannot be read as JSON"),
        ('{"images": [' + "[" * 100_000, "nested too deeply|cannot be read"),
        ("\ufeff", "cannot be read as JSON: expected an array or an object: line 1 column 2"),
        ('{"images": [{"id": 1 "file_name"', "Expecting ',' delimiter: line 1 column 22"),
        ('{"images": []} x', "extra data: line 1 column 16"),
        ('{"images": [1}', "expected a comma or ]: line 1 column 14"),
    ],
)
def test_what_is_no_coco_file_is_refused_in_a_sentence(coco, text, message):
    path = coco / "annotations" / "captions_val2017.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_source(path)
    assert "captions_val2017.json" in str(caught.value)


def test_maps_of_zips_are_read_as_swin_and_unicl_write_them(tmp_path):
    for name in ("train.zip", "00001.zip"):
        write_zip(tmp_path / name, {f"n01440764/a b{n}.JPEG": jpeg(n) for n in (1, 2)})
    (tmp_path / "train_map.txt").write_text(
        "n01440764/a b1.JPEG\t0\r\n"
        "00001.zip@/n01440764/a b2.JPEG\t999\n"
        "00001.zip@n01440764/a b1.JPEG\t-1\n"
        "gone.zip@x.JPEG\t1\n"
        "../x/00001.zip@n01440764/a b1.JPEG\t1\n"
        "n01440764/gone.JPEG\t3\n"
        "no label\n"
    )
    source = read_source(tmp_path / "train_map.txt")
    assert texts(source) == {
        "n01440764/a b1.JPEG": ([], [0]),
        "00001.zip@/n01440764/a b2.JPEG": ([], [999]),
    }
    assert [read(item) for item in list(source.items)[:2]] == [jpeg(1), jpeg(2)]
    assert list(outcomes(source).values())[2:] == [
        *("no text", "missing", "outside", "missing", "bad row")
    ]
    elsewhere = ListOptions(image_root=str(tmp_path / "00001.zip"))
    assert outcomes(read_source(tmp_path / "train_map.txt", elsewhere)) == outcomes(source)
    (tmp_path / "train.zip").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.zip"):
        read_source(tmp_path / "train_map.txt")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def pieces_of(value: Any) -> list[tuple[str, Any]]:
    """What `iter_elements` should give, by Python's own reader."""
    if isinstance(value, list):
        return [("", element) for element in value]
    return [
        (name, element)
        for name, entry in value.items()
        for element in (entry if isinstance(entry, list) else [entry])
    ]


@given(
    value=st.lists(VALUES, max_size=6) | st.dictionaries(st.text(), VALUES, max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    cut=st.floats(0, 1, exclude_max=True),
)
@examples(60)
def test_json_in_pieces_is_json(tmp_path_factory, value, indent, cut):
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert list(iter_elements(path)) == pieces_of(value)
    path.write_text(text[: int(cut * len(text))], encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ValueError, match=r"a\.json"):
        list(iter_elements(path))


SPLITS = ("train", "val", "test", "restval")


@pytest.fixture
def file(tmp_path: Path, shared_data: Path) -> Path:
    """Sixteen images of Flickr8k, four of each split, in the form of dataset_coco.json."""
    flickr = shared_data / "captions" / "flickr8k"
    lines = (flickr / "captions.jsonl").read_text().splitlines()[:16]
    images: list[dict[str, Any]] = []
    for number, sample in enumerate(map(json.loads, lines)):
        sentences = [
            {"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": n}
            for n, text in enumerate(sample["captions"])
        ]
        place = {"filepath": "images", "filename": Path(sample["image"]).name}
        own = {"imgid": number, "split": SPLITS[number % 4], "sentences": sentences}
        images.append(place | own)
    path = tmp_path / "dataset_flickr8k.json"
    path.write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    return path


@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ((), range(16)),
        (("split=test",), range(2, 16, 4)),
        (("split=train",), [n for n in range(16) if n % 4 in (0, 3)]),
        (("split=restval",), range(3, 16, 4)),
    ],
)
@pytest.mark.parametrize("folder", ["", "images"])
def test_a_split_has_its_images_with_all_their_captions(file, shared_data, where, numbers, folder):
    flickr = shared_data / "captions" / "flickr8k"
    options = ListOptions(image_root=str(flickr / folder), where=where)
    source = read_source(file, options)
    lines = (flickr / "captions.jsonl").read_text().splitlines()[:16]
    expected = [json.loads(lines[number]) for number in numbers]
    assert [item.captions for item in source.items] == [one["captions"] for one in expected]
    for item, one in zip(source.items, expected, strict=True):
        assert item.problem is None
        assert item.entry.read() == (flickr / one["image"]).read_bytes()
    assert source.passed_over[LEFT_OUT] == 16 - len(expected)


def test_a_split_that_is_not_there_is_refused_with_those_that_are(file):
    with pytest.raises(ValueError, match=r"split=dev; its splits are train \(4\), val \(4\)"):
        read_source(file, ListOptions(where=("split=dev",)))


def test_what_cannot_be_packed_is_named(file):
    content = json.loads(file.read_text())
    content["images"] = content["images"][:4]
    changes: list[dict[str, Any]] = [
        {"filename": 7},
        {"sentences": []},
        {"sentences": [{"raw": ["x", 3]}]},
        {"filename": "../x"},
    ]
    for image, changed in zip(content["images"], changes, strict=True):
        image |= changed
    content["images"][1]["filename"] = file.name  # something that is there
    content["images"][1]["filepath"] = ""
    content["images"].append(None)
    file.write_text(json.dumps(content))
    source = read_source(file)
    kinds = [item.problem.kind for item in source.items if item.problem]
    assert kinds == ["bad row", "no text", "bad row", "outside", "bad row"]
