"""Which device a rank trains on."""

from __future__ import annotations

import torch


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """The device that `run.device` means for this rank.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but torch finds no CUDA device here; use cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:  # SLURM may show each task its own device only
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise ValueError(
            f"local rank {local_rank} has no device of its own: torch sees {visible}; start as "
            "many ranks as there are devices"
        )
    return torch.device("cuda", local_rank)
