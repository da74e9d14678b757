"""Maps the checkout's rooms into one namespace, so that an install has one top-level name.

`pipelines/`, `tools/` and `benchmarks/` lie beside `unicl_fast/` in the checkout, where a reader
finds them, and are imported as `unicl_fast.pipelines` and so on. The list of packages is written
out: nothing called `tools` or `pipelines` can ever be installed by accident.
"""

from setuptools import setup

setup(
    packages=[
        "unicl_fast",
        "unicl_fast.models",
        "unicl_fast.conversion",
        "unicl_fast.remote",
        "unicl_fast.evaluation",
        "unicl_fast.pipelines",
        "unicl_fast.tools",
        "unicl_fast.benchmarks",
        "unicl_fast.benchmarks.experiments",
    ],
    package_dir={
        "unicl_fast": "unicl_fast",
        "unicl_fast.pipelines": "pipelines",
        "unicl_fast.tools": "tools",
        "unicl_fast.benchmarks": "benchmarks",
    },
)
