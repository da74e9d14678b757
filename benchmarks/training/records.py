"""The cost of records: writing a checkpoint beside training, a ledger's record, its proof.

    unicl-bench checkpoint [--folder DIR]
    unicl-bench ledger [--draws 100000000] [--folder DIR]

`checkpoint`: a turn is a few steps with a checkpoint after the first. What is still being written
at the end of a turn is waited for outside the clock: a run writes its next one later.

`ledger`: the step is that of a small preset on its CPU-sized model, the shortest that there are;
the ledger that is proven holds shuffled epochs over two sources.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.checkpoints.load import find_checkpoint, read_state
from unicl_fast.config import CheckpointConfig, OptimConfig
from unicl_fast.ledger.format import LedgerSource
from unicl_fast.ledger.proof import LedgerProof, prove
from unicl_fast.ledger.writer import Ledger
from unicl_fast.objectives.targets import collate
from unicl_fast.system.machine import keep_freed_memory
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.trainer import Trainer

from ..harness import Figures, Stage, rate_of, ratio_of, seconds_of, summarise, take_turns, timed
from .step import ModelStage, long_preset

_RECORDS = 200
"""Records of a turn: one is too short to be timed alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(ModelStage):
    """Cost of a checkpoint for training: written beside it, or waited for."""

    batch_size: int = 8
    """Images of a step."""
    steps: int = 4
    """Steps of a turn."""
    ema_decay: float = 0.9999
    """Above 0 the average of the weights is stored too."""
    folder: Path | None = None
    """Folder for checkpoints, on the disk to measure; by default a temporary one."""

    def run(self) -> None:
        keep_freed_memory()
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="unicl-bench-") as folder:
            trainer, batch = build(self, Path(folder))
            size = compare(trainer)
            saves: dict[str, Callable[[], None]] = {
                "without": lambda: None,
                "awaited": trainer.save,
                "beside": lambda: trainer.save(required=False),
            }
            saving: dict[str, list[float]] = {name: [] for name in saves}

            def steps(name: str) -> None:
                for step in range(self.steps):
                    loss, _ = trainer.train_step(batch)
                    if step == 0:
                        loss.item()
                        # every machine waits for the call; turns cost more than it where the
                        # writing thread and the steps share few cores
                        started = time.perf_counter()
                        saves[name]()
                        saving[name].append(time.perf_counter() - started)
                loss.item()  # waits for a device

            turns = take_turns(
                {name: functools.partial(steps, name) for name in saves},
                rounds=self.rounds,
                before=lambda name: trainer.finish_writing(),
            )
            trainer.finish_writing()
        taken = {name: [turn.wall_seconds for turn in turns[name]] for name in saves}
        step = statistics.median(taken["without"]) / self.steps
        figures = {f"{self.steps} steps, {name}, s": values for name, values in taken.items()}
        for name in ("awaited", "beside"):
            figures[f"save() of one {name}, s"] = saving[name][1:]  # without the warm-up
            cost = [one - none for one, none in zip(taken[name], taken["without"], strict=True)]
            figures[f"cost of one {name}, s"] = cost
            figures[f"cost of one {name}, steps"] = [seconds / step for seconds in cost]
        print(f"{'a checkpoint, MB':46} {size / 1e6:10.4g}")
        summaries = {name: summarise(values) for name, values in figures.items()}
        self.report(summaries, "safetensors", facts={"bytes of a checkpoint": size})


def build(settings: Checkpoint, folder: Path) -> tuple[Trainer, Batch]:
    """A trainer after a step, and a batch of noise with captions, which takes the usual time."""
    config = settings.config("bf16")
    config = dataclasses.replace(
        config,
        optim=OptimConfig(ema_decay=settings.ema_decay),
        checkpoint=CheckpointConfig(keep=1),
    )
    texts = [f"image {number} of some things" for number in range(settings.batch_size)]
    batch = noise(texts, torch.full((len(texts),), -1), side=settings.image_size)
    trainer = Trainer(config, ListLoader([batch]), run_folder=folder, progress=False)
    batch = batch.to(trainer.device)
    trainer.train_step(batch)
    return trainer, batch


def noise(texts: Sequence[str], labels: Tensor, *, side: int) -> Batch:
    """A batch of images without content; the others of its parts are given."""
    size = (len(texts), side, side, 3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    return collate(images, Tokenizer()(texts), labels)


def compare(trainer: Trainer) -> int:
    """Bytes of a checkpoint; raises RuntimeError if the two ways write different files."""
    assert trainer.run_folder is not None
    written = []
    for must in (True, False):
        trainer.save(required=must)
        trainer.finish_writing()
        checkpoint = find_checkpoint(trainer.run_folder)
        written.append(read_state(checkpoint).checksums)
    if written[0] != written[1]:
        raise RuntimeError(f"awaited and beside write different files: {written}; nothing timed")
    return sum(path.stat().st_size for path in checkpoint.iterdir())


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerCost(Stage):
    """A ledger's record beside a small training step, and the proof of a long ledger."""

    preset: str = "digits-small"
    """Preset of the step."""
    draws: int = 10_000_000
    """Draws of the ledger that is proven."""
    global_batch_size: int = 1024
    """Its batch size."""
    samples: tuple[int, ...] = (1_281_167, 3_000_000)
    """Samples of its sources."""
    folder: Path | None = None
    """Folder that it is written into; by default a temporary one."""

    def run(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            figures = _writing(self, Path(folder) / "written")
            figures |= _proving(self, Path(folder) / "proven")
        self.report(figures, "numpy", "numba", "xxhash")


def _writing(settings: LedgerCost, folder: Path) -> Figures:
    config = long_preset(settings.preset, device="cpu")
    size = config.run.global_batch_size
    labels = torch.randint(10, (size,), generator=torch.Generator().manual_seed(0))
    texts = [f"a photo of the digit {number}" for number in labels.tolist()]
    batch = noise(texts, labels, side=config.data.image_size)
    trainer = Trainer(config, ListLoader([batch]), progress=False)
    source = LedgerSource("digits", 60_000)
    ledger = Ledger(folder, sources=[source], global_batch_size=size, seed=0, shares=[1])
    ids = torch.randint(source.num_samples, (size,))
    named = _with_ids(batch, torch.zeros_like(ids), ids)
    steps = itertools.count()

    def record() -> None:
        for step in itertools.islice(steps, _RECORDS):
            ledger.record(dataclasses.replace(named, step=step))

    with ledger.segment(0):
        turns = take_turns(
            {"step": lambda: trainer.train_step(batch), "records": record}, rounds=settings.rounds
        )
    percent = 100 / _RECORDS
    return {
        f"step of {settings.preset}, {size} samples, ms": seconds_of(turns["step"], scale=1e3),
        "record, us": seconds_of(turns["records"], scale=1e6 / _RECORDS),
        "record, % of that step": ratio_of(turns, "records", "step", scale=percent),
        "record, % of that step's CPU time": ratio_of(
            turns, "records", "step", scale=percent, unit="cpu_seconds"
        ),
    }


def _proving(settings: LedgerCost, folder: Path) -> Figures:
    _write_epochs(settings, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    proofs: list[LedgerProof] = []
    turns = [
        timed(lambda: proofs.append(prove(folder))) for _ in range(max(1, settings.rounds - 2))
    ]
    if not all(proof.holds for proof in proofs):
        raise RuntimeError("a sound ledger was not proven: nothing is reported")
    draws = proofs[0].steps * proofs[0].global_batch_size
    return {
        "bytes a draw": summarise([size / draws]),
        "million draws proven/s": rate_of(turns, draws / 1e6),
    }


def _write_epochs(settings: LedgerCost, folder: Path) -> None:
    """Writes a ledger of one rank: sources are drawn at random, and shuffled for every epoch."""
    generator = np.random.default_rng(0)
    sources = [LedgerSource(str(i), n) for i, n in enumerate(settings.samples)]
    size = settings.global_batch_size
    ledger = Ledger(
        folder, sources=sources, global_batch_size=size, seed=0, shares=settings.samples
    )
    batch = noise([""], torch.tensor([-1]), side=1)  # only ids are recorded
    left = [np.empty(0, dtype=np.int64) for _ in sources]
    odds = np.array(settings.samples) / sum(settings.samples)
    with ledger.segment(0):
        for step in range(settings.draws // size):
            source_ids = generator.choice(len(sources), size=size, p=odds)
            ids = np.empty_like(source_ids)
            for number, source in enumerate(sources):
                mine = np.flatnonzero(source_ids == number)
                while len(left[number]) < len(mine):
                    fresh = generator.permutation(source.num_samples)
                    left[number] = np.concatenate([left[number], fresh])
                ids[mine], left[number] = np.split(left[number], [len(mine)])
            named = _with_ids(batch, torch.from_numpy(source_ids), torch.from_numpy(ids))
            ledger.record(dataclasses.replace(named, step=step))


def _with_ids(batch: Batch, source_ids: Tensor, ids: Tensor) -> Batch:
    """The batch with what a record needs; all samples are shown as they were scheduled."""
    return dataclasses.replace(batch, source_ids=source_ids, scheduled_ids=ids, sample_ids=ids)
