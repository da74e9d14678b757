"""Both encoders as programs of torch.export, `image.pt2` and `text.pt2`, for any number of samples.

A .pt2 file is the graph with its weights: torch runs it, or compiles it ahead of time, without
this package or timm.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from unicl_fast.conversion.towers import Tower, write_towers
from unicl_fast.models.unicl import UniCL


@torch.no_grad()
def write_exported_programs(model: UniCL, folder: Path) -> float:
    """Writes the folder, and runs both programs as they are read back, at three batch sizes.

    Args:
        model: in fp32 and evaluation mode.
        folder: a new one.

    Returns:
        The largest difference of a feature's coordinates.

    Raises:
        ValueError: the folder is there already.
        RuntimeError: the encoder cannot be traced, or the features are not ours.
        OSError: it cannot be written.
    """
    return write_towers(model, folder, ".pt2", export=_export, load=_load)


def _export(tower: Tower, inputs: Tensor, path: Path, _: str) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(tower, (inputs,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def _load(path: Path, _: str) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()
