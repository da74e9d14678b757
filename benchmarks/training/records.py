"""The cost of records: writing a checkpoint beside training, a ledger's record, its proof.

    unicl-bench checkpoint [--folder DIR]
    unicl-bench ledger [--draws 100000000] [--folder DIR]

`checkpoint`: a turn is a few steps with a checkpoint after the first, as the trainer writes it.
What is still being written at the end of a turn is waited for outside the clock: a run writes its
next one later.

`ledger`: the step is that of a small preset on its CPU-sized model, the shortest that there are;
the ledger that is proven holds shuffled epochs over two sources.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.checkpoints.load import find_checkpoint, read_state
from unicl_fast.config import (
    CheckpointConfig,
    DataConfig,
    EfficiencyConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from unicl_fast.ledger.format import (
    LedgerSource,
    SegmentHeader,
    encode_header,
    encode_record,
    segment_name,
)
from unicl_fast.ledger.proof import prove
from unicl_fast.ledger.writer import Ledger
from unicl_fast.objectives.targets import collate
from unicl_fast.presets import build_preset
from unicl_fast.system.machine import keep_freed_memory
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.trainer import Trainer

from ..harness import Figures, Stage, ratio_of, seconds_of, summarise, take_turns

_RECORDS = 200
"""Records of a turn: one is too short to be timed alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Stage):
    """Cost of a checkpoint for training: written beside it, or waited for."""

    image_encoder: str = "swin_tiny_patch4_window7_224"
    """A timm model; the text encoder is the paper's."""
    image_size: int = 224
    """Side of the images."""
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
            taken, saving = measure(trainer, batch, self)
        step = statistics.median(taken["without"]) / self.steps
        figures = {f"{self.steps} steps, {name}, s": values for name, values in taken.items()}
        for name in ("awaited", "beside"):
            figures[f"save() of one {name}, s"] = saving[name]
            cost = [one - none for one, none in zip(taken[name], taken["without"], strict=True)]
            figures[f"cost of one {name}, s"] = cost
            figures[f"cost of one {name}, steps"] = [seconds / step for seconds in cost]
        print(f"{'a checkpoint, MB':46} {size / 1e6:10.4g}")
        summaries = {name: summarise(values) for name, values in figures.items()}
        self.report(summaries, "safetensors", facts={"bytes of a checkpoint": size})


def build(settings: Checkpoint, folder: Path) -> tuple[Trainer, Batch]:
    """A trainer after a step, and a batch of noise with captions, which takes the usual time."""
    config = TrainConfig(
        data=DataConfig(image_size=settings.image_size, evaluation_resize=settings.image_size),
        model=ModelConfig(image_encoder=settings.image_encoder),
        optim=OptimConfig(ema_decay=settings.ema_decay),
        efficiency=EfficiencyConfig(precision="bf16"),
        checkpoint=CheckpointConfig(keep=1),
        run=RunConfig(global_batch_size=settings.batch_size, steps=1 << 20),
    )
    size = (settings.batch_size, settings.image_size, settings.image_size, 3)
    texts = [f"image {number} of some things" for number in range(settings.batch_size)]
    batch = collate(
        torch.randint(256, size, dtype=torch.uint8),
        Tokenizer()(texts),
        torch.full((settings.batch_size,), -1),
    )
    trainer = Trainer(config, ListLoader([batch]), run_folder=folder, progress=False)
    batch = batch.to(trainer.device)
    trainer.train_step(batch)
    return trainer, batch


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


def measure(
    trainer: Trainer, batch: Batch, settings: Checkpoint
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each contestant's turns, and of the saving call in them, after a warm-up round.

    Every machine waits for the call. Turns cost more than it where the writing thread and the steps
    share few cores.
    """
    saves: dict[str, Callable[[], None]] = {
        "without": lambda: None,
        "awaited": trainer.save,
        "beside": lambda: trainer.save(required=False),
    }
    taken: dict[str, list[float]] = {name: [] for name in saves}
    saving: dict[str, list[float]] = {name: [] for name in saves}
    for number in range(settings.rounds + 1):
        for name, save in saves.items():
            gc.collect()
            started = time.perf_counter()
            for step in range(settings.steps):
                loss, _ = trainer.train_step(batch)
                if step == 0:
                    loss.item()
                    before = time.perf_counter()
                    save()
                    paused = time.perf_counter() - before
            loss.item()  # waits for a device
            seconds = time.perf_counter() - started
            trainer.finish_writing()
            if number:
                taken[name].append(seconds)
                saving[name].append(paused)
    return taken, saving


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
    config = build_preset(settings.preset)
    config = dataclasses.replace(
        config, run=dataclasses.replace(config.run, steps=1_000_000, device="cpu")
    )
    size, side = config.run.global_batch_size, config.data.image_size
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (size,), generator=generator)
    images = torch.randint(256, (size, side, side, 3), dtype=torch.uint8, generator=generator)
    tokens = Tokenizer()([f"a photo of the digit {number}" for number in range(10)])[labels]
    batch = collate(images, tokens, labels)
    trainer = Trainer(config, ListLoader([batch]), progress=False)
    source = LedgerSource("digits", 60_000)
    ledger = Ledger(folder, sources=[source], global_batch_size=size, seed=0, shares=[1])
    named = _with_ids(batch, source.num_samples)
    done = 0

    def record() -> None:
        nonlocal done
        for _ in range(_RECORDS):
            ledger.record(dataclasses.replace(named, step=done))
            done += 1

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


def _with_ids(batch: Batch, num_samples: int) -> Batch:
    ids = torch.randint(num_samples, (batch.batch_size,))
    return dataclasses.replace(
        batch, source_ids=torch.zeros_like(ids), scheduled_ids=ids, sample_ids=ids
    )


def _proving(settings: LedgerCost, folder: Path) -> Figures:
    _write_epochs(settings, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    seconds = []
    for _ in range(max(1, settings.rounds - 2)):
        started = time.perf_counter()
        proof = prove(folder)
        seconds.append(time.perf_counter() - started)
        if not proof.holds:
            raise RuntimeError("a sound ledger was not proven: nothing is reported")
    draws = proof.steps * proof.global_batch_size
    return {
        "bytes a draw": summarise([size / draws]),
        "million draws proven/s": summarise([draws / s / 1e6 for s in seconds]),
    }


def _write_epochs(settings: LedgerCost, folder: Path) -> None:
    """Writes a ledger of one rank: sources are drawn at random, and shuffled for every epoch."""
    generator = np.random.default_rng(0)
    sources = tuple(LedgerSource(str(i), n) for i, n in enumerate(settings.samples))
    size = settings.global_batch_size
    header = SegmentHeader(
        segment=1,
        start_step=0,
        rank=0,
        world_size=1,
        global_batch_size=size,
        sources=sources,
        seed=0,
        shares=settings.samples,
    )
    left = [np.empty(0, dtype=np.int64) for _ in sources]
    odds = np.array(settings.samples) / sum(settings.samples)
    folder.mkdir()
    with (folder / segment_name(1, 0)).open("wb") as file:
        file.write(encode_header(header))
        for step in range(settings.draws // size):
            source_ids = generator.choice(len(sources), size=size, p=odds)
            ids = np.empty_like(source_ids)
            for number, source in enumerate(sources):
                mine = np.flatnonzero(source_ids == number)
                while len(left[number]) < len(mine):
                    fresh = generator.permutation(source.num_samples)
                    left[number] = np.concatenate([left[number], fresh])
                ids[mine], left[number] = np.split(left[number], [len(mine)])
            file.write(
                encode_record(
                    header, step=step, source_ids=source_ids, scheduled_ids=ids, shown_ids=ids
                )
            )
