"""The page of `unicl-eval serve`: what it answers, to whom, and how a browser shows it."""

import base64
import contextlib
import http.client
import inspect
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from browser import dump_page
from small_runs import tiny_config
from starlette.responses import Response
from starlette.routing import Route

from unicl_fast import Model
from unicl_fast.checkpoints.load import build_model
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation import serving
from unicl_fast.evaluation.search import SearchIndex
from unicl_fast.evaluation.serving import make_app, make_server

NAMES = ("dog", "cat", "horse")


_USED = '<iframe id="page" src="/" width="390" height="900"></iframe><script src="/outer.js">'
_USED += "</script>"
_USE = """
const frame = document.getElementById("page");
frame.onload = async () => {
  const page = frame.contentDocument;
  const until = async (ready) => {
    while (!ready()) await new Promise((go) => setTimeout(go, 20));
  };
  const all = (selector) => [...page.querySelectorAll(selector)];
  const choose = async (id) => {
    const chosen = new DataTransfer();
    chosen.items.add(new File([await (await fetch("/photo")).blob()], "photo.jpg"));
    page.getElementById(id).files = chosen.files;
    page.getElementById(id).dispatchEvent(new Event("change"));
  };
  const found = {};
  await until(() => page.getElementById("classes").value);
  found.focused = page.activeElement.id;
  found.status = page.getElementById("status").innerText;
  found.shown = all("img").filter((image) => image.offsetHeight).length;
  page.getElementById("text").value = "two dogs";
  page.getElementById("ask").requestSubmit();
  await until(() => all("#found li").length);
  await until(() => all("#found img").every((image) => image.complete));
  const titles = () => all("#found .title").map((one) => one.innerText);
  found.by_text = titles();
  found.lines = all("#found li")[0].innerText.split("\\n").filter(Boolean);
  found.broken = all("#found img").filter((image) => !image.naturalWidth).length;
  found.beside = all("main *").filter((one) => one.getBoundingClientRect().right > 390.5).length;
  await choose("example");
  await until(() => String(titles()) !== String(found.by_text));
  found.by_image = titles();
  found.asked = page.getElementById("text").value;
  await choose("image");
  await until(() => all("#answer li").length);
  found.answer = all("#answer .name").map((one) => one.innerText);
  found.error = page.getElementById("error").textContent;
  page.getElementById("template").value = "no place for a name";
  page.getElementById("template").dispatchEvent(new Event("input"));
  await until(() => page.getElementById("error").textContent);
  found.refused = page.getElementById("error").textContent;
  found.width = page.documentElement.scrollWidth;
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  document.body.replaceChildren(result);
};
"""


@pytest.fixture(scope="module")
def photo(shared_data: Path) -> Path:
    return min((shared_data / "captions" / "flickr8k" / "images").glob("*.jpg"))


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model(build_model(tiny_config(precision="fp32")))


@pytest.fixture(scope="module")
def index(model: Model, data: Path) -> Iterator[SearchIndex]:
    """Photographs with captions; their features are drawn, so that texts find different ones."""
    with PackedDataset(data / "captions") as dataset:
        rows = np.random.default_rng(0).normal(size=(len(dataset), 8)).astype(np.float32)
        with contextlib.closing(SearchIndex(model, dataset, rows)) as index:
            yield index


@contextlib.contextmanager
def running(model: Model, index: SearchIndex | None, photo: Path, **options: Any) -> Iterator[int]:
    """The port; beside the page one that uses it as a person does, and a photograph for it."""
    app = make_app(
        model, name="runs/<first>", index=index, **({"columns": {"": NAMES}} | options)
    )  # fmt: skip
    for path, content, kind in (
        ("/photo", photo.read_bytes(), "image/jpeg"),
        ("/outer", _USED, "text/html"),
        ("/outer.js", _USE, "text/javascript"),
    ):
        response = Response(content, media_type=kind)
        app.router.routes.append(Route(path, response))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def server(model: Model, index: SearchIndex, photo: Path) -> Iterator[int]:
    with running(model, index, photo) as server:
        yield server


def ask(
    server: int, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server)) as line:
        line.request(method, path, body=body, headers=headers)
        answer = line.getresponse()
        return answer.status, answer.read()


def post(server: int, path: str, question: Any, image: bytes | None = None) -> tuple[int, Any]:
    if image is not None:
        question = {**question, "image": base64.b64encode(image).decode()}
    body = question if isinstance(question, bytes) else json.dumps(question).encode()
    status, content = ask(server, "POST", path, body)
    return status, json.loads(content)


def test_an_image_is_named_in_each_label_column(model, photo):
    columns = {"animal": NAMES[:3], "colour": ("red", "blue")}
    with running(model, None, photo, columns=columns) as server:
        assert json.loads(ask(server, "GET", "/model")[1])["classes"] == [*NAMES[:3], "red", "blue"]
        status, found = post(server, "/classify", {}, photo.read_bytes())
        assert (status, found["columns"].keys()) == (200, columns.keys())
        for best, (column, names) in zip(found["classes"], columns.items(), strict=True):
            (expected,) = model.classify([photo], names)
            assert dict(found["columns"][column]) == pytest.approx(expected)
            assert best == found["columns"][column][0]
        status, found = post(server, "/classify", {"classes": ["a", "b"]}, photo.read_bytes())
        assert (status, found.keys()) == (200, {"classes"})


def test_questions_about_classes_and_images_are_answered(server, model, index, photo):
    assert serving._json(["\udce9 é"]).body.decode() == '["? é"]'  # a file's name in Latin 1
    question = {"classes": list(NAMES), "template": "a photo of a {}."}
    (expected,) = model.classify([photo], NAMES)
    for asked in (question, {}):
        status, found = post(server, "/classify", asked, photo.read_bytes())
        assert (status, found) == (200, {"classes": [list(one) for one in expected.items()]})
    for image, asked, status in (
        (b"no image", question, 422),
        (photo.read_bytes(), {"classes": ["dog"]}, 422),
        (photo.read_bytes(), {"classes": ["dog", "dog"]}, 422),
        (photo.read_bytes(), {"classes": ["dog", 5]}, 422),
        (photo.read_bytes(), {"template": "none"}, 422),
        (photo.read_bytes(), {"classes": [str(one) for one in range(1001)]}, 422),
        (None, question, 422),
        (None, {**question, "image": "?"}, 422),
        (None, [], 422),
        (None, b"{", 400),
    ):
        answered, content = post(server, "/classify", asked, image)
        assert (answered, list(content)) == (status, ["error"]), (asked, content)
    (by_text,), (by_image,) = index.by_texts(["a dog"], top=24), index.by_images([photo], top=24)
    for question, image, expected in (
        ({"text": "a dog"}, None, by_text),
        ({}, photo.read_bytes(), by_image),
    ):
        status, content = post(server, "/search", question, image)
        found = content["found"]
        assert status == 200
        assert [one["sample"] for one in found] == [one.sample for one in expected]
        assert found[0]["caption"] == expected[0].caption
        assert found[0]["score"] == pytest.approx(expected[0].score)
    assert len(post(server, "/search", {"text": "a dog", "top": 3})[1]["found"]) == 3
    status, content = ask(server, "GET", f"/image/{by_text[0].sample}")
    assert (status, content) == (200, index.image_file(by_text[0].sample))
    for number in (str(len(index)), "-1", "x", "", "%D9%A3", "9" * 5000):
        assert ask(server, "GET", f"/image/{number}")[0] == 404
    for question, image in (
        ({}, b"no image"), ({"text": 5}, None), ([], None), ({}, None), ({"text": "  "}, None),
        ({"text": "a", "top": 0}, None), ({"text": "a" * 100_001}, None), ({"words": "a"}, None),
    ):  # fmt: skip
        status, content = post(server, "/search", question, image)
        assert (status, list(content)) == (422, ["error"]), question
    assert ask(server, "GET", "/search")[0] == 405


def test_only_this_machine_is_served_and_hostile_requests_print_nothing(server, capfd, monkeypatch):
    own = {"Sec-Fetch-Site": "same-origin", "Origin": f"http://127.0.0.1:{server}"}
    for status, path, headers in (
        (403, "/", {"Host": "evil.example:80"}),
        (403, "/", {"Host": "127.0.0.1.evil.example"}),
        (403, "/image/0", {"Sec-Fetch-Site": "cross-site"}),
        (403, "/image/0", {"Sec-Fetch-Site": "same-site"}),
        (403, "/model", {"Origin": "http://evil.example"}),
        (403, "/model", {"Origin": "null"}),
        (200, "/image/0", own),
        (200, "/image/0", {"Sec-Fetch-Site": "none", "Host": f"localhost:{server}"}),
        (404, "/serving.py", {}),
        (404, "/../serving.py", {}),
        (200, "/", {}),
    ):
        assert ask(server, "GET", path, **headers)[0] == status, (path, headers)
    assert ask(server, "POST", "/classify", b"{}", Origin="http://evil.example")[0] == 403
    assert ask(server, "POST", "/classify", b"{}", **own)[0] == 422
    for deep in (b"[" * 100_000, b'{"a":' * 100_000, b'{"classes":' + b"[" * 100_000):
        assert post(server, "/classify", deep)[0] == 422
    assert ask(server, "POST", "/classify", **{"Content-Length": "9" * 5000})[0] == 400
    with monkeypatch.context() as patch:
        patch.setattr(serving, "_MOST_BODY", 1 << 20)
        large = b'{"text": "' + b"a" * (1 << 20)
        assert post(server, "/search", large) == (413, {"error": "the body is larger than 1 MB"})
    reset = struct.pack("ii", 1, 0)  # closing sends a reset
    short = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
    short += b'{"text": "a dog"}'
    for request in (b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n", b"GET /", b"\0" * 99, b"", short):
        with socket.create_connection(("127.0.0.1", server)) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            line.sendall(request)
    with socket.create_connection(("127.0.0.1", server), timeout=30) as line:
        line.sendall(short)
        line.shutdown(socket.SHUT_WR)
        assert b" 200 " not in line.makefile("rb").read(), "a body that was cut short"
    monkeypatch.setattr(serving, "_SECONDS", 0.1)
    for sent, said in ((b"", b""), (b"GET / HTTP/1.1\r\nHo", b""), (short, b" 408 ")):
        with socket.create_connection(("127.0.0.1", server), timeout=30) as line:
            line.sendall(sent)
            assert said in line.makefile("rb").read(), sent
    assert ask(server, "GET", "/model")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_token_is_asked_for_and_other_hosts_may_be_named(model, index, photo):
    with running(model, index, photo, host="0.0.0.0", token="sEcrét &1") as server:
        for status, path, headers in (
            (200, "/", {"Host": "shop.example"}),
            (401, "/model", {}),
            (401, "/image/0?token=wrong", {}),
            (401, "/image/0", {"Authorization": "Bearer "}),
            (200, "/image/0?token=sEcr%C3%A9t%20%261", {}),
            (200, "/model", {"Authorization": b"Bearer sEcr\xc3\xa9t &1"}),
            (403, "/model?token=sEcr%C3%A9t%20%261", {"Sec-Fetch-Site": "cross-site"}),
        ):
            assert ask(server, "GET", path, **headers)[0] == status, (path, headers)


def test_headers_and_the_description_of_the_interface(server):
    for path in ("/", "/model", "/image/0", "/nothing", "/docs"):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server)) as line:
            line.request("GET", path)
            answer = line.getresponse()
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin", path
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
            assert "Server" not in answer.headers
    described = json.loads(ask(server, "GET", "/openapi.json")[1])
    assert set(described["paths"]) == {"/search", "/classify", "/model", "/image/{number}"}
    kinds = (serving.SearchQuestion, serving.SearchAnswer)
    kinds += (serving.ClassifyQuestion, serving.ClassifyAnswer)
    place = "#/components/schemas/{name}"
    _, schemas = msgspec.json.schema_components(kinds, ref_template=place)
    for schema in schemas.values():  # msgspec 0.22 keeps a docstring's indentation
        schema["description"] = inspect.cleandoc(schema["description"])
    others = {"Error", "ModelAnswer"}
    assert described["components"]["schemas"].keys() == schemas.keys() | others
    assert described["components"]["schemas"].items() >= schemas.items(), "openapi.json is old"
    answered = json.loads(ask(server, "GET", "/model")[1])
    assert set(answered) == set(described["components"]["schemas"]["ModelAnswer"]["properties"])
    assert b"/docs.js" in ask(server, "GET", "/docs")[1]


def test_a_browser_searches_and_classifies(server, model, index, photo, tmp_path):
    found = dump_page(f"http://127.0.0.1:{server}/outer", tmp_path)
    assert found["focused"] == "text"
    assert found["status"] == f"{len(index)} images"
    assert found["shown"] == 0, "images before one is chosen or found"
    (by_text,), (by_image,) = index.by_texts(["two dogs"], top=24), index.by_images([photo], top=24)
    assert found["by_text"] == [one.caption for one in by_text]
    assert found["by_image"] == [one.caption for one in by_image]
    first = by_text[0]
    assert found["lines"] == [first.caption, f"{first.score:.3f}", f"{first.source}/{first.name}"]
    assert found["asked"] == "", "the text of the search before"
    (expected,) = model.classify([photo], NAMES)
    assert found["error"] == ""
    for shown, (name, value) in zip(found["answer"], expected.items(), strict=True):
        assert shown.split("\n") == [name, f"{100 * value:.1f} %"]
    assert "exactly one" in found["refused"]
    assert (found["broken"], found["beside"]) == (0, 0)
    assert found["width"] <= 390
