"""The trunk knows no feature, and its parts stay few and small."""

import os
import shutil
import subprocess
import sys

import networkx as nx
import pytest
import trunk_table

from unicl_fast.objectives.registry import OBJECTIVES

CHECKOUT = trunk_table.CHECKOUT


def test_the_trunk_names_no_objective_and_few_features():
    assert trunk_table.naming(trunk_table.FEATURES) == []
    known = trunk_table.known_features()
    assert sum(known.values()) - known["stages"] <= 75, known
    assert known["stages"] <= 80


@pytest.mark.dali
def test_a_batch_passes_few_iterators():
    assert trunk_table.iterators_of_a_batch() <= 6


@pytest.mark.parametrize("part", trunk_table.SIZES)
def test_the_project_is_no_larger_than_its_scope_says(part):
    assert trunk_table.lines_of(part) <= trunk_table.sizes_in_scope()[part]


def test_functions_fit_a_screen_or_two():
    assert trunk_table.long_functions(80) == []


def test_the_trainer_is_put_together_from_few_parts():
    lines, arguments = trunk_table.trainer_init()
    assert lines <= 40
    assert arguments <= 7
    assert len(trunk_table.graph_of_imports()["unicl_fast.training.trainer"]) <= 18


def test_no_module_imports_one_that_imports_it():
    """Imports in functions and for types count."""
    groups = nx.strongly_connected_components(trunk_table.graph_of_imports())
    assert [group for group in groups if len(group) > 1] == []


def test_few_files_know_the_whole_config():
    assert len(trunk_table.knowing_the_config()) <= 21


def test_there_are_few_options():
    count = sum(map(len, trunk_table.options().values()))
    assert count <= 85, trunk_table.options()


@pytest.mark.slow
def test_without_an_objective_all_others_work(tmp_path):
    """Its file and its line in the registry are deleted: nobody else knew of it."""
    module = OBJECTIVES["ce"].partition(":")[0]
    library = tmp_path / "lib"
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(library)]
    subprocess.run(command, cwd=CHECKOUT, check=True, timeout=120)
    objectives = library / "unicl_fast" / "objectives"
    (objectives / f"{module}.py").unlink()
    registry = objectives / "registry.py"
    lines = registry.read_text(encoding="utf-8").splitlines(keepends=True)
    registry.write_text("".join(line for line in lines if f'"{module}:' not in line), "utf-8")
    tests = tmp_path / "tests"
    shutil.copytree(CHECKOUT / "tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    rooms = ["training/test_trainer.py", "training/test_step.py", "checkpoints/test_state.py",
             "models/test_models.py", "test_config.py"]  # fmt: skip
    # the tests' own list of objectives leaves out what is not there
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rfE", "-k", "not for_ce",
         "-m", "not slow and not gpu",
         *(str(tests / room) for room in rooms)],
        cwd=tmp_path,
        env={"UNICL_TEST_DATA": str(CHECKOUT.parent / "shared" / "data"), **os.environ}
        | {"PYTHONPATH": str(library)},
        capture_output=True,
        text=True,
        timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:]
    assert " passed" in run.stdout
