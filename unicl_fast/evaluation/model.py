"""The model of an evaluation on its device and ranks, and whether these show progress."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import torch

from unicl_fast.checkpoints.load import load_model
from unicl_fast.distributed.launch import configure_logging
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.evaluation.requests import Evaluation
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.machine import choose_device


@contextlib.contextmanager
def model_on_ranks(command: Evaluation) -> Iterator[tuple[UniCL, Ranks]]:
    """The checkpoint's model in evaluation mode, and who shares the work."""
    device = choose_device(command.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(device) as ranks:
        configure_logging(ranks)
        model = load_model(command.checkpoint, weights=command.weights)
        yield move_to_device(model, device), ranks


def shows_progress(ranks: Ranks) -> bool:
    """Whether this process draws progress bars: rank 0, on a terminal; a log gets none."""
    return ranks.is_main and sys.stderr.isatty()


def move_to_device(model: UniCL, device: torch.device) -> UniCL:
    """The model on a device, its convolutions in the memory format it was trained with."""
    model.to(device)
    if model.config.efficiency.channels_last:
        model.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
