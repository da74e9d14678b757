"""`unicl-bench pack`: other writers get the same images, and one that is missing is named."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import xxhash
from pack_runs import jpeg

from benchmarks import packing

pytestmark = pytest.mark.slow

FAKE_WRITER = """
import tarfile, io
class WebDatasetSampleWriter:
    def __init__(self, shard_id, folder, save_caption, digits, schema, encode_format):
        self.format = encode_format
        self.tar = tarfile.open(f"{folder}/{shard_id:0{digits}d}.tar", "w")
    def write(self, image, key, caption, facts):
        assert facts["key"] == key
        for name, data in ((self.format, image), ("json", str(facts).encode())):
            member = tarfile.TarInfo(f"{key}.{name}")
            member.size = len(data)
            self.tar.addfile(member, io.BytesIO(data))
    def close(self):
        self.tar.close()
"""


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    paths = [folder / f"{number:08d}.jpg" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(jpeg(number))
    return paths


@pytest.fixture
def _img2dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which imports much that is not installed."""
    package = tmp_path / "site" / "img2dataset"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import albumentations_of_another_year")
    (package / "writer.py").write_text(FAKE_WRITER)
    monkeypatch.syspath_prepend(str(package.parent))


@pytest.mark.usefixtures("_img2dataset")
@pytest.mark.parametrize("name", ["webdataset", "img2dataset"])
@pytest.mark.parametrize("format", ["keep", "png"])
def test_writers_of_others_are_given_the_images_of_the_bare_loop(name, format, images, tmp_path):
    assert packing._missing(name) == ""
    recipe = packing._Recipe(format, "short:16")
    bare = packing._work(0, images, (recipe, packing._BARE, tmp_path))
    (tmp_path / "out").mkdir()
    for number, some in enumerate((images[:3], images[3:])):
        packing._work(number, some, (recipe, name, tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    assert Counter(packing._hashes_in(tmp_path / "out")) == Counter(bare)
    assert xxhash.xxh3_64_intdigest(images[0].read_bytes()) not in bare  # they were scaled


def test_a_writer_that_loses_an_image_stops_the_stage(images, tmp_path, monkeypatch):
    def lose(paths: list[Path], recipe: Any, name: str, out: Path) -> None:
        out.mkdir()
        packing._work(0, paths[1:], (recipe, name, out))

    monkeypatch.setattr(packing, "loop", lose)
    with pytest.raises(RuntimeError, match="keep: 1 of 5 images of the bare loop differ"):
        packing.compare(images, packing._Recipe("keep", ""), tmp_path, ["webdataset"])
