"""`unicl-bench loss`: tokens, targets, texts and the loss, the parts of a step besides images.

    unicl-bench loss --data PACKED [--parts loss] [--sizes 1024 4096] [--json FILE]

The file of each part says how it is measured.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from unicl_fast.config import DeviceName
from unicl_fast.system.machine import choose_device, keep_freed_memory

from ..harness import Figures, Stage
from .inputs import measure_targets, measure_texts, measure_tokens
from .losses import measure_losses

Part = Literal["tokens", "loss", "targets", "text"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(Stage):
    """Tokens, targets, texts and the loss: the parts of a training step besides images."""

    parts: tuple[Part, ...] = ("tokens", "loss", "targets", "text")
    """Parts to measure."""
    data: Path | None = None
    """Packed data set with captions for the part `text`; without one, random texts."""
    files: tuple[Path, ...] = ()
    """Texts for the part `tokens`: files with a caption per line, or .jsonl lists as unicl-pack
    reads them. Without any, ImageNet's prompts."""
    sizes: tuple[int, ...] = (1024, 4096, 16384, 32768)
    """Batch sizes for the parts `loss` and `targets`."""
    batch_size: int = 64
    """Captions in a batch, for the part `text`."""
    threads: int = torch.get_num_threads()
    """Torch's threads. With 1, CPU time hardly depends on other jobs on the machine."""
    memory: bool = True
    """Also measure the memory of the loss."""
    device: DeviceName = "auto"
    """Device of the loss and of the text encoder."""

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        device = choose_device(self.device)
        measures: dict[Part, Callable[[], Figures]] = {
            "tokens": lambda: measure_tokens(self.files, rounds=self.rounds),
            "loss": lambda: measure_losses(
                self.sizes,
                device=device,
                rounds=self.rounds,
                threads=self.threads,
                memory=self.memory,
            ),
            "targets": lambda: measure_targets(self.sizes, rounds=self.rounds),
            "text": lambda: measure_texts(
                self.data, self.batch_size, device=device, rounds=self.rounds
            ),
        }
        figures: Figures = {}
        for part, measure in measures.items():
            if part not in self.parts:
                continue
            if part in ("targets", "text"):
                keep_freed_memory()  # as in training; all contestants gain by it
            figures |= measure()
            self.write_result(figures, "open_clip_torch", "tokenizers", "numpy", "numba", "pandas")
