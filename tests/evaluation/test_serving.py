"""The page of `unicl-eval serve`: what it answers, to whom, and how a browser shows it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import dump_page
from small_runs import tiny_config

from unicl_fast import Model
from unicl_fast.checkpoints.load import build_model
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.search import SearchIndex
from unicl_fast.evaluation.serving import Server, _Handler

NAMES = ("dog", "cat", "horse")


class _Outer(_Handler):
    """Also serves a page that uses the other one as a person does, and a photograph for it."""

    photo: Path

    def do_GET(self) -> None:  # noqa: N802 - the name of its base
        own = {"/photo": (self.photo.read_bytes(), "image/jpeg")}
        own |= {"/outer": (_USED, "text/html"), "/outer.js": (_USE, "text/javascript")}
        if self.path in own:
            content, kind = own[self.path]
            self._send(content if isinstance(content, bytes) else content.encode(), kind=kind)
        else:
            super().do_GET()


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


@pytest.fixture
def server(model: Model, index: SearchIndex, photo: Path) -> Iterator[Server]:
    with Server(model, name="runs/<first>", classes=NAMES, port=0, index=index) as server:
        server.RequestHandlerClass = type("_", (_Outer,), {"photo": photo})
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(
    server: Server, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.server_port)) as line:
        line.request(method, path, body=body, headers=headers)
        answer = line.getresponse()
        return answer.status, answer.read()


def answer(server: Server, path: str, question: str | dict[str, Any], image: bytes = b"") -> Any:
    text = question if isinstance(question, str) else json.dumps(question)
    status, content = ask(server, "POST", path, text.encode() + b"\n" + image)
    assert status == 200
    return json.loads(content)


def test_questions_about_classes_and_images_are_answered(
    server: Server, model: Model, index: SearchIndex, photo: Path
) -> None:
    question = {"classes": list(NAMES), "template": "a photo of a {}."}
    (expected,) = model.classify([photo], NAMES)
    found = answer(server, "/classify", question, photo.read_bytes())
    assert found == {"classes": [list(one) for one in expected.items()]}
    for image, asked in (
        (b"no image", question),
        (photo.read_bytes(), "[]"),
        (photo.read_bytes(), "{"),
        (photo.read_bytes(), {"classes": ["dog"], "template": "{}"}),
    ):
        assert list(answer(server, "/classify", asked, image)) == ["error"]
    (by_text,), (by_image,) = index.by_texts(["a dog"], top=24), index.by_images([photo], top=24)
    for question, image, expected in (
        ({"text": "a dog"}, b"", by_text),
        ({}, photo.read_bytes(), by_image),
    ):
        found = answer(server, "/search", question, image)["found"]
        assert [one["sample"] for one in found] == [one.sample for one in expected]
        assert found[0]["caption"] == expected[0].caption
        assert found[0]["score"] == pytest.approx(expected[0].score)
    status, content = ask(server, "GET", f"/image/{by_text[0].sample}")
    assert (status, content) == (200, index.image_file(by_text[0].sample))
    for number in (str(len(index)), "-1", "x", "", "9" * 5000):
        assert ask(server, "GET", f"/image/{number}")[0] == 404
    for question, image in (({}, b"no image"), ({"text": 5}, b""), ("[]", b"")):
        assert list(answer(server, "/search", question, image)) == ["error"]


def test_only_this_machine_is_served_and_hostile_requests_print_nothing(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "GET", "/", Host="evil.example:80")[0] == 403
    assert ask(server, "POST", "/classify", b"{}\n", Origin="http://evil.example")[0] == 403
    assert ask(server, "POST", "/classify", b"{}\n", Origin=server.address[:-1])[0] == 200
    assert ask(server, "GET", "/serving.py")[0] == 404
    assert ask(server, "GET", "/../serving.py")[0] == 404
    assert ask(server, "GET", "/")[0] == 200
    assert "is not JSON" in answer(server, "/classify", "[" * 100_000)["error"]
    assert ask(server, "POST", "/classify", **{"Content-Length": "9" * 5000})[0] == 404
    reset = struct.pack("ii", 1, 0)  # closing sends a reset
    for request in (b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n", b"GET /", b"\0" * 99, b""):
        with socket.create_connection(server.server_address) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            line.sendall(request)
    assert ask(server, "GET", "/model")[0] == 200
    for thread in threading.enumerate():
        if thread.name.startswith("Thread-") and "process_request" in thread.name:
            thread.join(10)
    assert capfd.readouterr() == ("", "")


def test_a_browser_searches_and_classifies(
    server: Server, model: Model, index: SearchIndex, photo: Path, tmp_path: Path
) -> None:
    found = dump_page(server.address + "outer", tmp_path)
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
