"""`--retry quarantine.csv`: what was left out, once more, and nothing twice."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
from foreign_sources import jpeg, write_tar

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.packing.build import BuildSummary, build_dataset
from unicl_fast.packing.quarantine import Listed, choose_listed, read_retry
from unicl_fast.packing.sources.items import Item, Problem, Source


def build(sources: list[Path], out: Path, **options: object) -> BuildSummary:
    return build_dataset(sources, out, workers=1, progress=False, **options)  # type: ignore[arg-type]


def left_out(out: Path) -> set[str]:
    with (out / "quarantine.csv").open(encoding="utf-8", newline="") as file:
        return {row["name"] for row in csv.DictReader(file)}


def test_what_was_repaired_is_packed_with_the_same_class_numbers(tmp_path: Path) -> None:
    folder, tars = tmp_path / "photos", tmp_path / "tars"
    tars.mkdir()
    for number, name in enumerate(("ant", "bee", "cow", "dog")):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{number}.jpg").write_bytes(jpeg(number))
    raw = bytes(folder) + b"/cow/\xff.jpg"
    for place in (bytes(folder / "dog" / "bad.jpg"), raw):
        with open(place, "wb") as file:
            file.write(b"no image")
    members = {
        f"{n}.{e}": jpeg(n) if e == "jpg" else b"ant" for n in range(9) for e in ("jpg", "cls")
    }
    whole = write_tar(tars / "a.tar", members).read_bytes()
    (tars / "a.tar").write_bytes(whole[:7000])
    (tmp_path / "list.csv").write_text("image,label\nphotos/ant/0.jpg,bee\na,b,c\ngone.jpg,cow\n")
    sources = [folder, tars, tmp_path / "list.csv"]
    first = build(sources, tmp_path / "first")
    (cut,) = (name for name in left_out(tmp_path / "first") if name.startswith("a.tar from byte"))
    assert left_out(tmp_path / "first") - {cut} == {
        *("dog/bad.jpg", "cow/\\udcff.jpg", "a.tar/2", "line 3", "gone.jpg"),
    }

    (folder / "dog" / "bad.jpg").write_bytes(jpeg(20))
    (tars / "a.tar").write_bytes(whole)
    text = (tmp_path / "list.csv").read_text()
    (tmp_path / "list.csv").write_text(text.replace("a,b,c", "photos/dog/3.jpg,dog"))
    second = build(sources, tmp_path / "second", retry=tmp_path / "first" / "quarantine.csv")
    assert left_out(tmp_path / "second") == {"cow/\\udcff.jpg", "gone.jpg"}
    assert second.num_samples == 1 + 7 + 1  # bad.jpg, 2 to 8 of the tar, line 3
    assert first.num_samples + second.num_samples == 4 + 1 + 9 + 2
    assert second.class_names == first.class_names == ("ant", "bee", "cow", "dog")
    with PackedDataset(tmp_path / "second") as dataset:
        labels = Counter(int(dataset.labels_of(index)[0]) for index in range(len(dataset)))
    assert labels == {0: 7, 3: 2}
    left = tmp_path / "second" / "quarantine.csv"
    with pytest.raises(ValueError, match="nothing could be packed: 1 [a-z ]+, 1 [a-z ]+\\n"):
        build(sources, tmp_path / "third", retry=left)
    (folder / "ape").mkdir()
    (folder / "ape" / "1.jpg").write_bytes(jpeg(5))
    with pytest.raises(ValueError, match="has 4 class names, and now there are 5 .new: ape."):
        build(sources, tmp_path / "third", retry=left)


def test_joined_duplicates_are_packed_again_only_with_their_first_one(tmp_path: Path) -> None:
    """Two equal images that could be read, and two whose first, and so both, could not."""
    folder = tmp_path / "photos"
    for name, number in {"cat/1": 1, "dog/1": 1, "cat/2": 2, "dog/2": 2}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jpg").write_bytes(jpeg(number)[: 200 if number == 2 else None])
    first = build([folder], tmp_path / "first", duplicates="join")
    assert first.num_samples == 1
    assert left_out(tmp_path / "first") == {"dog/1.jpg", "cat/2.jpg", "dog/2.jpg"}
    for name in ("cat/2", "dog/2"):
        (folder / f"{name}.jpg").write_bytes(jpeg(2))
    listed = tmp_path / "first" / "quarantine.csv"
    second = build([folder], tmp_path / "second", duplicates="join", retry=listed)
    assert second.num_samples == 1
    assert left_out(tmp_path / "second") == {"dog/2.jpg"}
    with PackedDataset(tmp_path / "second") as dataset:
        assert sorted(dataset.labels_of(0).tolist()) == [0, 1]
    third = build([folder], tmp_path / "third", retry=listed)
    assert third.num_samples == 2  # each with its own label


def source_of(name: str, *items: Item) -> Source:
    return Source(name=name, items=list(items), labels_are_names=True, passed_over=Counter())


def chosen(listed: Listed, *sources: Source) -> list[str]:
    return [item.name for _, item in choose_listed(listed, sources, Counter())]


def test_stretches_of_files_name_what_lies_in_them() -> None:
    rows = [Item(f"a.parquet:{row}", position=row) for row in range(8)]
    others = [Item(f"b.parquet:{row}", position=row) for row in range(8)]
    again = Item("a.parquet rows 5 to 5", problem=Problem(kind="damaged", message=""))
    read = source_of("set", *rows, *others, again)
    listed = Counter({("set", "a.parquet rows 4 to 5"): 1, ("set", "b.parquet from row 6"): 1})
    names = ["a.parquet:4", "a.parquet:5", "b.parquet:6", "b.parquet:7", "a.parquet rows 5 to 5"]
    assert chosen(listed, read) == names
    alone = source_of("list.parquet", Item("1.jpg", position=0), Item("2.jpg", position=7))
    assert chosen(Counter({("list.parquet", "list.parquet from row 3"): 1}), alone) == ["2.jpg"]


def test_names_that_are_gone_are_counted_and_names_of_two_sources_refused() -> None:
    read = source_of("train", Item("cat/1.jpg"), Item("cat/2.jpg"))
    passed_over: Counter[str] = Counter()
    listed = Counter({("train", "cat/1.jpg"): 1, ("train", "cat/9.jpg"): 1, ("val", "x"): 1})
    assert len(choose_listed(listed, [read], passed_over)) == 1
    assert passed_over == {"names of --retry that the sources no longer have": 2}
    with pytest.raises(ValueError, match="nothing that --retry names"):
        chosen(Counter({("val", "x"): 1}), read)
    with pytest.raises(ValueError, match=r"cat/1.jpg of train 1 time,.* have it 2 times"):
        chosen(listed, read, read)
    assert chosen(Counter({("train", "cat/1.jpg"): 2}), read, read) == ["cat/1.jpg"] * 2


def test_a_line_that_is_still_broken_is_chosen_once() -> None:
    problem = Problem(kind="bad row", message="")
    read = source_of("a.tsv", Item("1", position=1), Item("line 2", problem=problem, position=2))
    assert chosen(Counter({("a.tsv", "line 2"): 1}), read) == ["line 2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line must be source,name,kind,message"),
        ("data_set,shard,key,offset,reason\n", "no quarantine.csv of unicl-pack"),
        ("source,name,kind,message\n", "names nothing"),
        ("source,name,kind,message\na,b,duplicate,c\n", "only duplicates of what it packed"),
        ("source,name,kind,message\na,b\n", "line 2: 2 fields of 4"),
        ("source,name,kind,message\n\xff", "cannot be read"),
    ],
)
def test_lists_that_are_no_quarantine_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_retry(tmp_path / "q.csv")
    with pytest.raises(ValueError, match=r"not s3://b/q\.csv: copy it here, and manifest\.json"):
        read_retry("s3://b/q.csv")
    with pytest.raises(FileNotFoundError, match=r"--retry: there is no file .*none\.csv"):
        read_retry(tmp_path / "none.csv")
