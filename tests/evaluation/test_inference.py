"""A trained model for use: the same features as an evaluation's, from whatever is given."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import dump_page
from PIL import Image
from small_runs import objective_config, tiny_config

from unicl_fast import Model
from unicl_fast.evaluation.serving import Server, _Handler
from unicl_fast.images.codec import ImageError
from unicl_fast.models.unicl import build_model

NAMES = ("dog", "cat", "horse")


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "captions" / "flickr8k" / "images").glob("*.jpg"))[:5]


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    config = tiny_config()
    data = dataclasses.replace(config.data, evaluation_resize=40)
    return Model(build_model(dataclasses.replace(config, data=data)).double())


def test_paths_images_and_arrays_give_the_same_features(model: Model, photos: list[Path]) -> None:
    opened = [Image.open(photo) for photo in photos]
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    of_paths = model.embed_images([str(photos[0]), *photos[1:]], batch_size=2)
    np.testing.assert_array_equal(of_paths, model.embed_images(opened))
    np.testing.assert_array_equal(of_paths, model.embed_images(arrays))
    np.testing.assert_allclose(np.linalg.norm(of_paths, axis=1), 1, rtol=1e-6)
    grey = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)
    np.testing.assert_array_equal(model.prepare(grey), model.prepare(np.dstack([grey] * 3)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_prepared_as_torchvision_does(
    model: Model, photos: list[Path], interpolation: str
) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    mode = InterpolationMode(interpolation)
    config = model.encoders.config
    data = dataclasses.replace(config.data, interpolation=interpolation)
    other = Model(build_model(dataclasses.replace(config, data=data)))
    for photo in photos:
        resized = transforms.resize(Image.open(photo), [40], interpolation=mode)
        expected = np.asarray(transforms.center_crop(resized, [32, 32]))
        assert abs(other.prepare(photo).astype(int) - expected).max() <= 1


def test_classes_are_ranked_by_probability(model: Model, photos: list[Path]) -> None:
    found = model.classify(photos, NAMES)
    images = torch.from_numpy(model.embed_images(photos))
    texts = torch.from_numpy(model.embed_texts([f"a photo of a {name}." for name in NAMES]))
    scale = model.encoders.logit_scale.exp().item()
    expected = (scale * images @ texts.T).softmax(dim=1)
    for answer, row in zip(found, expected.tolist(), strict=True):
        assert list(answer.values()) == sorted(answer.values(), reverse=True)
        assert answer == pytest.approx(dict(zip(NAMES, row, strict=True)), rel=1e-4)
    assert [next(iter(one)) for one in found] == [
        next(iter(one)) for one in model.classify(photos, NAMES, top=1)
    ]


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_cannot_be_used_is_named(model: Model, photos: list[Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(photos[0].read_bytes()[:3000])
    with pytest.raises(ImageError, match=r"cut\.jpg: .*truncated"):
        model.embed_images([photos[1], cut])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        model.embed_images([tmp_path / "nowhere.jpg"])
    with pytest.raises(ImageError, match=r"uint8 .*, not float32 \[4, 4, 3\]"):
        model.embed_images([np.zeros((4, 4, 3), np.float32)])
    with pytest.raises(ValueError, match="list of paths"):
        model.embed_images(str(photos[0]))
    with pytest.raises(ValueError, match=r"two or more class names .*\['dog', 'dog'\]"):
        model.classify(photos, ["dog", "dog"])
    with pytest.raises(ValueError, match="exactly one"):
        model.classify(photos, NAMES, templates=["a photo"])
    with pytest.raises(ValueError, match="list of texts"):
        model.embed_texts("a dog")


def test_a_model_without_texts_embeds_images_alone(photos: list[Path]) -> None:
    without = Model(build_model(objective_config("supcon")).double())
    assert without.embed_images(photos[:2]).shape == (2, 8)
    with pytest.raises(ValueError, match="no text encoder"):
        without.classify(photos, NAMES)


# The page.


class _Outer(_Handler):
    """Also serves a page that uses the other one as a person does, and the photograph it takes."""

    photo: Path

    def do_GET(self) -> None:  # noqa: N802 - the name of its base
        if self.path == "/photo":
            self._send(self.photo.read_bytes(), kind="image/jpeg")
        elif self.path == "/outer":
            self._send(_USED.encode(), kind="text/html")
        elif self.path == "/outer.js":
            self._send(_USE.encode(), kind="text/javascript")
        else:
            super().do_GET()


_USED = '<iframe id="page" src="/" width="390" height="900"></iframe><script src="/outer.js">'
_USED += "</script>"
_USE = """
const frame = document.getElementById("page");
frame.onload = async () => {
  const page = frame.contentDocument;
  const file = new File([await (await fetch("/photo")).blob()], "photo.jpg");
  const chosen = new DataTransfer();
  chosen.items.add(file);
  while (!page.getElementById("classes").value) await new Promise((go) => setTimeout(go, 20));
  page.getElementById("image").files = chosen.files;
  page.getElementById("image").dispatchEvent(new Event("change"));
  while (!page.querySelector("#answer li")) await new Promise((go) => setTimeout(go, 20));
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify({
    answer: [...page.querySelectorAll("#answer .name")].map((one) => one.innerText),
    error: page.getElementById("error").textContent,
    width: page.documentElement.scrollWidth,
  });
  document.body.replaceChildren(result);
};
"""


@pytest.fixture
def server(model: Model, photos: list[Path]) -> Iterator[Server]:
    with Server(model, name="runs/<first>", classes=NAMES, port=0) as server:
        server.RequestHandlerClass = type("_", (_Outer,), {"photo": photos[0]})
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


def test_the_page_s_questions_are_answered(
    server: Server, model: Model, photos: list[Path]
) -> None:
    question = json.dumps({"classes": list(NAMES), "template": "a photo of a {}."})
    body = question.encode() + b"\n" + photos[0].read_bytes()
    status, content = ask(server, "POST", "/classify", body)
    (expected,) = model.classify(photos[:1], NAMES)
    assert (status, json.loads(content)) == (200, {"classes": [list(x) for x in expected.items()]})
    for body, asked in (
        (b"no image", question),
        (photos[0].read_bytes(), "[]"),
        (photos[0].read_bytes(), "{"),
        (photos[0].read_bytes(), json.dumps({"classes": ["dog"], "template": "{}"})),
    ):
        status, content = ask(server, "POST", "/classify", asked.encode() + b"\n" + body)
        assert (status, list(json.loads(content))) == (200, ["error"])


def test_only_this_machine_and_known_files_are_served(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "GET", "/", Host="evil.example:80")[0] == 403
    assert ask(server, "POST", "/classify", b"{}\n", Origin="http://evil.example")[0] == 403
    assert ask(server, "POST", "/classify", b"{}\n", Origin=server.address[:-1])[0] == 200
    assert ask(server, "GET", "/serving.py")[0] == 404
    assert ask(server, "GET", "/../serving.py")[0] == 404
    assert ask(server, "GET", "/")[0] == 200


def test_a_browser_shows_the_answer(
    server: Server, model: Model, photos: list[Path], tmp_path: Path
) -> None:
    found = dump_page(server.address + "outer", tmp_path)
    (expected,) = model.classify(photos[:1], NAMES)
    assert found["error"] == ""
    assert found["width"] <= 390
    for shown, (name, value) in zip(found["answer"], expected.items(), strict=True):
        assert shown.split("\n") == [name, f"{100 * value:.1f} %"]
