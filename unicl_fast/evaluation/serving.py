"""A page and a JSON interface: search of a data set, and images tried against typed classes.

Starlette and uvicorn (the extra `serve`) do the HTTP. By default only this machine is answered, and
only pages of this host: no other site can reach the model or show an image through a browser. An
error has its status and {"error": "a sentence"}.
"""

import asyncio
import hmac
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import resources
from typing import Annotated, Any
from urllib.parse import parse_qs

import anyio
import msgspec
import numpy as np
import torch
import uvicorn
from msgspec import Meta
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from unicl_fast.dataset.reader import DamagedSampleError
from unicl_fast.evaluation.choices import LOOPBACK
from unicl_fast.evaluation.inference import Model
from unicl_fast.evaluation.search import Found, SearchIndex
from unicl_fast.images.codec import open_image, pillow_limits, pixels_of
from unicl_fast.images.limits import MAX_PIXELS

MOST_CLASSES = 1000
_MOST_BODY = 87 << 20  # an image of 64 MB, since Base64 makes four bytes of three
_MOST_REQUESTS = 32  # at a time, each with a body in memory; another one gets 503
_SECONDS = 60  # that a client can stay silent
_MOST_DIGITS = 15  # of a sample's number; Python refuses to parse thousands
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_KINDS = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp"}
_FILES = {  # the same everywhere: they need no token
    "/": ("serve.html", "text/html"),
    "/serve.js": ("serve.js", "text/javascript"),
    "/docs": ("docs.html", "text/html"),
    "/docs.js": ("docs.js", "text/javascript"),
    "/openapi.json": ("openapi.json", "application/json"),
}

# As long as the captions that packing takes: a text of 60 MB would hold the model for a minute.
Text = Annotated[str, Meta(max_length=100_000)]
Name = Annotated[str, Meta(min_length=1, max_length=1000)]


class SearchQuestion(msgspec.Struct, forbid_unknown_fields=True):
    """Searches by `text` or, if that is empty, by `image`, a file in Base64."""

    text: Text = ""
    image: bytes = b""
    top: Annotated[int, Meta(ge=1, le=1000)] = 24


class SearchAnswer(msgspec.Struct):
    """The images found, best first."""

    found: list[Found]


class ClassifyQuestion(msgspec.Struct, forbid_unknown_fields=True):
    """Names `image`, a file in Base64; by default by the model's own classes."""

    image: bytes
    classes: Annotated[list[Name], Meta(min_length=2, max_length=MOST_CLASSES)] | None = None
    template: Annotated[str, Meta(max_length=1000)] = "a photo of a {}."


class ClassifyAnswer(msgspec.Struct, omit_defaults=True):
    """Classes and probabilities, the 20 most probable first.

    Of a model with several label columns its own `columns`, and in `classes` the best of each.
    """

    classes: list[tuple[str, float]]
    columns: dict[str, list[tuple[str, float]]] = {}


def make_app(
    model: Model,
    *,
    name: str,
    columns: Mapping[str, Sequence[str]],
    index: SearchIndex | None = None,
    host: str = "127.0.0.1",
    token: str = "",
) -> Starlette:
    """The page and the interface for one model, which works for one request at a time.

    `columns` are class names by label column, as `classes_by_column` returns them.
    Only a `host` of this machine is compared with the requests'. With a `token`, each request needs
    it, as `Authorization: Bearer` or `?token=`.
    """
    alone = anyio.CapacityLimiter(1)
    count = None if index is None else len(index)
    classes = list(dict.fromkeys(itertools.chain(*columns.values())))
    described = {"name": name, "classes": classes, "num_images": count}
    page = resources.files(__package__)
    contents = {
        **{path: (page.joinpath(file).read_bytes(), kind) for path, (file, kind) in _FILES.items()},
        "/model": (msgspec.json.encode(described), "application/json"),
    }

    def classify(asked: ClassifyQuestion) -> ClassifyAnswer:
        given = columns if asked.classes is None else {"": asked.classes}
        rows = model.embed_images([_pixels(asked.image)], progress=False)
        features, templates = torch.from_numpy(rows), [asked.template]
        found = {}
        for column, names in given.items():
            (best,) = model.rank_classes(features, names, templates=templates, top=20)
            found[column] = list(best.items())
        if list(found) == [""]:
            return ClassifyAnswer(found[""])
        return ClassifyAnswer([best for best, *_ in found.values()], found)

    def search(asked: SearchQuestion) -> SearchAnswer:
        if index is None:
            raise HTTPException(404, "there is no data set to search")
        if asked.text.strip():
            return SearchAnswer(*index.by_texts([asked.text], top=asked.top))
        if not asked.image:
            raise ValueError("send a text or an image to search for")
        return SearchAnswer(*index.by_images([_pixels(asked.image)], top=asked.top))

    def image_file(number: str) -> bytes:
        is_number = number.isascii() and number.isdecimal() and len(number) <= _MOST_DIGITS
        if index is None or not is_number or int(number) >= len(index):
            raise HTTPException(404, "there is no such image")
        try:
            return index.image_file(int(number))
        except DamagedSampleError:
            raise HTTPException(404, "this image is damaged") from None

    async def show(request: Request) -> Response:
        content, kind = contents[request.url.path]
        return Response(content, media_type=kind)

    async def image(request: Request) -> Response:
        number = request.path_params["number"]
        content = await anyio.to_thread.run_sync(image_file, number, limiter=alone)
        return Response(content, media_type=_KINDS[content[:2]])

    return Starlette(
        routes=[
            *(Route(path, show) for path in contents),
            Route("/image/{number}", image),
            Route("/search", _answering(search, SearchQuestion, alone), methods=["POST"]),
            Route("/classify", _answering(classify, ClassifyQuestion, alone), methods=["POST"]),
        ],
        middleware=[Middleware(_Guard, hosts=LOOPBACK if host in LOOPBACK else (), token=token)],
        exception_handlers={HTTPException: _refuse, ClientDisconnect: _refuse},
    )


def _answering(
    answer: Callable[[Any], Any], kind: Any, alone: anyio.CapacityLimiter
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BODY:  # Starlette's own limit answers without our headers
                raise HTTPException(413, f"the body is larger than {_MOST_BODY >> 20} MB")
        try:
            asked = msgspec.json.decode(body, type=kind)
            return _json(await anyio.to_thread.run_sync(answer, asked, limiter=alone))
        except msgspec.DecodeError as error:
            status = 422 if isinstance(error, msgspec.ValidationError) else 400
            raise HTTPException(status, f"the body is not as asked for: {error}") from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    return endpoint


async def _refuse(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        error = HTTPException(400, "the body is shorter than its Content-Length")
    return _json({"error": error.detail}, status=error.status_code)


def make_server(app: Starlette) -> uvicorn.Server:
    """Its `run(sockets=[...])` returns after Ctrl-C or `should_exit`; it logs errors alone."""
    return uvicorn.Server(
        uvicorn.Config(
            app, http=_Protocol, ws="none", lifespan="off", access_log=False, log_config=None,
            log_level="error", server_header=False, limit_concurrency=_MOST_REQUESTS,
            timeout_graceful_shutdown=2,
        )
    )  # fmt: skip


class _Guard:
    """Lets in requests to this host, from its own pages, with the token; bounds silences."""

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], token: str) -> None:
        self._app, self._hosts, self._token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        async def receive_soon() -> Message:
            try:
                return await asyncio.wait_for(receive(), _SECONDS)
            except TimeoutError:
                raise HTTPException(408, f"nothing came for {_SECONDS} seconds") from None

        await (self._refusal(scope) or self._app)(scope, receive_soon, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        own = (f"http://{host}", f"https://{host}")  # the latter behind a proxy
        if self._hosts and name.strip("[]") not in self._hosts:
            return _json({"error": "only this machine is answered"}, status=403)
        site = headers.get("sec-fetch-site", "none")
        if headers.get("origin", own[0]) not in own or site not in ("none", "same-origin"):
            return _json({"error": "pages of other sites are not answered"}, status=403)
        if self._token and scope["path"] not in _FILES:
            asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            bearer = headers.get("authorization", "").removeprefix("Bearer ")
            given, expected = (asked.encode(), bearer.encode("latin-1")), self._token.encode()
            if not any(hmac.compare_digest(one, expected) for one in given):
                asks = {"WWW-Authenticate": "Bearer"}
                said = "this server asks for its token: Authorization: Bearer, or ?token="
                return _json({"error": said}, status=401, headers=asks)
        return None


class _Protocol(H11Protocol):
    """Also closes connections on which no whole request comes; uvicorn waits for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()

    def _wait(self) -> None:
        self._unset_keepalive_if_required()
        close = self.timeout_keep_alive_handler
        self.timeout_keep_alive_task = self.loop.call_later(_SECONDS, close)


def _json(values: Any, *, status: int = 200, headers: Any = None) -> Response:
    # names of files can hold lone surrogates, which UTF-8 lacks: they become question marks
    content = json.dumps(msgspec.to_builtins(values), ensure_ascii=False).encode(errors="replace")
    return Response(content, status, headers=headers, media_type="application/json")


def _pixels(image: bytes) -> NDArray[np.uint8]:
    with pillow_limits(MAX_PIXELS):  # which holds for the whole process
        return pixels_of(open_image(image))
