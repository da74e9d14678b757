"""`unicl-pack build` killed at any moment resumes, and the data set shows no trace of it."""

import contextlib
import json
import os
import shutil
import signal
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from damage import limited_files
from inline_checks import check_inline
from object_stores import FaultyStore, empty
from pack_runs import contents, jpeg, write_photos
from PIL import Image

from unicl_fast.dataset import writer as shard_writer
from unicl_fast.dataset.growing_files import FinishedShard, ShardJournal, read_journal
from unicl_fast.dataset.object_store import StorageError
from unicl_fast.dataset.writer import DatasetWriter
from unicl_fast.packing import build as build_module
from unicl_fast.packing.build import BuildSummary, build_dataset
from unicl_fast.packing.sources import tables as source_tables
from unicl_fast.packing.work_folder import WorkFolder, work_folder

pytestmark = pytest.mark.usefixtures("checked")

SHARD_BYTES = 30_000


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Class folders, and a list with captions whose images are partly the same; some bad."""
    root, classes = tmp_path_factory.mktemp("sources"), ("cat", "sea_lion", "dog")
    write_photos(root / "photos", range(80), classes)
    for number in range(0, 80, 9):
        cut = root / "photos" / classes[number % 3] / f"{number:03d}-cut.jpg"
        cut.write_bytes(jpeg(number)[:300])
    rows = [
        {"image": f"photos/cat/{number:03d}.jpg", "captions": [f"cat {number}", "so it is"]}
        for number in range(0, 90, 3)
    ]
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"image": 3}])))
    return [root / "photos", root / "list.jsonl"]


def build(sources: list[Path], out: Path, **options: Any) -> BuildSummary:
    options = {"shard_bytes": SHARD_BYTES, "workers": 1, "progress": False} | options
    return build_dataset(sources, out, **options)


@pytest.fixture(scope="module")
def unbroken(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        check_inline(patch)
        out = tmp_path_factory.mktemp("unbroken") / "set"
        build(sources, out)
        return contents(out)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


Place = Callable[[pytest.MonkeyPatch], None]
"""Patches something to die."""


def kill(sources: list[Any], out: Path, place: Place, **options: Any) -> None:
    """Builds in a process that kills itself on the way."""
    child = os.fork()
    if not child:
        try:
            with pytest.MonkeyPatch.context() as patch:
                place(patch)
                build(sources, out, **options)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it was to be killed, and ended by itself"


def at_call(owner: Any, name: str, number: int, *, after: bool) -> Place:
    """Before or after call `number` of a function, counted from 1."""
    real, calls = getattr(owner, name), []

    def replaced(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == number and not after:
            die()
        result = real(*arguments, **named)
        if len(calls) == number and after:
            die()
        return result

    return lambda patch: patch.setattr(owner, name, replaced)


def torn_line(patch: pytest.MonkeyPatch) -> None:
    """The third line of the journal reaches the disk in part."""
    real, calls = ShardJournal.append, []

    def append(self: ShardJournal, finished: Any) -> None:
        calls.append(finished)
        if len(calls) == 3:
            self._file.write(finished.to_line()[:-20])
            die()
        real(self, finished)

    patch.setattr(ShardJournal, "append", append)


PLACES: dict[str, tuple[Place, int]] = {
    "before the first sample": (at_call(DatasetWriter, "add", 1, after=False), 0),
    "a torn line": (torn_line, 2),
    "in mid-shard": (at_call(DatasetWriter, "add", 70, after=True), 3),
    "at a bad image": (at_call(DatasetWriter, "quarantine", 9, after=True), 1),
    "before the checksums": (at_call(shard_writer, "format_checksums", 1, after=False), -1),
    "before the renaming": (at_call(Path, "rename", 1, after=False), -1),
}


@pytest.mark.parametrize(
    "place",
    [at_call(os, "rmdir", 1, after=False), at_call(WorkFolder, "remove", 1, after=True)],
    ids=["with its work half removed", "when all is done"],
)
def test_a_build_killed_at_its_very_end_is_complete_for_the_same_command(
    sources, unbroken, checked, tmp_path, pack, place
):
    """A scheduler that starts the job again must not hear of wrong usage."""
    out = tmp_path / "set"
    kill(sources, out, place)
    command = ("build", *sources, "--out", out, "--shard-bytes", SHARD_BYTES)
    printed = pack(*command, "--workers", 2)
    assert "complete already" in printed
    assert "left out: 13, listed in" in printed
    assert not checked
    assert contents(out) == unbroken
    assert os.listdir(tmp_path) == ["set"]
    printed = pack(*command, "--seed", 1, code=2)
    assert "already holds a packed data set, made with other options:\n  --seed was" in printed
    (out / "manifest.json").write_bytes(unbroken["manifest.json"] + b" ")
    assert "already holds a packed data set; name" in pack(*command, code=2)
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_build_resumes_as_if_nothing_had_happened(
    sources, unbroken, checked, tmp_path, place
):
    dies, num_finished = PLACES[place]
    kill(sources, tmp_path / "set", dies)
    journal = read_journal(tmp_path / "set.partial" / "journal")
    num_shards = sum(name.endswith(".tar") for name in unbroken)
    assert num_shards > 4
    assert len(journal) >= (num_shards if num_finished < 0 else num_finished)
    summary = build(sources, tmp_path / "set")
    assert contents(tmp_path / "set") == unbroken
    assert os.listdir(tmp_path) == ["set"]
    done = journal[-1].num_samples + journal[-1].num_quarantined if journal else 0
    tried = 80 + 9 + 30 + 1
    quick = 1 + 3  # a line without a path, and images that are not there
    assert tried - done - quick <= len(checked) <= tried - done
    rows = unbroken["quarantine.csv"].decode().splitlines()[1:]
    assert summary.manifest.num_quarantined == len(rows)
    assert summary.quarantined.startswith("9 damaged, 3 missing, 1 bad row\n")


@pytest.mark.parametrize("num_more", [0, 1])
def test_a_split_that_is_killed_on_either_side_resumes(tmp_path, monkeypatch, num_more):
    """Killed so many shards after the last one for training."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    numbers = range(30)
    table = {"image": list(map(jpeg, numbers)), "caption": [f"number {n}" for n in numbers]}
    places = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for place in places:
        parquet.write_table(pyarrow.table(table), place)
    build(places, tmp_path / "whole", split=0.7)
    num_finished = len(list((tmp_path / "whole" / "train").glob("*.tar"))) + num_more
    last = at_call(ShardJournal, "append", num_finished, after=True)
    kill(places, tmp_path / "set", last, split=0.7)
    assert (tmp_path / "set" / "train").exists() == (num_more > 0)
    if not num_more:  # nothing is unpacked again
        monkeypatch.setattr(source_tables, "run_limited", lambda _, tasks, **__: iter(tasks))
    with pytest.MonkeyPatch.context() as patch:  # a busy machine gives other images up
        patch.setattr(build_module, "split_samples", lambda given, *_: (given, given, Counter()))
        with pytest.raises(ValueError, match="other split:\n  held out was '"):
            build(places, tmp_path / "set", split=0.7)
    summary = build(places, tmp_path / "set", split=0.7)
    assert summary.num_taken_over + summary.held_out.num_taken_over > 0
    assert sorted(os.listdir(tmp_path / "set")) == ["held-out", "train"]
    for side in ("train", "held-out"):
        assert contents(tmp_path / "set" / side) == contents(tmp_path / "whole" / side)
    assert sorted(os.listdir(tmp_path)) == ["a.parquet", "b.parquet", "set", "whole"]


@pytest.mark.parametrize("kind", ["folder", "mount", "zip"])
def test_a_source_that_vanishes_stops_the_build_which_resumes_when_it_is_back(
    tmp_path, monkeypatch, kind
):
    """A dropped mount is not 30 bad images: its folder stays, empty."""
    aside = tmp_path / "aside"
    source = photos = write_photos(tmp_path / "photos", range(40))
    if kind == "zip":
        source = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", photos))
    place = photos / "cat" if kind == "mount" else source
    options = {"shard_bytes": 9000}
    build([source], tmp_path / "unbroken", **options)
    real, calls = DatasetWriter.add, []

    def add(self: DatasetWriter, sample: Any) -> None:
        calls.append(sample)
        if len(calls) == 20:
            place.rename(aside)
            if kind == "mount":
                place.mkdir()
        real(self, sample)

    monkeypatch.setattr(DatasetWriter, "add", add)
    with pytest.raises(FileNotFoundError, match=f"photos.* has vanished .*{place}") as caught:
        build([source], tmp_path / "set", **options)
    assert "the same command resumes after them" in str(caught.value.__notes__)
    assert not (tmp_path / "set").exists()
    if kind == "mount":
        place.rmdir()
    aside.rename(place)
    assert build([source], tmp_path / "set", **options).num_taken_over > 0
    assert contents(tmp_path / "set") == contents(tmp_path / "unbroken")


def test_a_file_that_vanishes_by_itself_is_listed(tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos", range(9))
    real = build_module.shuffled_order

    def shuffled_order(count: int, *, seed: int) -> Any:
        (photos / "cat" / "003.jpg").unlink()
        return real(count, seed=seed)

    monkeypatch.setattr(build_module, "shuffled_order", shuffled_order)
    summary = build([photos], tmp_path / "set")
    assert (summary.manifest.num_samples, summary.manifest.num_quarantined) == (8, 1)
    assert "1 unreadable" in summary.quarantined


def test_a_build_killed_again_and_again_resumes_each_time(sources, checked, tmp_path):
    """With decoded images, which are not in the shards."""
    options = {"format": "raw", "resize": "square:16", "shard_bytes": 6000}
    build(sources, tmp_path / "whole", **options)
    expected = len(checked)
    checked.clear()
    for number in range(4):
        dies = at_call(DatasetWriter, "add", 11, after=number % 2 == 0)
        kill(sources, tmp_path / "set", dies, **options)
    summary = build(sources, tmp_path / "set", **options)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert 20 < summary.num_taken_over < summary.manifest.num_samples
    assert len(checked) < expected - 20
    assert summary.manifest.pixels.height == 16


@pytest.fixture
def store(sources: list[Path]) -> Iterator[FaultyStore]:
    """Holds the photos, sound and bad, at faulty://photos."""
    system = FaultyStore()
    for path in sources[0].rglob("*.jpg"):
        system.pipe_file(f"faulty://photos/{path.relative_to(sources[0])}", path.read_bytes())
    yield system
    empty()


URL = "faulty://photos"


def test_a_build_from_urls_resumes_with_the_copies_that_it_made(store, tmp_path):
    """Copies stay with a build that was killed; what has changed in the store is copied anew."""
    out = tmp_path / "set"
    build([URL], tmp_path / "whole")
    dies = at_call(DatasetWriter, "add", 60, after=True)
    kill([URL], out, dies)
    torn = next((tmp_path / "set.partial" / "copies").rglob("dog/*.jpg"))
    changed = f"faulty://photos/dog/{torn.name}"
    store.pipe_file(changed, store.cat_file(changed))
    store.reads.clear()
    with pytest.raises(ValueError, match="with other sources under URLs:\n  faulty://photos was"):
        build([URL], out)
    assert not store.reads
    assert torn.is_file(), "an error must not take what the next try needs"
    build([URL], out, restart=True)
    assert {path for path, _, _ in store.reads} == {f"/photos/dog/{torn.name}"}
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["set", "whole"]
    shutil.rmtree(out)

    kill([URL], out, dies)
    store.reads.clear()
    torn.write_bytes(torn.read_bytes())  # as if it had been killed before its time was set
    assert build([URL], out).num_taken_over > 0
    assert {path for path, _, _ in store.reads} == {f"/photos/dog/{torn.name}"}
    assert contents(out) == contents(tmp_path / "whole")
    shutil.rmtree(out)

    kill([URL], out, dies)
    store.rm(changed)  # or it would be packed from its old copy
    assert build([URL], out, restart=True).manifest.num_samples == 79


def test_an_object_that_is_replaced_while_it_is_copied_is_no_source(store, tmp_path):
    def replace(path: str, data: bytes) -> bytes:
        FaultyStore.spoil = None
        store.pipe_file(f"faulty:/{path}", jpeg(99))
        return data

    FaultyStore.spoil = staticmethod(replace)
    with pytest.raises(StorageError, match="faulty://photos was changed while it was copied"):
        build([URL], tmp_path / "set")
    build([URL], tmp_path / "set")
    build([URL], tmp_path / "again")
    assert contents(tmp_path / "set") == contents(tmp_path / "again")


def test_a_complete_build_from_urls_is_complete_for_the_same_command(
    sources, store, checked, tmp_path
):
    """Its copies are gone; nothing is copied again unless a local source needs a comparison."""
    out = tmp_path / "set"
    for places in ([URL], [URL, str(sources[1])]):
        build(places, out)
        before = contents(out)
        store.reads.clear()
        checked.clear()
        assert build(places, out).was_complete
        assert bool(store.reads) == (len(places) > 1)
        assert not checked
        with pytest.raises(ValueError, match="made with other options:\n  --seed"):
            build(places, out, seed=1)
        store.pipe_file("faulty://photos/cat/003.jpg", jpeg(3))  # the same bytes, written later
        with pytest.raises(ValueError, match="made with other sources"):
            build(places, out)
        assert contents(out) == before
        assert os.listdir(tmp_path) == ["set"]
        shutil.rmtree(out)


@pytest.fixture
def unfinished(sources: list[Path], tmp_path: Path) -> Path:
    """Where a build was to be; two shards of it are finished."""
    kill(sources, tmp_path / "set", at_call(ShardJournal, "append", 2, after=True))
    return tmp_path / "set"


def test_another_build_or_a_changed_source_is_named_and_does_not_resume_it(
    sources, unfinished, unbroken, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda _: "0")
        with pytest.raises(ValueError, match="other options:(\n  version of .*){5}"):
            build(sources, unfinished)
    message = r"2 finished shards .*other options:\n  --seed was 0 and is now 1\n.*--restart"
    with pytest.raises(ValueError, match=message):
        build(sources, unfinished, seed=1)
    with pytest.raises(ValueError, match="other options"):
        build(sources[:1], unfinished)
    image = sources[0] / "dog" / "002.jpg"
    before = image.stat()
    image.touch()
    try:
        with pytest.raises(ValueError, match="other sources:\n  source 1, photos was '89 samp"):
            build(sources, unfinished)
    finally:
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    summary = build(sources, unfinished, workers=2)  # which may change
    assert summary.num_taken_over > 0
    assert contents(unfinished) == unbroken


def test_finished_shards_that_are_damaged_are_made_again(sources, unfinished, unbroken):
    """The last shard was changed; then an array behind the first one's rows."""
    folder = unfinished.parent / "set.partial" / "set"
    with (folder / "shard-000001.tar").open("r+b") as file:
        file.seek(600)
        file.write(b"?")
    kill(sources, unfinished, at_call(ShardJournal, "append", 1, after=True))
    with (folder / "tokens.npy").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 2)
    summary = build(sources, unfinished)
    of_first_shard = len(unbroken["shard-000000.idx"].splitlines()) - 1
    assert summary.num_taken_over == of_first_shard
    assert contents(unfinished) == unbroken


def test_work_of_another_build_or_of_somebody_else_is_left_alone(sources, tmp_path):
    with (
        work_folder(tmp_path / "set"),
        pytest.raises(ValueError, match="set.partial is being written by process"),
    ):
        build(sources, tmp_path / "set")
    assert os.listdir(tmp_path) == []
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "precious").touch()
    with pytest.raises(ValueError, match=r"set.partial .* holds something else; move it away"):
        build(sources, tmp_path / "set", restart=True)
    assert os.listdir(tmp_path / "set.partial") == ["precious"]
    (tmp_path / "more.partial").symlink_to("/dev/shm")
    with pytest.raises(ValueError, match=r"more.partial is a link"):
        build(sources, tmp_path / "more")


def test_what_the_journal_tells_of_is_on_the_disk(sources, tmp_path, monkeypatch):
    synced: dict[int, int] = {}
    lines = []

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    def append(self: ShardJournal, finished: FinishedShard) -> None:
        folder = tmp_path / "set.partial" / "set"
        index = finished.shard.name.replace(".tar", ".idx")
        for name in (finished.shard.name, index, *finished.files):
            assert synced[(folder / name).stat().st_ino] == (folder / name).stat().st_size
        assert folder.stat().st_ino in synced
        lines.append(finished)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(ShardJournal, "append", append)
    build(sources, tmp_path / "set")
    assert len(lines) > 4


def test_a_full_disk_is_no_wrong_usage_and_the_build_resumes(
    sources, unbroken, tmp_path, monkeypatch, pack
):
    command = ("build", *sources, "--out", tmp_path / "set", "--shard-bytes", SHARD_BYTES)
    real, calls = ShardJournal.append, []
    with contextlib.ExitStack() as limits:

        def append(self: ShardJournal, finished: FinishedShard) -> None:
            real(self, finished)
            calls.append(finished)
            if len(calls) == 2:  # the next shard wants to be larger
                limits.enter_context(limited_files(12_000))

        monkeypatch.setattr(ShardJournal, "append", append)
        printed = pack(*command, code=1)
    assert f"File too large: '{tmp_path}/set.partial/set'\nmake room there, then" in printed
    assert "set.partial keeps 2 finished shards" in printed
    assert "images had been packed before this run" in pack(*command)
    assert contents(tmp_path / "set") == unbroken


def test_the_bytes_of_a_build_stay_what_they_are(tmp_path):
    """Pinned, so that the order of a seed, and all else that is written, stays for good.

    Of pixels, not JPEGs: these depend on the encoder's version.
    """
    numbers = np.random.PCG64(5).random_raw(40 * 384)
    records = numbers.astype("<u8").view(np.uint8).reshape(40, 32, 32, 3)
    (tmp_path / "more").mkdir()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number, record in enumerate(records):
            kind = ("cat", "dog")[number % 2]
            (tmp_path / "more" / kind).mkdir(exist_ok=True)
            Image.fromarray(record).save(tmp_path / "more" / kind / f"{number}.ppm")
            if number < 12:
                name = f"{'dog' if number % 3 else 'yak'}/{number}.ppm"
                archive.write(tmp_path / "more" / kind / f"{number}.ppm", name)
    rows = [  # "a picture" is part of the pinned bytes
        {"image": f"{'dog' if n % 3 else 'yak'}/{n}.ppm", "captions": [f"number {n}", "a picture"]}
        for n in [*range(14), 3, 4]
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = [tmp_path / name for name in ("photos.zip", "more", "list.jsonl")]
    options = {"format": "raw", "seed": 11, "image_root": tmp_path / "photos.zip"}
    build(places, tmp_path / "set", **options)
    files = {**contents(tmp_path / "set"), "manifest.json": b"", "checksums.txt": b""}
    digest = xxhash.xxh3_64()
    for name, data in files.items():
        digest.update(name.encode() + data.replace(str(tmp_path).encode(), b""))
    assert digest.hexdigest() == "5c846404074f2d63"
