"""A run and all its processes when it is stopped, crashes or hangs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from program_runs import SMALL, STEPS, processes_of
from waiting import wait_until

from unicl_fast.checkpoints.files import list_checkpoints

pytestmark = [pytest.mark.dali, pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = [word if word != str(STEPS) else "1000000" for word in SMALL]
FAULTS = Path(__file__).parents[1] / "helpers" / "faults"
SHARED_MEMORY = Path("/dev/shm")


class Program:
    """A started unicl-pretrain; its processes are known by a word in their environment."""

    def __init__(
        self, data: Path, folder: Path, *more: str, nproc: int = 2, torchrun: bool = False
    ) -> None:
        """Starts ranks that train on `data`; all that they write goes into `folder`."""
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self._shared_memory_before = set(SHARED_MEMORY.iterdir())
        launcher, ranks = ["-m"], ["--nproc", str(nproc)]
        if torchrun:
            launcher, ranks = ["-m", "torch.distributed.run", "--standalone"], []
            launcher += ["--nproc-per-node", str(nproc), "-m"]
        words = [*SETTINGS, "--data.train", str(data / "labels"), "--out", str(folder / "run")]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "UNICL_TEST_RUN": self.mark, "TMPDIR": str(self.temporary),
            "UNICL_FAULT": "1", "UNICL_FAULT_WHEN": str(folder / "fault"),
            "PYTHONPATH": f"{FAULTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }  # fmt: skip
        with (folder / "messages").open("w") as messages:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "unicl_fast.tools.pretrain", *words, *ranks, *more],
                stdout=messages, stderr=messages, env=environment,
            )  # fmt: skip

    @property
    def messages(self) -> str:
        return (self.folder / "messages").read_text(errors="replace")

    def processes(self) -> dict[int, str]:
        """Process id -> RANK ("" where there is none) of all that live."""
        return processes_of(self.mark)

    def rank(self, rank: int) -> int:
        """A rank's process id."""
        (found,) = [number for number, name in self.processes().items() if name == str(rank)]
        return found

    def wait_for(self, condition: Callable[[], object]) -> None:
        def holds() -> object:
            found = condition()
            assert found or self.process.poll() is None, f"it ended too early:\n{self.messages}"
            return found

        wait_until(holds, timeout=240)

    def wait_until_it_trains(self) -> None:
        self.wait_for(lambda: list_checkpoints(self.folder / "run" / "checkpoints"))

    def has_loaded(self, library: str) -> bool:
        """Whether rank 0 has a shared library by now: how far it is in its imports."""
        for number, rank in self.processes().items():
            if rank == "0":
                with contextlib.suppress(OSError):
                    return library in Path(f"/proc/{number}/maps").read_text()
        return False

    def assert_nothing_is_left(self) -> None:
        """All processes have ended, and nothing of theirs is left in memory or on disk."""
        deadline = time.monotonic() + 60
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"still running: {left}\n{self.messages}"
        while (files := self._unused_shared_memory()) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not files, f"left in memory: {files}\n{self.messages}"
        # torchrun's folder, a cache that all share, and what wandb makes when timm imports it
        of_others = ("elastic", "torchinductor", "wandb")
        names = [path.name for path in self.temporary.iterdir()]
        assert not [name for name in names if not any(word in name for word in of_others)]

    def _unused_shared_memory(self) -> list[Path]:
        """New files in /dev/shm that no living process has; other programs may run meanwhile."""
        new = set(SHARED_MEMORY.iterdir()) - self._shared_memory_before
        # semaphores are of process pools, which training has not: other tests' may be killed
        new = {path for path in new if not path.name.startswith("sem.mp-")}
        used = set()
        for process in psutil.process_iter() if new else ():
            with contextlib.suppress(psutil.Error):
                used |= {one.path for one in (*process.memory_maps(), *process.open_files())}
        return [path for path in new if str(path) not in used and path.exists()]


@contextlib.contextmanager
def running(*arguments: Path | str, **how: int) -> Iterator[Program]:
    """A program that ends with the block."""
    program = Program(*arguments, **how)
    try:
        yield program
    finally:
        program.process.kill()  # not by its number, which another process may have by now
        for number in program.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        program.process.wait()


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_signal_before_training_ends_the_program_at_once_with_75(data, tmp_path, torchrun):
    with running(data, tmp_path, torchrun=torchrun) as program:
        program.wait_for(lambda: program.has_loaded("libdali_operators"))
        victim = program.rank(0) if torchrun else program.process.pid
        os.kill(victim, signal.SIGTERM)
        code = program.process.wait(120)
        assert code == 75 or (torchrun and "75" in program.messages), program.messages
        assert "stopped by SIGTERM; no step is at risk" in program.messages
        assert torchrun or "Traceback" not in program.messages
        assert not list_checkpoints(tmp_path / "run" / "checkpoints")
        program.assert_nothing_is_left()


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.long)])
def test_nothing_outlives_a_killed_launcher(data, tmp_path, torchrun):
    with running(data, tmp_path, torchrun=torchrun) as program:
        program.wait_until_it_trains()
        program.process.kill()
        program.process.wait()
        program.assert_nothing_is_left()


def test_reading_that_hangs_ends_the_run_with_70_and_is_named(data, tmp_path):
    """After 30 seconds: a loaded machine may be compiling kernels."""
    # images of 32 pixels would be read 2,000 steps ahead, which take minutes on a loaded machine
    size = ("--data.image-size", "128", "--data.evaluation-resize", "128")
    with running(data, tmp_path, *size, "--run.timeout-seconds", "30") as program:
        program.wait_until_it_trains()
        (tmp_path / "fault").touch()
        assert program.process.wait(240) == 70, program.messages
        said = "rank 1 of 2 HANGS: 'waiting for the next batch' in step"
        assert said in program.messages
        assert "sitecustomize.py" in program.messages  # the stack of the thread that hangs
        program.assert_nothing_is_left()
