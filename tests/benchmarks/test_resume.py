"""`unicl-bench resume`: each kind of fault is counted, ranks die whole, ours has no fault."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_sets import Sample, pack

from benchmarks.resume import run as program
from benchmarks.resume.chain import Chain, Course, Layout, Step, run_chain
from benchmarks.resume.contenders import RESUMERS, Resumer, Task
from benchmarks.resume.report import Counts, count, table
from benchmarks.resume.run import Resume
from unicl_fast.images.codec import encode_png
from unicl_fast.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
TWO, ONE = Layout(2, 1), Layout(1, 1)


def run_of(*epochs: str) -> list[Step]:
    """Steps of two ranks: `01-23 45-67` are two steps of an epoch."""
    return [
        [(epoch, [int(one) for one in ids]) for ids in step.split("-")]
        for epoch, steps in enumerate(epochs)
        for step in steps.split()
    ]


@pytest.mark.parametrize(
    ("steps", "lost", "doubled", "out_of_order"),
    [
        (run_of("01-23 45-67", "76-54 32-10"), 0, 0, 0),
        (run_of("23-01 54-76", "76-54 32-10"), 0, 0, 0),  # other ranks, the same steps
        (run_of("45-67 01-23", "76-54 32-10"), 0, 0, 2),
        (run_of("01-23 45-63", "76-54 32-10"), 1, 1, 1),
        (run_of("01-23", "76-54 32-10 67-45"), 4, 4, 2),
        (run_of("01-23 01-23", "32-10 76-54"), 4, 4, 3),
        (run_of("01-23 45-67 01-23 76-54"), 0, 8, 2),  # an epoch that did not end loses nothing
        (run_of("01-23 45-67", "", "76-54 32-10"), 8, 0, 0),  # one that was left out
        (run_of("01-23 45-67", "76-54"), 0, 0, 0),  # it could not be resumed
    ],
)
def test_each_kind_of_fault_is_counted(steps, lost, doubled, out_of_order):
    unbroken = run_of("01-23 45-67", "76-54 32-10")
    assert count(steps, unbroken, 8) == Counts(lost, doubled, out_of_order, len(steps))


def fake(function: str, **more: Any) -> Resumer:
    facts: dict[str, Any] = {"state": "a number", "imports": (), "packages": ()}
    code = f"fake_resumers:{function}"
    return Resumer(name=function, kind="peer", about="", code=code, **(facts | more))


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HELPERS))
        with program._process(tmp_path_factory.mktemp("process")) as process:
            yield process


def task_in(folder: Path) -> Task:
    return Task(folder=folder, num_sets=1, samples=96, batch_size=8)


def chain_of(
    process: ProcessPoolExecutor, resumer: Resumer, folder: Path, *layouts: Layout, kills: int = 3
) -> tuple[Chain, Counts]:
    task = task_in(folder)
    course = Course(kills=kills, layouts=layouts, num_steps=24, every=2)
    chain = process.submit(run_chain, resumer, task, course).result(timeout=100)
    exact: list[Step] = [[(i // 12, range(i % 12 * 8, i % 12 * 8 + 8))] for i in range(24)]
    return chain, count(chain.steps, exact, task.epoch_size)


@pytest.mark.timeout(120)
def test_a_chain_counts_what_was_trained_on(process, tmp_path):
    chain, counts = chain_of(process, fake("exact"), tmp_path, TWO, ONE)
    assert counts == Counts(0, 0, 0, 24)
    assert len(chain.kills) == 3
    assert all(resumed <= done < 24 and resumed % 2 == 0 for done, resumed in chain.kills)
    assert [len(step) for step in chain.steps[-2:]] == [1, 1]  # its layouts took turns
    forgotten, counts = chain_of(process, fake("forgets"), tmp_path, TWO)
    first = next(resumed for _, resumed in forgotten.kills if resumed)
    assert counts.doubled >= 8 * min(first, 12)
    assert counts.out_of_order > 0


@pytest.mark.timeout(300)
def test_ours_loses_and_doubles_nothing(process, tmp_path):
    images = [encode_png(np.full((8, 8, 3), (0, one, 0), np.uint8)) for one in range(96)]
    samples = [Sample(image, labels=[0]) for image in images]
    options = {"class_names": ["record"], "tokenizer": Tokenizer(), "format": "raw"}
    pack(tmp_path / "0", samples, **options).close()
    broken, _ = chain_of(process, RESUMERS[0], tmp_path, TWO, ONE, kills=2)
    whole, _ = chain_of(process, RESUMERS[0], tmp_path, ONE, kills=0)
    assert count(broken.steps, whole.steps, 96) == Counts(0, 0, 0, 24)
    assert len(broken.kills) == 2


@pytest.mark.timeout(300)
def test_the_program_writes_table_and_json(tmp_path, monkeypatch, capsys):
    nowhere = {"imports": ("a_package_that_nobody_has",), "install": "pip install a-package"}
    fakes = (fake("exact"), fake("refuses", state=""), fake("absent", **nowhere))
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    monkeypatch.setattr(program, "RESUMERS", fakes)
    path = tmp_path / "result.json"
    Resume(kills=2, samples=96, json=path).run()
    result = json.loads(path.read_text())
    assert result["left_out"]["absent"].endswith("to have it: pip install a-package")
    for chain in result["contenders"]["exact"]["chains"].values():
        assert [chain[key] for key in ("lost", "doubled", "out_of_order")] == [0, 0, 0]
        assert len(chain["kills"]) == 2
    refused = result["contenders"]["refuses"]["chains"]["one, ranks"]
    assert refused["failure"] == "ValueError: the state is that of 2 ranks, not 1"
    said = capsys.readouterr().out
    assert table(result) in said
    assert re.search(r"refuses +\| +none \| +one set \| .* error at resume 1", said)
