"""`unicl-pack build`, from files to a data set."""

import io
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pack_runs import build_set, contents, jpeg, left_out, samples_of, write_photos
from PIL import Image
from waiting import wait_until

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.text.class_lists import SIMPLE_TEMPLATES

PROGRAM = (sys.executable, "-m", "unicl_fast.tools.pack", "build")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 sound images in 3 classes, 1 to be encoded anew, 2 that are none."""
    root = write_photos(tmp_path_factory.mktemp("images"), range(90), ("cat", "sea_lion", "dog"))
    Image.new("RGBA", (9, 7), "red").save(root / "cat" / "alpha.png")
    (root / "dog" / "cut.jpg").write_bytes(jpeg(1)[:300] + b"\xff\xd9")
    (root / "dog" / "page.jpg").write_text("<html>")
    (root / "readme.txt").write_text("hello")
    return root


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedDataset]:
    out = tmp_path_factory.mktemp("packed") / "set"
    build_set([folder], out, workers=2)
    with PackedDataset(out) as dataset:
        yield dataset


def test_every_sound_image_is_packed_with_its_class_and_the_others_are_listed(packed, folder):
    assert packed.manifest.class_names == ("cat", "dog", "sea lion")
    assert packed.manifest.templates == SIMPLE_TEMPLATES
    samples = samples_of(packed.folder)
    for one in samples:
        assert one.labels == [one.name.split("/")[0].replace("_", " ")]
        if not one.name.endswith("alpha.png"):
            assert one.image == (folder / one.name).read_bytes()
    assert len({one.name for one in samples}) == len(samples) == 91
    kinds = {name: kind for name, (kind, _) in left_out(packed.folder).items()}
    assert kinds == {"dog/cut.jpg": "damaged", "dog/page.jpg": "not an image"}
    assert packed.manifest.num_quarantined == 2


def test_the_number_of_workers_leaves_no_trace(packed, folder, tmp_path):
    build_set([folder], tmp_path / "one")
    assert contents(tmp_path / "one") == contents(packed.folder)


def test_the_program_says_what_it_did_and_what_comes_next(folder, tmp_path, pack):
    out = str(tmp_path / "set")
    options = ("--out", out, "--workers", "1", "--license", "CC-BY-4.0")
    text = pack("build", folder, *options)
    assert Manifest.load(out).license == "CC-BY-4.0"
    assert "91 images, 0 captions, 91 labels of 3 classes" in text
    assert "1 re-encoded as JPEG q95, 90 copied unchanged" in text
    assert "passed over: 1 .txt file\n" in text
    assert "dog/page.jpg: no known image format" in text
    assert f"unicl-pretrain --preset auto --data.train {out} --out runs/first" in text


@pytest.mark.usefixtures("checked")
def test_what_is_repeated_or_held_out_is_said(folder, tmp_path, pack):
    out = tmp_path / "held-out Äpfel"
    text = pack("build", folder, folder, "--out", out)
    assert f"note: 91 images of {out} that an earlier sample has too, byte for byte: " in text
    assert f"next: unicl-pretrain --preset auto --data.train TRAIN --data.evaluate '{out}'" in text


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize(("names", "warns"), [(("00", "42"), True), (("00", "cat"), False)])
def test_class_names_that_are_numbers_are_warned_of(tmp_path, pack, names, warns):
    for name in names:
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpg").write_bytes(jpeg(1))
    arguments = (str(tmp_path / "in"), "--workers", "1", "--out")
    text = pack("build", *arguments, str(tmp_path / "set"))
    assert ("WARNING: the class names are keys (00, 42)" in text) == warns
    assert ("--class-names FILE" in text) == warns
    (tmp_path / "names").write_text("".join(f"{name}\tclass {name}\n" for name in names))
    named = ("--class-names", str(tmp_path / "names"))
    text = pack("build", *arguments, str(tmp_path / "named"), *named)
    assert "2 classes" in text
    assert "WARNING" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "OUT"], "nowhere"),
        (["FOLDER", "--out", "FOLDER"], "not an empty folder"),
        (["FOLDER", "--out", "OUT", "--resize", "256"], "short:PIXELS"),
        (["FOLDER", "--out", "OUT", "--resize", "square:0"], "square:PIXELS"),
        (["FOLDER", "--out", "OUT", "--resize", "square:20000"], "400,000,000 pixels; at most"),
        (["FOLDER", "--out", "OUT", "--resize", "square:9", "--max-pixels", "80"], "at most 80"),
        (["FOLDER", "--out", "OUT", "--format", "png", "--quality", "90"], "--format png"),
        (["FOLDER", "--out", "OUT", "--format", "raw", "--quality", "90"], "--format raw"),
        (["FOLDER", "--out", "OUT", "--quality", "90"], "--quality would change nothing"),
        (["FOLDER", "--out", "OUT", "--image-seconds", "-1"], "--image-seconds"),
        (["FOLDER", "--out", "OUT", "--class-names", "NAMES"], "'cat' is not among"),
        (["FOLDER", "--out", "OUT", "--license", "x" * 11_000], "license has a text of 11,000"),
        (["FOLDER", "--out", "NAMES"], "name another"),
        (["FOLDER", "--out", "NAMES/set"], "name another"),
        (["FOLDER", "--out", "s3://bucket/set", "--engine", "ray"], "--engine ray needs a folder"),
        (["--out", "OUT"], "at least one source"),
        (["FOLDER"], "--out"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(folder, tmp_path, pack, arguments, message):
    (tmp_path / "names").write_text("bird\n")
    places = {"FOLDER": folder, "OUT": tmp_path / "out", "NAMES": tmp_path / "names"}
    places["NAMES/set"] = tmp_path / "names" / "set"
    errors = pack("build", *(places.get(word, word) for word in arguments), code=2)
    assert message in errors
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == ["names"]


@pytest.mark.usefixtures("checked")
def test_nothing_to_pack_is_an_error_and_leaves_nothing(tmp_path, pack):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "1.jpg").write_text("no image")
    (tmp_path / "in" / "0.tar").touch()
    errors = pack("build", tmp_path / "in", "--out", tmp_path / "out", code=2)
    assert "nothing could be packed: 1 not an image" in errors
    assert "passed over: 1 .tar file" in errors
    assert os.listdir(tmp_path) == ["in"]


def test_a_stopped_build_leaves_nothing(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        big = io.BytesIO()
        Image.effect_noise((1600, 1200), 90).save(big, format="JPEG")
        for index in range(150):  # three seconds of work
            archive.writestr(f"cat/{index}.jpg", big.getvalue())
    process = subprocess.Popen(
        [*PROGRAM, tmp_path / "many.zip", "--workers", "1", "--out", tmp_path / "out"],
        stderr=subprocess.PIPE,
        # a shell that starts tests behind itself lets its children ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_until(
        lambda: (
            process.poll() is not None
            or any(path.stat().st_size for path in tmp_path.glob("out.partial/set/shard-*.tar"))
        )
    )
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert b"Traceback" not in errors
    assert os.listdir(tmp_path) == ["many.zip"]


@pytest.mark.usefixtures("checked")
def test_classes_get_their_places_in_a_hierarchy(folder, tmp_path, pack):
    """By WordNet-style keys with words; some name no class."""
    (tmp_path / "is_a.txt").write_text("n1 n2\nn2 n3\nn2 n4\nn9 n8\n")
    words = "n1\tanimal, beast\nn2\tmammal\nn3\tcat, true cat\nn4\tsea lion\nn8\tox\n"
    (tmp_path / "words.txt").write_text(words)
    options = ("--hierarchy", tmp_path / "is_a.txt", "--hierarchy-names", tmp_path / "words.txt")
    text = pack("build", folder, "--out", tmp_path / "set", *options)
    assert "hierarchy: 2 of 3 classes placed, 2 classes above" in text
    manifest = Manifest.load(tmp_path / "set")
    names = (*manifest.class_names, *manifest.hierarchy.names)
    chains = [[names[one] for one in chain] for chain in manifest.hierarchy.chains()[:3]]
    assert chains == [["animal", "mammal", "cat"], ["dog"], ["animal", "mammal", "sea lion"]]


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hierarchy": '{"ox": "cow"}'}, "places none of the 3 classes .cat, dog, sea lion, ...."),
        ({"hierarchy": '{"cat": "dog", "dog": "cat"}'}, "above itself"),
        ({"hierarchy_names": "words.txt"}, "say how --hierarchy FILE is read: give that too"),
    ],
)
def test_a_hierarchy_of_other_classes_is_refused_before_anything_is_packed(
    folder, tmp_path, options, message
):
    if "hierarchy" in options:
        (tmp_path / "tree.json").write_text(options["hierarchy"])
        options = {"hierarchy": str(tmp_path / "tree.json")}
    with pytest.raises(ValueError, match=message):
        build_set([folder], tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()
