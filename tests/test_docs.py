"""What the pages say of the tests is so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import unicl_fast
from unicl_fast.distributed import signals

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text(encoding="utf-8"))
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).is_file()
        or (name and f"def {name}" not in (ROOT / file).read_text(encoding="utf-8"))
    ]
    assert not missing


def test_every_exit_code_is_in_the_one_table() -> None:
    page = (ROOT / "docs" / "programs.md").read_text(encoding="utf-8")
    table = page.partition("## Exit codes")[2]
    named = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    known = {value for name, value in vars(signals).items() if name.startswith("EXIT_")}
    assert named == known | {0, 143}  # done; SIGTERM to unicl-pack


def test_the_citation_is_of_this_version_and_forms_are_yaml() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"] == unicl_fast.__version__
    assert citation["license"] == project["license"]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text(encoding="utf-8"))
