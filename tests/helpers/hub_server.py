"""A server on localhost that speaks the part of the Hugging Face hub's protocol that downloads use.

`OWNER/NAME/resolve/REVISION/FILE` is answered with the headers by which huggingface_hub knows a
file of a commit; a file or a repository that is not there with the hub's error codes.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Where it listens, and what it was asked for: method and path."""

    url: str
    requests: list[tuple[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def serve_hub(root: Path) -> Iterator[Hub]:
    """Serves repositories root/OWNER/NAME, of the revisions main and COMMIT."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            hub.requests.append((self.command, self.path))
            parts = self.path.split("?")[0].strip("/").split("/")
            repository = root.joinpath(*parts[:2])
            if len(parts) < 5 or parts[2] != "resolve" or not repository.is_dir():
                return self.refuse("RepoNotFound")
            if parts[3] not in ("main", COMMIT):
                return self.refuse("RevisionNotFound")
            file = repository.joinpath(*parts[4:])
            if not file.is_file():
                return self.refuse("EntryNotFound")
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
            return None

        do_GET = do_HEAD = answer  # noqa: N815

        def refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def ask_hub_at(url: str, patch: pytest.MonkeyPatch, *, cache: Path) -> None:
    """Points this process, which has imported huggingface_hub, to a hub and an empty cache."""
    from huggingface_hub import constants

    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
