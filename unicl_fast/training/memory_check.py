"""Whether a step fits into memory, checked before the first one.

A process that runs out of memory on the host is ended without a message, often late in the run. So
the bytes that backward needs of one image are measured, and multiplied.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from unicl_fast.config import TrainConfig
from unicl_fast.models.precision import Precision
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.machine import control_groups
from unicl_fast.training.step import encoder_input

logger = logging.getLogger(__name__)


def check_memory(
    model: UniCL, config: TrainConfig, *, images_per_step: int, device: torch.device
) -> None:
    """Warns where a step will hardly fit, and refuses where it cannot.

    Only the image encoder's activations are counted: texts come in all lengths, and the rest is
    small beside them. So the number in the message is a lower bound, except for compiled encoders.

    Args:
        model: on its device.
        config: the run's settings.
        images_per_step: of this rank, both views counted.
        device: where the model is.

    Raises:
        ValueError: more than twice what is free would be needed.
    """
    at_once = min(images_per_step, config.efficiency.micro_batch_size or images_per_step)
    image_bytes = activation_bytes(model, config, device)
    free = free_memory(device)
    needed = at_once * image_bytes
    if needed <= free:
        return
    message = (
        f"a step keeps about {needed / 1e9:.0f} GB for backward ({at_once} images of "
        f"{image_bytes / 1e6:.0f} MB), and {free / 1e9:.0f} GB are free: "
        + _advice(model, int(free // image_bytes))
    )
    if needed > 2 * free:
        raise ValueError(message)
    logger.warning(message)


def activation_bytes(model: UniCL, config: TrainConfig, device: torch.device) -> int:
    """Bytes an image that the image encoder's forward pass keeps for backward.

    Two passes of different size are compared, since weights in a narrow type are kept once, not
    for each image. Compiled encoders run as they are written here, and may keep less in training.
    """
    few, more = (_kept_bytes(model, config, device, num_images) for num_images in (2, 4))
    return (more - few) // 2


def _kept_bytes(model: UniCL, config: TrainConfig, device: torch.device, num_images: int) -> int:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    size = config.data.image_size
    images = torch.zeros(num_images, size, size, 3, dtype=torch.uint8, device=device)
    was_training = model.training
    model.eval()  # keeps as much, and leaves BatchNorm's averages and drop path alone
    with (
        torch.compiler.set_stance("force_eager"),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        Precision(config.efficiency.precision).autocast(device.type),
    ):
        model.encode_image(encoder_input(images, config))
    model.train(was_training)
    return sum(kept.values())


def free_memory(device: torch.device) -> int:
    """Bytes that this rank can still have: of its device, or its part of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_fields_of(Path("/proc/meminfo"))["MemAvailable"] * 1024]
    free += [_free_in_group(folder) for folder in _limited_groups()]
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _limited_groups() -> list[Path]:
    """Finds this process's control group and those around it that have a memory limit."""
    limits = [folder / "memory.max" for folder in control_groups()]
    return [one.parent for one in limits if one.is_file() and one.read_text().strip() != "max"]


def _free_in_group(folder: Path) -> int:
    limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
    files = _fields_of(folder / "memory.stat")
    # files that were read count as used, and make room when it is needed
    return limit - used + files["inactive_file"] + files["active_file"]


def _fields_of(path: Path) -> dict[str, int]:
    lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {name: int(value) for name, value, *_ in lines}


def _advice(model: UniCL, fitting: int) -> str:
    if fitting < 1:
        return "not even one image fits; take a smaller image encoder or data.image_size"
    smaller = 1 << max(0, fitting.bit_length() - 2)  # half of what would fit, or less
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        return f"set run.global_batch_size to {smaller} a rank, or use more ranks"
    return f"set efficiency.micro_batch_size to {smaller} (the same result), or use more ranks"
