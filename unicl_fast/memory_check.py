"""Whether a step fits into memory, told before the first one.

A training process that runs out of memory is killed without a word on the host, and after a while.
What backward needs of one picture is measured instead, and multiplied.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from unicl_fast.config import TrainConfig
from unicl_fast.models.unicl import UniCL
from unicl_fast.precision import Precision
from unicl_fast.step import encoder_input

logger = logging.getLogger(__name__)

_PICTURES = 2


def check_memory(model: UniCL, config: TrainConfig, *, share: int, device: torch.device) -> None:
    """Warns where a step will hardly fit, and refuses where it cannot.

    Only the image encoder's activations are counted: texts come in all lengths, and the rest is
    small beside them. So the need is higher than what is said here, never lower.

    Args:
        model: on its device.
        config: the run's settings.
        share: samples of a step on this rank.
        device: where the model is.

    Raises:
        ValueError: more than twice what is free would be needed.
    """
    at_once = min(share, config.efficiency.micro_batch_size or share)
    of_one = activation_bytes(model, config, device)
    free = free_memory(device)
    needed = at_once * of_one
    if needed <= free:
        return
    advice = _advice(model, free // of_one)
    sentence = (
        f"a step keeps about {needed / 1e9:.0f} GB for backward ({at_once} pictures of "
        f"{of_one / 1e6:.0f} MB), and {free / 1e9:.0f} GB are free: {advice}"
    )
    if needed > 2 * free:
        raise ValueError(sentence)
    logger.warning(sentence)


def activation_bytes(model: UniCL, config: TrainConfig, device: torch.device) -> int:
    """What the image encoder's forward pass keeps for backward, in bytes a picture."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    size = config.data.image_size
    pictures = torch.zeros(_PICTURES, size, size, 3, dtype=torch.uint8, device=device)
    was_training = model.training
    model.eval()  # keeps as much, and leaves BatchNorm's averages and drop path alone
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        Precision(config.efficiency.precision).autocast(device.type),
    ):
        features = model.encode_image(encoder_input(pictures, config))
    del features
    model.train(was_training)
    return sum(kept.values()) // _PICTURES


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had, of the device or of the host and its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_read_meminfo("MemAvailable")]
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free.append(int(text) - int(used.read_text()))
    return min(free)


def _read_meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/meminfo has no {name}")


def _advice(model: UniCL, fitting: int) -> str:
    smaller = 1 << max(0, int(fitting).bit_length() - 2)  # half of what would fit, or less
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        return (
            f"set run.global_batch_size to {smaller} a rank, or "
            "efficiency.activation_checkpointing=True, or use more ranks"
        )
    return f"set efficiency.micro_batch_size to {smaller} (the same result), or use more ranks"
