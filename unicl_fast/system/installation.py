"""Names versions that nobody has tried, and the pip command that adds an extra."""

import contextlib
from importlib import metadata

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
    """Returns the command that adds an extra of this package."""
    return f"pip install -e '.[{extra}]' in a checkout of unicl_fast"
