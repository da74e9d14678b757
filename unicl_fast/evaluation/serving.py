"""A page on this machine where images are tried against typed classes.

The server of Python's standard library suffices: one user, on the loopback interface. Only requests
that name this host and come from its own page are answered, so that no page of another site reaches
the model through the user's browser. Images are decoded as `Model` decodes them, with its limits.
"""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from unicl_fast.evaluation.inference import Model
from unicl_fast.images.codec import MAX_PIXELS, open_image, pillow_limits, pixels_of

_HOSTS = ("127.0.0.1", "localhost")
_MOST_BYTES = 64 << 20
_MOST_CLASSES = 1000
_POLICY = "default-src 'self'; img-src 'self' blob:; style-src 'self' 'unsafe-inline'"
_FILES = {"/": ("serve.html", "text/html"), "/serve.js": ("serve.js", "text/javascript")}


class Server(ThreadingHTTPServer):
    """Answers for one model, an image at a time."""

    daemon_threads = True

    def __init__(self, model: Model, *, name: str, classes: tuple[str, ...], port: int) -> None:
        """Listens on the loopback interface; raises OSError if the port is taken."""
        super().__init__((_HOSTS[0], port), _Handler)
        self.model, self.name, self.classes = model, name, classes
        self.working = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://{_HOSTS[0]}:{self.server_port}/"

    def classify(self, body: bytes) -> dict[str, Any]:
        """The answer to a question of the page: a line of JSON, and then the image's file.

        Raises ValueError if it cannot be answered.
        """
        question, _, image = body.partition(b"\n")
        asked = json.loads(question)
        if not isinstance(asked, dict):
            raise ValueError("a question is an object with classes and template")
        classes, template = asked.get("classes"), asked.get("template")
        if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
            raise ValueError("classes are a list of names")
        if len(classes) > _MOST_CLASSES or not isinstance(template, str):
            raise ValueError(f"at most {_MOST_CLASSES:,} classes are taken, and one prompt")
        with self.working, pillow_limits(MAX_PIXELS):  # which holds for the whole process
            pixels = pixels_of(open_image(image))
            (found,) = self.model.classify([pixels], classes, templates=[template], top=20)
        return {"classes": list(found.items())}


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if not self._is_for_this_host():
            return
        if self.path == "/model":
            self._answer({"name": self.server.name, "classes": self.server.classes})
        elif self.path in _FILES:
            name, kind = _FILES[self.path]
            self._send(resources.files(__package__).joinpath(name).read_bytes(), kind=kind)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if not self._is_for_this_host():
            return
        size = self.headers.get("Content-Length", "")
        if self.path != "/classify" or not size.isdecimal():
            self.send_error(HTTPStatus.NOT_FOUND)
        elif (left := int(size)) > _MOST_BYTES:
            while left > 0 and (part := self.rfile.read(min(left, 1 << 20))):
                left -= len(part)  # a browser reads no answer before it has sent everything
            self._answer({"error": f"an image of at most {_MOST_BYTES >> 20} MB is taken"})
        else:
            body = self.rfile.read(left)
            try:
                self._answer(self.server.classify(body))
            except ValueError as error:
                self._answer({"error": str(error)})

    def _is_for_this_host(self) -> bool:
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin", f"http://{host}")
        is_ours = host.rsplit(":", 1)[0] in _HOSTS and origin == f"http://{host}"
        if not is_ours:
            self.send_error(HTTPStatus.FORBIDDEN)
        return is_ours

    def _answer(self, values: dict[str, Any]) -> None:
        self._send(json.dumps(values).encode(), kind="application/json")

    def _send(self, content: bytes, *, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Stays silent: the page shows what there is to see."""
