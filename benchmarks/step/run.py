"""`unicl-bench step`: a training step against open_clip's, its switches and parts.

    unicl-bench step [--data PACKED] [--parts switches profile] [--device cuda] [--json FILE]

The file of each part says how it is measured.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from unicl_fast.batch import Batch
from unicl_fast.config import DeviceName, PrecisionName, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.system.machine import choose_device, keep_freed_memory
from unicl_fast.training.settle import settle

from ..harness import Figures, Stage
from .parts import measure_parts, random_batch, step_config
from .switches import measure_switches

Part = Literal["open-clip", "switches", "profile"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Stage):
    """Training steps: against open_clip's, by switch, by part."""

    data: Path | None = None
    """Packed data set with captions, or with labels (one prompt per class shows the most). Without
    one, images and texts are random."""
    parts: tuple[Part, ...] = ("open-clip",)
    """Parts to measure."""
    image_encoder: str = "swin_tiny_patch4_window7_224"
    """A timm model."""
    image_size: int = 224
    """Side of the images."""
    batch_size: int = 16
    """Images in a step."""
    memory: bool = True
    """Also measure the memory of each switch."""
    tune_contender: bool = False
    """In the part `open-clip`, let the process keep freed memory, as unicl-pretrain does and
    open_clip's script does not."""
    device: DeviceName = "auto"
    """Device that runs the step."""

    def run(self) -> None:
        rounds = self.rounds
        device = choose_device(self.device)
        bf16, auto = (self._config(precision) for precision in ("bf16", "auto"))
        auto = settle(auto, device=device, ranks=Ranks())
        batch = take_batch(bf16, self.data)
        measures: dict[Part, Callable[[], Figures]] = {
            "open-clip": lambda: self._measure_open_clip(bf16, batch),
            "switches": lambda: measure_switches(
                auto, batch, device=device, rounds=rounds, memory=self.memory
            ),
            "profile": lambda: measure_parts(auto, batch, rounds=rounds),
        }
        figures: Figures = {}
        precision = auto.efficiency.precision
        for part, measure in measures.items():
            if part in self.parts:
                if part != "open-clip" or self.tune_contender:
                    keep_freed_memory()  # as unicl-pretrain does
                figures |= measure()
                self.write_result(figures, "open_clip_torch", "timm", precision=precision)

    def _measure_open_clip(self, config: TrainConfig, batch: Batch) -> Figures:
        from .open_clip import measure_open_clip  # imports open_clip, which other parts do not need

        return measure_open_clip(config, batch, rounds=self.rounds)

    def _config(self, precision: PrecisionName) -> TrainConfig:
        return step_config(
            self.image_encoder,
            image_size=self.image_size,
            batch_size=self.batch_size,
            device=self.device,
            precision=precision,
        )


def take_batch(config: TrainConfig, data: Path | None) -> Batch:
    """The first batch of a run on the data set, copied out of the loader's buffers; or random."""
    if data is None:
        size = config.run.global_batch_size
        return random_batch(size, pixels=config.data.image_size, num_texts=size)
    from ..input.own import open_loader  # with DALI, which a step does not need

    with (
        PackedDataset(data) as dataset,
        contextlib.closing(open_loader(dataset, config)) as loader,
    ):
        return copy.deepcopy(next(loader.batches(0)))
