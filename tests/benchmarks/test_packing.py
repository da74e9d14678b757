"""`unicl-bench pack` compares the images of other writers; test_run.py has the whole program."""

from pathlib import Path
from typing import Any

import pytest
from pack_runs import jpeg

from benchmarks import packing

pytestmark = pytest.mark.slow


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    paths = [folder / f"{number:08d}.jpg" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(jpeg(number))
    return paths


def test_a_writer_that_loses_an_image_stops_the_stage(images, tmp_path, monkeypatch):
    def lose(paths: list[Path], recipe: Any, name: str, out: Path) -> None:
        out.mkdir()
        packing._work(0, paths[1:], (recipe, name, out))

    monkeypatch.setattr(packing, "loop", lose)
    with pytest.raises(RuntimeError, match="keep: 1 of 5 images of the bare loop differ"):
        packing.compare(images, packing._Recipe("keep", ""), tmp_path, ["webdataset"])
