"""Versions that nobody tried are named; the command of an extra suits the installation."""

import json
import re
import shlex
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from unicl_fast.system.installation import TRIED, install_command, untried_versions


@pytest.mark.parametrize(
    ("records", "command"),
    [
        ([None, {"url": "file:///home/ann/my%20code", "dir_info": {"editable": True}}],
         "pip install -e '/home/ann/my code[ray]'"),
        ([None, {"url": "file:///src", "dir_info": {}}], "pip install '/src[ray]'"),
        ([None, {"url": "https://host/a.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}}],
         "pip install 'unicl_fast[ray] @ git+https://host/a.git@0a1b'"),
        ([None, {"url": "file:///tmp/unicl_fast-0.2.0-py3-none-any.whl", "archive_info": {}}],
         "pip install 'unicl_fast[ray] @ file:///tmp/unicl_fast-0.2.0-py3-none-any.whl'"),
        ([None], "pip install 'unicl_fast[ray]'"),
        ([], "pip install '.[ray]' in a checkout of unicl_fast"),
    ],
    ids=["editable", "folder", "git", "wheel", "index", "not installed"],
)  # fmt: skip
def test_an_extra_comes_from_where_the_package_came_from(monkeypatch, records, command):
    texts = [record and json.dumps(record) for record in records]
    found = [SimpleNamespace(read_text={"direct_url.json": text}.__getitem__) for text in texts]
    monkeypatch.setattr(metadata, "distributions", lambda name: found)
    assert install_command("ray") == command
    *_, last = shlex.split(command)
    if last.startswith("unicl_fast["):
        assert Requirement(last).extras == {"ray"}


def test_the_tried_versions_are_those_of_the_lock():
    """Of Triton the lock has another one for Pythons without a build of that of torch."""
    lock = (Path(__file__).parents[2] / "uv.lock").read_text()
    locked = re.findall(r'^name = "(.*)"\nversion = "(.*)"$', lock, re.M)
    for name, version in TRIED.items():
        assert (name, version) in locked
    assert (
        f'{{ name = "triton", version = "{TRIED["triton"]}"' in lock.split('name = "torch"\nv')[1]
    )


def test_versions_that_nobody_tried_are_named(monkeypatch):
    installed = TRIED | {"torch": "2.13.0+cu130"}
    del installed["nvidia-dali-cuda120"]

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    assert untried_versions() == ""
    installed |= {"torch": "2.15.0", "triton": "3.9.0"}
    expected = "nobody has tried torch 2.15.0 (tried: 2.13.0), triton 3.9.0 (tried: 3.7.1)"
    assert untried_versions() == expected
