"""Items on the disk are equal to those in memory, and memory does not grow with them."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
from children import run_python
from hypothesis import given
from hypothesis import strategies as st

from unicl_fast.packing.sources.entries import FileEntry, Problem
from unicl_fast.packing.sources.items import Item, require_text
from unicl_fast.packing.sources.rows import Columns, add_texts
from unicl_fast.packing.sources.spool import ItemStore, Spool
from unicl_fast.packing.sources.trees import open_tree

COLUMNS = Columns((), ("caption",), ("label",))
texts = st.sampled_from(["a", "b", "\udcff is no UTF-8", "", 3.5, None, ["c", "d"], "x" * 5000])
labels = st.sampled_from(["cat", 7, True, -1, None, ["dog", 2**70]])

MEASURE = """
import gc, sys, tempfile, tracemalloc
from pathlib import Path
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.read_sources import read_sources
from unicl_fast.packing.sources.spool import Spool

def read():
    return read_sources([sys.argv[1]], ListOptions(), Spool(Path(tempfile.gettempdir())))

read()  # what is loaded once
tracemalloc.start()
(found,) = read()
gc.collect()
print(list(tracemalloc.get_traced_memory()))
assert len(found.items) == int(sys.argv[2])
"""


def new_store() -> ItemStore:
    return Spool(Path(tempfile.gettempdir())).new_items()


@given(st.lists(st.tuples(st.sampled_from("uvw"), texts, labels), max_size=30))
def test_rows_in_any_order_make_the_items_that_they_make_in_memory(rows):
    expected: dict[str, Item] = {}
    store = new_store()
    for line, (name, caption, label) in enumerate(rows):
        row = {"caption": caption, "label": label}
        problem = Problem(kind="missing", message="v") if name == "v" else None
        new = expected.setdefault(name, Item(name, problem=problem))
        add_texts(new, row, COLUMNS, f"line {line}")
        known = store.find(name)
        item = Item(name, problem=problem) if known is None else Item(name)
        add_texts(item, row, COLUMNS, f"line {line}")
        if known is None:
            store.append_named(item)
        else:
            store.add_row(known, item)
    for item in expected.values():
        require_text(item)
    assert list(store) == list(expected.values())


def test_rows_that_are_left_out_do_not_count_as_rows_without_texts():
    store = new_store()
    store.append(Item("a", captions=["text"]))
    store.append(Item("b", problem=Problem(kind="missing", message="b")))
    assert not store.notes()
    store.append(Item("c", labels=["cat"]))
    assert store.notes()["rows without a caption, where others have one"] == 1


def test_a_full_disk_is_told_by_what_it_is_needed_for():
    store = new_store()
    store._database.execute("PRAGMA max_page_count = 100")  # as a disk of 400 kB
    with pytest.raises(OSError, match="no room left for the list of samples") as caught:
        store.extend(Item(str(number), captions=["x" * 1000]) for number in range(1000))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.slow
def test_memory_does_not_hold_what_is_read(tmp_path):
    """Bytes a sample that are still held, and at the worst moment; 590 when all was in memory."""
    count = 4000
    for place in range(4):
        (tmp_path / "in" / str(place)).mkdir(parents=True)
    names = [f"{number % 4}/{number:05d}.jpg" for number in range(count)]
    for name in names:
        (tmp_path / "in" / name).touch()
    with (tmp_path / "in" / "list.jsonl").open("w") as file:
        for name in names:
            file.write(json.dumps({"image": name, "caption": f"an image that is {name}"}) + "\n")
    # A process of its own: where pytest has run for long, Python's table of interned strings may
    # grow during the second reading, by 15 MB at once.
    held, peak = json.loads(run_python("-c", MEASURE, tmp_path / "in" / "list.jsonl", count))
    # SQLite's cache is not seen here; it has a limit of its own
    assert held < 30 * count
    assert peak < 200 * count


def test_folders_are_listed_in_the_order_of_whole_names(tmp_path):
    root = tmp_path / "in"
    for name in ("a/1", "a-b/1", "a.b", "a/z/2", "b/1", "a0/1", "a/-", "a b/c"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "linked").symlink_to(root / "b")  # b comes first, and is listed once
    (root / "0").symlink_to(tmp_path / "elsewhere")
    (root / "self").symlink_to(root / "self")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "9").touch()
    found = dict(open_tree(root).entries())
    names = ["0/9", "a b/c", "a-b/1", "a.b", "a/-", "a/1", "a/z/2", "a0/1", "b/1", "self"]
    assert list(found) == names == sorted(names)
    assert isinstance(found["self"], Problem)
    entry = found["a/1"]
    assert isinstance(entry, FileEntry)
    assert entry.mtime_ns == os.stat(root / "a/1").st_mtime_ns
    assert entry.read() == b"a/1"
