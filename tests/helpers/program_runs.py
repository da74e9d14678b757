"""The programs started as a user starts them, and small settings to train with."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from safetensors.torch import load_file
from waiting import wait_until

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.tools import pretrain
from unicl_fast.tools.evaluate import __main__ as evaluate

STEPS = 12
SMALL = [
    *("--preset", "digits-small", "--model.image-encoder", "test_vit", "--data.image-size", "32"),
    *("--data.evaluation-resize", "32", "--model.drop-path", "0.2", "--model.text-width", "16"),
    *("--run.global-batch-size", "8", "--run.samples", "0", "--run.steps", str(STEPS)),
    *("--run.log-every-steps", "1", "--run.evaluate-every-steps", "0", "--run.device", "cpu"),
    *("--checkpoint.every-steps", "2", "--checkpoint.keep", "0"),
]


def run(
    program: str,
    *arguments: str | Path,
    expect: int = 0,
    before: Sequence[str] = (),
    env: Mapping[str, str] = os.environ,
    **how: Any,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*before, sys.executable, "-m", f"unicl_fast.tools.{program}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**env, "OMP_NUM_THREADS": "1"},
        **how,
    )
    assert done.returncode == expect, done.stderr[-3000:]
    return done


def call(program: ModuleType, *arguments: str | Path, draws: bool = False) -> None:
    """In this process, which has imported everything already; a run `draws` its figures or not."""
    with pytest.MonkeyPatch.context() as patch:
        if program is pretrain and not draws:  # a third of the time of a run of a few steps
            patch.setattr("unicl_fast.training.run.draw_curves", Mock())
            patch.setattr("unicl_fast.training.observers.draw_contact_sheet", Mock())
        program.main([str(argument) for argument in arguments])


def refusal_of(program: ModuleType, *arguments: str | Path, code: int = 2) -> str:
    """The standard error of a program that exits with `code`."""
    with pytest.raises(SystemExit) as stopped, redirect_stderr(io.StringIO()) as said:
        call(program, *arguments)
    assert stopped.value.code == code, said.getvalue()
    return said.getvalue()


def evaluated(kind: str, checkpoint: Path, *more: str | Path, nproc: int = 1) -> dict[str, Any]:
    """The JSON that `unicl-eval` writes on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        words = [kind, "--checkpoint", checkpoint, "--json", path, "--device", "cpu", *more]
        if nproc == 1:
            call(evaluate, *words)
        else:
            run("evaluate", *words, "--nproc", str(nproc))
        return json.loads(path.read_text())


def weights(run_folder: Path) -> bytes:
    newest = list_checkpoints(run_folder / "checkpoints")[-1]
    tensors = load_file(newest / "model.safetensors")
    return b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))


STARTED: list[subprocess.Popen[str]] = []


def start(
    *arguments: str | Path, env: Mapping[str, str] = {}, torchrun: Sequence[str] | None = None
) -> subprocess.Popen[str]:
    """Starts unicl-pretrain, by itself or by options of torchrun on two ranks."""
    launcher = ["-m"]
    if torchrun is not None:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launcher += [*torchrun, "-m"]
    process = subprocess.Popen(
        [sys.executable, *launcher, "unicl_fast.tools.pretrain", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        # a shell that starts tests behind itself lets its children ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    STARTED.append(process)
    return process


def processes_of(mark: str | Path) -> dict[int, str]:
    """Process id -> RANK ("" for the launcher) of all that have a word or a variable like this."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            variables = process.environ()
            if str(mark) in [*process.cmdline(), *variables.values()]:
                found[process.pid] = variables.get("RANK", "")
    return found


def wait_until_gone(out: Path) -> None:
    wait_until(lambda: not processes_of(out))


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits for a checkpoint of at least this step."""

    def has_come() -> bool:
        assert process.poll() is None, f"no checkpoint of step {step}: {process.poll()}"
        found = list_checkpoints(out / "checkpoints")
        return bool(found) and int(found[-1].name[5:]) >= step

    wait_until(has_come, timeout=300)
