"""Is the diagnosis right? Known causes of slow runs are brought about, and its advice is followed.

    python tests/helpers/slow_runs.py --test-data DATA --work FOLDER [--only NAME...] [--busy]

Each cause is a run on real images with one thing wrong, in processes of its own. It is diagnosed;
then the change that mends it is measured again in longer turns. A cause counts as named if the
limit is one of its `stages` and the change is among those that were measured; one that takes less
of the time than a limit, if the change is advised. Its gain counts as predicted if that is within a
third of the later one. `--busy` adds a busy loop for each core. The table is that of
docs/performance-notes.md; DATA is the folder that CONTRIBUTING.md names.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from unicl_fast.benchmarks.diagnosis.advise import advise, find_limit
from unicl_fast.benchmarks.diagnosis.deadline import Budget
from unicl_fast.benchmarks.diagnosis.diagnose import Diagnoser
from unicl_fast.benchmarks.diagnosis.model import (
    CHECKPOINT,
    EVALUATION,
    LOGGING,
    MUCH,
    READ,
    Change,
    Trial,
)
from unicl_fast.benchmarks.diagnosis.session import on_bench, on_ranks
from unicl_fast.benchmarks.harness import describe_machine
from unicl_fast.dataset import files
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.machine import choose_environment
from unicl_fast.system.program import begin_program
from unicl_fast.tools.pack.__main__ import main as pack
from unicl_fast.tools.pretrain import parse_arguments, split_config

_WITHIN = 1 / 3
"""Part of the later gain by which the predicted one may miss."""
_LONGER = 3.0
"""Times the usual turn, in which a change is measured again."""
_DISK_BYTES, _STORE_BYTES = 8e6, 1e5
"""Bytes a second of the slow disk, and of the slow store."""
_REQUEST_SECONDS = 0.2
_SYNC_SECONDS = 1.5
_SLOW_SECONDS = 0.15
"""How long the slow rank's image encoder waits."""
# A model so small that the loader is what one waits for.
_TINY = (
    *("--preset", "digits-small", "--model.image-encoder", "test_vit", "--model.text-width", "16"),
    *("--model.text-heads", "2", "--model.text-layers", "1", "--run.device", "cpu"),
    *("--data.image-size", "32", "--data.evaluation-resize", "32"),
    *("--data.crop-scale", "0.3", "1.0", "--run.global-batch-size", "64"),
    *("--run.samples", "0", "--run.steps", "1000000", "--checkpoint.every-steps", "0"),
    *("--efficiency.precision", "fp32", "--data.prefetch", "2", "--run.trackers"),
    *("--optim.name", "adamw"),
)
_FEW, _MANY = ("--run.global-batch-size", "16"), ("--run.global-batch-size", "128")
_WIDE_TEXT = ("--model.text-width", "256", "--model.text-heads", "4")
# A model that takes all the time itself.
_LARGE = (
    *_TINY,
    *("--model.image-encoder", "vit_tiny_patch16_224", "--data.image-size", "224"),
    *("--data.evaluation-resize", "256", "--run.global-batch-size", "8"),
)
_ENCODER = ("image encoder forward", "image encoder backward")


@contextlib.contextmanager
def _slowed(owner: Any, name: str, seconds_of: Callable[..., float]) -> Iterator[None]:
    """Lets a function sleep before it works."""
    plain = getattr(owner, name)

    def slow(*arguments: Any, **more: Any) -> Any:
        time.sleep(seconds_of(*arguments))
        return plain(*arguments, **more)

    setattr(owner, name, slow)
    try:
        yield
    finally:
        setattr(owner, name, plain)


class SlowStore(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory under slow:// and far://, behind a thin line or far away."""

    protocol: ClassVar = ("slow", "far")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar = [""]
    line: ClassVar = threading.Lock()
    request_seconds: ClassVar = 0.0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).partition("://")[2].strip("/") if "://" in path else str(path)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **more: Any
    ) -> bytes:
        data: bytes = super().cat_file(path, start=start, end=end, **more)
        if "shard" in str(path) and self.request_seconds:
            time.sleep(self.request_seconds)
        elif "shard" in str(path):
            with self.line:
                time.sleep(len(data) / _STORE_BYTES)
        return data


def _slow_rank(*_: Any) -> float:
    return _SLOW_SECONDS if os.environ.get("RANK") == "1" else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause:
    """Something that makes a run slow."""

    data: str
    """A data set of `make_data`."""
    stages: tuple[str, ...]
    """How the diagnosis may name what limits the run."""
    remedy: str
    """How the option of the change begins that mends it; empty where no setting does."""
    options: tuple[str, ...] = _TINY
    inject: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    ranks: int = 1


_SMALLER = "unicl-pack build SOURCES --resize"
_CAUSES_OF_OURS = {
    "throttled disk": Cause(
        data="full", options=(*_TINY, *_FEW), stages=(READ,), remedy=_SMALLER,
        inject=functools.partial(
            _slowed, files.LocalReader, "read_ranges",
            lambda reader, numbers, offsets, sizes, *_: sizes.sum() / _DISK_BYTES,
        ),
    ),
    "throttled object store": Cause(
        data="slow://store/cifar", stages=(READ,), remedy="copy the data set",
        # few images are read together, so that seconds show what the line gives
        options=(*_TINY, *_FEW, "--data.shuffle-window", "64", "--data.cache-bytes", "262144"),
    ),
    "one decoding thread": Cause(
        data="full", options=(*_TINY, *_MANY, "--data.threads", "1"), stages=("JPEG decode",),
        remedy="--data.threads",
    ),
    "full-size JPEGs": Cause(
        data="full", options=(*_TINY, *_MANY), stages=("JPEG decode",), remedy=_SMALLER
    ),
    "PNGs": Cause(data="png", options=(*_TINY, *_MANY), stages=("PNG decode",), remedy=_SMALLER),
    "heavy augmentation": Cause(
        data="small", stages=("augment",), remedy="--data.augment none",
        options=(
            *_TINY,
            *("--data.image-size", "64", "--data.evaluation-resize", "64"),
            *("--optim.freeze", "image"),  # LiT: the step is a forward pass, and texts
            *("--data.augment", "supcon,views=1,blur=1,policy=auto", "--data.resample", "dali"),
        ),
    ),
    "tiny local batch": Cause(
        data="cifar", options=(*_TINY, "--run.global-batch-size", "2"),
        stages=("clip and update", *_ENCODER), remedy="--run.global-batch-size",
    ),
    "fp32": Cause(
        data="small", options=_LARGE, stages=_ENCODER, remedy="--efficiency.precision bf16"
    ),
    "activation checkpointing": Cause(
        data="small", options=(*_LARGE, "--efficiency.activation-checkpointing"),
        stages=_ENCODER, remedy="--efficiency.no-activation-checkpointing",
    ),
    "80 templates per sample": Cause(
        data="cifar-80", options=(*_TINY, *_WIDE_TEXT, *_MANY),
        stages=("text encoder backward", "text encoder forward"),
        remedy="--data.templates per_class",
    ),
    "checkpoint every step": Cause(
        data="cifar", stages=(CHECKPOINT,), remedy="--checkpoint.every-steps",
        options=(*_TINY, *_WIDE_TEXT, *_FEW, "--checkpoint.every-steps", "1"),
    ),
    "slow rank": Cause(
        data="cifar", stages=("rank 1",), remedy="", ranks=2,
        inject=functools.partial(_slowed, UniCL, "encode_image", _slow_rank),
    ),
}  # fmt: skip
_CAUSES_FROM_OUTSIDE = {
    "200 ms a request, no read-ahead": Cause(
        data="far://store/cifar", stages=(READ,), remedy="copy the data set",
        options=(*_TINY, *_FEW, "--data.shuffle-window", "64", "--data.cache-bytes", "65536"),
    ),
    "fsync of 1.5 s, checkpoint every 3 steps": Cause(
        data="cifar", options=(*_TINY, "--checkpoint.every-steps", "3"), stages=(CHECKPOINT,),
        remedy="--checkpoint.every-steps",
        inject=functools.partial(_slowed, os, "fsync", lambda *_: _SYNC_SECONDS),
    ),
    "evaluation every 10 steps": Cause(
        data="cifar", stages=(EVALUATION,), remedy="--run.evaluate-every-steps",
        options=(*_TINY, "--data.evaluate", "WORK/cifar", "--run.evaluate-every-steps", "10"),
    ),
    "two trackers every step": Cause(
        data="cifar", stages=(LOGGING,), remedy="--run.log-every-steps",
        options=(
            *_TINY, *_FEW, "--run.trackers", "tensorboard", "wandb", "--run.log-every-steps", "1",
        ),
        environment={"WANDB_MODE": "offline"},
    ),
    "progressive JPEGs of 8 megapixels": Cause(
        data="progressive", options=(*_TINY, *_FEW), stages=("JPEG decode",), remedy=_SMALLER
    ),
    "micro-batch of 1": Cause(
        data="small", options=(*_LARGE, "--efficiency.micro-batch-size", "1"),
        stages=("forward and backward in micro-batches of 1",),
        remedy="--efficiency.micro-batch-size 0",
    ),
    "OMP_NUM_THREADS=1": Cause(
        data="small", options=_LARGE, stages=_ENCODER, remedy="OMP_NUM_THREADS=",
        environment={"OMP_NUM_THREADS": "1"},
    ),
    "Muon on a tiny batch": Cause(
        data="cifar", stages=("clip and update",), remedy="--run.global-batch-size",
        options=(*_TINY, *_WIDE_TEXT, "--run.global-batch-size", "4", "--optim.name", "muon"),
    ),
}  # fmt: skip
CAUSES = _CAUSES_OF_OURS | _CAUSES_FROM_OUTSIDE


def make_data(test_data: Path, work: Path) -> None:
    """Packs the data sets of the causes, unless they are there."""
    decode = test_data / "decode" / "labels.csv"
    listed = ["--image-column", "file", "--label-column", "wnid", "--class-names", "imagenet"]
    cifar = str(test_data / "cifar10" / "cifar10-test.zip")
    work.mkdir(parents=True, exist_ok=True)
    names = ("photo", "view", "drawing", "sketch", "close view", "bad print",
             "clear print", "painting")  # fmt: skip
    kinds = ("", "small ", "large ", "old ", "new ", "dark ", "bright ", "odd ", "fine ", "plain ")
    templates = [f"a {kind}{name} of a {{}}." for name in names for kind in kinds]
    (work / "templates.txt").write_text("\n".join(templates) + "\n", encoding="utf-8")
    _write_progressive(test_data / "decode", work / "progressive-files")
    builds = {
        "full": [str(decode), *listed],
        "small": [str(decode), *listed, "--resize", "short:80"],
        "png": [str(decode), *listed, "--resize", "short:256", "--format", "png"],
        "cifar": [cifar, "--templates", "simple"],
        "cifar-80": [cifar, "--templates", str(work / "templates.txt")],
        "progressive": [str(work / "progressive-files")],
    }
    for name, words in builds.items():
        if not (work / name).is_dir():
            pack(["build", *words, "--out", str(work / name)])


def _write_progressive(source: Path, folder: Path) -> None:
    """Photographs in two classes, enlarged to 8 megapixels."""
    for number, path in enumerate(sorted(source.rglob("*.JPEG"))[:32]):
        out = folder / "ab"[number % 2] / f"{number}.jpg"
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
            image.resize((3264, 2448)).save(out, quality=90, progressive=True)


def _fill_store(work: Path) -> None:
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    fsspec.register_implementation("far", SlowStore, clobber=True)
    system = fsspec.filesystem("slow")
    for path in (work / "cifar").iterdir():
        system.pipe_file(f"slow://store/cifar/{path.name}", path.read_bytes())


def examine(name: str, work: Path, scratch: Path, *, seconds: float) -> dict[str, Any] | None:
    """Brings a cause about, diagnoses it, follows the advice; None on ranks other than 0."""
    cause = CAUSES[name]
    data = cause.data if "://" in cause.data else str(work / cause.data)
    SlowStore.request_seconds = _REQUEST_SECONDS if data.startswith("far") else 0.0
    options = [option.replace("WORK", str(work)) for option in cause.options]
    config = split_config(
        parse_arguments([*options, "--data.train", data, "--out", str(scratch / "run")])
    )
    begun = time.perf_counter()
    with (
        cause.inject(),
        on_ranks(config) as (ranks, device),
        on_bench(config, scratch, ranks=ranks, device=device) as bench,
    ):
        diagnoser = Diagnoser(
            bench, Budget(seconds), folder=scratch, rounds=3, report=lambda _: None
        )
        measured = diagnoser.diagnose()
        taken = time.perf_counter() - begun
        limit, by_cpu = find_limit(measured), measured.by_cpu
        trials = {trial.change.option: trial for trial in measured.trials}
        remedy = next((option for option in trials if option.startswith(cause.remedy)), "")
        gains = {}
        if cause.remedy and remedy:
            gains = _gains(diagnoser, trials[remedy], by_cpu=by_cpu)
        if not ranks.is_main:
            return None
    advice = {one.change.option: one.gain for one in advise(measured)[0]}
    is_found = not cause.remedy or bool(remedy)
    # what takes less of the time limits nothing: advice names it
    is_little = bool(gains) and gains["gain"] <= MUCH
    is_named = limit.stage in cause.stages or (is_little and remedy in advice)
    return {
        "cause": name, "limit": limit.stage, "sentence": limit.sentence,
        "is_named": is_named and is_found,
        "remedy": remedy if cause.remedy else "", "is_advised": remedy in advice, **gains,
        "advice": advice, "seconds": taken, "measured": measured.as_dict(),
    }  # fmt: skip


def _gains(diagnoser: Diagnoser, trial: Trial, *, by_cpu: bool) -> dict[str, Any]:
    """The gain of a change by the diagnosis, and the one that comes in longer turns."""
    change: Change = trial.change
    again = diagnoser.trial(change, by_cpu=by_cpu, turns=_LONGER)
    assert isinstance(again, Trial), again
    predicted, came = (statistics.median(one.gains(by_cpu=by_cpu)) for one in (trial, again))
    return {
        "predicted": predicted, "gain": came,
        "is_predicted": abs(predicted - came) <= _WITHIN * abs(came),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test-data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of packed data sets")
    parser.add_argument("--only", nargs="+", choices=list(CAUSES), default=list(CAUSES))
    parser.add_argument("--seconds", type=float, default=60.0, help="of each diagnosis")
    parser.add_argument("--busy", action="store_true", help="keep each core busy")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--is-own", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(begin_program() if argv is None else list(argv))
    if arguments.is_own:
        _fill_store(arguments.work)
        with tempfile.TemporaryDirectory(prefix="unicl-bench-") as scratch:
            row = examine(
                arguments.only[0], arguments.work, Path(scratch), seconds=arguments.seconds
            )
        if row is not None:
            arguments.json.write_text(json.dumps(row), encoding="utf-8")
        return
    make_data(arguments.test_data, arguments.work)
    rows: list[dict[str, Any]] = []
    with _busy_loops(len(os.sched_getaffinity(0)) if arguments.busy else 0):
        for name in arguments.only:
            rows.append(_in_own_processes(name, arguments))
            print(line_of(rows[-1]), flush=True)
            if arguments.json is not None:
                result = {"rows": rows, "machine": describe_machine("timm", "nvidia-dali-cuda120")}
                arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _busy_loops(count: int) -> Iterator[None]:
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


def _in_own_processes(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Examines a cause in the environment and on the ranks that a run would have."""
    choose_environment("cpu")
    with tempfile.TemporaryDirectory(prefix="unicl-bench-") as scratch:
        result = Path(scratch) / "result.json"
        launcher = (
            "from unicl_fast.distributed.launch import start_ranks; import sys; "
            f"start_ranks('slow_runs', nproc={CAUSES[name].ranks}, argv=sys.argv[1:])"
        )
        words = ["--test-data", arguments.test_data, "--work", arguments.work, "--only", name]
        words += ["--seconds", arguments.seconds, "--is-own", "--json", result]
        command = [sys.executable, "-c", launcher, *map(str, words)]
        environment = os.environ | CAUSES[name].environment
        environment |= {"PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run(command, check=True, env=environment)
        row: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return row


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    gains = "not measured | "
    if "gain" in row:
        gains = f"{row['predicted']:+.0%} | {row['gain']:+.0%}"
        gains += "" if row["is_predicted"] else " (missed)"
    named = "yes" if row["is_named"] else "NO"
    return f"| {row['cause']} | {row['limit']} | {named} | `{row['remedy']}` | {gains} |"


if __name__ == "__main__":
    main()
