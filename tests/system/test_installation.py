"""Versions that nobody tried are named; the command of an extra suits the installation."""

import re
from importlib import metadata
from pathlib import Path

from unicl_fast.system.installation import TRIED, untried_versions


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
