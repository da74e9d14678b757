"""What the packing tool does and says of URLs: file:// stands for all stores, also for folders."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from foreign_sources import write_tar
from http_servers import Server
from inline_checks import check_inline
from pack_runs import build_set, jpeg, stop_at, write_photos
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.object_store import ObjectStore
from unicl_fast.packing import build as build_module
from unicl_fast.packing import upload
from unicl_fast.packing.build import build_dataset
from unicl_fast.packing.sources.tars import expand_braces

SHARD_BYTES = 30_000


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_inline(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", range(60), ("cat", "dog"))


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Below a folder that is not there."""
    return f"file://{tmp_path}/store/new/set"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where things are packed for a URL by default."""
    return tmp_path / "home" / "unicl_fast" / "work"


def build(photos: Path, url: str) -> None:
    build_set([str(photos)], url, shard_bytes=SHARD_BYTES)


def raising(error: BaseException) -> Callable[..., None]:
    def function(*_: Any, **__: Any) -> None:
        raise type(error)(*error.args)  # anew: notes are added to it

    return function


def test_a_stopped_build_to_a_url_says_what_is_kept(photos, url, work, monkeypatch, pack):
    error = SystemExit(143)
    arguments = ("build", photos, "--out", url, "--shard-bytes", SHARD_BYTES)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, error)
        text = pack(*arguments, code=143)
    assert "stopped; this run has written nothing" in text
    assert not os.listdir(work), "of a build that kept nothing"
    with monkeypatch.context() as patch:
        stop_at(patch, 40, error)
        text = pack(*arguments, code=143)
    kept = rf"stopped; {re.escape(str(work))}/\w+/set\.partial keeps \d finished shards"
    assert re.search(kept, text), text

    with monkeypatch.context() as patch:
        patch.setattr(upload, "_send", raising(error))
        text = pack(*arguments, code=143)
    (packed,) = work.glob("*/set")
    assert "stopped; uploaded files stay" in text
    assert f"resume by: unicl-pack upload {packed} --out {url}" in text

    with monkeypatch.context() as patch:
        patch.setattr(upload, "_send", raising(error))
        text = pack("upload", packed, "--out", url, code=143)
    assert f"stopped; uploaded files stay under {url}" in text
    assert "files sent and read back" in pack("upload", packed, "--out", url)
    build_set([str(photos)], packed.with_name("other"))
    text = pack("upload", packed.with_name("other"), "--out", url, code=2)
    assert "already holds another packed data set" in text


def test_the_same_build_resumes_an_upload_that_was_cut_off(
    photos, url, work, tmp_path, monkeypatch
):
    real, sent = upload._send, []

    def send(store: ObjectStore, path: Path, expected: str) -> None:
        if len(sent) == 2:
            raise OSError("the line is cut")
        sent.append(path.name)
        real(store, path, expected)

    monkeypatch.setattr(upload, "_send", send)
    with pytest.raises(RuntimeError, match="packed, but not uploaded: the line is cut"):
        build(photos, url)
    monkeypatch.setattr(upload, "_send", real)
    with pytest.raises(ValueError, match="made with other options:\n  --seed"):
        build_dataset([str(photos)], url, workers=1, shard_bytes=SHARD_BYTES, seed=1)
    build(photos, url)
    assert not os.listdir(work)
    build(photos, str(tmp_path / "whole"))
    store = tmp_path / "store" / "new" / "set"
    for name in os.listdir(store):
        assert (store / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert set(os.listdir(tmp_path / "whole")) - set(os.listdir(store)) == {"made-of.json"}


def test_a_build_to_a_url_that_cannot_be_leaves_nothing(url, work, tmp_path, monkeypatch):
    (tmp_path / "bad" / "cat").mkdir(parents=True)
    (tmp_path / "bad" / "cat" / "1.jpg").write_text("no image")
    with pytest.raises(ValueError, match="nothing could be packed"):
        build(tmp_path / "bad", url)
    assert not os.listdir(work)
    monkeypatch.setattr(build_module, "_build", raising(AssertionError("packed")))
    with pytest.raises(ValueError, match="https://host/set: http has no uploads; give the URL"):
        build(tmp_path / "bad", "https://host/set")


@pytest.mark.parametrize("name", ["photos.tar", "photos.zip", "photos-{0..1}.tar"])
def test_the_query_of_a_source_is_in_no_name_and_no_file(name, photos, tmp_path, pack):
    secret = "?X-Sig=SE/CRET"
    for number, one in enumerate(expand_braces(name)):
        place = tmp_path / "store" / f"{one}{secret}"
        place.parent.mkdir(parents=True, exist_ok=True)
        if one.endswith(".zip"):
            shutil.make_archive(str(tmp_path / "photos"), "zip", photos)
            (tmp_path / one).rename(place)
        else:
            write_tar(place, {"1.jpg": jpeg(number), "1.txt": b"x"})
    url = f"file://{tmp_path}/store/{name}{secret}"
    assert "CRET" not in pack("build", url, "--out", tmp_path / "set")
    for path in (tmp_path / "set").iterdir():
        assert b"CRET" not in path.read_bytes(), path
    assert f'"source":"{name}'.encode() in (tmp_path / "set" / "shard-000000.tar").read_bytes()
    assert "CRET" not in pack("build", f"{url}2", "--out", tmp_path / "new", code=2)


def test_a_packed_set_on_a_web_server_is_verified_and_packed_again(photos, tmp_path, pack):
    """Though nobody lists its files but the data set itself."""
    build(photos, str(tmp_path / "set"))

    @Request.application
    def answer(request: Request) -> Response:
        path = tmp_path / request.path.strip("/")
        if not path.is_file():
            return Response(status=404)
        return send_file(path, request.environ, conditional=True)

    with contextlib.closing(Server(answer)) as server:
        url = f"{server.url}/set"
        assert "60" in pack("verify", url)
        build_set([url], str(tmp_path / "again"))
        manifest = Manifest.load(tmp_path / "again")
        assert (manifest.num_samples, manifest.source) == (60, (url,))
        (tmp_path / "set" / "samples.npy").unlink()
        text = pack("verify", url, code=1)
        assert "samples.npy" in text
        assert f"unicl-pack upload DIR --out {url}" in text


def test_an_inspection_names_the_url_and_not_its_copy(photos, url, tmp_path, monkeypatch, pack):
    build(photos, url)
    places = {kind: tmp_path / f"all.{kind}" for kind in ("json", "html", "csv")}
    text = pack(
        *("inspect", url, "--no-near", "--workers", 1, "--json", places["json"]),
        *("--html", places["html"], "--duplicates-list", places["csv"]),
    )
    assert f"{url}: 60 images" in text
    assert json.loads(places["json"].read_text())["folder"] == url
    page = places["html"].read_text(encoding="utf-8")
    assert f'<div class="where">{url}: ' in page
    assert '<h1 dir="auto">set</h1>' in page
    for place in places.values():
        assert "staging-" not in place.read_text(encoding="utf-8")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    text = pack("inspect", url, code=2)
    assert re.search(r"need [\d,]+ bytes more, and 1,000 are free in \S+staging-\S+: make", text)
