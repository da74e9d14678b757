"""TSV files with images in base64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from foreign_sources import base64_text, jpeg, outcomes, read, texts
from hypothesis import given
from hypothesis import strategies as st
from property_tests import examples

from unicl_fast.packing.sources import tsv
from unicl_fast.packing.sources.read_sources import read_source
from unicl_fast.packing.sources.rows import ListOptions


def write_lines(path: Path, *lines: tuple[str, ...], end: str = "\n") -> Path:
    path.write_bytes("".join("\t".join(line) + end for line in lines).encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_texts_stand_between_key_and_image_in_any_of_their_forms(tmp_path: Path, end: str) -> None:
    objects = [{"class": "dog", "rect": [1, 2, 3, 4]}, {"class": "cat"}, {"caption": "both"}]
    path = write_lines(
        tmp_path / "train.tsv",
        ("a", "big cat", base64_text(jpeg(0))),
        ("b", "7", base64_text(jpeg(1))),
        (
            "c",
            json.dumps({"caption": "one", "captions": ["two"], "label": 3}),
            base64_text(jpeg(2)),
        ),
        ("d", json.dumps(objects), base64_text(jpeg(3))),
        ("e", "", base64_text(jpeg(4))),
        end=end,
    )
    source = read_source(str(path))
    assert texts(source) == {
        "a": ([], ["big cat"]),
        "b": ([], [7]),
        "c": (["one", "two"], [3]),
        "d": (["both"], ["dog", "cat"]),
    }
    assert [read(item) for item in source.items] == [jpeg(number) for number in range(5)]
    assert outcomes(source)["e"] == "no text"
    chosen = read_source(str(path), ListOptions(where=["caption=both"]))
    assert list(outcomes(chosen)) == ["d"]


def test_companions_are_found_by_key(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "val.tsv", ("1", base64_text(jpeg(1))), ("2", base64_text(jpeg(2)))
    )
    write_lines(tmp_path / "val.label.tsv", ("2", '[{"class": "tie"}]'), ("1", "car"), ("3", "x"))
    write_lines(tmp_path / "val.caption.tsv", ("1", '[{"caption": "a"}, "b"]'), ("2", "c"), ("4",))
    (tmp_path / "val.lineidx").write_text("0\n9999999\n")  # lies, and is not asked
    source = read_source(str(path))
    assert texts(source) == {"1": (["a", "b"], ["car"]), "2": (["c"], ["tie"])}
    assert source.passed_over == {
        "lines of val.label.tsv about no image": 1,
        "lines of val.caption.tsv that are not KEY<TAB>TEXTS": 1,
    }


def test_lines_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tsv, "_HEAD_BYTES", 100)  # less than any line has
    good = base64_text(jpeg(1))
    path = write_lines(
        tmp_path / "a.tsv",
        ("good", "x", good),
        ("good", "y", good),
        ("alone",),
        ("four", "x", "y", good),
        ("", "x", good),
        ("long", "x" * 200, good),
        ("json", "{", good),
        ("deep", "[" * 90, good),
        ("cut", "x", good[:-3]),
        ("letters", "x", good[:40] + "%" + good[41:]),
        ("last", "x", good),
    )
    path.write_bytes(path.read_bytes() + b"\xff\xff\tx\t" + good.encode())
    source = read_source(str(path))
    assert outcomes(source) == {
        **{"good": "read", "last": "read", "json": "bad row", "deep": "bad row"},
        **{"line 2": "ambiguous", "cut": "damaged", "letters": "damaged"},
        **{f"line {number}": "bad row" for number in (3, 4, 5, 6, 12)},
    }
    assert read(source.items[0]) == jpeg(1)


def test_lines_that_cannot_be_read_are_named_whatever_where_asks_for(tmp_path: Path) -> None:
    good = base64_text(jpeg(1))
    path = write_lines(
        tmp_path / "a.tsv",
        ("a", '{"label": 1, "set": "x"}', good),
        ("b", '{"label": 1, "set": "y"}', good),
        ("b", '{"label": 1, "set": "y"}', good),
        ("alone",),
        ("json", "{", good),
        ("json", "{", good),
    )
    source = read_source(str(path), ListOptions(where=["set=x"]))
    assert outcomes(source) == {
        **{"a": "read", "line 4": "bad row", "json": "bad row", "line 6": "ambiguous"},
    }
    assert source.passed_over == {"rows that --where left out": 2}
    scored = outcomes(read_source(str(path), ListOptions(min_score=["label=2"])))
    assert (scored["a"], scored["b"], scored["line 3"]) == ("low score", "low score", "ambiguous")
    assert outcomes(read_source(str(path), ListOptions(min_score=["label=1"])))["a"] == "read"


def test_lists_with_a_header_stay_lists(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    path = write_lines(tmp_path / "a.tsv", ("image", "caption"), ("1.jpg", "/9j/ and " + "x" * 99))
    assert outcomes(read_source(str(path))) == {"1.jpg": "read"}


@given(data=st.data())
@examples(60)
def test_any_damage_to_a_tsv_is_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("tsv") / "a.tsv"
    write_lines(path, *((f"{n}", '{"label": "x"}', base64_text(jpeg(n))) for n in range(3)))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = outcomes(read_source(str(path)))
    except ValueError as error:
        assert "a.tsv" in str(error)  # noqa: PT017
    else:
        assert set(found.values()) <= {"read", "damaged", "bad row", "ambiguous", "no text"}
