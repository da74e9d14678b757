"""Stores for tests: one in memory that fails when told to, and S3 with a faulty line to it."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from unicl_fast.dataset.object_store import ObjectStore


class FaultyStore(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory under faulty://; every read is noted, and may be made to fail."""

    protocol: ClassVar = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar = [""]
    reads: ClassVar[list[tuple[str, int | None, int | None]]] = []
    """Path, first byte and end of each."""
    spoil: ClassVar[Callable[[str, bytes], bytes] | None] = None
    """Given the path and what would be read; returns or raises what comes instead."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("faulty://").strip("/")

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **more: Any
    ) -> bytes:
        path = self._strip_protocol(path)
        self.reads.append((path, start, end))
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


class FaultyLine(http.server.ThreadingHTTPServer):
    """A proxy in front of an HTTP server. `fault` is asked at every request what is to go wrong."""

    daemon_threads = True

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Forwarder)
        self.target = target
        self.fault: Callable[[str, str], str] = lambda method, path: ""
        """Given method and path: slow, 500, 503, cut, short, reset, or nothing."""
        self.requests: list[tuple[str, str, str]] = []
        """Method, path and range of each."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of lines that were cut."""


class _Forwarder(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyLine

    def _forward(self) -> None:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            body = b"".join(iter(self._read_chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, self.path, self.headers.get("Range", "")))
        fault = self.server.fault(self.command, self.path)
        if fault == "slow":
            time.sleep(3)
        if fault == "reset":
            self.close_connection = True
            return
        if fault in ("500", "503"):
            self._answer(int(fault), {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        line = http.client.HTTPConnection("127.0.0.1", self.server.target)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        line.request(self.command, self.path, body=body, headers=headers)
        answer = line.getresponse()
        data = answer.read()
        line.close()
        headers = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date")
        }
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        if fault == "short":
            data = data[: len(data) // 2]
        self._answer(answer.status, headers, data, length=length, cut=fault == "cut")

    def _read_chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline().split(b";")[0], 16))
        self.rfile.readline()
        return data

    def _answer(
        self,
        status: int,
        headers: dict[str, str],
        data: bytes,
        *,
        length: str | None = None,
        cut: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """Moto's S3 in a process of its own, with a bucket called `bucket`; gives its port."""
    with (folder / "moto.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        port = _port_of(folder / "moto.log")
        request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        urllib.request.urlopen(request).read()
        yield port
    finally:
        server.kill()
        server.wait()


def _port_of(log: Path) -> int:
    for _ in range(600):
        for line in log.read_text().splitlines():
            if "Running on http://127.0.0.1:" in line:
                return int(line.rsplit(":", 1)[1].split()[0].strip("/"))
        time.sleep(0.1)
    raise TimeoutError(f"moto did not start: {log.read_text()}")


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


def put(store: ObjectStore, name: str, data: bytes) -> None:
    """Writes an object without retries."""
    store._call("pipe_file", store._path(name), data)
