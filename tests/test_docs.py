"""What the pages say of the tests is so."""

import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import unicl_fast
from unicl_fast.distributed import signals
from unicl_fast.tools.bench import load_program

ROOT = Path(__file__).parents[1]
SKILL = ROOT / "skills" / "unicl-train" / "SKILL.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [ROOT / "AGENTS.md", SKILL]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page):
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text(encoding="utf-8"))
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).is_file()
        or (name and f"def {name}" not in (ROOT / file).read_text(encoding="utf-8"))
    ]
    assert not missing


def test_every_exit_code_is_in_the_one_table():
    page = (ROOT / "docs" / "programs.md").read_text(encoding="utf-8")
    table = page.partition("## Exit codes")[2]
    named = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    known = {value for name, value in vars(signals).items() if name.startswith("EXIT_")}
    assert named == known | {0, 143}  # done; SIGTERM to unicl-pack


def test_ratios_on_the_page_about_performance_are_those_of_the_benchmarks():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    tables = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    told = re.findall(r"[\d.,]+ \([\d.,]+ to [\d.,]+\)", page)
    assert len(told) > 10
    assert [one for one in told if one not in tables] == []


def test_every_committed_result_is_on_the_benchmark_page():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert [one.name for one in results if f"/{one.name}" not in page] == []


@pytest.mark.slow  # imports every program
def test_the_benchmark_page_is_made_of_the_committed_results():
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    try:
        import benchmark_page
    finally:
        sys.path.pop(0)
    assert benchmark_page.page() == benchmark_page.PAGE.read_text(encoding="utf-8"), (
        "run python docs/site/benchmark_page.py"
    )
    for program, *options in map(
        shlex.split, re.findall(r"`unicl-bench (.+?)`", benchmark_page.page())
    ):
        # an option that is no more ends the test
        load_program(program).parse(options, prog=program)


def test_what_examples_and_pages_import_is_on_the_page_about_the_api():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    # the folders beside unicl_fast/ are read there under their own names
    shown = re.findall(r"^(?::::| +heading:) (\S+)", page, re.MULTILINE)
    imported = {f"{home}.{name}" for name, home in unicl_fast._HOMES.items()}
    for path in [*PAGES, *(ROOT / "examples").rglob("*.py")]:
        for module, names in re.findall(
            r"^from (unicl_fast\.[\w.]+) import ([\w, ]+)",
            path.read_text(encoding="utf-8"),
            re.MULTILINE,
        ):
            imported |= {f"{module}.{name.strip()}" for name in names.split(",")}
    assert len(imported) > 20
    assert [
        one for one in sorted(imported) if one not in shown and one.rpartition(".")[0] not in shown
    ] == []


_PROGRAMS = {  # with how many words before the options
    "unicl-pack": ("unicl_fast.tools.pack.__main__", 1),
    "unicl-pretrain": ("unicl_fast.tools.pretrain", 0),
    "unicl-eval": ("unicl_fast.tools.evaluate.__main__", 1),
    "unicl-convert": ("unicl_fast.tools.convert.__main__", 1),
    "unicl-ledger": ("unicl_fast.tools.ledger", 0),
    "unicl-doctor": ("unicl_fast.tools.doctor.__main__", 0),
    "unicl-bench": ("unicl_fast.tools.bench", 1),
}


def _commands() -> list[tuple[str, tuple[str, ...], set[str]]]:
    """Page, program with its command, and options of all commands in the pages' blocks of code."""
    found = []
    for page in [*PAGES, ROOT / "examples" / "README.md"]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?: {4}|\$ )+(?:\$ )?(unicl-.*)", text, re.MULTILINE):
            words = line.partition(" #")[0].split()
            if words[0] not in _PROGRAMS or len(words) == 1:
                continue
            named = tuple(words[: 1 + _PROGRAMS[words[0]][1]])
            options = {word.partition("=")[0] for word in words if word.startswith("--")}
            if all(re.fullmatch(r"[a-z-]+", word) for word in named):  # not `unicl-convert FORMAT`
                found.append((page.name, named, options - {"--help", "--version"}))
    return found


@pytest.mark.slow  # a help text for each command of each program
def test_options_of_commands_in_the_docs_exist(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    commands = _commands()
    assert len(commands) > 100
    more = {  # that no help lists
        ("unicl-pretrain",): {"--init", "--init-image", "--init-text", "--tyro-write-completion"}
    }
    passing_on = ("unicl-bench", "run"), ("unicl-bench", "race")
    known: dict[tuple[str, ...], set[str]] = {}
    for named in sorted({named for _, named, _ in commands}):
        program = importlib.import_module(_PROGRAMS[named[0]][0])
        with pytest.raises(SystemExit) as ended:
            program.main([*named[1:], "--help-all" if named == ("unicl-pretrain",) else "--help"])
        assert ended.value.code == 0, named
        known[named] = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    for named in passing_on:
        known[named] |= known["unicl-pretrain",]
    wrong = [
        f"{page}: {' '.join(named)} has no {option}"
        for page, named, options in commands
        for option in sorted(options - known[named] - more.get(named, set()))
    ]
    assert not wrong, "\n".join(wrong)


def test_agents_find_a_short_page_and_a_skill_in_the_common_form():
    """As agentskills.io says, and `hf skills add` installs: front matter, the folder's name."""
    assert len((ROOT / "AGENTS.md").read_text(encoding="utf-8").split()) <= 200
    _, head, body = SKILL.read_text(encoding="utf-8").split("---\n", 2)
    values = yaml.safe_load(head)
    assert values["name"] == SKILL.parent.name
    assert re.fullmatch(r"[a-z0-9-]{1,64}", values["name"])
    assert 0 < len(values["description"]) <= 1024
    assert len(body.splitlines()) < 500


def test_the_citation_is_of_this_version_and_forms_are_yaml():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"] == unicl_fast.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## ([\d.]+)", changes, re.MULTILINE)[1] == unicl_fast.__version__
    assert citation["license"] == project["license"]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text(encoding="utf-8"))
