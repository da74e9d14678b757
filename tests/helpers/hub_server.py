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
from pathlib import Path

import pytest
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

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

    @Request.application
    def answer(request: Request) -> Response:
        response = respond(request)
        # which huggingface_hub shows: a hub may send back what it got
        response.headers["X-Request-Id"] = request.headers.get("Authorization", "0")
        return response

    def respond(request: Request) -> Response:
        hub.requests.append((request.method, request.path))
        body, parts = request.get_data(), request.path.strip("/").split("/")
        if request.method == "POST" and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return refusal(401, message="Invalid credentials in Authorization header")
        match [request.method.replace("HEAD", "GET"), *parts]:
            case ["GET", "api", "models", owner, name, *_]:
                if not (root / owner / name).is_dir():
                    return refusal(404, "RepoNotFound")
                return values({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []})
            case ["GET", owner, name, "resolve", revision, *file]:
                path = root.joinpath(owner, name, *file)
                if not (root / owner / name).is_dir():
                    return refusal(404, "RepoNotFound")
                if revision not in ("main", COMMIT):
                    return refusal(404, "RevisionNotFound")
                return content(path.read_bytes()) if path.is_file() else refusal(404)
            case ["POST", "api", "validate-yaml"]:
                return values({"warnings": [], "errors": []})
            case ["POST", "api", "repos", "create"]:
                wanted = json.loads(body)
                if wanted["organization"] != "us":
                    return refusal(403, message="You don't have the rights")
                if (root / "us" / wanted["name"]).exists():
                    return refusal(409, message="You already created this model repo")
                (root / "us" / wanted["name"]).mkdir(parents=True)
                return values({"url": f"{hub.url}/us/{wanted['name']}"})
            case ["POST", "api", "models", _, _, "preupload", _]:
                paths = [file["path"] for file in json.loads(body)["files"]]
                return values({"files": [
                    {"path": path, "shouldIgnore": False,
                     "uploadMode": "lfs" if path.endswith(LARGE) else "regular"}
                    for path in paths
                ]})  # fmt: skip
            case ["POST", _, _, "info", "lfs", "objects", "batch"]:
                objects = json.loads(body)["objects"]
                for one in objects:
                    one["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
                return values({"objects": objects})
            case ["PUT", "lfs", checksum]:
                assert checksum == hashlib.sha256(body).hexdigest()
                sent[checksum] = body
                return content(b"")
            case ["POST", "api", "models", owner, name, "commit", _]:
                if hub.breaks_off:
                    return refusal(500, message="Internal error")
                for line in map(json.loads, body.splitlines()):
                    value, file = line["value"], root / owner / name
                    if line["key"] == "file":
                        (file / value["path"]).write_bytes(base64.b64decode(value["content"]))
                    elif line["key"] == "lfsFile":
                        (file / value["path"]).write_bytes(sent[value["oid"]])
                url = f"{hub.url}/{owner}/{name}/commit/{COMMIT}"
                return values({"commitUrl": url, "commitOid": COMMIT})
        return refusal(404, "RepoNotFound" if request.method == "GET" else "EntryNotFound")

    def content(data: bytes) -> Response:
        response = Response(data, headers={"X-Repo-Commit": COMMIT})
        response.set_etag(hashlib.sha1(data).hexdigest())
        return response

    def values(given: object) -> Response:
        return content(json.dumps(given).encode())

    def refusal(status: int, code: str = "EntryNotFound", message: str = "") -> Response:
        kind = {"X-Error-Message": message} if message else {"X-Error-Code": code}
        return Response(status=status, headers=kind | {"X-Repo-Commit": COMMIT})

    server = make_server("127.0.0.1", 0, answer, threaded=True)
    hub = Hub(f"http://127.0.0.1:{server.port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def hub_of(root: Path, patch: pytest.MonkeyPatch, *, cache: Path) -> Iterator[Hub]:
    """Serves repositories and points this process to them, and to a cache."""
    with serve_hub(root) as hub:
        ask_hub_at(hub.url, patch, cache=cache)
        yield hub


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
