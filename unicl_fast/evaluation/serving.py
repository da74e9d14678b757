"""A page on this machine: search of a data set, and images tried against typed classes.

Python's standard server suffices: it has one user, on the loopback interface. It answers only
requests that name this host and come from its own page, so that no other site can reach the model
through the user's browser. Images are decoded with the limits of `Model`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.reader import DamagedSampleError
from unicl_fast.evaluation.inference import Model
from unicl_fast.evaluation.search import SearchIndex
from unicl_fast.images.codec import MAX_PIXELS, open_image, pillow_limits, pixels_of
from unicl_fast.system.untrusted_files import parse_json

MOST_CLASSES = 1000
_HOSTS = ("127.0.0.1", "localhost")
_MOST_BYTES = 64 << 20
_MOST_DIGITS = 15  # most digits of a length or a sample's number; Python refuses to parse thousands
_FOUND = 24
_POLICY = "default-src 'self'; img-src 'self' blob:; style-src 'self' 'unsafe-inline'"
_FILES = {"/": ("serve.html", "text/html"), "/serve.js": ("serve.js", "text/javascript")}
_KINDS = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp"}


class Server(ThreadingHTTPServer):
    """Answers for one model, an image at a time."""

    daemon_threads = True

    def __init__(
        self,
        model: Model,
        *,
        name: str,
        classes: tuple[str, ...],
        port: int,
        index: SearchIndex | None = None,
    ) -> None:
        """Listens on the loopback interface; OSError if the port is in use."""
        super().__init__((_HOSTS[0], port), _Handler)
        self.model, self.name, self.classes, self.index = model, name, classes, index
        self.working = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://{_HOSTS[0]}:{self.server_port}/"

    def describe(self) -> dict[str, Any]:
        num_images = None if self.index is None else len(self.index)
        return {"name": self.name, "classes": self.classes, "num_images": num_images}

    def classify(self, body: bytes) -> dict[str, Any]:
        """Answers a request: a line of JSON, then the image's file; ValueError if unusable."""
        asked, image = _question(body)
        classes, template = asked.get("classes"), asked.get("template")
        if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
            raise ValueError("classes must be a list of names")
        if len(classes) > MOST_CLASSES or not isinstance(template, str):
            raise ValueError(f"send at most {MOST_CLASSES:,} classes, and one prompt")
        with self.working:
            (found,) = self.model.classify(
                [_pixels(image)], classes, templates=[template], top=20, progress=False
            )
        return {"classes": list(found.items())}

    def search(self, body: bytes) -> dict[str, Any]:
        """As `classify`; searches by {"text": ...}, or by the image if there is no text."""
        asked, image = _question(body)
        text = asked.get("text", "")
        if self.index is None or not isinstance(text, str):
            raise ValueError("there is no data set to search, or the text is not a string")
        with self.working:
            if text.strip():
                (found,) = self.index.by_texts([text], top=_FOUND)
            else:
                (found,) = self.index.by_images([_pixels(image)], top=_FOUND)
        return {"found": list(map(dataclasses.asdict, found))}

    def image(self, number: str) -> bytes | None:
        """An image's file, by its number in the data set; None if there is no such image."""
        is_number = number.isdecimal() and len(number) <= _MOST_DIGITS
        if self.index is None or not is_number or int(number) >= len(self.index):
            return None
        with self.working:
            return self.index.image_file(int(number))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints errors, except that of a browser that has left."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _question(body: bytes) -> tuple[dict[str, Any], bytes]:
    question, _, image = body.partition(b"\n")
    asked = parse_json(question, where="the question")
    if not isinstance(asked, dict):
        raise ValueError("the question must be a JSON object")
    return asked, image


def _pixels(image: bytes) -> NDArray[np.uint8]:
    with pillow_limits(MAX_PIXELS):  # which holds for the whole process
        return pixels_of(open_image(image))


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60  # seconds that a client can stay silent

    def do_GET(self) -> None:
        if not self._is_for_this_host():
            return
        if self.path == "/model":
            self._answer(self.server.describe())
        elif self.path in _FILES:
            name, kind = _FILES[self.path]
            content = resources.files(__package__).joinpath(name).read_bytes()
            self._send(content, kind=f"{kind}; charset=utf-8")
        elif self.path.startswith("/image/"):
            self._send_image(self.path.removeprefix("/image/"))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send_image(self, number: str) -> None:
        try:
            content = self.server.image(number)
        except DamagedSampleError:
            content = None
        if content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self._send(content, kind=_KINDS.get(content[:2], "application/octet-stream"))

    def do_POST(self) -> None:
        if not self._is_for_this_host():
            return
        size = self.headers.get("Content-Length", "")
        answers = {"/classify": self.server.classify, "/search": self.server.search}
        if self.path not in answers or not size.isdecimal() or len(size) > _MOST_DIGITS:
            self.send_error(HTTPStatus.NOT_FOUND)
        elif (left := int(size)) > _MOST_BYTES:
            while left > 0 and (part := self.rfile.read(min(left, 1 << 20))):
                left -= len(part)  # a browser reads no answer before it has sent everything
            self._answer({"error": f"the image is larger than {_MOST_BYTES >> 20} MB"})
        else:
            body = self.rfile.read(left)
            try:
                self._answer(answers[self.path](body))
            except ValueError as error:
                self._answer({"error": str(error)})

    def _is_for_this_host(self) -> bool:
        host = self.headers.get("Host", "")
        is_own_page = self.headers.get("Origin", f"http://{host}") == f"http://{host}"
        if not (is_ours := is_own_page and host.rsplit(":", 1)[0] in _HOSTS):
            self.send_error(HTTPStatus.FORBIDDEN)
        return is_ours

    def _answer(self, values: dict[str, Any]) -> None:
        self._send(json.dumps(values).encode(), kind="application/json; charset=utf-8")

    def _send(self, content: bytes, *, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        headers = {"Content-Type": kind, "Content-Length": str(len(content))}
        headers |= {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Stays silent."""
