"""With this folder in PYTHONPATH, Python is that of a machine without the packages UNICL_MISSING.

The packages cannot be found, and neither can an editable install, which has a finder of its own.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

MISSING = set(os.environ["UNICL_MISSING"].split(","))


class BarePaths(PathFinder):
    @classmethod
    def find_spec(cls, name: str, *more: Any) -> ModuleSpec | None:
        return None if name.split(".")[0] in MISSING else super().find_spec(name, *more)


sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in repr(one).lower()]
sys.meta_path[sys.meta_path.index(PathFinder)] = BarePaths
