"""Zips, lists and folders that lie, lead outside, or hold what is no file."""

import json
import os
import socket
import stat
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from foreign_sources import outcomes, read_source, write_zip
from pack_runs import build_set, left_out

from unicl_fast.packing.sources import trees
from unicl_fast.packing.sources.list_options import ListOptions

IMAGE = bytes(simplejpeg.encode_jpeg(np.full((8, 8, 3), 90, np.uint8)))


def member(name: str, mode: int = 0, *, system: int = 3) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = system
    info.external_attr = mode << 16
    return info


def test_zip_members_that_no_sound_zip_has_are_refused_by_name(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the name that is there twice
        for info in (
            member("cat/1.jpg", stat.S_IFREG | 0o644),
            member("cat/plain.jpg"),
            member("cat/dos.jpg", stat.S_IFLNK, system=0),
            member("../../cat/out.jpg"),
            member("/etc/cat/absolute.jpg"),
            member("cat/../up.jpg"),
            member("cat/link.jpg", stat.S_IFLNK | 0o777),
            member("cat/device.jpg", stat.S_IFCHR | 0o666),
            member("cat/fifo.jpg", stat.S_IFIFO | 0o666),
            member("cat/twice.jpg"),
            member("cat/twice.jpg"),
        ):
            archive.writestr(info, IMAGE)
    expected = {
        "cat/1.jpg": "read",
        "cat/plain.jpg": "read",
        "cat/dos.jpg": "read",
        "../../cat/out.jpg": "outside",
        "/etc/cat/absolute.jpg": "outside",
        "cat/../up.jpg": "outside",
        "cat/link.jpg": "unreadable",
        "cat/device.jpg": "unreadable",
        "cat/fifo.jpg": "unreadable",
        "cat/twice.jpg": "ambiguous",
    }
    assert outcomes(read_source(path)) == expected
    rows = ["image,caption", *(f"{name},text" for name in expected)]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    listed = read_source(tmp_path / "list.csv", ListOptions(image_root=str(path)))
    assert outcomes(listed) == expected


def two_members(path: Path) -> bytearray:
    return bytearray(write_zip(path, {"cat/1.jpg": IMAGE, "cat/2.jpg": IMAGE}).read_bytes())


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        (42, (0).to_bytes(4, "little"), "damaged"),  # the place of the other: overlapping
        (42, (2**31).to_bytes(4, "little"), "damaged"),  # far beyond the end
        (42, (9).to_bytes(4, "little"), "damaged"),  # no header there
        (20, (2**31).to_bytes(4, "little"), "damaged"),  # packed size
        (24, (2**31).to_bytes(4, "little"), "too large"),  # size
        (24, (5).to_bytes(4, "little"), "damaged"),  # less than there is: a bomb
        (16, bytes(4), "damaged"),  # checksum
        (10, (99).to_bytes(2, "little"), "unreadable"),  # method
        (8, b"\1", "unreadable"),  # encrypted
    ],
)
def test_a_directory_that_lies_costs_the_members_it_lies_about(tmp_path, field, value, kind):
    data = two_members(tmp_path / "set.zip")
    second = data.rindex(b"PK\x01\x02")
    data[second + field : second + field + len(value)] = value
    (tmp_path / "set.zip").write_bytes(data)
    found = outcomes(read_source(tmp_path / "set.zip"))
    assert found["cat/2.jpg"] == kind
    overlaps = field == 42 and value in (bytes(4), (9).to_bytes(4, "little"))
    assert found["cat/1.jpg"] == ("damaged" if overlaps else "read")


HARD_NAMES = [
    *("a\0b.jpg", "\ud800.jpg", "x" * 300 + ".jpg", "x/" * 40_000 + "1.jpg", "loop/1.jpg"),
    *("self.jpg", "~/1.jpg", "", ".", "./../1.jpg", "//etc/hostname", "con\nrow\r.jpg"),
]


def test_paths_in_lists_that_lead_nowhere_or_outside_are_listed(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "1.jpg").write_bytes(IMAGE)
    (root / "loop").symlink_to("loop")
    (root / "self.jpg").symlink_to("self.jpg")
    names = [*HARD_NAMES, "1.jpg", "./1.jpg", str(root / "1.jpg"), "/etc/hostname"]
    rows = [json.dumps({"image": name, "caption": "text"}) for name in names]
    (root / "list.jsonl").write_text("\n".join(rows))
    source = read_source(root / "list.jsonl")
    found = outcomes(source)
    good = {name for name, kind in found.items() if kind == "read"}
    # a whole path is taken where it leads inside the root
    assert good == {"1.jpg", "./1.jpg", str(root / "1.jpg")}
    assert found["/etc/hostname"] == found["//etc/hostname"] == "outside"
    assert len(source.items) == len(names)
    everywhere = read_source(root / "list.jsonl", ListOptions(image_root="/"))
    assert outcomes(everywhere)[str(root / "1.jpg")] == "read"


def row(image: str = '"1.jpg"', **fields: str) -> str:
    """A line of JSON; values are JSON already."""
    return "{" + ", ".join(f'"{k}": {v}' for k, v in {"image": image, **fields}.items()) + "}"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.usefixtures("checked")
def test_rows_that_cannot_be_are_left_out_and_the_others_stay(tmp_path):
    rows = [
        *(row(caption=nested(900)), row(caption=nested(100_000)), row(label="9" * 5000)),
        *(row(label="NaN"), row(image=nested(3), caption='"x"'), row(caption="{}")),
        *(row(captions=json.dumps([str(number) for number in range(70_000)])), "\udcff\udcfe"),
        *("[" * 100_000, "[1]", '{"image":', row(image='"gone.jpg"', caption='"x"')),
        *(row(image='""', caption='"x"'), row(label=f'"{"x" * 12_000}"')),
        row(image=f'"{"x/" * 70_000}1.jpg"', caption='"x"'),  # csv reads 131,072 characters
    ]
    lines = []
    for number, line in enumerate(rows):
        lines += [line.replace("1.jpg", f"bad-{number}.jpg")]
        lines += [row(image=f'"good-{number}.jpg"', caption='"x"')]
        for name in ("bad", "good"):
            (tmp_path / f"{name}-{number}.jpg").write_bytes(IMAGE)
    file = tmp_path / "list.jsonl"
    file.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    summary = build_set([file], tmp_path / "out")
    assert summary.manifest.num_samples == summary.manifest.num_quarantined == len(rows)
    # a number like any other, in no list of names
    file.write_text(row('"good-0.jpg"', label="9" * 4000))
    with pytest.raises(ValueError, match="label"):
        build_set([file], tmp_path / "no")


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_half_characters_and_no_numbers_cost_their_row_and_not_the_list(kind, tmp_path):
    rows = [
        '{"image": "0.jpg", "caption": "fine", "area": NaN}',
        r'{"image": "1.jpg", "caption": "half \ud800 of one"}',
        '{"image": "2.jpg", "caption": NaN}',
        r'{"image": "3.jpg", "caption": "fine", "label": "\udc00"}',
        r'{"image": "4.jpg", "caption": "whole \ud83d\ude00"}',
    ]
    for number in range(len(rows)):
        (tmp_path / f"{number}.jpg").write_bytes(IMAGE)
    text = f"[{', '.join(rows)}]" if kind == "json" else "\n".join(rows)
    (tmp_path / f"list.{kind}").write_text(text)
    source = read_source(tmp_path / f"list.{kind}")
    assert outcomes(source) == {
        "0.jpg": "read", "1.jpg": "bad row", "2.jpg": "bad row", "3.jpg": "bad row", "4.jpg": "read"
    }  # fmt: skip


def test_what_is_no_file_in_a_folder_neither_stops_nor_is_opened(tmp_path, monkeypatch):
    cat = tmp_path / "cat"
    cat.mkdir()
    (cat / "1.jpg").write_bytes(IMAGE)
    os.mkfifo(cat / "fifo.jpg")
    (cat / "zero.jpg").symlink_to("/dev/zero")
    (cat / "tape.jpg").symlink_to("/dev/full")
    (cat / "self.jpg").symlink_to("self.jpg")
    (cat / "gone.jpg").symlink_to("nowhere")
    (cat / "up").symlink_to("..")
    (cat / "mem.jpg").symlink_to("/proc/self/mem")  # a regular file that cannot be read
    monkeypatch.chdir(cat)  # the name of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
    opened = []
    real_open = os.open

    def watched(path: str, *arguments: int) -> int:
        opened.append(os.path.basename(path))
        return real_open(path, *arguments)

    monkeypatch.setattr(trees.os, "open", watched)
    found = outcomes(read_source(tmp_path))
    monkeypatch.undo()
    assert found.pop("cat/1.jpg") == "read"
    assert set(found.values()) == {"unreadable"}
    assert len(found) == 7
    assert {name for name in opened if name.endswith(".jpg")} == {"1.jpg", "mem.jpg"}


@pytest.mark.usefixtures("checked")
def test_odd_names_reach_the_lists_whole(tmp_path, pack):
    odd = ("a\nb", "c\rd", 'e",f', "\x1b]0;owned\x07", "x" * 240, " ")
    names = [f"{name}.jpg" for name in odd]
    root = tmp_path / "in\udcff"
    (root / "cat").mkdir(parents=True)
    for name in names:
        (root / "cat" / name).write_bytes(b"no image")
        (root / "cat" / f"good{name}").write_bytes(IMAGE)
    raw = os.fsencode(root) + b"/cat/\xff\xfe.jpg"
    with open(raw, "wb") as file:
        file.write(b"no image")
    printed = pack("build", root, "--out", tmp_path / "out", "--workers", 1)
    expected = {f"cat/{name}" for name in names} | {"cat/\\udcff\\udcfe.jpg"}
    assert set(left_out(tmp_path / "out")) == expected
    assert "\x1b" not in printed
    assert "\r" not in printed
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["source"] == [str(root)]


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("kind", ["zip", "list"])
def test_nothing_is_written_outside_the_output_folder(tmp_path, kind, monkeypatch):
    names = ["../escaped.jpg", f"{tmp_path}/absolute/cat/1.jpg", "cat/ok.jpg", "../../cat/up.jpg"]
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "ok.jpg").write_bytes(IMAGE)
    (tmp_path / "work").mkdir()
    if kind == "zip":
        source = write_zip(tmp_path / "in" / "set.zip", dict.fromkeys(names, IMAGE))
    else:
        source = tmp_path / "in" / "list.csv"
        source.write_text("image,caption\n" + "".join(f"{name},text\n" for name in names))
    monkeypatch.chdir(tmp_path / "work")
    before, out = set(tmp_path.rglob("*")), tmp_path / "out"
    build_set([source], out)
    assert set(tmp_path.rglob("*")) - before == {out, *out.iterdir()}
