"""Stores for tests: one in memory that fails when told to, and S3 with a faulty line to it."""

import io
import os
import socket
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from http_servers import Server
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.wrappers import Request, Response

from unicl_fast.dataset import object_store
from unicl_fast.dataset.object_store import ObjectStore


class FaultyStore(MemoryFileSystem):
    """Objects in memory under faulty://; every read is noted, and may be made to fail."""

    protocol: ClassVar = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar = [""]
    reads: ClassVar[list[tuple[str, int | None, int | None]]] = []
    """Path, first byte and end of each, which is not beyond the file's."""
    spoil: ClassVar[Callable[[str, bytes], bytes] | None] = None
    """Given the path and what would be read; returns or raises what comes instead."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("faulty://").strip("/")

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **more: Any
    ) -> bytes:
        path = self._strip_protocol(path)
        file = self.store.get(path)
        shown = end if end is None or file is None else min(end, file.size)
        self.reads.append((path, start, shown))
        data: bytes = super().cat_file(path, start=start, end=end, **more)
        spoil = type(self).spoil
        return data if spoil is None else spoil(path, data)


fsspec.register_implementation("faulty", FaultyStore, clobber=True)


def upload(folder: Path, url: str) -> str:
    """The files of a folder as objects below a URL, which is returned."""
    system, root = fsspec.core.url_to_fs(url)
    for path in folder.iterdir():
        system.pipe_file(f"{root}/{path.name}", path.read_bytes())
    return url


def empty() -> None:
    """Takes all out of the store in memory, and mends it."""
    FaultyStore.store.clear()
    FaultyStore.pseudo_dirs[:] = [""]
    FaultyStore.reads.clear()
    FaultyStore.spoil = None


class FaultyLine(Server):
    """Moto's S3 with a bucket called `bucket`, whose answers `fault` may spoil on their way."""

    def __init__(self) -> None:
        self.fault: Callable[[str, str], str] = lambda method, path: ""
        """Given method and path: slow, 500, 503, cut, short, reset, or nothing."""
        self.requests: list[tuple[str, str, str]] = []
        """Method, path and range of each."""
        self._answer = DomainDispatcherApplication(create_backend_app)
        super().__init__()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/bucket", method="PUT")).close()

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        """Answers a request: a WSGI application."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path, environ.get("HTTP_RANGE", "")))
        fault = self.fault(method, path)
        if fault == "slow":
            time.sleep(3)
        # a client may wait until all that it sends was read
        environ["wsgi.input"] = io.BytesIO(Request(environ).get_data())
        if fault == "reset":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        answer = Response.from_app(self._answer, environ)
        data = answer.get_data()
        if fault in ("500", "503"):
            answer = Response(b"<Error><Code>SlowDown</Code></Error>", int(fault))
        elif fault == "short":
            answer.set_data(data[: len(data) // 2])
        elif fault == "cut":
            answer.response = [data[: len(data) // 2]]
        return answer(environ, start_response)


class FaultyServer(Server):
    """An HTTP server of one object, "12345" under any name, with the given answers in turn."""

    def __init__(self, *answers: int | str) -> None:
        """Statuses, or "reset"; the last one repeats."""
        self.answers = list(answers)
        super().__init__()

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer == "reset":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            answer = 200
        return Response(b"12345" if answer == 200 else b"", int(answer))(environ, start_response)


def s3_environment(url: str) -> dict[str, str]:
    """What makes s3:// mean a server that lets everybody in."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "no_proxy": os.environ.get("no_proxy", "") + ",127.0.0.1",
    }


def lose_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are tried three times, at short intervals."""
    monkeypatch.setattr(object_store, "TRIES", 3)
    monkeypatch.setattr(object_store, "FIRST_PAUSE_SECONDS", 0.01)


def put(store: ObjectStore, name: str, data: bytes) -> None:
    """Writes an object without retries."""
    store._call("pipe_file", store._path(name), data)
