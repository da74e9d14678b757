"""A server on localhost that speaks the Hugging Face hub's protocol of downloads.

`OWNER/NAME/resolve/REVISION/FILE` is answered with the headers by which huggingface_hub knows a
file of a commit; a file or a repository that is not there with the hub's error codes.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from http_servers import Server
from werkzeug.wrappers import Request, Response

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_ofthetests"


@dataclass
class Hub:
    """Its address, and the requests so far (method and path)."""

    url: str
    requests: list[tuple[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def serve_hub(root: Path) -> Iterator[Hub]:
    """Serves repositories root/OWNER/NAME, of the revisions main and COMMIT."""

    @Request.application
    def answer(request: Request) -> Response:
        hub.requests.append((request.method, request.path))
        parts = request.path.strip("/").split("/")
        match [request.method.replace("HEAD", "GET"), *parts]:
            case ["GET", "api", "models", owner, name, *_]:
                if not (root / owner / name).is_dir():
                    return refusal(404, "RepoNotFound")
                found = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []}
                return content(json.dumps(found).encode())
            case ["GET", owner, name, "resolve", revision, *file]:
                path = root.joinpath(owner, name, *file)
                if not (root / owner / name).is_dir():
                    return refusal(404, "RepoNotFound")
                if revision not in ("main", COMMIT):
                    return refusal(404, "RevisionNotFound")
                return content(path.read_bytes()) if path.is_file() else refusal(404)
        return refusal(404, "RepoNotFound")

    def content(data: bytes) -> Response:
        response = Response(data, headers={"X-Repo-Commit": COMMIT})
        response.set_etag(hashlib.sha1(data).hexdigest())
        return response

    def refusal(status: int, code: str = "EntryNotFound") -> Response:
        return Response(status=status, headers={"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    with contextlib.closing(Server(answer)) as server:
        hub = Hub(server.url)
        yield hub


@contextlib.contextmanager
def hub_of(root: Path, patch: pytest.MonkeyPatch, *, cache: Path) -> Iterator[Hub]:
    """Serves repositories and points this process to them, and to a cache."""
    with serve_hub(root) as hub:
        ask_hub_at(hub.url, patch, cache=cache)
        yield hub


def ask_hub_at(url: str, patch: pytest.MonkeyPatch, *, cache: Path) -> None:
    """Points this process, which has imported huggingface_hub, to a hub and an empty cache."""
    from huggingface_hub import constants

    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # it would ask a server of another kind
    patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    patch.setenv("HF_TOKEN", TOKEN)
