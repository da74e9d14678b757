"""`unicl-bench gpu` without a GPU: the dry run, errors of stages, and work that was not on one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from unicl_fast.benchmarks.gpu import measure, run, stages
from unicl_fast.benchmarks.gpu.measure import Bench
from unicl_fast.benchmarks.gpu.run import Gpu, format_page, run_stage
from unicl_fast.benchmarks.gpu.stages import PART_A, GpuStage
from unicl_fast.config import TrainConfig

CHECKOUT = Path(__file__).resolve().parents[2]
# Sure to be there are torch, timm with what it needs, tokenizers, numba and NumPy.
MISSING = (
    *("nvidia", "tyro", "msgspec", "jaxtyping", "xxhash", "ftfy", "regex", "open_clip", "triton"),
    *("simplejpeg", "matplotlib", "tensorboard", "jinja2", "pandas", "pytest", "hypothesis"),
)


@pytest.mark.slow
def test_a_bare_checkout_runs_part_a_dry(tmp_path: Path) -> None:
    helper = CHECKOUT / "tests" / "helpers" / "bare_machine.py"
    command = [sys.executable, str(helper), ",".join(MISSING), str(CHECKOUT / "benchmarks/gpu")]
    subprocess.run(
        [*command, "--out", str(tmp_path / "report"), "--dry-run"],
        cwd="/",
        # no git; the compiler is asked for, and not called
        env={
            "PATH": "/nowhere",
            "CXX": sys.executable,
            "OMP_NUM_THREADS": "1",
            "HOME": str(tmp_path),
        },
        check=True,
        timeout=240,
    )
    report = json.loads((tmp_path / "report" / "gpu.json").read_text())
    stages = report["stages"]
    assert list(stages) == list(PART_A)
    skipped = {name: stage["reason"] for name, stage in stages.items() if stage["status"] != "done"}
    assert skipped == {
        "tests": "needs pytest, hypothesis, jaxtyping",
        "open-clip": "needs open_clip",
    }
    assert report["stand_ins"] == ["ftfy", "jaxtyping", "msgspec", "regex", "xxhash"]
    assert all(
        stage["figures"] and stage["dry_run"] for stage in stages.values() if stage["figures"]
    )
    assert "of the product's rate" in json.dumps(stages["step"]["figures"])
    assert (tmp_path / "report" / "stages" / "A4-step.trace.json.gz").is_file()
    page = (tmp_path / "report" / "gpu.md").read_text()
    assert page.startswith("# Dry run on a CPU: no figure here is a GPU's")


@pytest.mark.slow
def test_the_dry_run_of_an_install_compares_with_open_clip(tmp_path: Path) -> None:
    Gpu(out=tmp_path, dry_run=True, stages="open-clip").run()
    found = json.loads((tmp_path / "gpu.json").read_text())["stages"]["open-clip"]
    assert found["status"] == "done", found["reason"]
    assert len(found["figures"]) == 2


@dataclasses.dataclass
class Card:
    """A GPU of which torch.cuda and the profiler tell; by default one that did all the work."""

    seconds: float = 10.0
    kernel_seconds: float = 9.0


ON_CARD = SimpleNamespace(device=torch.device("cuda:0"))


@pytest.fixture
def put_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Card], None]:
    def put_in(card: Card) -> None:
        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * card.seconds * 3  # three calls a round

        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_000_000_000)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1_000_000_000)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(measure.gc, "collect", lambda: 0)  # a tenth of a second in a test run

    return put_in


def run_on(work: Callable[[], object], file: Path) -> Bench:
    stage = GpuStage(part="A0", about="", run=lambda bench: bench.time("work", work))
    bench = Bench(torch.device("cuda"), file, is_tiny=False)
    run_stage(stage, bench)
    assert json.loads(file.read_text())["status"] == bench.status
    return bench


def test_a_stage_that_computes_on_the_cpu_is_refused(
    tmp_path: Path, put_in: Callable[[Card], None]
) -> None:
    """The real profiler sees no kernel of its products, and the results lie in host memory."""
    put_in(Card())
    bench = run_on(lambda: torch.ones(64, 64) @ torch.ones(64, 64), tmp_path / "stage.json")
    assert bench.status == "refused"
    assert "its results are on cpu" in bench.reason
    assert "kernels ran in 0.00e+00 of 1.00e+01 s" in bench.reason
    assert not bench.figures


@pytest.mark.parametrize(
    ("card", "result", "reason"),
    [
        (Card(), ON_CARD, ""),
        (Card(kernel_seconds=0.5), ON_CARD, "kernels ran in 5.00e-01 of 1.00e+01 s"),
        (Card(seconds=1e-9, kernel_seconds=1e-9), ON_CARD, "times the device's time"),
        (Card(), torch.ones(1), "its results are on cpu"),
        (Card(), 1.5, "its results are on no tensor"),
    ],
)
def test_each_sign_of_work_on_the_host_is_enough(
    tmp_path: Path,
    put_in: Callable[[Card], None],
    monkeypatch: pytest.MonkeyPatch,
    card: Card,
    result: object,
    reason: str,
) -> None:
    put_in(card)
    monkeypatch.setattr(
        measure, "kernel_seconds", lambda work: card.kernel_seconds if work() is None else 0.0
    )
    bench = run_on(lambda: result, tmp_path / "stage.json")
    assert bench.status == ("refused" if reason else "done")
    assert reason in bench.reason
    assert bool(bench.figures) != bool(reason)
    if not reason:
        figure = bench.figures["work"]
        assert [figure[name] for name in ("median", "busy", "peak_gb", "risen_gb")] == [
            10,
            0.9,
            3,
            2,
        ]


def test_a_time_cannot_be_noted_without_being_measured(tmp_path: Path) -> None:
    bench = Bench(torch.device("cpu"), tmp_path / "stage.json", is_tiny=True)
    for unit in ("s", "ms", "images/s", "TFLOP/s"):
        with pytest.raises(ValueError, match=r"comes from Bench\.time"):
            bench.note("step", 1.0, unit)


def test_memory_that_does_not_suffice_is_a_result(tmp_path: Path) -> None:
    bench = Bench(torch.device("cpu"), tmp_path / "stage.json", is_tiny=True)
    with bench.running_out_of_memory("step of 512"):
        raise torch.OutOfMemoryError
    assert json.loads(bench.file.read_text())["figures"]["step of 512"]["value"] == "out of memory"


def fail(bench: Bench) -> None:
    raise RuntimeError("this fails")


def die(bench: Bench) -> None:
    bench.note("before", 1.0)
    os._exit(3)


def stall(bench: Bench) -> None:
    bench.note("before", 2.0)
    time.sleep(600)


@pytest.mark.slow
def test_a_stage_that_fails_dies_or_stalls_leaves_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works: dict[str, Callable[[Bench], None]] = {
        "fail": fail,
        "die": die,
        "good": lambda bench: bench.note("after", 1.0),
        "stall": stall,
        "late": lambda bench: None,
    }
    stages = {name: GpuStage(part="A0", about="", run=work) for name, work in works.items()}
    stages["lacks"] = GpuStage(part="A0", about="", run=fail, needs=("no_such_package",))
    monkeypatch.setattr(run, "STAGES", stages)
    monkeypatch.setattr(run, "PART_A", stages)
    Gpu(out=tmp_path / "report", dry_run=True, minutes=0.1).run()
    found: dict[str, Any] = json.loads((tmp_path / "report" / "gpu.json").read_text())["stages"]
    assert {name: (one["status"], one["reason"]) for name, one in found.items()} == {
        "fail": ("failed", "RuntimeError: this fails"),
        "die": ("failed", "its process ended with code 3"),
        "good": ("done", ""),
        "stall": ("cut off", "the 0.1 minutes are over"),
        "late": ("skipped", "the 0.1 minutes are over"),
        "lacks": ("skipped", "needs no_such_package"),
    }
    assert [found[name]["figures"]["before"]["value"] for name in ("die", "stall")] == [1.0, 2.0]


def test_stages_run_in_one_process_where_forks_cannot_use_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process: list[int] = []

    def look(bench: Bench) -> None:
        process.append(os.getpid())
        bench.note("device", str(bench.device))

    monkeypatch.setattr(run, "STAGES", {"look": GpuStage(part="A0", about="", run=look)})
    monkeypatch.setattr(run, "_forks_reach_device", lambda: False)
    Gpu(out=tmp_path / "report").run()
    report = json.loads((tmp_path / "report" / "gpu.json").read_text())
    assert report["stages"]["look"]["figures"]["device"]["value"] == "cuda:0"
    assert process == [os.getpid()]
    assert not report["a_process_for_each_stage"]


def test_what_cannot_be_run_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no stage nothing; dry run has machine, tests"):
        Gpu(out=tmp_path / "new", dry_run=True, stages="machine,nothing").run()
    (tmp_path / "gpu.json").touch()
    with pytest.raises(ValueError, match="holds a report"):
        Gpu(out=tmp_path, dry_run=True).run()
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_the_dry_run_is_possible(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no CUDA device works here"):
        Gpu(out=tmp_path / "new").run()
    assert not (tmp_path / "new").exists()


def test_a_page_has_a_table_of_each_stage() -> None:
    figure = {"median": 310.0, "low": 300.0, "high": 320.0, "unit": "TFLOP/s", "busy": 0.98}
    stage = {"status": "done", "reason": "", "figures": {"product of 8192^3, bf16": figure}}
    report = {"dry_run": False, "machine": {}, "stand_ins": [], "stages": {"machine": stage}}
    (line,) = (line for line in format_page(report).splitlines() if line.startswith("| product"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells == ["310 TFLOP/s (300 to 320)", "0.98", "", ""]


class ListingBench(Bench):
    """Keeps by its name what would be timed."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), Path("unwritten"), is_tiny=False)
        self.works: dict[str, Callable[[], Any]] = {}

    def write(self) -> None:
        pass

    def time(self, name: str, work: Callable[[], Any], **options: Any) -> float:
        self.works[name] = work
        return 1.0

    def take_turns(self, works: Any, **options: Any) -> Any:
        self.works |= works


def test_every_step_is_built_as_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_trainer(config: TrainConfig, batch: Any, **options: Any) -> Any:
        return MagicMock(config=config, train_step=lambda batch: config), batch

    monkeypatch.setattr(stages, "build_trainer", build_trainer)
    monkeypatch.setattr(stages, "make_batch", lambda _, size, **more: MagicMock(batch_size=size))
    monkeypatch.setattr(stages, "_write_trace", lambda bench, step: None)
    monkeypatch.setattr(stages, "StepInParts", MagicMock())
    monkeypatch.setattr(stages, "product_seconds", lambda bench: 1.0)
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)  # a fifth of a second, after each step
    # the true one takes seconds to import
    compiler = MagicMock(counters=defaultdict(Counter))
    for module in ("torch._dynamo", "torch._dynamo.utils"):
        monkeypatch.setitem(sys.modules, module, compiler)
    monkeypatch.setattr(torch, "_dynamo", compiler, raising=False)
    theirs = MagicMock(open_clip_twin=lambda *_, **__: (MagicMock(), None, None))
    monkeypatch.setitem(sys.modules, "unicl_fast.benchmarks.step.open_clip", theirs)
    bench = ListingBench()
    for name in ("step", "switches", "large", "open-clip"):
        PART_A[name].run(bench)
    steps = {name: work() for name, work in bench.works.items()}
    for name, config in steps.items():
        if not isinstance(config, TrainConfig):
            assert name.endswith("open_clip")
            continue
        efficiency = config.efficiency
        assert efficiency.precision == ("fp32" if "fp32" in name else "bf16"), name
        assert efficiency.tf32 == ("on" if "TF32" in name else "auto"), name
        assert efficiency.compile == (name.partition("compiled: ")[2] or "off"), name
        assert efficiency.activation_checkpointing == ("checkpointing" in name), name
        assert efficiency.channels_last == ("no channels_last" not in name), name
        assert efficiency.fused_optimizer == ("no fused optimizer" not in name), name
        assert (efficiency.text_layout == "padded") == ("padded texts" in name), name
        sizes = {int(part) for part in name.split(", ") if part.isdigit()} or {256}
        assert {config.run.global_batch_size} == sizes, name
        encoder = next(
            (
                part
                for part in ("swin-base", "vit_base_patch32", "vit_base_patch16")
                if part in name
            ),
            "swin-tiny",
        )
        assert config.model.image_encoder.startswith(encoder.replace("-", "_")), name
