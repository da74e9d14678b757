"""WebDataset tars and what img2dataset writes."""

import contextlib
import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest
from foreign_sources import outcomes, read, read_source, texts, write_tar
from hypothesis import given
from hypothesis import strategies as st
from pack_runs import jpeg
from property_tests import examples

from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.tars import DamagedTarError, iter_members


def three_samples(path: Path) -> Path:
    """A caption, a label, and both with more in JSON."""
    texts = {"caption": " one\n", "captions": ["two", "one"], "label": ["cat", 3]}
    fields = json.dumps(texts | {"split": "val", "score": 0.7}).encode()
    members = {"000.jpg": jpeg(0), "000.txt": b"a red square\n", "001.cls": b"7"}
    members |= {"001.png": jpeg(1), "f/002.webp": jpeg(2), "f/002.json": fields}
    return write_tar(path, members | {"f/002.txt": b"one"})


def test_a_key_is_a_sample_with_its_texts(tmp_path):
    place = str(three_samples(tmp_path / "a.tar"))
    source = read_source(place)
    assert texts(source) == {
        "a.tar/000": (["a red square"], []),
        "a.tar/001": ([], [7]),
        "a.tar/f/002": (["one", "two"], ["cat", 3]),
    }
    assert [read(item) for item in source.items] == [jpeg(0), jpeg(1), jpeg(2)]
    only = read_source(place, ListOptions(caption_column="captions", where=["split=val"]))
    assert texts(only) == {"a.tar/f/002": (["two", "one"], ["cat", 3])}
    assert only.passed_over == {"rows that --where left out": 2}
    with pytest.raises(ValueError, match=r"holds no images .*: rows that --where left out"):
        read_source(place, ListOptions(where=["split=test"]))
    scored = read_source(place, ListOptions(min_score=["score=0.5"]))
    assert outcomes(scored) == {
        "a.tar/000": "low score", "a.tar/001": "low score", "a.tar/f/002": "read"
    }  # fmt: skip


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_are_read_as_tarfile_reads_them(tmp_path, style):
    names = ["a.jpg", "f/" * 60 + "b.jpg", "\u00e9/" + "c" * 80 + ".jpg", "\udcff.jpg"]
    if style != tarfile.USTAR_FORMAT:
        names.append("d" * 300 + ".jpg")
    with tarfile.open(tmp_path / "a.tar", "w", format=style) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            info.mtime = 1.5  # pax writes a header for the half
            archive.addfile(info, io.BytesIO(os.fsencode(name)))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with tarfile.open(tmp_path / "a.tar") as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    with (tmp_path / "a.tar").open("rb") as file:
        assert [(m.name, m.offset_data, m.size) for m in iter_members(file)] == expected
    assert len(expected) == len(names)


def test_folders_braces_and_archives_in_a_row_are_read_through(tmp_path):
    one, two = three_samples(tmp_path / "s-08.tar"), write_tar(tmp_path / "x", {"9.jpg": jpeg(9)})
    (tmp_path / "s-09.tar").write_bytes(one.read_bytes() + two.read_bytes())
    two.unlink()
    statistics = {"successes": 3, "failed_to_download": 6, "failed_to_resize": 1}
    (tmp_path / "s-08_stats.json").write_text(json.dumps(statistics))  # img2dataset's
    folder = read_source(tmp_path)
    assert len(folder.items) == 7
    assert folder.passed_over == {"failed downloads of img2dataset": 7}
    for name in ("8.jpg", "8.txt"):
        (tmp_path / name).touch()
    assert read_source(tmp_path).passed_over["files beside the tars"] == 2
    assert {len(read(item)) > 100 for item in folder.items} == {True}
    assert outcomes(folder)["s-09.tar/9"] == "no text"
    braces = read_source(tmp_path / "s-{08..09}.tar")
    assert len(braces.items) == 7
    with pytest.raises(FileNotFoundError, match="1 of 3 tars.*s-07"):
        read_source(tmp_path / "s-{07..09}.tar")
    with pytest.raises(ValueError, match="no range"):
        read_source(tmp_path / "s-{09..07}.tar")


def test_folders_that_programs_leave_do_not_hide_tars(tmp_path):
    three_samples(tmp_path / "a.tar")
    for folder in ("_tmp", "__MACOSX"):
        (tmp_path / folder).mkdir()
    (tmp_path / "_tmp" / "0.feather").write_bytes(b"x")
    source = read_source(tmp_path)
    assert len(source.items) == 3
    assert source.passed_over["folder _tmp"] == source.passed_over["folder __MACOSX"] == 1
    (tmp_path / "notes").mkdir()
    assert read_source(tmp_path).passed_over == {".tar files": 1}
    (tmp_path / "_tmp" / "0.feather").unlink()
    message = r"holds no images; .* Passed over: 1 \.tar file; tars .* not read: name the files"
    with pytest.raises(ValueError, match=message):
        read_source(tmp_path)


def test_a_cut_tar_gives_what_is_whole_and_names_the_rest(tmp_path):
    data = three_samples(tmp_path / "a.tar").read_bytes()
    with (tmp_path / "a.tar").open("rb") as file:
        members = list(iter_members(file))
    cut = members[3].offset_data + 100  # in the image of the second, whose label is before it
    (tmp_path / "a.tar").write_bytes(data[:cut])
    found = outcomes(read_source(tmp_path / "a.tar"))
    expected = {"a.tar/000": "read", "a.tar/001": "damaged"}
    assert found == expected | {f"a.tar from byte {members[3].offset}": "damaged"}
    # cut where a member ends: the last sample may have had more files
    (tmp_path / "a.tar").write_bytes(data[: members[1].offset])
    found = outcomes(read_source(tmp_path / "a.tar"))
    assert found == {"a.tar/000": "damaged", f"a.tar from byte {members[1].offset}": "damaged"}
    # a download of which the room was taken first
    (tmp_path / "a.tar").write_bytes(data[: members[3].offset].ljust(2_000_000, b"\0"))
    found = outcomes(read_source(tmp_path / "a.tar"))
    assert found == expected | {f"a.tar from byte {members[3].offset}": "damaged"}
    (tmp_path / "a.tar").write_bytes(data[:100])
    with pytest.raises(ValueError, match=r"a\.tar holds no images .*without its end mark"):
        read_source(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_header_of_2_mb_costs_its_file_and_no_other(kind, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as archive:
        for number in range(3):
            for suffix, data in (("jpg", jpeg(number)), ("txt", b"text")):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                if member.name == "1.txt" and kind == tarfile.PAX_FORMAT:
                    member.pax_headers["comment"] = "x" * 2_000_000
                elif member.name == "1.txt":
                    member.linkname = "x" * 2_000_000
                archive.addfile(member, io.BytesIO(data))
    source = read_source(tmp_path / "a.tar")
    assert outcomes(source) == {"a.tar/0": "read", "a.tar/1": "unreadable", "a.tar/2": "read"}
    problem = next(item.problem for item in source.items if item.problem is not None)
    assert "a header of 2,000," in problem.message


def test_odd_samples_are_refused_by_name(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("one.jpg", jpeg(1)),
            ("one.jpg", jpeg(2)),
            ("one.txt", b"twice the same name"),
            ("two.jpg", jpeg(1)),
            ("two.png", jpeg(2)),
            ("two.txt", b"two images"),
            ("alone.txt", b"no image"),
            ("list.jpg", jpeg(1)),
            ("list.json", b"[1]"),
            ("latin.jpg", jpeg(1)),
            ("latin.txt", b"caf\xe9"),
            ("long.jpg", jpeg(1)),
            ("long.txt", b"x" * 2_000_000),
            ("none.jpg", jpeg(1)),
            ("good.jpg", jpeg(1)),
            ("good.txt", b"good"),
            ("good.seg.png", jpeg(1)),
            ("__MACOSX/._x", b""),
            ("README", b""),
        ],
    )
    with tarfile.open(path, "a") as archive:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("pipe.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    source = read_source(path)
    assert {name.removeprefix("a.tar/"): kind for name, kind in outcomes(source).items()} == {
        **{"one": "ambiguous", "two": "ambiguous", "alone": "missing", "list": "bad row"},
        **{"latin": "bad row", "long": "bad row", "none": "no text", "good": "read"},
        **{"link": "unreadable", "pipe": "unreadable"},
    }
    assert source.passed_over == {"files that belong to no sample": 2, ".seg.png files": 1}


LIES = (b"\0" * 124 + b"7" * 11, b"\0" * 124 + b"\x80" + b"\x7f" * 11)
"""Extended headers, which would have to be read, of too large a size."""


@pytest.mark.parametrize("header", [*LIES, b"\xff" * 2048])
def test_headers_that_lie_end_the_tar_there(tmp_path, header):
    data = three_samples(tmp_path / "a.tar").read_bytes()
    with (tmp_path / "a.tar").open("rb") as file:
        place = list(iter_members(file))[2].offset
    block = bytearray(header.ljust(512, b"\0"))
    if header in LIES:
        block[156:157] = b"x"
        block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    (tmp_path / "a.tar").write_bytes(data[:place] + block)
    found = outcomes(read_source(three_samples(tmp_path / "b.tar").parent))
    assert found.pop(f"a.tar from byte {place}") == "damaged"
    assert found.pop("a.tar/000") == "damaged"  # of which more may have followed
    assert set(found) == {"b.tar/000", "b.tar/001", "b.tar/f/002"}


def headers_with(kind: bytes, content: bytes) -> bytes:
    """A header of `kind` with its content, and a file behind it."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(content)
    file = tarfile.TarInfo("1.jpg")
    padded = content + bytes(-len(content) % 512)
    return info.tobuf(tarfile.GNU_FORMAT) + padded + file.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


@pytest.mark.parametrize(
    "data",
    [
        headers_with(b"x", b"1" * 900_000),  # time squared in Python before 3.11.10
        headers_with(b"L", b"x" * 2_000_000),
        headers_with(b"x", b"30 path=" + b"x" * 10),
        headers_with(b"L", b"x") * 2000,
        headers_with(b"L", b"x")[:1024] * 2000,  # one header after another, and no file
        headers_with(b"S", b"")[:482] + b"\1" + bytes(29) + (b"\x80" + bytes(10) + b"\1") * 200_000,
    ],
    ids=["digits", "long", "short", "many", "nested", "sparse"],
)
def test_headers_that_cost_time_or_memory_are_refused(tmp_path, data):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    started = time.process_time()
    with path.open("rb") as file, contextlib.suppress(DamagedTarError):
        assert all(member.name for member in iter_members(file))
    assert time.process_time() - started < 20  # hours, without limits


@given(data=st.data())
@examples(100)
def test_any_damage_to_a_tar_is_named_or_leaves_images_where_they_were(tmp_path_factory, data):
    path = three_samples(tmp_path_factory.mktemp("tar") / "a.tar")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        source = read_source(path)
    except ValueError as error:
        assert "a.tar" in str(error)  # noqa: PT017
        return
    for item in source.items:
        if item.problem is None:
            assert len(read(item)) in {len(jpeg(number)) for number in range(3)}


def test_img2dataset_in_files(tmp_path):
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text('{"failed_to_download": 1}')
    for number, status in enumerate(("success", "success", "failed_to_download")):
        stem = tmp_path / "00000" / f"{number:09d}"
        fields = {"caption": f"square {number}", "status": status, "key": stem.name}
        stem.with_suffix(".json").write_text(json.dumps(fields))
        if status == "success":
            stem.with_suffix(".jpg").write_bytes(jpeg(number))
            stem.with_suffix(".txt").write_text(f"square {number}")
    source = read_source(tmp_path)
    assert texts(source) == {f"00000/{n:09d}": ([f"square {n}"], []) for n in range(2)}
    assert source.passed_over == {"failed downloads of img2dataset": 1}
