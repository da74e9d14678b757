"""A server on localhost that speaks the Hugging Face hub's protocol: downloads, and new models.

`OWNER/NAME/resolve/REVISION/FILE` is answered with the headers by which huggingface_hub knows a
file of a commit; a file or a repository that is not there with the hub's error codes. A repository
is made with a token, its large files are sent by Git LFS, and a commit puts all of them there.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_ofthetests"
LARGE = ".safetensors"


@dataclass
class Hub:
    """Where it listens, what it was asked for (method and path), and whether it loses commits."""

    url: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    breaks_off: bool = False


@contextlib.contextmanager
def serve_hub(root: Path) -> Iterator[Hub]:
    """Serves repositories root/OWNER/NAME, of the revisions main and COMMIT."""
    sent: dict[str, bytes] = {}  # large files, by their SHA-256

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.requests.append((self.command, self.path))
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                if not root.joinpath(*parts[2:4]).is_dir():
                    return self.refuse(404, "RepoNotFound")
                return self.say({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []})
            repository = root.joinpath(*parts[:2])
            if len(parts) < 5 or parts[2] != "resolve" or not repository.is_dir():
                return self.refuse(404, "RepoNotFound")
            if parts[3] not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            file = repository.joinpath(*parts[4:])
            if not file.is_file():
                return self.refuse(404, "EntryNotFound")
            return self.send(200, file.read_bytes())

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            hub.requests.append((self.command, self.path))
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self.refuse(401, "", "Invalid credentials in Authorization header")
            parts = self.path.split("?")[0].strip("/").split("/")
            match parts:
                case ["api", "validate-yaml"]:
                    return self.say({"warnings": [], "errors": []})
                case ["api", "repos", "create"]:
                    wanted = json.loads(body)
                    name = f"{wanted['organization']}/{wanted['name']}"
                    if wanted["organization"] != "us":
                        return self.refuse(403, "", "You don't have the rights")
                    if (root / name).exists():
                        return self.refuse(409, "", "You already created this model repo")
                    (root / name).mkdir(parents=True)
                    return self.say({"url": f"{hub.url}/{name}"})
                case ["api", "models", _, _, "preupload", _]:
                    files = json.loads(body)["files"]
                    return self.say({"files": [self.mode_of(file["path"]) for file in files]})
                case [_, _, "info", "lfs", "objects", "batch"]:
                    objects = json.loads(body)["objects"]
                    for one in objects:
                        one["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
                    return self.say({"objects": objects})
                case ["api", "models", owner, name, "commit", _]:
                    if hub.breaks_off:
                        return self.refuse(500, "", "Internal error")
                    self.commit(root / owner / name, body)
                    url = f"{hub.url}/{owner}/{name}/commit/{COMMIT}"
                    return self.say({"commitUrl": url, "commitOid": COMMIT})
            return self.refuse(404, "EntryNotFound")

        def do_PUT(self) -> None:
            hub.requests.append((self.command, self.path))
            content = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == f"/lfs/{hashlib.sha256(content).hexdigest()}"
            sent[self.path.rpartition("/")[2]] = content
            self.send(200, b"")

        def mode_of(self, path: str) -> dict[str, object]:
            mode = "lfs" if path.endswith(LARGE) else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False}

        def commit(self, repository: Path, body: bytes) -> None:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    (repository / value["path"]).write_bytes(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    (repository / value["path"]).write_bytes(sent[value["oid"]])

        def say(self, values: object) -> None:
            self.send(200, json.dumps(values).encode())

        def refuse(self, status: int, code: str, message: str = "") -> None:
            self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

        def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            for name, value in (headers or {}).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

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


def ask_hub_at(
    url: str, patch: pytest.MonkeyPatch, *, cache: Path, token: str | None = TOKEN
) -> None:
    """Points this process, which has imported huggingface_hub, to a hub and an empty cache."""
    from huggingface_hub import constants

    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # it would ask a server of another kind
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
