"""An image that crashes, hangs or devours memory costs a build itself and nothing else."""

import signal
from pathlib import Path

import psutil
import pytest
from bad_entries import Crashing, CrashingOnce, Faulty, Hanging, Hungry, Refused
from pack_runs import build_set, jpeg, left_out, write_photos

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.writer import MADE_OF_NAME
from unicl_fast.packing import build as build_module
from unicl_fast.packing.sources.entries import Entry
from unicl_fast.packing.workers import Checked, ImageOptions, Task, check_in_order

# expected of each: what stands in quarantine.csv
BAD: dict[str, tuple[Entry, str, str]] = {
    "dog/fault.jpg": (Crashing(int(signal.SIGSEGV)), "crash", "a decoder crashed (SIGSEGV)"),
    "cat/abort.jpg": (Crashing(int(signal.SIGABRT)), "crash", "a decoder crashed (SIGABRT)"),
    "cat/killed.jpg": (Crashing(int(signal.SIGKILL)), "crash", "a decoder was killed, possibly "
                       "out of memory"),
    "cat/slow.jpg": (Hanging(), "too slow", "not done after 3 seconds"),
    "dog/hungry.jpg": (Hungry(16), "too large", "uses more memory than its number of pixels "
                       "should"),
    "dog/odd.jpg": (Faulty(), "failed", "KeyError: 'surprise'"),
}  # fmt: skip


def options(**changes: float) -> ImageOptions:
    known = {"short_side": 0, "quality": 90, "max_pixels": 10_000_000, "seconds": 600}
    return ImageOptions(**(known | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 sound images, and the names of those that will turn bad."""
    root = write_photos(tmp_path_factory.mktemp("images"), range(70), ("cat", "dog"))
    for name in BAD:
        (root / name).touch()
    return root


def build(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    out: Path,
    entries: dict[str, Entry],
    workers: int,
) -> dict[str, bytes]:
    """Packs `folder` with other entries under some names; returns the files made."""

    def task(name: str, entry: Entry, *others: object) -> Task:
        return Task(name, entries.get(name, entry), *others)

    monkeypatch.setattr(build_module, "Task", task)
    build_set([folder], out, workers=workers, image_seconds=3)
    monkeypatch.undo()
    (out / MADE_OF_NAME).unlink()  # which knows the entries, and is no part of the data set
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.slow
def test_what_ends_a_worker_is_left_out_and_all_else_is_as_if_it_were_damaged(
    monkeypatch, folder, tmp_path
):
    bad = {name: entry for name, (entry, _, _) in BAD.items()}
    refused: dict[str, Entry] = {
        name: Refused(kind, message) for name, (_, kind, message) in BAD.items()
    }
    found = build(monkeypatch, folder, tmp_path / "bad", bad, 3)
    assert found == build(monkeypatch, folder, tmp_path / "refused", refused, 1)
    expected = {name: (kind, message) for name, (_, kind, message) in BAD.items()}
    assert left_out(tmp_path / "bad") == expected
    with PackedDataset(tmp_path / "bad") as dataset:
        assert len(dataset) == 70
        images = {dataset.image_bytes(index, verify=True).tobytes() for index in range(70)}
    assert images == {jpeg(number) for number in range(70)}


def test_a_death_that_was_not_the_images_fault_costs_nothing(tmp_path):
    """A signal from outside, a neighbour's leak: the second try in a fresh process is sound."""
    tasks = [
        Task(str(number), CrashingOnce(str(tmp_path / str(number)), jpeg(number)), ("a dog",))
        for number in range(3)
    ]
    results = list(check_in_order(tasks, options=options(), workers=1))
    for number, result in enumerate(results):
        assert isinstance(result, Checked)
        assert result.data == jpeg(number)
        assert [len(ids) for ids in result.tokens] == [2 * 4]


def test_workers_are_gone_when_the_results_are_not_wanted_any_more():
    others = set(psutil.Process().children())  # which fixtures of a session have started
    sound = [Task(name="a", entry=CrashingOnce("/", jpeg(1)))] * 128
    stuck = [Task(name="b", entry=Hanging())] * 400
    results = check_in_order(sound + stuck, options=options(seconds=0), workers=2)
    assert isinstance(next(iter(results)), Checked)
    assert len(set(psutil.Process().children()) - others) == 2
    results.close()
    assert not set(psutil.Process().children()) - others
