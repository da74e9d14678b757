"""What the tests of programs share."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from program_runs import STARTED, call

from unicl_fast.tools import pack_dataset


@pytest.fixture(scope="session")
def data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 pictures as class folders and packed, and captioned photographs packed."""
    folder = tmp_path_factory.mktemp("data")
    archive = zipfile.ZipFile(shared_data / "cifar10" / "cifar10-test.zip")
    names = [name for name in archive.namelist() if name.endswith(("0001.jpg", "0002.jpg"))]
    names += [name for name in archive.namelist() if name.endswith("cat/0003.jpg")]
    for name in names:
        archive.extract(name, folder / "classes")
    lines = (shared_data / "captions" / "flickr8k" / "captions.jsonl").read_text().splitlines()
    (folder / "list.jsonl").write_text("\n".join(lines[:20]))
    call(pack_dataset, "build", folder / "classes", "--out", folder / "labels")
    call(
        *(pack_dataset, "build", folder / "list.jsonl", "--out", folder / "captions"),
        *("--image-root", shared_data / "captions" / "flickr8k"),
    )
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()  # its ranks end with it
        process.wait()
