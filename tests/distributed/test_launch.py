"""How a launcher ends, given how its ranks do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
LAUNCH = "import sys; from unicl_fast.distributed.launch import start_ranks;" + (
    "start_ranks(sys.argv[1], nproc=len(sys.argv) - 2, argv=sys.argv[2:])"
)


def launched(program: str, *ranks: str) -> int:
    paths = f"{HELPERS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", LAUNCH, program, *ranks]
    return subprocess.run(command, timeout=100, env=os.environ | {"PYTHONPATH": paths}).returncode


@pytest.mark.slow
@pytest.mark.dist
def test_no_rank_of_one_machine_listens_to_other_machines() -> None:
    """Neither the store of the ranks, nor their gloo connections, nor their heartbeats."""
    assert launched("listening_program", "-", "-") == 0


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "code"),
    [
        (["0", "0"], 0),
        (["0", "2"], 2),
        (["sleep", "3"], 3),  # the first rank notices nothing of the second one's end
        pytest.param(["3", "sleep"], 3, marks=pytest.mark.slow),
        (["1", "70", "1"], 70),  # two have lost their peer
        (["sleep", "sleep", "70"], 70),
        (["75", "75"], 75),
    ],
    ids=str,
)
def test_the_code_is_that_of_the_rank_that_brought_about_the_end(
    ranks: list[str], code: int
) -> None:
    assert launched("rank_program", *ranks) == code
