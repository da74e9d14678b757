"""A run and all its processes when it is stopped, crashes or hangs."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from program_runs import SMALL, STEPS, processes_of, start
from waiting import wait_until

from unicl_fast.checkpoints.files import list_checkpoints

pytestmark = [pytest.mark.dali, pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = [word if word != str(STEPS) else "1000000" for word in SMALL]
FAULTS = Path(__file__).parents[1] / "helpers" / "faults"
SHARED_MEMORY = Path("/dev/shm")
OF_OTHERS = ("elastic", "torchinductor", "wandb")
"""torchrun's folder, a cache that all share, and what wandb makes when timm imports it."""


class Program:
    """A started unicl-pretrain on two ranks; its processes have its folder in their environment."""

    def __init__(self, data: Path, folder: Path, *more: str, torchrun: bool = False) -> None:
        self.folder, self.temporary = folder, folder / "temporary"
        self.temporary.mkdir()
        self._shared_memory_before = set(SHARED_MEMORY.iterdir())
        environment = {
            "UNICL_TEST_RUN": str(folder), "TMPDIR": str(self.temporary), "UNICL_FAULT": "1",
            "UNICL_FAULT_WHEN": str(folder / "fault"),
            "PYTHONPATH": f"{FAULTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }  # fmt: skip
        words = [*SETTINGS, "--data.train", data / "labels", "--out", folder / "run", *more]
        words += [] if torchrun else ["--nproc", "2"]
        self.process = start(*words, env=environment, torchrun=[] if torchrun else None)

    def wait_for(self, condition: Callable[[], object]) -> None:
        def holds() -> object:
            found = condition()
            assert found or self.process.poll() is None, self.process.communicate()
            return found

        wait_until(holds, timeout=240)

    def wait_until_it_trains(self) -> None:
        self.wait_for(lambda: list_checkpoints(self.folder / "run" / "checkpoints"))

    def ended(self) -> tuple[int, str]:
        """The code and the messages of the program, of which nothing is left then."""
        _, said = self.process.communicate(timeout=240)
        wait_until(lambda: not processes_of(self.folder))
        wait_until(lambda: not self._unused_shared_memory())
        names = [path.name for path in self.temporary.iterdir()]
        assert not [name for name in names if not any(word in name for word in OF_OTHERS)]
        return self.process.returncode, said

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


def has_loaded(folder: Path, library: str) -> bool:
    """Whether rank 0 has a shared library by now: how far it is in its imports."""
    for number, rank in processes_of(folder).items():
        if rank == "0":
            with contextlib.suppress(OSError):
                return library in Path(f"/proc/{number}/maps").read_text()
    return False


def test_a_signal_before_training_ends_the_program_at_once_with_75(data, tmp_path):
    program = Program(data, tmp_path)
    program.wait_for(lambda: has_loaded(tmp_path, "libdali_operators"))
    program.process.terminate()
    code, said = program.ended()
    assert code == 75, said
    assert "stopped by SIGTERM; no step is at risk" in said
    assert "Traceback" not in said
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.long)])
def test_nothing_outlives_a_killed_launcher(data, tmp_path, torchrun):
    program = Program(data, tmp_path, torchrun=torchrun)
    program.wait_until_it_trains()
    program.process.kill()
    assert program.ended()[0] == -signal.SIGKILL


def test_reading_that_hangs_ends_the_run_with_70_and_is_named(data, tmp_path):
    """After 30 seconds: a loaded machine may be compiling kernels."""
    # images of 32 pixels would be read 2,000 steps ahead, which take minutes on a loaded machine
    size = ("--data.image-size", "128", "--data.evaluation-resize", "128")
    program = Program(data, tmp_path, *size, "--run.timeout-seconds", "30")
    program.wait_until_it_trains()
    (tmp_path / "fault").touch()
    code, said = program.ended()
    assert code == 70, said
    assert "rank 1 of 2 HANGS: 'waiting for the next batch' in step" in said
    assert "sitecustomize.py" in said  # the stack of the thread that hangs
