"""Data sets under URLs: the same samples as from a folder, whatever the store and the cache do."""

import contextlib
import copy
import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_tokenizers import PAD, write_tokenizer
from object_stores import FaultyServer, FaultyStore, empty, lose_patience, put, upload
from packed_sets import Sample, pack, read_pixels, saved
from PIL import Image
from waiting import wait_until

from unicl_fast.dataset import block_cache, files, object_store
from unicl_fast.dataset.block_cache import BlockCache, CacheOptions
from unicl_fast.dataset.object_store import ObjectStore, StorageError
from unicl_fast.dataset.other_tokens import take_tokens
from unicl_fast.dataset.reader import DamagedDatasetError, DamagedSampleError, PackedDataset
from unicl_fast.images.limits import ImageFormat
from unicl_fast.packing.upload import upload_dataset
from unicl_fast.system.atomic_files import lock
from unicl_fast.text.file_tokenizer import FileTokenizer
from unicl_fast.text.tokenizer import Tokenizer

BLOCK = 4096


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    lose_patience(monkeypatch)
    monkeypatch.setattr(files, "_BETWEEN_READINGS_SECONDS", 0.01)
    empty()
    yield
    empty()


def image(seed: int, side: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), format="PNG")


@pytest.fixture(scope="module", params=["keep", "raw"])
def local(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedDataset]:
    """40 images of noise, 3.6 kB each, so that many lie across the border of two blocks."""
    samples = [Sample(image(i, 34), captions=[f"noise {i}"]) for i in range(40)]
    out = tmp_path_factory.mktemp("packed") / "noise"
    with pack(out, samples, class_names=(), tokenizer=Tokenizer(), format=request.param) as dataset:
        yield dataset


@pytest.fixture
def cache(tmp_path: Path) -> CacheOptions:
    return CacheOptions(folder=tmp_path / "cache", max_bytes=10**7, block_bytes=BLOCK)


@pytest.mark.parametrize("url", ["simplecache::s3://b/x", "https://h/x?key=1", "s3://"])
def test_urls_that_are_no_folders_are_refused(url):
    with pytest.raises(ValueError, match="is not the URL of a folder"):
        ObjectStore(url)


def test_a_store_without_its_package_names_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"pip install .*\[remote\]"):
        ObjectStore("s3://bucket/x").read("a", 0, 1)
    with pytest.raises(ValueError, match="known are s3, gs"):
        ObjectStore("nonsense://bucket/x").read("a", 0, 1)


@pytest.mark.parametrize("ask", ["find", "find_all", "read_whole", "read"])
@pytest.mark.parametrize("answers", [(503, 429, 200), ("reset", 200), (410,), (404,), (403,)])
def test_only_404_and_410_mean_that_an_object_of_a_server_is_missing(ask, answers):
    server = FaultyServer(*answers)
    store = ObjectStore(f"{server.url}/folder")
    requests: dict[str, Callable[[], Any]] = {
        "find": lambda: store.find("a") and 5,
        "find_all": lambda: store.find_all(["a"])["a"] and 5,
        "read_whole": lambda: len(store.read_whole("a") or b"") or None,
        "read": lambda: len(store.read("a", 0, 5)),
    }
    if answers == (403,):
        with pytest.raises(StorageError, match="may not be"):
            requests[ask]()
    elif answers[-1] != 200 and ask == "read":
        with pytest.raises(FileNotFoundError):
            requests[ask]()
    else:
        assert requests[ask]() == (5 if answers[-1] == 200 else None)
    server.close()
    if answers == (503, 429, 200):
        with pytest.raises(StorageError, match=r"\(3 tries\)"):  # nobody is there
            requests[ask]()


def test_an_upload_continues_where_it_was_cut_off_and_ends_with_the_manifest(local, monkeypatch):
    url, sent, refused = "faulty://bucket/new", [], {"captions.npy"}
    put_file = FaultyStore.put_file

    def put_or_fail(store: FaultyStore, path: str, target: str, **more: Any) -> None:
        sent.append(target.rpartition("/")[2])
        if sent[-1] in refused:
            raise OSError(errno.EIO, "an internal error")
        put_file(store, path, target, **more)

    monkeypatch.setattr(FaultyStore, "put_file", put_or_fail)
    with pytest.raises(StorageError, match=r"captions\.npy could not be written"):
        upload_dataset(local.folder, url, progress=False)
    with pytest.raises(FileNotFoundError, match="is not a packed data set"):
        PackedDataset(url)
    refused.clear()
    sent.clear()
    upload_dataset(local.folder, url, progress=False)
    assert "captions.npy" in sent
    assert not [name for name in sent if name.endswith(".tar")]
    assert sent[-1] == "manifest.json"
    sent.clear()
    upload_dataset(local.folder, url, progress=False)
    assert sent == ["manifest.json"]
    del FaultyStore.store["/bucket/new/manifest.json"]
    put(ObjectStore(url), "notes.txt", b"x")
    with pytest.raises(ValueError, match=r"holds 1 other object, notes\.txt for one"):
        upload_dataset(local.folder, url, progress=False)


@pytest.mark.parametrize(("in_buckets", "place"), [(True, "bucket"), (False, "folder")])
def test_a_bucket_that_is_not_there_is_named_and_not_made(tmp_path, monkeypatch, in_buckets, place):
    def write(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("none of this name")

    made: list[str] = []
    monkeypatch.setattr(FaultyStore, "put_file", write)
    monkeypatch.setattr(FaultyStore, "makedirs", lambda _, path, **__: made.append(path))
    if in_buckets:
        monkeypatch.setattr(object_store, "_IN_BUCKETS", ("faulty",))
    (tmp_path / "large").write_bytes(b"345")
    store = ObjectStore("faulty://buckte/x")
    message = rf"faulty://buckte/x/a cannot be written: the {place} .*none of this name.*URL is"
    with pytest.raises(StorageError, match=message):
        store.write_file(tmp_path / "large", "a")
    assert bool(made) != in_buckets


def test_another_tokenizer_reads_captions_once_into_the_cache(local, cache, tmp_path):
    url = upload(local.folder, "faulty://bucket/noise")
    tokenizer = FileTokenizer(str(write_tokenizer(tmp_path / "tokenizer", pad=PAD)), 16)
    with PackedDataset(url, cache=cache, fraction=0.5) as remote:
        FaultyStore.reads.clear()
        take_tokens(remote, tokenizer, cache=tmp_path / "elsewhere")
        assert len(FaultyStore.reads) == len(set(FaultyStore.reads)) > 0
        for i in range(len(remote)):
            expected = tokenizer.encode([f"noise {i}"])[0]
            assert np.array_equal(remote.caption_tokens(i, 0), expected)
    FaultyStore.reads.clear()
    with PackedDataset(url, cache=cache) as again:
        opened = len(FaultyStore.reads)
        take_tokens(again, tokenizer, cache=tmp_path / "elsewhere")
        assert len(FaultyStore.reads) == opened
        last = len(again) - 1
        expected = tokenizer.encode([f"noise {last}"])[0]
        assert np.array_equal(again.caption_tokens(last, 0), expected)
        (rows,) = (tmp_path / "elsewhere").glob("*/tokens.npy")
        os.truncate(rows, 200)
        with pytest.raises(DamagedDatasetError, match=f"{rows} was cut"):
            again.check_arrays()


def test_samples_are_those_of_the_folder_and_come_once(local, cache):
    url = upload(local.folder, "faulty://bucket/noise")
    with PackedDataset(url, cache=cache) as remote:
        FaultyStore.reads.clear()
        for i in reversed(range(len(local))):
            assert np.array_equal(remote.image_bytes(i, verify=True), local.image_bytes(i))
            assert np.array_equal(remote.caption_tokens(i, 0), local.caption_tokens(i, 0))
        assert len(FaultyStore.reads) == len(set(FaultyStore.reads))
        blocks = remote.blocks_of(np.arange(len(local)))
        assert len(FaultyStore.reads) == len(blocks) > 20
        header = 0 if local.image_shape is None else len(b"P6\n34 34\n255\n")
        sizes = [len(local.image_bytes(i)) - header for i in range(len(local))]
        assert remote.needed_bytes == sum(sizes)
        assert remote.location == url
        assert remote.folder.name == "noise"
        with copy.deepcopy(remote) as copied:
            assert np.array_equal(copied.image_bytes(7, verify=True), local.image_bytes(7))
        assert url in remote.describe(3)
    FaultyStore.reads.clear()
    with PackedDataset(url, cache=cache) as again:
        assert np.array_equal(again.image_bytes(7), local.image_bytes(7))
    names = [path.rsplit("/", 1)[1] for path, _, _ in FaultyStore.reads]
    assert set(names) <= {"manifest.json", "checksums.txt", "pixels.npy"}  # the latter's header


def test_pixels_are_read_by_the_batch(local, cache):
    if local.image_shape is None:
        pytest.skip("not decoded")
    url = upload(local.folder, "faulty://bucket/noise")
    indices, positions = np.array([5, 39, 0, 17, 18]), np.array([4, 3, 2, 1, 0])
    expected = np.zeros((6, *local.image_shape), np.uint8)
    found = expected.copy()
    assert read_pixels(local, indices, expected, positions).all()
    with PackedDataset(url, cache=cache) as remote:
        assert read_pixels(remote, indices, found, positions).all()
        assert np.array_equal(found, expected)
        assert remote.needed_bytes == found[:5].nbytes
        for block in (cache.place / "blocks").rglob("0*"):
            block.write_bytes(bytes(block.stat().st_size))
        assert not read_pixels(remote, indices, found, positions).any()
        assert np.array_equal(remote.image_bytes(5, verify=True), local.image_bytes(5))
        del FaultyStore.store["/bucket/noise/pixels.npy"]
        for block in (cache.place / "blocks").rglob("0*"):
            block.unlink()
        assert not read_pixels(remote, indices, found, positions).any()


def test_what_the_cache_lost_or_spoilt_is_fetched_again(local, cache):
    url = upload(local.folder, "faulty://bucket/noise")
    with PackedDataset(url, cache=cache) as remote:
        for i in range(len(local)):
            remote.image_bytes(i)
        for number, block in enumerate(sorted((cache.place / "blocks").rglob("0*"))):
            if number % 3 == 0:
                block.write_bytes(b"\0" * block.stat().st_size)
            elif number % 3 == 1:
                os.truncate(block, 100)
            else:
                block.unlink()
        for i in range(len(local)):
            assert np.array_equal(remote.image_bytes(i, verify=True), local.image_bytes(i))


def test_a_store_that_fails_for_good_is_named(local, cache):
    url = upload(local.folder, "faulty://bucket/noise")
    with PackedDataset(url, cache=cache) as remote:

        def spoil(path: str, data: bytes) -> bytes:
            raise OSError(errno.EIO, "an internal error")

        FaultyStore.spoil = staticmethod(spoil)
        FaultyStore.reads.clear()
        with pytest.raises(
            StorageError,
            match=r"faulty://bucket/noise/\S+, bytes \d+ to \d+ could not be read: .*an internal "
            r"error.*\(3 tries\).*--resume auto",
        ):
            remote.image_bytes(0)
        assert len(FaultyStore.reads) == 3
        FaultyStore.spoil = staticmethod(lambda path, data: data[:-1])
        with pytest.raises(StorageError, match=r"4095 bytes came, 4096 were requested"):
            remote.image_bytes(0)


def test_a_shard_that_is_gone_is_a_damaged_sample(local, cache):
    url = upload(local.folder, "faulty://bucket/noise")
    with PackedDataset(url, cache=cache) as remote:
        del FaultyStore.store[f"/bucket/noise/{local.shard_of(3)}"]
        with pytest.raises(DamagedSampleError, match=r"sample 0000000003 .*no such object"):
            remote.image_bytes(3)
    with pytest.raises(FileNotFoundError, match=r"faulty://\S+ is missing"):
        PackedDataset(url, cache=cache)


def test_a_data_set_that_changed_is_noticed(local, cache, tmp_path):
    url = upload(local.folder, "faulty://bucket/noise")
    samples = [Sample(image(100 + i, 34), captions=[f"other {i}"]) for i in range(40)]
    form: ImageFormat = "keep" if local.image_shape is None else "raw"
    other = pack(tmp_path / "o", samples, class_names=(), tokenizer=Tokenizer(), format=form)
    with other, PackedDataset(url, cache=cache) as remote:
        remote.image_bytes(0, verify=True)
        upload(other.folder, url)
        assert np.array_equal(remote.image_bytes(0, verify=True), local.image_bytes(0))
        with pytest.raises(DamagedDatasetError, match=f"{url} was replaced or removed while"):
            remote.image_bytes(39, verify=True)
        with PackedDataset(url, cache=cache) as opened_later:
            for i in (0, 39):
                found = opened_later.image_bytes(i, verify=True)
                assert np.array_equal(found, other.image_bytes(i))
    upload(local.folder, url)
    with PackedDataset(url, cache=cache) as back:  # a block of the other's must not be taken
        assert np.array_equal(back.image_bytes(39, verify=True), local.image_bytes(39))


@pytest.mark.parametrize("years", [-40, 40])
def test_a_clock_that_is_set_removes_no_copy_in_use(local, cache, monkeypatch, years):
    """As on a machine that knows the time only after its start."""
    url, now = upload(local.folder, "faulty://bucket/noise"), time.time()
    monkeypatch.setattr("time.time", lambda: now + years * 365 * 86_400)
    with PackedDataset(url, cache=cache) as remote:
        for i in range(2):
            assert np.array_equal(remote.image_bytes(i, verify=True), local.image_bytes(i))


def test_arrays_are_compared_with_their_checksums(local, cache):
    url = upload(local.folder, "faulty://bucket/noise")
    PackedDataset(url, cache=cache).close()
    (tokens,) = cache.place.rglob("tokens.npy")
    tokens.write_bytes(tokens.read_bytes()[::-1])  # in the cache: is fetched again
    PackedDataset(url, cache=cache).close()
    assert tokens.read_bytes() == (local.folder / "tokens.npy").read_bytes()
    tokens.unlink()
    data = bytearray((local.folder / "tokens.npy").read_bytes())
    data[-1] ^= 1
    store = ObjectStore(url)
    put(store, "tokens.npy", bytes(data))
    with pytest.raises(ValueError, match=rf"{url}/tokens\.npy is damaged: its checksum"):
        PackedDataset(url, cache=cache)
    upload(local.folder, url)
    put(store, "manifest.json", (local.folder / "manifest.json").read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged, or just being replaced"):
        PackedDataset(url, cache=cache)
    put(store, "manifest.json", bytes((64 << 20) + 1))
    with pytest.raises(ValueError, match=rf"{url}/manifest\.json is too large: at most"):
        PackedDataset(url, cache=cache)
    assert FaultyStore.reads[-1][1:] == (0, (64 << 20) + 1)
    FaultyStore().rm(f"{url}/manifest.json")
    with pytest.raises(FileNotFoundError, match=f"{url} is not a packed data set"):
        PackedDataset(url, cache=cache)


def test_the_cache_stays_within_its_bytes_and_keeps_what_is_used(tmp_path):
    cache = BlockCache(tmp_path, max_bytes=20 * BLOCK)
    fetched: list[int] = []

    def read(number: int) -> None:
        def fetch() -> bytes:
            fetched.append(number)
            return bytes([number]) * BLOCK

        view = bytearray(10)
        cache.read_into(f"file/{number:08d}", BLOCK, memoryview(view), 5, fetch)
        assert view == bytes([number]) * 10

    old = time.time() - 1000
    for number in range(60):
        read(number)
        read(0)
        for path in (tmp_path / "blocks").rglob("0*"):
            if not path.name.endswith("00"):
                os.utime(path, (old + number, old + number))
        size = sum(path.stat().st_size for path in (tmp_path / "blocks").rglob("0*"))
        assert size <= 20 * BLOCK
    assert fetched.count(0) == 1
    assert len(fetched) == 60


def test_blocks_are_fetched_once_by_threads_and_forked_processes(tmp_path):
    log = tmp_path / "log"
    log.touch()

    def fetch() -> bytes:
        with log.open("ab", buffering=0) as file:
            file.write(b"x")
        time.sleep(0.02)
        return b"y" * BLOCK

    def read_all() -> None:
        cache = BlockCache(tmp_path / "cache", max_bytes=10**6)
        for number in range(10):
            view = bytearray(BLOCK)
            cache.read_into(f"f/{number}", BLOCK, memoryview(view), 0, fetch)
            assert view == b"y" * BLOCK

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_all) for _ in range(3)]
    threads = [threading.Thread(target=read_all) for _ in range(3)]
    for one in (*processes, *threads):
        one.start()
    for one in (*processes, *threads):
        one.join()
    assert [one.exitcode for one in processes] == [0, 0, 0]
    assert log.stat().st_size == 10


def test_who_was_killed_leaves_nothing_that_others_wait_for(tmp_path):
    cache = BlockCache(tmp_path, max_bytes=10 * BLOCK)
    started = tmp_path / "started"

    def fetch_for_ever() -> bytes:
        started.touch()
        time.sleep(600)
        return b""

    context = multiprocessing.get_context("fork")
    process = context.Process(target=cache.ensure, args=("f/0", BLOCK, fetch_for_ever))
    process.start()
    wait_until(started.exists)
    cache.ensure("f/0", BLOCK, fetch_for_ever)  # comes back at once: another is at it
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    (left,) = (tmp_path / "blocks").rglob("*.part")
    os.utime(left, (0, 0))
    view = bytearray(BLOCK)
    cache.read_into("f/0", BLOCK, memoryview(view), 0, lambda: b"z" * BLOCK)
    assert view == b"z" * BLOCK
    assert not list((tmp_path / "blocks").rglob("*.part"))
    left.touch()  # of a block that nobody wants again
    for number in range(1, 20):
        cache.read_into(f"f/{number}", BLOCK, memoryview(view), 0, lambda: b"z" * BLOCK)
    assert not left.exists()


@pytest.mark.parametrize("where", ["full", "stopped"])
def test_without_a_cache_that_works_reading_continues(tmp_path, where, monkeypatch, caplog):
    cache = BlockCache(tmp_path, max_bytes=10 * BLOCK)
    with contextlib.ExitStack() as stack:
        if where == "full":

            def write(file: int, data: bytes) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(block_cache, "_write_all", write)
        else:
            monkeypatch.setattr(block_cache, "_LOCK_PATIENCE_SECONDS", 0.1)
            (tmp_path / "blocks" / "f").mkdir()
            part = stack.enter_context((tmp_path / "blocks" / "f" / "0.part").open("w"))
            lock(part.fileno())
        for _ in range(2):
            view = bytearray(8)
            cache.read_into("f/0", BLOCK, memoryview(view), 0, lambda: b"z" * BLOCK)
            assert view == b"z" * 8
    assert caplog.text.count("CACHE: blocks cannot be kept") == (where == "full")
