"""A shop's export is packed as it is; each guess is said, and an option switches it off."""

import csv
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_sources import outcomes, read_source, texts, write_tar
from pack_runs import build_set, jpeg, samples_of

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.data import all_descriptions
from unicl_fast.packing.sources.cells import attributes_in, images_in, without_html
from unicl_fast.packing.sources.items import PATH
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.spool import Spool

MEN, WOMEN = "All/Men/Tops/Tees", "All/Women/Tops/Tees,All,All/Women,All/Sale/Eco &amp; fair"
ROWS = [
    # sku, type, categories, name, base_image, additional_images, additional_attributes
    ("T1-S-Red", "simple", MEN, "Ada Tee", "/1.jpg", "", "size=S,color=Red"),
    ("T1-M-Red", "simple", MEN, "Ada Tee", "/1.jpg", "", "size=M,color=Red"),
    ("T1-S-Blue", "simple", MEN, "Ada Tee", "/2.jpg", "/3.jpg,/4.jpg", "size=S,color=Blue"),
    ("T1", "parent", MEN, "Ada <b>Tee</b>&reg;", "/1.jpg", "", "material=Wool|Hemp, soft"),
    (
        "T2-S",
        "simple",
        "All/Women/Tops/Tees",
        "<p>Bo&nbsp;Top</p><p>&bull; soft</p>",
        "/5.jpg",
        "",
        "color=Red",
    ),
    ("T3", "simple", WOMEN, "Cy <3 Top", "/6.jpg", "/gone.jpg", "color="),
]
HEADER = (
    *("sku", "product_type", "categories", "name", "base_image"),
    *("additional_images", "additional_attributes"),
)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """The list of a shop, whose photographs are in media/."""
    (tmp_path / "media").mkdir()
    for number in range(1, 7):
        (tmp_path / "media" / f"{number}.jpg").write_bytes(jpeg(number))
    with (tmp_path / "export.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *ROWS])
    return tmp_path / "export.csv"


def labels(*paths: str) -> list[str]:
    return [path.replace("/", PATH) for path in paths]


def test_an_export_is_packed_as_it_is(export, tmp_path, pack, checked):
    text = pack("build", export, "--out", tmp_path / "none", code=2)
    assert f"not one of 7 images is there, such as '/1.jpg' in {tmp_path}. It is in" in text
    assert f"add --image-root {tmp_path}/media" in text
    out = tmp_path / "out"
    text = pack("build", export, "--image-root", tmp_path / "media", "--out", out)
    found = {one.name: one for one in samples_of(out)}
    assert list(found) == [f"/{number}.jpg" for number in range(1, 7)]
    assert found["/1.jpg"].captions == ("Ada Tee", "Ada Tee ®")
    assert found["/2.jpg"].captions == found["/4.jpg"].captions == ("Ada Tee",)
    assert found["/5.jpg"].captions == ("Bo Top • soft",)
    assert found["/6.jpg"].captions == ("Cy <3 Top",)
    assert found["/1.jpg"].labels == ["Men Tops Tees"]
    assert found["/6.jpg"].labels == ["Women Tops Tees", "Eco & fair"]
    with PackedDataset(out) as dataset:
        assert [
            one.group for one in sorted(all_descriptions(dataset), key=lambda one: one.name)
        ] == [*("T1", "T1", "T1", "T1", "T2-S", "T3")]
    manifest = Manifest.load(out)
    assert manifest.hierarchy is not None
    names = (*manifest.class_names, *manifest.hierarchy.names)
    chains = [[names[n] for n in chain] for chain in manifest.hierarchy.chains()]
    assert ["Men", "Men Tops", "Men Tops Tees"] in chains
    assert ["Sale", "Eco & fair"] in chains
    for line in (
        "note: 4 columns chosen by their names: base_image, additional_images, name, categories\n",
        "note: 6 cells of categories read as paths below All, such as Men > Tops > Tees (--cells); "
        "no row has only Sale, which may say nothing of an image: "
        "--label-column 'categories=^(Men|Women)' leaves them out\n",
        "note: 6 rows grouped by their sku or one that it continues (--group-column)",
        "note: 2 rows with several images: each is a sample (--cells)\n",
        "note: 3 texts from which HTML tags and entities were removed (--cells)\n",
        "note: 6 paths that begin with / found below the image root\n",
        "left out: 1, listed in",
        "hierarchy: 3 of 3 classes placed, 5 classes above\n",
        "prompts: 1 template for each class; the first: 'a photo of a Eco & fair.'\nfirst capt",
    ):
        assert line in text


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_option_says_otherwise(export, tmp_path, kind):
    if kind == "parquet":
        columns = zip(*ROWS, strict=True)
        pq.write_table(pa.table(dict(zip(HEADER, map(list, columns), strict=True))),
                       export := tmp_path / "export.parquet")  # fmt: skip
    root: Any = {"image_root": str(tmp_path / "media")}

    def read(**options: Any) -> dict[str, tuple[list[str], list[str | int]]]:
        with Spool(tmp_path / f"spool-{next(builds)}") as spool:  # as builds of other options have
            source = read_source(export, ListOptions(**options, **root), spool)
            groups.update({item.name: item.groups for item in source.items})
            return texts(source)

    groups, builds = dict[str, list[str]](), itertools.count()
    found = read()
    assert list(found) == [f"/{number}.jpg" for number in range(1, 7)]
    assert found["/6.jpg"][1] == labels("Women/Tops/Tees", "Sale/Eco & fair")
    assert groups["/1.jpg"] == ["T1"]
    assert sorted(groups["/4.jpg"]) == ["/2.jpg", "T1"]
    assert groups["/5.jpg"] == ["T2-S"]
    some = read(label_column=["categories=^(Men|Women)/", "color=Red"])
    assert some["/1.jpg"] == (["Ada Tee", "Ada Tee ®"], [*labels("Men/Tops/Tees"), "Red"])
    assert some["/6.jpg"] == (["Cy <3 Top"], labels("Women/Tops/Tees"))
    assert list(read(cells="first")) == ["/1.jpg", "/2.jpg", "/5.jpg", "/6.jpg"]
    named = {"image_column": "base_image", "caption_column": ["name"]}
    assert read(**named)["/5.jpg"] == (["Bo Top • soft"], [])
    plain = read(**named, label_column="categories", cells="plain")
    assert plain["/5.jpg"] == ([ROWS[4][3]], [ROWS[4][2]])
    assert groups["/1.jpg"] == []
    # attributes are columns, and a caption can be made of several
    both = {"caption_column": ["{name} in {color}", "material"], "label_column": ["color"]}
    found = read(**both, group_column="sku=-(.)", where=["color=Red"])
    assert found == {
        "/1.jpg": (["Ada Tee in Red"], ["Red"]),
        "/5.jpg": (["Bo Top • soft in Red"], ["Red"]),
    }
    assert groups["/1.jpg"] == ["S", "M"]
    assert read(**both)["/1.jpg"] == (["Ada Tee in Red", "Wool", "Hemp, soft"], ["Red"])
    assert "/6.jpg" not in read(**both)  # its colour is blank
    with pytest.raises(ValueError, match=r"no column 'colour' \(--label-column\); .*color, mate"):
        read(label_column="colour")
    with pytest.raises(ValueError, match="usual name with images"):
        read(cells="plain")


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_image_that_is_missing_or_no_name_costs_only_itself(export, tmp_path, kind):
    images = ["gone.jpg,1.jpg,2.jpg", "lost.jpg,2.jpg", r'["\ud800.jpg"]', "3.jpg"]
    table = {"images": images, "title": list("abcd")}
    if kind == "csv":
        with export.open("w", newline="") as file:
            csv.writer(file).writerows([table, *zip(*table.values(), strict=True)])
    else:
        pq.write_table(pa.table(table), export := tmp_path / "export.parquet")
    with Spool(tmp_path / "spool") as spool:
        options = ListOptions(image_root=str(tmp_path / "media"))
        source = read_source(export, options, spool)
        found = outcomes(source)
        assert texts(source)["2.jpg"][0] == ["a", "b"]
    assert [found.pop(f"{number}.jpg") for number in (1, 2, 3)] == ["read"] * 3
    assert found.pop("gone.jpg") == found.pop("lost.jpg") == "missing"
    assert list(found.values()) == ["missing" if kind == "csv" else "bad row"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_column": "sku=(", "split": 0.5}, "must be COLUMN or COLUMN=EXPRESSION: '[(]'"),
        ({"cells": "some"}, "--cells must be one of all, first, plain, not 'some'"),
    ],
)
def test_options_that_cannot_work_are_refused(export, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_set([export], tmp_path / "out", image_root=str(tmp_path / "media"), **options)


@pytest.mark.parametrize(
    ("header", "row", "group"),
    [
        ("SKU,Parent,Images,Name", 'A-1,A,"1.jpg, 2.jpg",x', ["A", "1.jpg"]),
        ("Variant SKU,Handle,Image Src,Title", "A-1,tee,1.jpg,x", ["tee"]),
        ("id,parent,image,caption", "7,70,1.jpg,x", []),
    ],
)
def test_parents_are_found_by_the_columns_of_other_shops(tmp_path, header, row, group):
    for number in (1, 2):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "list.csv").write_text(f"{header}\n{row}\n")
    item = next(iter(read_source(tmp_path / "list.csv").items))
    assert (item.name, item.captions, sorted(item.groups)) == ("1.jpg", ["x"], sorted(group))


def test_paths_of_labels_are_told_from_names(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))

    def read(*cells: str) -> set[str | int]:
        rows = [json.dumps({"image": "1.jpg", "label": cell}) for cell in cells]
        (tmp_path / "list.jsonl").write_text("\n".join(rows))
        (item,) = read_source(tmp_path / "list.jsonl").items
        return set(item.labels)

    for names in (("T-shirt/top", "Coat", "Dress", "Bag"), ("AC/DC", "n/a"), ("a, b", "c")):
        assert read(*names) == set(names)
    assert read("Home &gt; Sofas, Sale", "Home > Beds", "Sale") == {
        *labels("Home/Sofas", "Home/Beds"), "Sale"
    }  # fmt: skip
    assert read("R/a/x;R/b", "R/a/y|R/a", "R") == set(labels("a/x", "b", "a/y"))


def test_cells_are_read_as_shops_write_them():
    assert images_in("a.jpg, b.PNG|c.webp;d.jpeg\ne.gif") == [
        *("a.jpg", "b.PNG", "c.webp", "d.jpeg", "e.gif")
    ]
    assert images_in('["a,b", "c"]') == images_in(["a,b", None, "c"]) == ["a,b", "c"]
    for one in ("Smith, John.jpg", "https://h/a,b.jpg", "[x].jpg", "a.jpg"):
        assert images_in(one) == [one]
    assert attributes_in("a=1,b=x, y|z,c=") == {"a": ["1"], "b": ["x, y", "z"], "c": [""]}
    assert attributes_in('{"a": 1}') == attributes_in({"a": 1}) == {"a": 1}
    for other in ("x, a=1", "no", '<a href="x">', None, "{"):
        assert attributes_in(other) == {}
    assert without_html("<h2>Big</h2><p>sea &amp;amp; <br/>air</p>") == "Big sea & air"
    for text in ("a <unk> b  <3", "R&D", "x < y > z", "&;"):
        assert without_html(text) is text


@pytest.mark.parametrize("piece", ["<a", "<!--", "<b ", "&", "</p", "&#1", "<p>", "a/", ",a=", " "])
def test_hostile_cells_cost_linear_time(tmp_path, piece):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    cell = piece * (90_000 // len(piece)) + "!"
    row = {"image": "1.jpg", "name": cell, "categories": cell, "attributes": cell}
    (tmp_path / "list.json").write_text(json.dumps([row, row | {"image": cell}]))
    start = time.process_time()
    source = read_source(tmp_path / "list.json", ListOptions(where=["image=1.jpg"]))
    # a manifest with so long a label could not be read; of "<p>" only "!" is left
    assert outcomes(source) == {"1.jpg": "read" if piece == "<p>" else "bad row"}
    attributes_in(cell)
    assert time.process_time() - start < 5  # seconds; a quadratic way needs more than ten


def test_fields_of_tars_make_captions_and_groups(tmp_path):
    fields = json.dumps({"name": "Tee", "color": "red", "sku": "T1-S"}).encode()
    path = write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.json": fields})
    options = ListOptions(
        caption_column=["{name}, {color}"], group_column="sku=^[^-]+", label_column="name=^T"
    )
    (item,) = read_source(path, options).items
    assert (item.captions, item.labels, item.groups) == (["Tee, red"], ["Tee"], ["T1"])
