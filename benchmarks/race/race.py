"""`unicl-bench race`: as much accuracy a CPU second as anybody?

    unicl-bench race --train packed/train --test packed/test --out race

Runs of several lengths by `unicl-pretrain` and by others' own programs, judged by none. At
the longest length each contestant tries all learning rates with the first seed, and keeps the best.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from unicl_fast.config import TrainConfig
from unicl_fast.config_json import config_to_dict, load_config
from unicl_fast.conversion.export import write_export
from unicl_fast.conversion.initial import load_encoders
from unicl_fast.conversion.open_clip import write_open_clip
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.system.bar import Bar
from unicl_fast.system.machine import usable_cores
from unicl_fast.tools.diagnose.measuring import describe_machine

from ..harness import Program, end_of, module_command, run_apart
from ..input.worker import session_bytes
from .contestants import (
    OPEN_CLIP,
    SENTENCE_TRANSFORMERS,
    Contestant,
    ImageList,
    Length,
    open_clip_model,
    open_clip_options,
    our_options,
    sentence_transformers_job,
)
from .report import START, Outcome, draw, table, verdict

_PARTS_OF_RATE = (0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class _Task:
    """One run to do."""

    contestant: Contestant
    length: Length
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder under the race's."""
        name = self.contestant.name.replace(" ", "-").replace("/", "-")
        return f"{name}/{self.length.images}-images/lr-{self.lr:g}/seed-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Race(Program):
    """Accuracy by images and by CPU seconds, next to others' own training loops.

    All options of unicl-pretrain are taken too, such as --data.image-size; they hold for all
    contestants.
    """

    train: tuple[str, ...]
    """Packed data sets to train on, each DIR or DIR=WEIGHT; as --data.train of unicl-pretrain."""
    test: tuple[str, ...]
    """Packed data sets to judge by: with labels zero-shot, with captions retrieval."""
    out: Path
    """Folder for runs, race.json, race.md and race.png. Finished runs in it are not repeated."""
    init: str = ""
    """A model of any source that all contestants start from; it is judged as it is, too."""
    preset: str = "mixed-small"
    """Preset of unicl-pretrain. Others get its encoders, image size, crops, batch, warm-up."""
    contestants: tuple[str, ...] = ("unicl", "clip: --objective.name clip", "open_clip")
    """Each NAME or NAME: OPTIONS. A name that begins with open_clip is its program, with options of
    open_clip_train.main, and with sentence_transformers its trainer, with a loss and its arguments;
    others are unicl-pretrain. The first one is compared with each that is not."""
    images: tuple[int, ...] = (11_520, 23_040, 46_080)
    """Images of the runs, rounded to whole epochs of the others' list."""
    lr: tuple[float, ...] = ()
    """Learning rates that ours try at the longest length, without scaling by the batch. Default:
    half, all and twice of what the preset and the options say."""
    peer_lr: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Learning rates that others try there."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    probe: bool = False
    """Judge by a linear probe on image features too, as models without texts need it."""
    threads: int = 1
    """Threads of each run, and processes that load open_clip's images."""
    jobs: int = 0
    """Runs at the same time; 0 takes cores / threads."""
    options: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Options of unicl-pretrain."""

    @classmethod
    def parse(cls, options: Sequence[str], *, prog: str) -> Race:
        """Takes its own options, and leaves the others to unicl-pretrain."""
        chosen, rest = tyro.cli(cls, args=list(options), prog=prog, return_unknown_args=True)
        return dataclasses.replace(chosen, options=tuple(rest))

    def run(self) -> None:
        """Does the runs that are missing, and writes the report.

        Raises:
            ValueError: options that unicl-pretrain does not take, no data set, or no model that
                sentence-transformers could start from.
            RuntimeError: a run failed; with the end of its log.
        """
        contestants = [Contestant.parse(text) for text in self.contestants]
        config = self._config()
        if self.init and config.model.tokenizer:
            raise ValueError(f"a race is judged with CLIP's tokenizer, and {self.init} has another")
        peers = {one.peer for one in contestants} - {""}
        if SENTENCE_TRANSFORMERS in peers and not self.init:
            raise ValueError("sentence-transformers starts from a model: add --init MODEL")
        images = ImageList(self.train, self.out / "open_clip-images")
        batch = config.run.global_batch_size
        lengths = [
            Length.nearest(count, num_images=images.num_images, batch_size=batch)
            for count in sorted(self.images)
        ]
        before = _Task(Contestant(START, ()), Length(0, 0, batch), 0.0, self.seeds[0])
        started = [self._do(before, config, images)] if self.init else []
        for peer in peers if self.init else ():
            self._write_start(peer)
        own = self.lr or tuple(part * config.optim.lr for part in _PARTS_OF_RATE)
        longest = [
            _Task(one, lengths[-1], lr, self.seeds[0])
            for one in contestants
            for lr in (self.peer_lr if one.peer else own)
        ]
        rest_count = len(contestants) * (len(lengths) * len(self.seeds) - 1)
        with Bar(total=len(longest) + rest_count, unit="run") as bar:
            tried = dict(zip(longest, self._do_all(longest, config, images, bar), strict=True))
            best = {
                one: max(
                    (task for task in tried if task.contestant == one),
                    key=lambda task: statistics.fmean(tried[task].scores.values()),
                ).lr
                for one in contestants
            }
            rest = [
                _Task(one, length, best[one], seed)
                for length in reversed(lengths)  # the longest first
                for seed in self.seeds
                for one in contestants
                if (length, seed) != (lengths[-1], self.seeds[0])
            ]
            done = tried | dict(zip(rest, self._do_all(rest, config, images, bar), strict=True))
        kept = [outcome for task, outcome in done.items() if task.lr == best[task.contestant]]
        self._report(contestants, [*started, *kept], list(tried.values()))

    def _config(self) -> TrainConfig:
        """The config that the options common to our contestants give, with its precision here."""
        import torch

        from unicl_fast.distributed.ranks import Ranks
        from unicl_fast.tools.pretrain import parse_arguments, split_config
        from unicl_fast.training.settle import settle

        config = split_config(parse_arguments([*self._common(), "--out", "."]))
        return settle(config, device=torch.device("cpu"), ranks=Ranks())

    def _common(self) -> list[str]:
        init = ["--model.init", self.init] if self.init else []
        return ["--preset", self.preset, "--data.train", *self.train, *init, *self.options]

    def _start(self, peer: str) -> Path:
        """The folder of the start as a peer reads it."""
        return self.out / START.replace(" ", "-") / peer

    def _write_start(self, peer: str) -> None:
        folder, write = self._start(peer), write_open_clip if peer == OPEN_CLIP else write_export
        if not folder.exists():
            gap = write(load_encoders(self.init).float(), folder)
            if gap is None:
                shutil.rmtree(folder)
                raise ValueError(f"transformers has no model such as {self.init}, or is missing")
            print(f"{peer} starts from features that differ from ours by {gap:.1e} at most")

    def _do_all(
        self, tasks: Sequence[_Task], config: TrainConfig, images: ImageList, bar: Any
    ) -> list[Outcome]:
        jobs = self.jobs or max(1, usable_cores() // self.threads)

        def do(task: _Task) -> Outcome:
            outcome = self._do(task, config, images)
            scores = ", ".join(f"{name} {score:.1f}" for name, score in outcome.scores.items())
            bar.write(f"{task.name}: {outcome.cpu_seconds:.0f} CPU s; {scores}")
            bar.update()
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            try:
                return list(pool.map(do, tasks))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _do(self, task: _Task, config: TrainConfig, images: ImageList) -> Outcome:
        """Trains, unless no steps are asked for, and judges; what is done is not done again."""
        folder = self.out / task.name
        asked = {"options": self._common(), "contestant": dataclasses.asdict(task.contestant)}
        path = folder / "outcome.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("asked") != json.loads(json.dumps(asked)):
                raise RuntimeError(f"{folder} holds another run: remove it, or take another --out")
            return Outcome(**found)
        shutil.rmtree(folder, ignore_errors=True)  # a run that was stopped begins anew
        make_folder(folder)
        model: dict[str, Any] | None = None
        command: list[str] = []
        if not task.length.steps:
            checkpoint = self.init
        elif peer := task.contestant.peer:
            rows, start = folder / "rows.tsv", self._start(peer) if self.init else None
            images.write_rows(
                rows, task.length.steps_of_epoch * task.length.batch_size, seed=task.seed
            )
            asked_of = (task.contestant, config, task.length)
            facts: dict[str, Any] = {"rows": rows, "lr": task.lr, "seed": task.seed, "start": start}
            if peer == OPEN_CLIP:
                model = open_clip_model(config, start)
                facts |= {"workers": self.threads, "precision": config.efficiency.precision}
                job = {"model": model, "options": open_clip_options(*asked_of, out=folder, **facts)}
                checkpoint = f"{folder}/open_clip/checkpoints/epoch_{task.length.epochs}.pt"
            else:
                job = sentence_transformers_job(*asked_of, **facts)
                checkpoint = f"{folder}/model"
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            command = [*module_command(f"race.{peer}_loop"), str(folder / "job.json")]
        else:
            options = our_options(task.contestant, task.length, lr=task.lr, seed=task.seed)
            execution = ("--data.threads", str(self.threads), "--out", str(folder / "run"))
            program = [sys.executable, "-m", "unicl_fast.tools.pretrain"]
            command = [*program, *self._common(), *execution, *options]
            checkpoint = str(folder / "run")
        cost: dict[str, Any] = {"cpu_seconds": 0.0, "wall_seconds": 0.0, "peak_bytes": 0}
        if command:
            cost = _measured(command, folder / "train.log", threads=self.threads)
        if command and not task.contestant.peer:  # with the contestant's own options
            config = load_config(folder / "run" / "config.json")
        judge_job = {
            "model": model,
            "checkpoint": checkpoint,
            "folder": str(folder),
            "config": config_to_dict(config),
            "test": [str(test) for test in self.test],
            "probe": self.probe,
        }
        (folder / "judge.json").write_text(json.dumps(judge_job), encoding="utf-8")
        files = [str(folder / "judge.json"), str(folder / "scores.json")]
        judged = [*module_command("race.judge"), *files]
        _measured(judged, folder / "judge.log", threads=self.threads)
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        outcome = Outcome(
            contestant=task.contestant.name,
            images=task.length.images,
            lr=task.lr,
            seed=task.seed,
            **cost,
            scores=scores,
        )
        path.write_text(
            json.dumps({**dataclasses.asdict(outcome), "asked": asked}, indent=1) + "\n",
            encoding="utf-8",
        )
        return outcome

    def _report(
        self, contestants: Sequence[Contestant], kept: list[Outcome], tried: list[Outcome]
    ) -> None:
        text = table(kept)
        found = ""
        ours = contestants[0].name
        for one in contestants[1:]:
            if one.peer:
                found += verdict(kept, ours, one.name) + "\n"
        print(f"\n{text}\n\n{found}")
        (self.out / "race.md").write_text(f"{text}\n\n{found}", encoding="utf-8")
        draw(kept, self.out / "race.png")
        result = {
            "verdict": found.splitlines(),
            "runs": [dataclasses.asdict(one) for one in kept],
            "rates_tried": [dataclasses.asdict(one) for one in tried],
            "options": self._common(),
            "contestants": list(self.contestants),
            "machine": describe_machine("open_clip_torch", "sentence-transformers", "timm"),
        }
        path = self.out / "race.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{path}, and .md and .png beside it")


def _measured(command: Sequence[str], log: Path, *, threads: int) -> dict[str, Any]:
    """Runs a program; its cost with all that it started, or RuntimeError with its log."""
    peak = 0

    def watch(session: int) -> None:
        nonlocal peak
        peak = max(peak, session_bytes(session))

    environment = {"OMP_NUM_THREADS": str(threads)}
    ended = run_apart(command, log, watch=watch, environment=environment)
    if ended.code != 0:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {ended.code}:\n{end_of(log)}")
    return {
        "cpu_seconds": round(ended.cpu_seconds, 1),
        "wall_seconds": round(ended.wall_seconds, 1),
        "peak_bytes": max(peak, ended.largest_bytes),  # its floor is this process's own
    }
