"""What a ledger costs: its record beside a small training step, and how fast a ledger is proven.

    unicl-bench ledger [--visits 100000000] [--folder DIR] [--json FILE]

The step is that of a small preset on its CPU-sized model, which is as short as steps get; the
ledger that is proven is made of shuffled passes over two sources.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.ledger.format import (
    LedgerSource,
    SegmentHeader,
    encode_header,
    encode_record,
    segment_name,
)
from unicl_fast.ledger.proof import prove
from unicl_fast.ledger.writer import Ledger
from unicl_fast.objectives.collate import collate
from unicl_fast.presets import build_preset
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.trainer import Trainer

from ..harness import (
    BenchmarkSettings,
    print_figures,
    ratios_of,
    summarise,
    take_turns,
    write_result,
)

_RECORDS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """A ledger's record beside a small training step, and the proof of a long ledger."""

    preset: str = "digits-small"
    """Whose step."""
    draws: int = 10_000_000
    """Of the ledger that is proven."""
    global_batch_size: int = 1024
    """Of the ledger that is proven."""
    samples: tuple[int, ...] = (1_281_167, 3_000_000)
    """Of its sources."""
    folder: Path | None = None
    """Where that ledger is written; a temporary one if none is given."""


def run(settings: Settings) -> None:
    """Measures, prints, and writes the JSON if one is wanted."""
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        figures = _writing(settings, Path(folder) / "written")
        figures |= _proving(settings, Path(folder) / "proven")
    print_figures(figures)
    write_result(settings, figures, "numpy", "numba", "xxhash")


def _writing(settings: Settings, folder: Path) -> dict[str, dict[str, object]]:
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
    percent = {
        unit: [100 * ratio / _RECORDS for ratio in ratios_of(turns, "records", "step", unit=unit)]
        for unit in ("wall_seconds", "cpu_seconds")
    }
    return {
        f"step of {settings.preset}, {size} samples, ms": summarise(
            [1e3 * turn.wall_seconds for turn in turns["step"]]
        ),
        "record, us": summarise([1e6 * turn.wall_seconds / _RECORDS for turn in turns["records"]]),
        "record, % of that step": summarise(percent["wall_seconds"]),
        "record, % of that step's CPU time": summarise(percent["cpu_seconds"]),
    }


def _with_ids(batch: Batch, num_samples: int) -> Batch:
    ids = torch.randint(num_samples, (batch.batch_size,))
    return dataclasses.replace(
        batch, source_ids=torch.zeros_like(ids), scheduled_ids=ids, sample_ids=ids
    )


def _proving(settings: Settings, folder: Path) -> dict[str, dict[str, object]]:
    _write_passes(settings, folder)
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
        "bytes a visit": summarise([size / draws]),
        "millions of visits proven a second": summarise([draws / s / 1e6 for s in seconds]),
    }


def _write_passes(settings: Settings, folder: Path) -> None:
    """A ledger of one rank: the sources take turns by chance, each shuffled for every pass."""
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
