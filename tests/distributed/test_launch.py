"""How a launcher ends, given how its ranks end; and the log file."""

import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unicl_fast.distributed.launch import keeping_log

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
LAUNCH = """
import sys
from unicl_fast.distributed.launch import start_ranks
program, restarts, *ranks = sys.argv[1:]
start_ranks(program, nproc=len(ranks), argv=ranks, max_restarts=int(restarts))
"""


def launch(
    program: str, *ranks: str, restarts: int = 0, code: str = LAUNCH
) -> subprocess.Popen[str]:
    paths = f"{HELPERS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, "-c", code, program, str(restarts), *ranks],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def launched(program: str, *ranks: str, restarts: int = 0) -> tuple[int, str, str]:
    """The exit code, and all of stdout and stderr."""
    with launch(program, *ranks, restarts=restarts) as process:
        out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


@pytest.mark.slow
def test_no_rank_of_one_machine_listens_to_other_machines():
    """Neither the ranks' store nor their gloo connections."""
    code, _, errors = launched("listening_program", "-", "-")
    assert code == 0, errors


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
def test_the_code_is_that_of_the_rank_that_brought_about_the_end(ranks, code):
    assert launched("rank_program", *ranks)[0] == code


def test_a_rank_that_fails_ends_with_its_traceback_while_another_waits_for_it():
    code, _, errors = launched("failing_program", "-", "-")
    assert code == 1
    assert errors.rstrip().endswith("RuntimeError: the fault of rank 1"), errors


@pytest.mark.parametrize(
    ("asked", "code", "starts"),
    [("die", 137, 3), ("3", 3, 3), ("0", 0, 1), ("2", 2, 1), ("75", 75, 1)],
)
def test_ranks_are_started_again_after_a_death_but_not_after_wrong_input_or_a_stop(
    asked, code, starts
):
    found, out, errors = launched("rank_program", asked, restarts=2)
    assert (found, out.count("started")) == (code, starts)
    if starts > 1:
        how = "WAS KILLED BY SIGKILL" if asked == "die" else "ENDED WITH CODE 3"
        assert f"RANK 0 {how}: starting all again, restart 1 of 2" in errors
        assert f"RANK 0 {how}, and all 2 restarts are used up" in errors


def test_a_program_that_resumes_nothing_ends_with_130_after_ctrl_c():
    begin = "from unicl_fast.system.program import begin_program; begin_program()\n"
    code = begin + LAUNCH.replace("max_restarts=int(restarts)", "resumes=False")
    with launch("rank_program", "sleep", "sleep", code=code) as process:
        assert {process.stdout.readline() for _ in range(4)} == {"started\n", "asleep\n"}
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "\nunicl_fast: stopped by Ctrl-C\n")


def test_ranks_that_a_signal_ended_are_not_started_again():
    with launch("rank_program", "sleep", restarts=2) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["started\n", "asleep\n"]
        process.terminate()
        out, _ = process.communicate(timeout=120)
    assert (process.returncode, out) == (9, "")


def test_a_log_is_kept_until_its_file_has_a_name_and_ends_with_the_error(tmp_path, caplog):
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


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, caplog):
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
