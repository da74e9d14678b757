"""How a launcher ends, given how its ranks do; and what a program logs into a file."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from unicl_fast.distributed.launch import keeping_log

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
        pytest.param(["sleep", "sleep", "70"], 70, marks=pytest.mark.slow),
        (["75", "75"], 75),
    ],
    ids=str,
)
def test_the_code_is_that_of_the_rank_that_brought_about_the_end(
    ranks: list[str], code: int
) -> None:
    assert launched("rank_program", *ranks) == code


def test_a_log_is_kept_until_its_file_has_a_name_and_ends_with_the_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    logger = logging.getLogger("unicl_fast")
    path = tmp_path / "log.txt"

    def fail() -> None:
        with keeping_log() as write_to:
            logger.info("early")
            assert not path.exists()
            write_to(path)
            logger.warning("late, from s3://user:secret@host/x")
            raise RuntimeError("a disk")

    with pytest.raises(RuntimeError):
        fail()
    logger.info("after")
    lines = path.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [IWE] unicl_fast", line) for line in lines)
    assert [line.split(": ", 1)[1] for line in lines] == [
        "early",
        "late, from s3://host/x",
        "ended by RuntimeError: a disk",
    ]


def test_a_log_that_cannot_be_written_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    logger = logging.getLogger("unicl_fast")
    with keeping_log():
        logger.info("nowhere")
    with keeping_log() as write_to:
        write_to(tmp_path / "no folder" / "log.txt")
        logger.info("lost")
    with keeping_log() as write_to:
        write_to(Path("/dev/full"))
        logger.info("lost")
    assert not list(tmp_path.iterdir())
