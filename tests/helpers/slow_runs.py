"""Is the diagnosis right? Known causes of slow runs are brought about, and its advice is followed.

    python tests/helpers/slow_runs.py --test-data DATA --work FOLDER [--only NAME...]

Each cause is a run on real images with one thing wrong. It is diagnosed without being told; then
the advice is followed, in turns with the run as it was, so that both see the same machine. A cause
counts as found if the stage is named, if the change that mends it is among the advice, and if what
it gains is predicted within a fifth. The table is that of docs/performance-notes.md.

DATA is the folder of test data that CONTRIBUTING.md names.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
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

from unicl_fast.benchmarks.diagnosis.advise import Advice, advise, find_limit
from unicl_fast.benchmarks.diagnosis.bench import Bench
from unicl_fast.benchmarks.diagnosis.clocks import median, median_ratio
from unicl_fast.benchmarks.diagnosis.diagnose import Budget, diagnose
from unicl_fast.benchmarks.diagnosis.model import CHECKPOINT, READ, Cost, Measured
from unicl_fast.benchmarks.diagnosis.session import on_bench, steps_in, try_out
from unicl_fast.benchmarks.harness import describe_machine, in_turns
from unicl_fast.dataset import files
from unicl_fast.distributed.ranks import from_rank_0
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.machine import choose_environment
from unicl_fast.system.program import begin_program
from unicl_fast.tools.pack.__main__ import main as pack
from unicl_fast.tools.pretrain import parse_arguments, split_config

_WITHIN = 0.2
"""Part of the measured gain by which the predicted one may miss."""
_SECONDS = 60.0
_TRY_SECONDS = 2.0
_ROUNDS = 3
_DISK_BYTES = 8e6
"""Bytes a second of the slow disk."""
_STORE_BYTES = 1e5
"""An epoch takes minutes, longer than all that is measured: nothing comes from the cache."""
_SLOW_SECONDS = 0.15
"""How long the slow rank's image encoder waits."""
# A model so small that the loader is what one waits for.
_TINY = (
    *("--preset", "digits-small", "--model.image-encoder", "test_vit", "--model.text-width", "16"),
    *("--model.text-heads", "2", "--model.text-layers", "1", "--run.device", "cpu"),
    *("--data.image-size", "32", "--data.evaluation-resize", "32"),
    *("--data.crop-scale", "0.3", "1.0", "--run.global-batch-size", "64"),
    *("--run.samples", "0", "--run.steps", "1000000", "--checkpoint.every-steps", "0"),
    *("--efficiency.precision", "fp32", "--data.prefetch", "2"),
)
_MANY = ("--run.global-batch-size", "128")
# A model that takes all the time itself.
_LARGE = (
    *_TINY,
    *("--model.image-encoder", "vit_tiny_patch16_224", "--data.image-size", "224"),
    *("--data.evaluation-resize", "256", "--run.global-batch-size", "8"),
)


Switch = Callable[[bool], None]
"""Brings a cause about, or suspends it."""


@contextlib.contextmanager
def nothing() -> Iterator[Switch]:
    """Injects nothing: only the options are wrong."""
    yield lambda on: None


@contextlib.contextmanager
def slow_disk() -> Iterator[Switch]:
    """Files are read at `_DISK_BYTES`, even from the page cache."""
    plain = files.LocalReader.read_into

    def read_into(self: Any, number: int, buffer: Any, offset: int) -> int:
        time.sleep(len(buffer) / _DISK_BYTES)
        return plain(self, number, buffer, offset)

    yield from _patched(files.LocalReader, "read_into", plain, read_into)


def _patched(owner: Any, name: str, plain: Any, slow: Any) -> Iterator[Switch]:
    def switch(on: bool) -> None:
        setattr(owner, name, slow if on else plain)

    switch(True)
    try:
        yield switch
    finally:
        switch(False)


class SlowStore(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory under slow://, over a line of `_STORE_BYTES`."""

    protocol: ClassVar = "slow"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar = [""]
    line: ClassVar = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("slow://").strip("/")

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **more: Any
    ) -> bytes:
        data: bytes = super().cat_file(path, start=start, end=end, **more)
        if "shard" in str(path):
            with self.line:
                time.sleep(len(data) / _STORE_BYTES)
        return data


@contextlib.contextmanager
def slow_rank() -> Iterator[Switch]:
    """The image encoder of rank 1 waits."""
    plain = UniCL.encode_image

    def encode_image(self: UniCL, images: Any) -> Any:
        time.sleep(_SLOW_SECONDS if os.environ.get("RANK") == "1" else 0)
        return plain(self, images)

    yield from _patched(UniCL, "encode_image", plain, encode_image)


@contextlib.contextmanager
def busy_neighbour() -> Iterator[Switch]:
    """Other processes that compute, one for each core."""
    cores = len(os.sched_getaffinity(0))
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]

    def switch(on: bool) -> None:
        for process in burning:
            process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)

    try:
        yield switch
    finally:
        for process in burning:
            process.kill()
            process.wait()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause:
    """Something that makes a run slow."""

    data: str
    """A data set of `make_data`."""
    stages: tuple[str, ...] = ()
    """How the diagnosis may name what limits the run; any where the remedy must come first."""
    remedy: str
    """How the option of the advice begins that mends it."""
    options: tuple[str, ...] = _TINY
    inject: Callable[[], contextlib.AbstractContextManager[Switch]] = nothing
    is_mended_by_ending: bool = False
    """The remedy is that the injected thing ends."""
    instead: str = ""
    """A data set that the remedy reads instead."""


CAUSES = {
    "throttled disk": Cause(
        data="full",
        options=(*_TINY, "--run.global-batch-size", "16"),
        inject=slow_disk,
        stages=(READ,),
        remedy="unicl-pack build SOURCES --resize short",
    ),
    "throttled object store": Cause(
        data="slow://store/cifar",
        options=(
            *(*_TINY, "--run.global-batch-size", "16"),
            # few images are read together, so that seconds show what the line gives
            *("--data.shuffle-window", "64", "--data.cache-bytes", "262144"),
        ),
        stages=(READ,),
        remedy="wait",
        instead="cifar",
    ),
    "one decoding thread": Cause(
        data="full",
        options=(*_TINY, *_MANY, "--data.threads", "1"),
        stages=("JPEG decode",),
        remedy="--data.threads",
    ),
    "full-size JPEGs": Cause(
        data="full",
        options=(*_TINY, *_MANY),
        stages=("JPEG decode",),
        remedy="unicl-pack build SOURCES --resize short",
    ),
    "PNGs": Cause(
        data="png",
        options=(*_TINY, *_MANY),
        stages=("PNG decode",),
        remedy="unicl-pack build SOURCES --resize short",
    ),
    "heavy augmentation": Cause(
        data="small",
        options=(
            *_TINY,
            *("--data.image-size", "64", "--data.evaluation-resize", "64"),
            *("--optim.freeze", "image"),  # LiT: the step is a forward pass, and texts
            *("--data.augment", "supcon,views=1,blur=1,policy=auto", "--data.resample", "dali"),
        ),
        stages=("augment",),
        remedy="--data.augment none",
    ),
    "tiny local batch": Cause(
        data="cifar",
        options=(*_TINY, "--run.global-batch-size", "2"),
        stages=("clip and update", "image encoder backward", "image encoder forward"),
        remedy="--run.global-batch-size",
    ),
    "fp32": Cause(
        data="small",
        options=_LARGE,
        stages=("image encoder backward",),
        remedy="--efficiency.precision bf16",
    ),
    "activation checkpointing": Cause(
        data="small",
        options=(*_LARGE, "--efficiency.activation-checkpointing"),
        stages=("image encoder backward",),
        remedy="--efficiency.no-activation-checkpointing",
    ),
    "80 templates per sample": Cause(
        data="cifar-80",
        options=(
            *_TINY,
            *("--model.text-width", "256", "--model.text-heads", "4"),
            *("--run.global-batch-size", "128"),
        ),
        stages=("text encoder backward", "text encoder forward"),
        remedy="--data.templates per_class",
    ),
    "checkpoint every 5 steps": Cause(
        data="cifar",
        options=(
            *_TINY,
            *("--model.text-width", "256", "--model.text-heads", "4"),
            *("--run.global-batch-size", "16", "--checkpoint.every-steps", "5"),
        ),
        stages=(CHECKPOINT,),
        remedy="--checkpoint.every-steps",
    ),
    "busy neighbour": Cause(
        data="small",
        options=_LARGE,
        inject=busy_neighbour,
        remedy="end or move",
        is_mended_by_ending=True,
    ),
    "slow rank": Cause(
        data="cifar",
        inject=slow_rank,
        stages=("rank 1",),
        remedy="mend or replace",
        is_mended_by_ending=True,
    ),
}
RANKS = {"slow rank": 2}


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
    builds = {
        "full": [str(decode), *listed],
        "small": [str(decode), *listed, "--resize", "short:80"],
        "png": [str(decode), *listed, "--resize", "short:256", "--format", "png"],
        "cifar": [cifar, "--templates", "simple"],
        "cifar-80": [cifar, "--templates", str(work / "templates.txt")],
    }
    for name, words in builds.items():
        if not (work / name).is_dir():
            pack(["build", *words, "--out", str(work / name)])
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    system = fsspec.filesystem("slow")
    for path in (work / "cifar").iterdir():
        system.pipe_file(f"slow://store/cifar/{path.name}", path.read_bytes())


def examine(name: str, work: Path, scratch: Path) -> dict[str, Any] | None:
    """Brings a cause about, diagnoses it, follows the advice; None on ranks other than 0."""
    cause = CAUSES[name]
    data = cause.data if "://" in cause.data else str(work / cause.data)
    arguments = [*cause.options, "--data.train", data, "--out", str(scratch / "run")]
    config = split_config(parse_arguments(arguments))
    with cause.inject() as switch, on_bench(config, scratch) as bench:
        with contextlib.closing(Budget(_SECONDS, is_shown=False)) as budget:
            measured = diagnose(bench, budget, folder=scratch / "trial", start_seconds=0.0)
        limit = find_limit(measured)
        useful, idle = advise(measured)
        chosen = next(
            (a for a in (*useful, *idle) if a.variant.option.startswith(cause.remedy)), None
        )
        gains: dict[str, float] = {}
        if from_rank_0(chosen is not None, bench.ranks):
            assert chosen is not None
            gains = _follow(bench, chosen, measured, cause, switch, scratch=scratch, work=work)
        if not bench.ranks.is_main:
            return None
    place = 1 + [*useful, *idle].index(chosen) if chosen is not None else 0
    is_right = (limit.stage in cause.stages if cause.stages else place == 1) and bool(gains)
    if is_right:
        is_right = abs(gains["predicted"] / gains["gain"] - 1) <= _WITHIN
    return {
        "cause": name,
        "limit": limit.stage,
        "sentence": limit.sentence,
        "advice": chosen.variant.option if chosen is not None else "",
        "place": place,
        **gains,
        "is_right": is_right,
        "others_cores": measured.others_cores,
        "measured": measured.as_dict(),
    }


def _follow(
    bench: Bench,
    advice: Advice,
    measured: Measured,
    cause: Cause,
    switch: Switch,
    *,
    scratch: Path,
    work: Path,
) -> dict[str, float]:
    """The predicted and the measured gain of a remedy, as ratios of rates."""
    if cause.is_mended_by_ending:
        # long turns: for a while after others come or go, threads are not where they will be
        steps = steps_in(bench, measured.rate, 3 * _TRY_SECONDS)

        def take(is_on: bool) -> Cost:
            switch(is_on)
            return bench.whole(steps)

        works = {"now": lambda: take(True), "then": lambda: take(False)}
        turns = in_turns(works, rounds=_ROUNDS)
        gain = 1 / median_ratio(turns["then"], turns["now"]).wall
        rates = {name: bench.ranks.world_size / median(taken).wall for name, taken in turns.items()}
        return {"predicted": advice.images_per_second / measured.rate, "gain": gain, **rates}
    if cause.instead:
        variant = dataclasses.replace(advice.variant, data=(str(work / cause.instead),))
        advice = dataclasses.replace(advice, variant=variant)
    tried = try_out(
        bench, advice, measured, scratch / "tried", rounds=_ROUNDS, seconds=_TRY_SECONDS
    )
    names = {"predicted": "predicted_gain", "gain": "measured_gain", "now": "now", "then": "then"}
    return {name: tried[key] for name, key in names.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test-data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of packed data sets")
    parser.add_argument("--only", nargs="+", choices=list(CAUSES), default=list(CAUSES))
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--is-own", action="store_true", help=argparse.SUPPRESS)
    given = begin_program() if argv is None else list(argv)
    arguments = parser.parse_args(given)
    make_data(arguments.test_data, arguments.work)
    rows: list[dict[str, Any]] = []
    for name in arguments.only:
        if not arguments.is_own:
            rows += _in_own_processes(name, arguments)
        else:
            with tempfile.TemporaryDirectory(prefix="unicl-bench-") as scratch:
                row = examine(name, arguments.work, Path(scratch))
            rows += [row] if row is not None else []
        if rows and arguments.json is not None:
            result = {"rows": rows, "machine": describe_machine("timm", "nvidia-dali-cuda120")}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _in_own_processes(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Examines a cause in the environment and on the ranks that a run would have."""
    choose_environment("cpu")
    with tempfile.TemporaryDirectory(prefix="unicl-bench-") as scratch:
        result = Path(scratch) / "result.json"
        launcher = (
            "from unicl_fast.distributed.launch import start_ranks; import sys; "
            f"start_ranks('slow_runs', nproc={RANKS.get(name, 1)}, argv=sys.argv[1:])"
        )
        words = ["--test-data", arguments.test_data, "--work", arguments.work, "--only", name]
        command = [sys.executable, "-c", launcher, *map(str, words), "--is-own"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run([*command, "--json", str(result)], check=True, env=environment)
        rows: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        print(line_of(row), flush=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    gains = "not measured | not measured"
    if "gain" in row:
        gains = f"{row['predicted']:.2f} | {row['gain']:.2f}"
    found = "yes" if row["is_right"] else "no"
    return f"| {row['cause']} | {row['limit']} | `{row['advice']}` | {gains} | {found} |"


if __name__ == "__main__":
    main()
