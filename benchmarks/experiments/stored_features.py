"""A locked image encoder run in every step, against its features stored once: CPU time of images.

CPU time, not the clock: other programs on the machine change it little. Both runs take one thread,
and turns of either alternate. That both train the same is tested elsewhere.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.presets import build_preset
from unicl_fast.system.atomic_files import temporary_folder
from unicl_fast.training.run import build_trainer
from unicl_fast.training.trainer import Trainer

_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """Images of a second of CPU time, with and without efficiency.image_features; prints a line.

    The preset mixed-small with another, frozen image encoder, in fp32 and batches of 64.
    """

    data: Path
    """A packed data set."""
    encoder: str = "resnet18"
    """Image encoder."""
    image_size: int = 224
    """Side of its images."""
    turns: int = 5
    """Turns of each, which alternate."""
    steps: tuple[int, int] = (1, 6)
    """Steps of a turn that encodes, and of one with stored features."""

    def run(self) -> None:
        torch.set_num_threads(1)
        with temporary_folder("unicl-stored-features-") as folder:
            trainers = [self._trainer(folder, features) for features in ("", "features")]
            batches = [trainer.loader.batches(0) for trainer in trainers]
            pairs = list(zip(trainers, batches, self.steps, strict=True))
            for pair in pairs:
                _rate(*pair)  # compiles and fills caches
            found = [[_rate(*pair) for pair in pairs] for _ in range(self.turns)]
            for trainer in trainers:
                trainer.loader.close()
        encoded, stored = map(statistics.median, zip(*found, strict=True))
        ratio = statistics.median(after / before for before, after in found)
        print(
            f"{self.encoder} at {self.image_size} pixels: {encoded:,.0f} images of a second of CPU "
            f"time, {stored:,.0f} with stored features, {ratio:.1f} times as many"
        )

    def _trainer(self, folder: Path, features: str) -> Trainer:
        return build_trainer(
            self._config(str(folder / features) if features else ""),
            run_folder=folder / f"run-{features}",
            build_loader=TrainLoader,
            evaluate=lambda *_, **__: {},
            ranks=Ranks(),
            device=torch.device("cpu"),
            progress=False,
        )

    def _config(self, features: str) -> TrainConfig:
        preset, replace = build_preset("mixed-small"), dataclasses.replace
        side = self.image_size
        return replace(
            preset,
            data=replace(
                preset.data,
                train=(str(self.data),),
                image_size=side,
                evaluation_resize=side,
                crop_scale=(1.0, 1.0),
                crop_ratio=(1.0, 1.0),
                flip_probability=0.0,
                threads=1,
            ),
            model=replace(preset.model, image_encoder=self.encoder),
            optim=replace(preset.optim, freeze=("image",)),
            efficiency=replace(preset.efficiency, precision="fp32", image_features=features),
            run=replace(
                preset.run, global_batch_size=_BATCH_SIZE, samples=0, steps=10_000, trackers=()
            ),
        )


def _rate(trainer: Trainer, batches: Iterator[Batch], steps: int) -> float:
    """Images of a second of this process's CPU time."""
    begun = time.process_time()
    for _ in range(steps):
        trainer.train_step(next(batches))
    return _BATCH_SIZE * steps / (time.process_time() - begun)
