"""The programs on S3: moto's server, over a line that is slow, is cut, or answers with errors."""

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_stores import FaultyLine, FaultyStore, lose_patience, put, s3_environment
from program_runs import SMALL, call

from unicl_fast.dataset import object_store
from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.dataset.object_store import ObjectStore, StorageError
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.packing.upload import upload_dataset
from unicl_fast.tools import pretrain
from unicl_fast.tools.evaluate import __main__ as evaluate
from unicl_fast.tools.pack import __main__ as pack

pytest.importorskip("s3fs")
pytestmark = pytest.mark.slow  # each opening of S3 takes half a second; the like without it is not


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyLine]:
    line = FaultyLine()
    for name, value in s3_environment(line.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for name, value in (("TRIES", 4), ("FIRST_PAUSE_SECONDS", 0.02), ("ANSWER_SECONDS", 2)):
        monkeypatch.setattr(object_store, name, value)
    yield line
    line.close()


class NowAndThen:
    """Each fault in turn, at every so many requests of a method."""

    def __init__(self, *faults: str, method: str = "GET", every: int = 4) -> None:
        self.met: Counter[str] = Counter()  # of each fault
        self._method, self._every = method, every
        self._calls, self._kinds = itertools.count(1), itertools.cycle(faults)
        self._lock = threading.Lock()

    def __call__(self, asked: str, path: str) -> str:
        with self._lock:
            if asked != self._method or next(self._calls) % self._every:
                return ""
            kind = next(self._kinds)
            self.met[kind] += 1
            return kind


def test_upload_and_reading_survive_faults_of_the_line(data, line, tmp_path, caplog):
    url = f"s3://bucket/{tmp_path.name}/captions"
    line.fault = writing = NowAndThen("503", "reset", method="PUT", every=3)
    upload_dataset(data / "captions", url, progress=False)
    assert set(writing.met) == {"503", "reset"}
    faults = ("500", "503", "cut", "short", "reset", "slow")
    line.fault = reading = NowAndThen(*faults)
    cache = CacheOptions(block_bytes=16_384)
    with PackedDataset(data / "captions") as local, PackedDataset(url, cache=cache) as remote:
        for i in range(len(local)):
            assert bytes(remote.image_bytes(i, verify=True)) == bytes(local.image_bytes(i))
        assert set(reading.met) == set(faults)
        # s3fs itself retries after errors and without an answer; the other retries are ours
        assert caplog.text.count("; try 2 of 4 in ") >= 3
        for said in ("payload is not completed", "bytes came, 16384", "no answer came in time"):
            assert said in caplog.text
        line.fault = lambda method, path: "503"
        (block,) = (tmp_path / "home").rglob("00000000")
        block.unlink()
        with pytest.raises(StorageError, match=r"s3://\S+, bytes 0 to \d+ .*\(4 tries\)"):
            remote.image_bytes(0)
    gets = [path for method, path, _ in line.requests if method == "GET"]
    assert len(gets) < 400


def test_no_file_and_no_message_holds_a_password_of_a_url(
    data, tmp_path, monkeypatch, capfd,
    caplog,
):  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    lose_patience(monkeypatch)
    root, out = "faulty://ann:geheim@store", tmp_path / "run"
    store = ObjectStore(f"{root}/classes")
    for path in (data / "classes").rglob("*.jpg"):
        store.write_file(path, str(path.relative_to(data / "classes")))
    put(store, "cat/bad.jpg", b"no image")
    call(pack, "build", f"{root}/classes", "--out", f"{root}/labels", "--workers", 1)
    call(pack, "inspect", f"{root}/labels", "--html", tmp_path / "page.html", "--no-near")
    call(pack, "verify", f"{root}/labels")
    train = [*SMALL, "--data.train", f"{root}/labels=1", "--data.evaluate", f"{root}/labels",
             "--out", out, "--ledger"]  # fmt: skip
    call(pretrain, *train, "--run.steps", 2)
    call(pretrain, *train, "--run.steps", 4, "--resume", "auto", "--data.crop-scale", "0.5", "1")
    call(evaluate, "zero-shot", "--checkpoint", out, "--data", f"{root}/labels", "--json",
         tmp_path / "results.json")  # fmt: skip
    # with another password it is the same data
    for name in list(FaultyStore.store):
        FaultyStore.store[name.replace("geheim", "secret")] = FaultyStore.store[name]
    again = [str(word).replace("geheim", "secret") for word in train]
    call(pretrain, *again, "--run.steps", 6, "--resume", "auto")

    def refuse(path: str, content: bytes) -> bytes:
        raise OSError("no answer from http://ann:geheim@host/a?sig=geheim")

    monkeypatch.setattr(FaultyStore, "spoil", refuse)
    with pytest.raises(SystemExit):
        call(pretrain, *train[:-3], "--out", tmp_path / "other")
    with pytest.raises(SystemExit):
        call(pretrain, *SMALL, "--data.train", "http://ann:geheim@host/a?b", "--out", out)
    shown = capfd.readouterr()
    assert "could not be read" in shown.err
    said = [shown.out, shown.err, caplog.text]
    places = [out, tmp_path / "home", tmp_path / "page.html", tmp_path / "results.json"]
    files = [path for place in places for path in [place, *place.rglob("*")] if path.is_file()]
    assert len(files) > 10
    for secret in ("geheim", "secret"):
        assert not [text for text in said if secret in text]
        assert not [path for path in files if secret.encode() in path.read_bytes()]
        stored = {name: file for name, file in FaultyStore.store.items() if "/labels/" in name}
        assert not [name for name, file in stored.items() if secret.encode() in file.getvalue()]
