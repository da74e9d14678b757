"""Who may import whom, what an install contains, and what works without DALI."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from trunk_table import CHECKOUT, files_of, imports_of, module_of, tree_of

MAPPED = ("pipelines", "tools")

# Floors, lowest first: a room may import those of the floors below it, and itself. A single file of
# unicl_fast/ is a room too.
FLOORS = [
    {"system", "batch"},
    {"augmentation", "stages"},
    {"images", "text", "distributed"},
    {"objectives"},
    {"config"},
    {"config_json", "dataset", "presets"},
    {"ledger", "models", "pipelines"},
    {"checkpoints"},
    {"training"},
    {"packing", "conversion"},
    {"evaluation"},
    {"tools"},
]
# What only some rooms may import, whatever the floor.
OUTSIDE = {
    **{"nvidia": {"pipelines"}, "tyro": {"tools"}, "argparse": {"tools"}},
    **{"apex": {"training"}, "amp_C": {"training"}, "peft": {"conversion", "models"}},
    "triton": {"models", "objectives"},
    "benchmarks": set(),  # only `unicl-bench` starts them, by name
}


def room_of(module: str) -> str | None:
    """`unicl_fast.text.prompts` is in the room `text`; None for what is not ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == "unicl_fast" and len(parts) > 1 else None


ALL_FILES = files_of("unicl_fast", *MAPPED)


def test_every_room_has_a_floor_and_knows_only_those_below():
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for path in ALL_FILES:
        room = room_of(module_of(path))
        if room is None:  # unicl_fast/__init__.py, which names what the library offers
            continue
        assert room in floor_of, f"{path}: give {room} a floor in this test"
        for name in imports_of(path):
            other = room_of(name)
            if other in (None, room) or other not in floor_of:
                continue
            if floor_of[other] >= floor_of[room]:
                wrong.append(f"{path.relative_to(CHECKOUT)} imports {name}")
    assert not wrong, "\n".join(sorted(wrong))


def test_text_is_read_and_written_as_utf_8():
    """Whatever the locale; ruff's PLW1514 sees only what it knows to be a path."""
    wrong = []
    for path in ALL_FILES:
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            modes = {one.value for one in node.args[:2] if isinstance(one, ast.Constant)}
            is_text = node.func.attr in ("read_text", "write_text") or (
                node.func.attr in ("open", "fdopen") and modes & {"r", "w", "a", "x", "r+", "w+"}
            )
            if is_text and not any(word.arg == "encoding" for word in node.keywords):
                wrong.append(f"{path.relative_to(CHECKOUT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_what_comes_from_outside_is_known_where_it_belongs():
    wrong = [
        f"{path.relative_to(CHECKOUT)} imports {name}"
        for path in ALL_FILES
        for name in imports_of(path)
        for package, rooms in OUTSIDE.items()
        if name.split(".")[0] == package and room_of(module_of(path)) not in rooms
    ]
    assert not wrong


def test_mapped_rooms_import_their_own_files_relatively():
    """So that static tools, which know nothing of setup.py, follow them in the checkout too."""
    wrong = []
    for folder in MAPPED:
        for path in files_of(folder):
            for node in ast.walk(tree_of(path)):
                module = node.module if isinstance(node, ast.ImportFrom) else None
                if module and module.startswith(f"unicl_fast.{folder}"):
                    wrong.append(f"{path.relative_to(CHECKOUT)}:{node.lineno}")
    assert not wrong


IMPORT_ALL = """
import importlib, pkgutil, sys
names, absent = (words.split() for words in sys.argv[1:])
for module in map(importlib.import_module, names):
    for inner in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{module.__name__}."):
        importlib.import_module(inner.name)
sys.exit(" ".join(set(absent) & set(sys.modules)) or 0)
"""


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("unicl_fast.packing", "torch tyro"),
        ("unicl_fast.text.tokenizer", "torch numba"),
        ("unicl_fast.objectives.targets unicl_fast.text.prompts", "torch nvidia.dali timm"),
        ("unicl_fast.tools.pack.__main__", "torch numba"),
        ("unicl_fast.presets unicl_fast.dataset.manifest", "torch numpy tyro pydantic"),
    ],
)
def test_importing_does_not_pay_for_what_is_not_needed(modules, absent):
    command = [sys.executable, "-c", IMPORT_ALL, modules, absent]
    subprocess.run(command, cwd=CHECKOUT, check=True, timeout=60)


def test_the_lock_file_is_of_these_requirements_and_names_public_hosts_alone():
    lock = (CHECKOUT / "uv.lock").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^/\"]+", lock)) == {
        "https://pypi.org",
        "https://files.pythonhosted.org",
    }
    (own,) = re.findall(
        r'^\[\[package\]\]\nname = "unicl-fast"\n.*?(?=^\[\[package\]\])', lock, re.M | re.S
    )
    (package,) = tomllib.loads(own)["package"]
    locked = {
        (one["name"], one.get("specifier", ""), one.get("marker", "").partition("extra == ")[2])
        for one in package["metadata"]["requires-dist"]
    }
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    asked = {
        (canonicalize_name(one.name), one.specifier, f"'{extra}'" if extra else "")
        for extra, lines in lists.items()
        for one in map(Requirement, lines)
    }
    assert {(name, SpecifierSet(versions), extra) for name, versions, extra in locked} == asked
    assert len(asked) == sum(map(len, lists.values()))  # no extra names a package twice


def test_every_optional_tool_that_a_test_asks_for_is_named():
    """What neither `make test` nor a line of CONTRIBUTING brings would be skipped for ever."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["dev"]]
    for line in lines:  # which grows by what extras of ours name
        if line.startswith("unicl_fast["):
            lines += [one for extra in line[11:-1].split(",") for one in extras[extra]]
    brought = "\n".join(lines)
    named = (CHECKOUT / "CONTRIBUTING.md").read_text().lower()
    asked = {
        found.replace("_", "-")
        for path in (CHECKOUT / "tests").rglob("*.py")
        for found in re.findall(
            r'importorskip\("(\w+)|has_\w+ = .*find_spec\("(\w+)', path.read_text()
        )
        for found in found
        if found
    }
    assert {"ray", "s3fs"} <= asked
    assert not {name for name in asked if name not in brought and name not in named}


@pytest.mark.slow
def test_a_wheel_has_one_top_level_name_and_all_rooms(tmp_path):
    """It is built out of the sdist, as others build it, and setuptools warns of nothing."""
    done = subprocess.run(
        [*(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path), CHECKOUT],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    said = done.stdout + done.stderr
    assert not re.search(r"^.*(warning|deprecat).*$", said, re.IGNORECASE | re.MULTILINE), said
    assert len(list(tmp_path.glob("*.tar.gz"))) == 1
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"unicl_fast"}
    in_checkout = {module_of(path).replace(".", "/") for path in ALL_FILES}
    packed = {name.removesuffix(".py").removesuffix("/__init__") for name in names}
    assert in_checkout <= packed
    templates = [
        module_of(path).replace(".", "/") + ".html"
        for folder in ("unicl_fast", *MAPPED)
        for path in (CHECKOUT / folder).rglob("*.html")
    ]
    others = {"unicl_fast/py.typed", "unicl_fast/conversion/card.md"}
    assert others | {"unicl_fast/packing/page.html", *templates} <= set(names)


def test_an_install_has_no_benchmarks_and_says_where_they_are(tmp_path):
    library = tmp_path / "library"
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(library)]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, timeout=120)
    assert (library / "unicl_fast" / "tools" / "diagnose" / "page.html").is_file()
    assert not list(library.rglob("*benchmarks*"))

    def bench(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "unicl_fast.tools.bench", *words],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(library)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    run, race = bench("run", "--help"), bench("race")
    assert run.returncode == 0, run.stderr
    assert "Says what limits a run" in run.stdout
    assert race.returncode == 2
    assert "clone the repository of unicl_fast and run this program in the checkout" in race.stderr


def test_only_the_rooms_are_importable():
    """An editable install maps two folders; nothing else of the checkout has an import name."""
    names = [f"unicl_fast.{name}" for name in ("setup", "tests", "docs", "build", "benchmarks")]
    code = (
        f"import sys; from importlib.util import find_spec; sys.exit(any(map(find_spec, {names})))"
    )
    subprocess.run([sys.executable, "-c", code], cwd="/", check=True, timeout=60)


@pytest.mark.slow
def test_an_install_without_extras_has_model_loss_evaluation_and_conversion(tmp_path):
    helpers = CHECKOUT / "tests" / "helpers"
    subprocess.run(
        [sys.executable, helpers / "light_core.py", tmp_path],
        env={"PATH": "/usr/bin:/bin"},
        check=True,
        timeout=120,
    )


HELP = """
import contextlib, importlib, io, sys
heavy = "torch torchvision timm numba nvidia.dali matplotlib open_clip pandas scipy ftfy jinja2"
for line in sys.argv[1:]:
    module, *words = line.split()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(f"unicl_fast.{module}").main(words)
    if found := set(heavy.split()) & set(sys.modules):
        sys.exit(f"{line} imports {found}")
"""


def test_help_does_not_wait_for_what_it_does_not_need():
    """It takes less than half a second so; the clock of a busy machine would say little."""
    lines = [
        *("tools.pretrain --help", "tools.pretrain --help-all", "tools.evaluate.__main__ --help"),
        *("tools.pack.__main__ build --help", "tools.convert.__main__ onnx --help"),
        *("tools.ledger --help", "tools.doctor.__main__ --help", "tools.bench --help"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", HELP, *lines], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
