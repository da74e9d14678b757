"""`unicl-pack inspect`, its page, and what its list leaves out of a build."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inline_checks import check_inline
from pack_runs import build_set, jpeg, samples_of
from pages import Page
from PIL import Image

from unicl_fast.packing.inspect import Inspection, inspect_dataset
from unicl_fast.tools.pack.__main__ import main

HOSTILE = "<script>parent.broken = broken = true</script><img src=x onerror=parent.broken=true>"
CLASSES = ["cat", "Cat", "dog & fox", '"><svg onload=parent.broken=true>', "empty"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photograph-like noise with labels and captions: copies, prompts, hostile texts."""
    root = tmp_path_factory.mktemp("inspect")
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []

    def add(image: Image.Image, kind: str = "jpg", **texts: Any) -> None:
        name = f"{len(rows):03d}.{kind}"
        image.save(root / name, quality=90)
        rows.append({"image": name, **texts})

    for number in range(20):
        small = generator.integers(0, 256, (8, 8, 3), np.uint8)
        image = Image.fromarray(small).resize((96 + 8 * (number % 4), 120), 3)
        texts: dict[str, Any] = {"label": CLASSES[number % 4]}
        if number < 12:
            texts["captions"] = [f"a red bird on a tree {number}", "A photo of a dog & fox."]
        add(image, **texts)
        if number < 3:
            add(image, label=CLASSES[number], captions=[HOSTILE])  # the same bytes
        if number == 4:
            add(image.resize((300, 360)), "png", label="dog & fox")  # alike, and of another class
    (root / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (root / "names").write_text("\n".join(CLASSES))
    (root / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    with (root / "list.jsonl").open("a") as file:
        file.write('\n{"image": "cut.jpg", "label": "cat"}')
    options = {"class_names": str(root / "names"), "templates": "simple"}
    build_set([root / "list.jsonl"], root / "set", cells="plain", **options)
    return root / "set"


@pytest.fixture(scope="module")
def inspection(packed: Path) -> Inspection:
    return inspect_dataset(packed, workers=1, progress=False)


def test_the_numbers_are_those_of_the_data(inspection):
    assert (inspection.manifest.num_samples, inspection.manifest.num_labels) == (24, 24)
    assert dict(inspection.class_counts) == {
        "cat": 6, "Cat": 6, "dog & fox": 7, CLASSES[3]: 5, "empty": 0
    }  # fmt: skip
    assert inspection.manifest.num_captions == 2 * 12 + 3
    assert inspection.num_distinct_captions == 14
    assert inspection.repeated_captions[0] == ("a photo of a dog & fox .", 12)
    assert inspection.quarantined == {"damaged": 1}
    assert inspection.spreads["height"].largest == 360
    assert sum(inspection.spreads["width"].counts) == 24
    assert inspection.spreads["captions/image"].counts == (3, 12)


def test_copies_are_found_by_bytes_and_by_eye(inspection):
    assert (inspection.exact_copies.num_groups, inspection.exact_copies.num_surplus) == (3, 3)
    assert inspection.exact_copies.num_labels_differ == 0
    (group,) = inspection.near_copies.groups
    assert group.labels_differ
    assert len(group.samples) == 2
    assert 0 < max(group.distances) <= 4 or group.distances == (0, 0)


@pytest.fixture(scope="module")
def written(packed: Path, inspection: Inspection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program writes; the inspection itself is the one from above."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unicl_fast.packing.inspect.inspect_dataset", lambda *_, **__: inspection)
        main(["inspect", str(packed), "--html", str(folder / "page.html"), "--json",
              str(folder / "all.json"), "--duplicates-list", str(folder / "list.csv")])  # fmt: skip
    return folder


def test_the_page_needs_nothing_else_and_obeys_no_text(written):
    page = Page(written / "page.html")
    assert sum(tag == "img" for tag, _ in page.tags) == 24 + 6 + 2
    assert HOSTILE[:40] in page.text


def test_the_list_of_copies_can_be_left_out(packed, written):
    rows = list(csv.DictReader((written / "list.csv").open(newline="")))
    assert sorted(row["kind"] for row in rows) == ["duplicate"] * 3 + ["near duplicate"]
    main(["build", str(packed), "--leave-out", str(written / "list.csv"),
          "--out", str(written / "clean")])  # fmt: skip
    again = inspect_dataset(written / "clean", near=False, progress=False)
    assert (again.manifest.num_samples, again.exact_copies.num_groups) == (20, 0)
    assert again.near_copies is None
    found = json.loads((written / "all.json").read_text())
    assert found["class_counts"][0] == ["cat", 6]
    assert found["exact_copies"]["num_surplus"] == 3


def test_an_image_beyond_pillows_limit_ends_an_inspection_with_a_sentence(packed, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    check_inline(monkeypatch)
    with pytest.raises(ValueError, match=r"sample 0+ .*cannot be read .*Bomb.*--no-near"):
        inspect_dataset(packed, near=True)


def test_a_raw_set_is_described_by_its_pixels(tmp_path, pack):
    """Files of different bytes and names of different lengths, but the same pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), np.uint8)
    for name, content, level in (("cat/1", 0, 1), ("dog/a longer name", 0, 9), ("dog/2", 1, 1)):
        path = tmp_path / "in" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[content]).save(path, compress_level=level)
    build_set([tmp_path / "in"], tmp_path / "set", format="raw")
    text = pack(
        "inspect",
        *(tmp_path / "set", "--workers", 1, "--html", tmp_path / "page.html"),
        *("--json", tmp_path / "all.json", "--duplicates-list", tmp_path / "list.csv"),
    )
    assert "MB, kept as pixels" in text
    assert "exact copies: 1 in 1 group, labels differ in 1" in text
    found = json.loads((tmp_path / "all.json").read_text())
    sizes = found["spreads"]["bytes"]
    assert sizes["smallest"] == sizes["largest"] == 20 * 24 * 3
    assert found["near_copies"]["num_groups"] == 0
    (row,) = csv.DictReader((tmp_path / "list.csv").open(newline=""))
    assert row["kind"] == "duplicate"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "pixels.npy and 1 shard" in page


@pytest.mark.usefixtures("checked")
def test_a_list_that_does_not_tell_sources_called_alike_apart_is_refused(tmp_path, pack):
    """Else a copy's row would take the image that stays as well, and nobody would notice."""
    places = [tmp_path / folder / "train" for folder in "ab"]
    for number, place in enumerate(places):
        (place / "cat").mkdir(parents=True)
        for name in ("1", "2"):  # four equal images, and one of their own
            (place / "cat" / f"{name}.jpg").write_bytes(jpeg(1))
        (place / "cat" / f"own{number}.jpg").write_bytes(jpeg(2 + number))
    build_set(places, tmp_path / "all")
    pack("inspect", tmp_path / "all", "--no-near", "--duplicates-list", tmp_path / "copies.csv")
    rows = (tmp_path / "copies.csv").read_text().splitlines()
    assert len(rows) == 1 + 3
    before = set(os.listdir(tmp_path))
    for sources in (places, [tmp_path / "all"]):
        said = pack(
            *("build", *sources, "--leave-out", tmp_path / "copies.csv", "--out", tmp_path / "x"),
            code=2,
        )
        assert "of train in 1 row, and more samples are called so" in said
        assert "several sources are called train" in said
    assert set(os.listdir(tmp_path)) == before
    for name in ("1", "2"):  # who means all of them says so
        rows += [f"train,cat/{name}.jpg,,"] * 2
    (tmp_path / "copies.csv").write_text("\n".join(rows))
    for name, sources in (("built", places), ("again", [tmp_path / "all"])):
        build_set(sources, tmp_path / name, leave_out=str(tmp_path / "copies.csv"))
        assert {one.name for one in samples_of(tmp_path / name)} == {"cat/own0.jpg", "cat/own1.jpg"}


@pytest.mark.usefixtures("checked")
def test_a_name_that_is_not_utf_8_can_be_left_out(tmp_path):
    source = tmp_path / "in\udcff"
    (source / "cat").mkdir(parents=True)
    for number, name in enumerate((b"\xff.jpg", b"plain.jpg")):
        with open(bytes(source / "cat") + b"/" + name, "wb") as file:
            file.write(jpeg(number))
    (tmp_path / "out.csv").write_text(
        "source,name\nin\\udcff,cat/\\udcff.jpg\nother,cat/plain.jpg\nin\\udcff,cat/none.jpg\n"
    )
    build_set([source], tmp_path / "all")
    assert {one.name for one in samples_of(tmp_path / "all")} == {"cat/\udcff.jpg", "cat/plain.jpg"}
    for name, place in {"in": source, "all": tmp_path / "all"}.items():
        summary = build_set([place], tmp_path / f"of {name}", leave_out=str(tmp_path / "out.csv"))
        assert summary.passed_over == {f"images named in {tmp_path / 'out.csv'}": 1}
        assert {one.name for one in samples_of(tmp_path / f"of {name}")} == {"cat/plain.jpg"}
    with pytest.raises(ValueError, match=r"--leave-out .* not s3://bucket/list\.csv: copy it here"):
        build_set([source], tmp_path / "no", leave_out="s3://bucket/list.csv")
