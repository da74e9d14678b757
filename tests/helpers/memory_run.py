"""Prints the peak memory of training steps beside the plan of them, as JSON. Run as a program."""

import json
import sys
from pathlib import Path

import torch

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import TrainConfig
from unicl_fast.objectives.targets import collate
from unicl_fast.presets import build_preset
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.memory_plan import plan

TEXT_TOKENS = 12


def config_of(size: int, *, text_width: int = 128, **efficiency: object) -> TrainConfig:
    config = build_preset("mixed-small")
    settings = {"image_encoder": "test_vit", "text_layers": 4, "text_width": text_width}
    return config.changed(
        model={**settings},
        run={"global_batch_size": size, "samples": 2 * size, "device": "cpu"},
        efficiency={"precision": "fp32", **efficiency},
    )


def distinct_batch(size: int, image_size: int) -> Batch:
    """Images without content, each with a text of its own, all as long."""
    tokens = torch.zeros(size, 77, dtype=torch.int64)
    tokens[:, :TEXT_TOKENS] = Tokenizer()(["a photo of a small dog on the grass here"])[0, :12]
    tokens[:, 1] = torch.arange(size) + 1000
    images = torch.zeros(size, image_size, image_size, 3, dtype=torch.uint8)
    labels = torch.full((size,), -1)
    return collate(images, tokens, labels, step=0, rank=0, world_size=1)


def train(config: TrainConfig) -> int:
    """Trains two steps; returns by how many bytes the peak of this process has risen."""
    batch = distinct_batch(config.run.global_batch_size, config.data.image_size)
    # Resets the peak (proc(5)): a process starts with the one of whoever started it.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = peak()
    make_trainer(config, ListLoader([batch]), progress=False).fit()
    return peak() - before


def peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main() -> None:
    efficiency = json.loads(sys.argv[1])
    train(config_of(2, text_width=8, **efficiency))  # loads libraries
    config = config_of(512, **efficiency)
    risen = train(config)
    found = plan(config, world_size=1, device_bytes=0, device_type="cpu", longest_text=TEXT_TOKENS)
    json.dump({"risen": risen, "parts": found.parts}, sys.stdout)


if __name__ == "__main__":
    main()
