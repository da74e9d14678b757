"""Maps the checkout's rooms into one namespace, so that an install has one top-level name.

`pipelines/` and `tools/` lie beside `unicl_fast/` in the checkout, where a reader finds them, and
are imported as `unicl_fast.pipelines` and `unicl_fast.tools`. The roots are written out: nothing
called `tools` or `pipelines` can ever be installed by accident. `benchmarks/` is not installed.
"""

from setuptools import find_packages, setup

ROOTS = {
    "unicl_fast": "unicl_fast",
    "unicl_fast.pipelines": "pipelines",
    "unicl_fast.tools": "tools",
}

setup(
    packages=[
        name
        for root, folder in ROOTS.items()
        for name in (root, *(f"{root}.{inner}" for inner in find_packages(folder)))
    ],
    package_dir=ROOTS,
    package_data={
        "unicl_fast": ["py.typed"],
        "unicl_fast.system": ["page_base.html", "page_parts.html"],
        "unicl_fast.packing": ["page.html", "croissant.json"],
        "unicl_fast.conversion": ["card.md"],
        "unicl_fast.evaluation": ["*.html", "*.js", "openapi.json"],
        "unicl_fast.tools.diagnose": ["page.html"],
    },
)
