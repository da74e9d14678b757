"""Names versions that nobody has tried, and the pip command that adds an extra."""

import contextlib
import json
import shlex
from importlib import metadata
from urllib.parse import unquote, urlsplit

TRIED = {
    "torch": "2.13.0",
    "triton": "3.7.1",
    "nvidia-dali-cuda120": "2.4.0",
    "nvidia-dali-cuda130": "2.4.0",
}
"""The versions of uv.lock, with which the tests and goldens of the GPU's path were made."""
INSTALL_TRIED = "`uv sync --extra cuda13` in a checkout installs the versions that were tried"


def untried_versions() -> str:
    """Returns the installed packages whose version nobody has tried, with the tried one; or ""."""
    others = []
    for name, tried in TRIED.items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = metadata.version(name)
            if found.partition("+")[0] != tried:  # 2.13.0+cu130 is a build of 2.13.0
                others.append(f"{name} {found} (tried: {tried})")
    return f"nobody has tried {', '.join(others)}" if others else ""


def install_command(extra: str) -> str:
    """Returns the command that adds an extra to this installation.

    It names the same checkout, wheel or repository, which pip has recorded (PEP 610), or the
    package if that came from an index.
    """
    # in a checkout, setuptools' own folder is found too, and has no record
    found = [one.read_text for one in metadata.distributions(name="unicl_fast")]
    noted = [text for read in found if (text := read("direct_url.json"))]
    if not found:  # run from a folder without an installation
        return f"pip install '.[{extra}]' in a checkout of unicl_fast"
    name = f"unicl_fast[{extra}]"
    if not noted:
        return f"pip install '{name}'"
    origin = json.loads(noted[0])
    url, repository = origin["url"], origin.get("vcs_info")
    if "dir_info" in origin:
        folder = shlex.quote(f"{unquote(urlsplit(url).path)}[{extra}]")
        return f"pip install {'-e ' * origin['dir_info'].get('editable', False)}{folder}"
    if repository is not None:
        url = f"{repository['vcs']}+{url}@{repository['commit_id']}"
    return f"pip install {shlex.quote(f'{name} @ {url}')}"
