"""Peak memory of a batch that is larger than memory, in micro-batches.

`unicl-pretrain` takes one step of each; the figure is the largest resident size of its process.
"""

import sys
import tempfile
from pathlib import Path

from unicl_fast.config import TrainConfig
from unicl_fast.system.checked_fields import require

from ..harness import Ended, Figures, end_of, printed, run_apart, summarise

_LARGE, _PLAIN = 128, 16
"""Micro-batches in the large batch, and in the one that is encoded at once."""


def measure_micro_batches(config: TrainConfig, data: Path | None) -> Figures:
    """Gigabytes and seconds of a micro-batch, of a large batch of them, and of a plain batch."""
    require(data is not None, "the part micro-batches trains on a packed data set: give --data")
    micro = config.run.global_batch_size
    batches = {
        f"batch {micro:,}": (micro, 0),
        f"batch {_LARGE * micro:,} in micro-batches of {micro}": (_LARGE * micro, micro),
        f"batch {_PLAIN * micro:,}": (_PLAIN * micro, 0),
    }
    figures: Figures = {}
    for name, sizes in batches.items():
        ended = _take_a_step(config, data, *sizes)
        figures |= printed(
            {
                f"{name}, peak GB": summarise([ended.largest_bytes / 1e9]),
                f"{name}, seconds with start": summarise([ended.wall_seconds]),
            }
        )
    return figures


def _take_a_step(config: TrainConfig, data: Path | None, batch: int, micro: int) -> Ended:
    """One step of unicl-pretrain; its resident size is at least this process's own."""
    size = str(config.data.image_size)
    with tempfile.TemporaryDirectory() as name:
        command = (
            *(sys.executable, "-m", "unicl_fast.tools.pretrain", "--preset", "mixed-small"),
            *("--model.image-encoder", config.model.image_encoder, "--data.image-size", size),
            *("--data.evaluation-resize", size, "--data.train", str(data)),
            *("--efficiency.precision", config.efficiency.precision),
            *("--run.samples", "0", "--run.steps", "1", "--run.device", config.run.device),
            *("--run.global-batch-size", str(batch), "--out", f"{name}/run"),
            *("--efficiency.micro-batch-size", str(micro)),
        )
        log = Path(name) / "log.txt"
        if (ended := run_apart(command, log)).code != 0:
            raise RuntimeError(f"{' '.join(command[2:])}:\n{end_of(log)}")
    return ended
