"""Hierarchies of classes are read from three kinds of files, and refused where they are none."""

from pathlib import Path

import pytest

from unicl_fast.text.hierarchies import Hierarchy, read_names, read_parents


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_same_hierarchy_from_each_kind_of_file(tmp_path):
    expected = {"beagle": "dog", "dog": "mammal", "cat": "mammal"}
    table = "file,kind,genus,breed\n1,mammal,dog,beagle\n2,mammal, cat,cat\n3,mammal,,\n"
    columns = ("kind", "genus", "breed")
    for path, chosen in (
        (written(tmp_path, "a.json", '{"beagle": "dog", "dog": "mammal", "cat": "mammal"}'), ()),
        (written(tmp_path, "b.csv", table), columns),
        (written(tmp_path, "b.tsv", table.replace(",", "\t")), columns),
        (written(tmp_path, "c.csv", "a,b,c\nmammal,dog,beagle\nmammal,cat,\n"), ()),
        (written(tmp_path, "is_a.txt", "dog beagle\nmammal dog\nmammal cat\npet cat\n"), ()),
    ):
        assert read_parents(path, columns=chosen) == expected, path


def test_names_are_the_first_of_each_key(tmp_path):
    path = written(tmp_path, "words.txt", "n1\tdog, domestic dog\nn2\tsea lion\n")
    assert read_names(path) == {"n1": "dog", "n2": "sea lion"}


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.json", '["dog"]', (), 'must hold {"child": "parent", ...}'),
        ("a.json", '{"dog": 3}', (), "names as texts"),
        ("a.json", '{"dog": "a", "dog": "b"}', (), "is not JSON"),
        ("a.json", "{}", ("kind",), "only a .csv or .tsv file has columns"),
        ("a.csv", "kind,genus\nmammal,dog\n", ("family",), "no column 'family'; it has kind, g"),
        ("a.csv", "a,b\nmammal,dog\npet,dog\n", (), "line 3 puts 'dog' under 'pet', an earlier"),
        ("is_a.txt", "mammal dog\nmammal\n", (), "line 2 must be PARENT CHILD"),
    ],
)
def test_other_files_are_refused_with_the_place(tmp_path, name, text, columns, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("(", r"\(")):
        read_parents(written(tmp_path, name, text), columns=columns)


def test_files_that_are_not_there_or_hold_no_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .* with a hierarchy"):
        read_parents(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="no file .* with names"):
        read_names(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="line 1 must be KEY<TAB>NAME"):
        read_names(written(tmp_path, "words.txt", "n1 dog\n"))


def test_chains_lead_from_the_top_to_the_class():
    # 0 beagle, 1 cat, 2 car; above: 3 dog, 4 mammal
    hierarchy = Hierarchy(names=("dog", "mammal"), parents=(3, 4, -1, 4, -1))
    assert hierarchy.num_classes == 3
    assert hierarchy.chains() == [(4, 3, 0), (4, 1), (2,), (4, 3), (4,)]
    assert hierarchy.describe() == "2 of 3 classes placed, 2 classes above"


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ((1, 2, 0), "class 0 is above itself"),
        ((-1, 1), "class 1 is above itself"),
        ((*range(1, 101), -1), "has 100 classes or more above it"),
        ((-2,), "the parent -2"),
        ((1,), "one of the 1 classes or -1"),
    ],
)
def test_no_class_is_above_itself_or_under_one_that_is_not_there(parents, message):
    with pytest.raises(ValueError, match=message):
        Hierarchy(names=(), parents=parents)
