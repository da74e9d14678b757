"""What becomes of a run, and of all its processes, when it is stopped, crashes or hangs."""

from __future__ import annotations

import os
import re
import signal
import time
import zipfile
from pathlib import Path

import pytest
from programs import Program, has_loaded, hears, running

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.tools.pack import __main__ as pack_dataset

pytestmark = [pytest.mark.dali, pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = [
    *("--preset", "digits-small", "--model.image-encoder", "test_vit", "--data.image-size", "32"),
    *("--data.evaluation-resize", "32", "--model.text-width", "16", "--run.device", "cpu"),
    *("--run.global-batch-size", "12", "--run.samples", "0", "--run.steps", "1000000"),
    *("--run.evaluate-every-steps", "0", "--checkpoint.every-steps", "2", "--checkpoint.keep", "2"),
]
HANG_SECONDS = 30  # a loaded machine may be compiling kernels


@pytest.fixture(scope="module")
def data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images of CIFAR-10 with labels, packed."""
    folder = tmp_path_factory.mktemp("data")
    archive = zipfile.ZipFile(shared_data / "cifar10" / "cifar10-test.zip")
    for name in archive.namelist():
        if name.endswith(("0001.jpg", "0002.jpg", "cat/0003.jpg")):
            archive.extract(name, folder / "classes")
    pack_dataset.main(["build", str(folder / "classes"), "--out", str(folder / "packed")])
    return folder / "packed"


def arguments(data: Path, folder: Path, nproc: int) -> list[str | Path]:
    words = [*SETTINGS, "--data.train", data, "--out", folder / "run"]
    return [*words, "--nproc", str(nproc)] if nproc else words


def is_training(folder: Path) -> bool:
    return bool(list_checkpoints(folder / "run" / "checkpoints"))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("nproc", "number", "moment"),
    [
        (1, signal.SIGTERM, "main has begun"),
        (1, signal.SIGUSR1, "torch is there"),
        pytest.param(
            *(1, signal.SIGINT, "DALI is there"), marks=[pytest.mark.slow, pytest.mark.long]
        ),
        pytest.param(
            *(2, signal.SIGTERM, "main has begun"), marks=[pytest.mark.slow, pytest.mark.long]
        ),
        (2, signal.SIGTERM, "a rank has begun"),
        pytest.param(2, signal.SIGUSR1, "all ranks have DALI", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_signal_before_training_ends_the_program_at_once_with_75(
    data: Path, tmp_path: Path, nproc: int, number: signal.Signals, moment: str
) -> None:
    with running(*arguments(data, tmp_path, nproc), folder=tmp_path) as program:
        program.wait_for(lambda: has_come_to(program, moment, number))
        program.process.send_signal(number)
        sent = time.monotonic()
        assert program.wait() == 75, program.messages
        assert time.monotonic() - sent < 60
        assert f"stopped by {number.name}; no step is at risk" in program.messages
        assert "Traceback" not in program.messages
        assert not is_training(tmp_path)
        program.wait_until_gone()


def has_come_to(program: Program, moment: str, number: signal.Signals) -> bool:
    first = program.process.pid
    ranks = [process for process, rank in program.processes().items() if rank]
    return {
        "main has begun": lambda: hears(first, number),
        "torch is there": lambda: has_loaded(first, "libtorch"),
        "DALI is there": lambda: has_loaded(first, "libdali_operators"),
        "a rank has begun": lambda: any(hears(rank, number) for rank in ranks),
        "all ranks have DALI": lambda: (
            len(ranks) == 2 and all(has_loaded(rank, "libdali_operators") for rank in ranks)
        ),
    }[moment]()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("victim", ["rank", pytest.param("torchrun", marks=pytest.mark.long)])
def test_under_torchrun_a_signal_before_training_leaves_nothing(
    data: Path, tmp_path: Path, victim: str
) -> None:
    with running(*arguments(data, tmp_path, 0), folder=tmp_path, torchrun=2) as program:
        program.wait_for(
            lambda: (
                len([rank for rank in program.processes().values() if rank]) == 2
                and has_loaded(program.rank(0), "libdali_operators")
            )
        )
        number = program.rank(0) if victim == "rank" else program.process.pid
        os.kill(number, signal.SIGTERM)
        program.wait()
        assert "stopped by SIGTERM; no step is at risk" in program.messages
        if victim == "rank":  # torchrun says how it ended
            assert "75" in program.messages
        program.wait_until_gone()


def crash(program: Program, kind: str, victim: int) -> None:
    if kind == "SIGKILL":
        os.kill(victim, signal.SIGKILL)
    else:
        program.trigger.touch()


CODES = {"SIGKILL": 137, "segfault": 139, "abort": 134, "exit": 3}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("nproc", "kind"),
    [
        pytest.param(2, "SIGKILL", marks=pytest.mark.slow),
        pytest.param(3, "SIGKILL", marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(2, "segfault", marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(3, "abort", marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(2, "exit", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_nothing_outlives_a_crashed_rank(data: Path, tmp_path: Path, nproc: int, kind: str) -> None:
    words = arguments(data, tmp_path, nproc)
    with running(*words, folder=tmp_path, fault=f"{kind}:1") as program:
        program.wait_for(lambda: is_training(tmp_path))
        assert sorted(program.processes().values()) == ["", *map(str, range(nproc))]
        crash(program, kind, program.rank(1))
        # its own, and not the one of another that lost its peer
        assert program.wait() == CODES[kind], program.messages
        program.wait_until_gone()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("nproc", [2, pytest.param(3, marks=pytest.mark.long)])
def test_nothing_outlives_its_launcher(data: Path, tmp_path: Path, nproc: int) -> None:
    with running(*arguments(data, tmp_path, nproc), folder=tmp_path) as program:
        program.wait_for(lambda: is_training(tmp_path))
        program.process.kill()
        program.wait_until_gone()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("victim", [pytest.param("rank", marks=pytest.mark.long), "torchrun"])
def test_under_torchrun_nothing_outlives_a_crash(data: Path, tmp_path: Path, victim: str) -> None:
    with running(*arguments(data, tmp_path, 0), folder=tmp_path, torchrun=2) as program:
        program.wait_for(lambda: is_training(tmp_path))
        os.kill(program.rank(1) if victim == "rank" else program.process.pid, signal.SIGKILL)
        assert program.wait() != 0
        program.wait_until_gone()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["SIGKILL", *(pytest.param(one, marks=pytest.mark.long) for one in ("segfault", "abort"))],
)
def test_a_crashed_process_leaves_nothing(data: Path, tmp_path: Path, kind: str) -> None:
    words = arguments(data, tmp_path, 1)
    with running(*words, folder=tmp_path, fault=f"{kind}:") as program:
        program.wait_for(lambda: is_training(tmp_path))
        crash(program, kind, program.process.pid)
        assert program.wait() == 128 - CODES[kind]
        program.wait_until_gone()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.long)])
def test_reading_that_hangs_ends_the_run_with_70_and_is_named(
    data: Path, tmp_path: Path, nproc: int
) -> None:
    words = [*arguments(data, tmp_path, nproc), "--run.timeout-seconds", str(HANG_SECONDS)]
    guilty = nproc - 1
    fault = f"data:{guilty if nproc > 1 else ''}"
    with running(*words, folder=tmp_path, fault=fault) as program:
        program.wait_for(lambda: is_training(tmp_path))
        program.trigger.touch()
        assert program.wait() == 70, program.messages
        of_ranks = " of 2" if nproc == 2 else ""
        assert (
            f"rank {guilty}{of_ranks} HANGS: 'waiting for the next batch' in step"
            in program.messages
        )
        assert "sitecustomize.py" in program.messages  # the stack of the thread that hangs
        program.wait_until_gone()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.dist
def test_a_stopped_rank_is_named_and_ended_too(data: Path, tmp_path: Path) -> None:
    words = [*arguments(data, tmp_path, 2), "--run.timeout-seconds", str(HANG_SECONDS)]
    with running(*words, folder=tmp_path) as program:
        program.wait_for(lambda: is_training(tmp_path))
        os.kill(program.rank(1), signal.SIGSTOP)
        assert program.wait() == 70, program.messages
        said = r"LOOK THERE FIRST: rank 1: \d+ s without a sign of life"
        assert re.search(said, program.messages)
        program.wait_until_gone()
