"""The command that brings an extra suits the way in which the package was installed."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from unicl_fast.system.installation import install_command


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
