"""`unicl-bench gpu` without a GPU: the dry run, stages that fail, and work that was not on one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unicl_fast.benchmarks import harness, on_gpu
from unicl_fast.benchmarks.gpu import checks, run
from unicl_fast.benchmarks.gpu.run import Gpu
from unicl_fast.benchmarks.gpu.stages import COMMANDS, STAGES, GpuStage
from unicl_fast.benchmarks.on_gpu import NotOnDeviceError, busy_part
from unicl_fast.benchmarks.run import load_program
from unicl_fast.benchmarks.step.parts import step_config
from unicl_fast.benchmarks.step.switches import switches_of

CHECKOUT = Path(__file__).resolve().parents[2]
# Sure to be there are torch, timm with what it needs, tokenizers, numba and NumPy.
MISSING = (
    *("nvidia", "tyro", "msgspec", "jaxtyping", "xxhash", "ftfy", "regex", "open_clip", "triton"),
    *("simplejpeg", "matplotlib", "tensorboard", "jinja2", "pandas", "pytest", "hypothesis"),
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bare_checkout_runs_dry(tmp_path: Path) -> None:
    chosen = ("first", "tests", "step-64", "switches", "open-clip", "loss", "text", "run")
    command = [sys.executable, str(CHECKOUT / "benchmarks/gpu"), "--stages", ",".join(chosen)]
    subprocess.run(
        [*command, "--out", str(tmp_path / "report"), "--dry-run"],
        cwd="/",
        # no git; the compiler is asked for, and not called
        env={
            "PATH": "/nowhere",
            "CXX": sys.executable,
            "OMP_NUM_THREADS": "1",
            "HOME": str(tmp_path),
            "PYTHONPATH": str(CHECKOUT / "tests" / "helpers" / "bare_machine"),
            "UNICL_MISSING": ",".join(MISSING),
        },
        check=True,
        timeout=540,
    )
    report = json.loads((tmp_path / "report" / "gpu.json").read_text())
    stages = report["stages"]
    assert list(stages) == [*COMMANDS["first"], *chosen[1:]]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "gpu.json", "gpu.md", "gpu.log"
    }  # fmt: skip
    skipped = {name: stage["reason"] for name, stage in stages.items() if stage["status"] != "done"}
    assert skipped == {
        "tests": "needs pytest, hypothesis, jaxtyping",
        "open-clip": "needs open_clip",
        "loss": "needs open_clip",
        "kernels": "needs triton",
        "run": "needs nvidia.dali, tyro, msgspec, xxhash, ftfy, regex",
    }
    assert report["stand_ins"] == ["ftfy", "jaxtyping", "msgspec", "regex", "xxhash"]
    assert "whole step, times its floor" in stages["step-64"]["figures"]
    assert "timm, compile=off, images/s" in stages["ways"]["figures"]
    assert any(note.startswith("precision") for note in stages["step-64"]["notes"])
    assert "two micro-batches, times as long" in stages["switches"]["figures"]
    without = {"machine", *skipped}
    assert all(stage["figures"] for name, stage in stages.items() if name not in without)
    page = (tmp_path / "report" / "gpu.md").read_text()
    assert page.startswith("# Dry run on a CPU: no figure here is a GPU's")
    assert re.search(r"^\| whole step, times its floor +\|( +[\d.,]+ \|){3}$", page, re.MULTILINE)


ON_CARD = SimpleNamespace(device=torch.device("cuda:0"))


def test_what_computes_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real profiler sees no kernel of its products, and the results lie in host memory."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(harness.gc, "collect", lambda: 0)  # a tenth of a second in a test run
    works = {"work": lambda: torch.ones(64, 64) @ torch.ones(64, 64)}
    with pytest.raises(NotOnDeviceError) as refused:
        harness.take_turns(works, rounds=1, device_type="cuda")
    assert "work was not done on the GPU: its results are on cpu" in str(refused.value)
    assert "kernels ran in 0.00e+00 of " in str(refused.value)


@pytest.mark.parametrize(
    ("kernel_seconds", "result", "reason"),
    [
        (9.0, ON_CARD, ""),
        (0.5, ON_CARD, "kernels ran in 5.00e-01 of 1.00e+01 s"),
        (9.0, torch.ones(1), "its results are on cpu"),
        (9.0, 1.5, "its results are on no tensor"),
    ],
)
def test_each_sign_of_work_on_the_host_is_enough(
    monkeypatch: pytest.MonkeyPatch, kernel_seconds: float, result: object, reason: str
) -> None:
    monkeypatch.setattr(
        on_gpu, "kernel_seconds", lambda work: kernel_seconds if work() is None else 0.0
    )
    if reason:
        with pytest.raises(NotOnDeviceError, match=reason.replace("+", r"\+")):
            busy_part("work", lambda: result, seconds=10.0)
    else:
        assert busy_part("work", lambda: result, seconds=10.0) == 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(harness.Stage):
    """A stage that does what its option says, after a first figure."""

    does: str
    device: str = "cuda"

    def run(self) -> None:
        self.write_result({"before": harness.summarise([1.0])}, on=self.device)
        if self.does == "fail":
            raise RuntimeError("this fails")
        if self.does == "die":
            os._exit(3)
        if self.does == "stall":
            time.sleep(600)


_SMALL_STAGES = """
import sys
sys.path[:0] = [{tests!r}, *{paths!r}]
import test_gpu
from unicl_fast.benchmarks.gpu import checks, run
test_gpu.put_in_small_stages()
run.__file__ = {program!r} + "/run.py"
test_gpu.Gpu.parse(sys.argv[1:], prog="").run()
"""


@pytest.fixture
def small_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of the folder that is started for each stage."""
    for name in ("STAGES", "PROGRAMS", "COMMANDS"):
        monkeypatch.setattr(run, name, dict(getattr(run, name)))
    put_in_small_stages()
    program = tmp_path / "gpu"
    paths = [path for path in sys.path if path]
    text = _SMALL_STAGES.format(tests=str(Path(__file__).parent), paths=paths, program=str(program))
    program.write_text(text, encoding="utf-8")
    monkeypatch.setattr(run, "__file__", str(program / "run.py"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is not the program
    return program


def put_in_small_stages() -> None:
    run.PROGRAMS["small"] = Small
    run.STAGES.clear()
    run.COMMANDS.clear()
    for name in ("fail", "die", "good", "stall", "late"):
        run.STAGES[name] = GpuStage(about="", program="small", options={"does": name})
    run.STAGES["lacks"] = GpuStage(about="", program="small", needs=("no_such_package",))


@pytest.mark.slow
def test_a_stage_that_fails_dies_or_stalls_leaves_what_it_measured(
    tmp_path: Path, small_program: Path
) -> None:
    every = ",".join(run.STAGES)
    with pytest.raises(RuntimeError, match="not all stages are done: see .*gpu.md"):
        Gpu(out=tmp_path / "report", dry_run=True, minutes=1.0, stages=every).run()
    found: dict[str, Any] = json.loads((tmp_path / "report" / "gpu.json").read_text())["stages"]
    assert found["fail"]["status"] == "failed"
    assert "RuntimeError: this fails" in found["fail"]["reason"]
    assert {
        name: (one["status"], one["reason"]) for name, one in found.items() if name != "fail"
    } == {
        "die": ("failed", "ended with code 3: "),
        "good": ("done", ""),
        "stall": ("cut off", "the 1 minutes are over"),
        "late": ("skipped", "the 1 minutes are over"),
        "lacks": ("skipped", "needs no_such_package"),
    }
    for name in ("fail", "die", "good", "stall"):
        assert found[name]["figures"]["before"]["median"] == 1.0
        assert found[name]["on"] == "cpu"


@pytest.mark.slow
def test_a_stage_ends_with_the_program_that_started_it(tmp_path: Path, small_program: Path) -> None:
    words = ["--out", str(tmp_path / "report"), "--dry-run", "--stages", "stall"]
    program = subprocess.Popen([sys.executable, str(small_program), *words])
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    deadline = time.monotonic() + 60
    while not (stage := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.1)
    program.terminate()
    assert program.wait(timeout=30) == 143
    assert stage
    assert not Path("/proc", stage[0]).exists()


@pytest.mark.slow
def test_the_dry_run_selects_all_tests_for_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "tests"]
    listed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    program = [sys.executable, str(CHECKOUT / "benchmarks" / "gpu"), "--dry-run"]
    subprocess.run(
        [*program, "--stages", "tests", "--out", str(tmp_path / "report")], check=True, timeout=300
    )
    report = json.loads((tmp_path / "report" / "gpu.json").read_text())
    found = report["stages"]["tests"]["figures"]["collected"]["median"]
    assert found == len(re.findall(r"^tests/.*::", listed.stdout, flags=re.MULTILINE)) > 40


def test_what_cannot_be_run_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no stage nothing; stages are first, tests, step"):
        Gpu(out=tmp_path / "new", dry_run=True, stages="step,nothing").run()
    (tmp_path / "gpu.json").touch()
    with pytest.raises(ValueError, match="holds a report"):
        Gpu(out=tmp_path, dry_run=True).run()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device works here"):
            Gpu(out=tmp_path / "new").run()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", STAGES)
def test_programs_have_the_options_of_their_stages(name: str) -> None:
    stage = STAGES[name]
    program = run.PROGRAMS.get(stage.program) or load_program(stage.program)
    known = {field.name for field in dataclasses.fields(program)}
    assert stage.options.keys() <= known
    assert "device" in known or stage.program == "run"  # whose own is run.device, which is auto


def test_every_switch_changes_what_its_name_says() -> None:
    config = step_config("test_vit", image_size=160, batch_size=4, precision="bf16")
    for name, change in switches_of(config, torch.device("cuda")).items():
        efficiency = dataclasses.replace(config.efficiency, **change)  # type: ignore[arg-type]
        assert efficiency != config.efficiency
        wanted = "tf32" if "TF32" in name else "fp32" if "fp32" in name else "bf16"
        assert efficiency.precision == wanted, name
        compiled = name.partition("compiled: ")[2]
        assert efficiency.compile == (compiled or config.efficiency.compile), name
        assert efficiency.activation_checkpointing == ("checkpointing" in name), name
        assert (efficiency.window_attention == "timm") == ("timm's" in name), name


def test_a_kernel_that_computes_wrongly_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(trial: str, device: torch.device, dtype: str) -> str:
        return "loss_trial float32: the trial failed" * (trial.endswith("loss_trial"))

    monkeypatch.setattr(checks, "fault_in_trial", fault)
    notes: list[str] = []
    assert checks.try_kernels(torch.device("cpu"), notes) == {}
    assert notes[:2] == [
        "models.window_trial in float32: right", "models.window_trial in bfloat16: right"
    ]  # fmt: skip
    assert all(note.startswith("WRONG: loss_trial") for note in notes[2:])
