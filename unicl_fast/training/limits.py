"""Limits of a run: non-finite steps, replaced samples, and memory before the first step.

Steps and samples are counted on every rank and judged at logging steps, on all ranks alike, so that
no other step waits for the device or for another rank. What is counted is on the host anyway: a
`Batch` tells which samples it holds and which were planned.
"""

from __future__ import annotations

import collections
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm

from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.dataset.reader import QUARANTINE_NAME, TooManyBadSamplesError
from unicl_fast.distributed.ranks import Ranks, gather_objects, sum_integers
from unicl_fast.models.efficiency import has_batch_norm
from unicl_fast.models.precision import Precision
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.machine import control_groups
from unicl_fast.system.wording import without_secrets
from unicl_fast.training.global_loss import encoder_input

logger = logging.getLogger(__name__)

LEAST_DRAWS = 10_000
"""The limit on replaced samples is a fraction of at least so many draws: a few at the start of a
run do not stop it."""
_REMEMBERED_STEPS = 512
"""At 4,096 samples a rank that is 50 MB. A run that logs more seldom still knows the step."""
_RECORDS = ("source_ids", "sample_ids", "scheduled_ids")


class NonfiniteSteps:
    """Finds steps whose loss or gradient norm is not finite, and stops a run with too many of them.

    Their update has been masked on the device (`optim.update`); the samples they saw are written
    to `non-finite-step-XXXXXXXX.json`.
    """

    def __init__(
        self, config: TrainConfig, *, ranks: Ranks, run_folder: Path | None, scaler: GradScaler
    ) -> None:
        """Gradient norms that are not finite are the scaler's business where it is enabled."""
        self.count = 0
        """Non-finite steps of this process so far."""
        self._config, self._ranks, self._run_folder = config, ranks, run_folder
        self._scaler = scaler
        self._judged = 0
        self._remembered: collections.deque[tuple[int, dict[str, Tensor | None]]]
        self._remembered = collections.deque(maxlen=_REMEMBERED_STEPS)

    def start_at(self, step: int) -> None:
        """Resumes from `step`: steps that were judged before may come again."""
        self._judged = step
        self._remembered.clear()

    def remember(self, batch: Batch) -> None:
        """Keeps which samples a batch holds, until its step is judged."""
        self._remembered.append((batch.step, {name: getattr(batch, name) for name in _RECORDS}))

    def judge(
        self, steps: Sequence[tuple[float, float]], *, done: int, last_metrics: Mapping[str, float]
    ) -> None:
        """Looks at the steps that were not judged yet; all ranks call it together.

        `steps` holds loss and gradient norm of the last ones of the `done` steps of the run.

        Raises:
            FloatingPointError: one more than `run.max_bad_steps`, or gradients that overflow at
                any loss scale; names the step.
        """
        scales_loss = self._scaler.is_enabled()
        for step, (loss, grad_norm) in enumerate(steps, start=done - len(steps)):
            if step < self._judged:
                continue
            self._judged = step + 1
            if not math.isfinite(loss):
                fault = f"the loss of step {step} is {loss}"
            elif not (math.isfinite(grad_norm) or scales_loss):
                fault = f"the gradient norm of step {step} is {grad_norm}"
            else:
                continue
            self.count += 1
            values = {"step": step, "loss": loss, "grad_norm": grad_norm}
            where = self._write(values, last_metrics)
            self._report(f"{fault}, and the update was left out", where)
        self._remembered.clear()
        overflowed = bool(steps) and not any(math.isfinite(norm) for _, norm in steps)
        # updates are left out while the scale halves; below 1 it has nothing more to give
        if overflowed and scales_loss and self._scaler.get_scale() < 1:
            raise FloatingPointError(
                f"no gradient of the {len(steps)} steps before step {done} was finite in fp16, "
                "whatever the loss scale: use efficiency.precision=bf16"
            )

    def _report(self, fault: str, where: str) -> None:
        allowed = self._config.run.max_bad_steps
        if self.count > allowed:
            if allowed:
                fault += f" (non-finite step {self.count}, run.max_bad_steps={allowed})"
            raise FloatingPointError(
                f"{fault}: lower optim.lr or lengthen the warm-up; checkpoints are from "
                f"before{where}"
            )
        if self._ranks.is_main:
            logger.error(
                "NON-FINITE STEP %d of at most %d: %s; training continues%s",
                self.count, allowed, fault, where,
            )  # fmt: skip

    def _write(self, values: dict[str, Any], last_metrics: Mapping[str, float]) -> str:
        """Writes the step with the samples of all ranks; returns the end of a message about it."""
        step = values["step"]
        columns = dict(self._remembered).get(step, dict.fromkeys(_RECORDS))
        own = {name: None if ids is None else ids.tolist() for name, ids in columns.items()}
        every = gather_objects(own, self._ranks)
        if self._run_folder is None:
            return ""
        path = self._run_folder / f"non-finite-step-{step:08d}.json"
        if self._ranks.is_main:
            content = {
                **_for_json(values),
                "last_metrics": _for_json(last_metrics),
                "seed": self._config.run.seed,
                "global_batch_size": self._config.run.global_batch_size,
                "sources": list(map(without_secrets, self._config.data.train)),
                "ranks": [{"rank": rank, **samples} for rank, samples in enumerate(every)],
            }
            try:
                path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                logger.error("the samples of step %d cannot be written down: %s", step, error)
        return f"; its samples are in {path}"


class BatchNormBackup:
    """Puts back BatchNorm's averages, which the forward pass of a non-finite step has changed."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._buffers: list[Tensor] = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Copies the averages, before a step."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore_where(self, is_bad: Tensor) -> None:
        """Restores them after it, where `is_bad` (bool [] on the device, which is not read)."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(torch.where(is_bad, kept, buffer))


class ReplacedSamples:
    """Counts draws of another sample than the planned one, since this process began to train."""

    def __init__(self, config: TrainConfig, *, run_folder: Path | None) -> None:
        """Takes the limit from the config; `run_folder` is for the message."""
        self._max_fraction = config.data.max_bad_fraction
        self._global_batch_size = config.run.global_batch_size
        self._where = "the log" if run_folder is None else str(run_folder / QUARANTINE_NAME)
        self._replaced = 0
        self._draws = 0

    def add(self, batch: Batch) -> None:
        """Counts this rank's samples of one step."""
        self._draws += self._global_batch_size
        if batch.sample_ids is not None and batch.scheduled_ids is not None:
            differ = batch.sample_ids.numpy() != batch.scheduled_ids.numpy()  # both on the host
            self._replaced += int(np.count_nonzero(differ))

    def total(self, ranks: Ranks) -> int:
        """Adds up the counts of all ranks, which call it together."""
        return sum_integers([self._replaced], ranks)[0]

    def check(self, total: int) -> None:
        """Stops a run whose limit `total` exceeds; the same on all ranks.

        Raises:
            TooManyBadSamplesError: names the file that lists them.
        """
        if total > self._max_fraction * max(self._draws, LEAST_DRAWS):
            raise TooManyBadSamplesError(
                f"{total} of the {self._draws} samples since this start were bad and had to be "
                f"replaced, more than data.max_bad_fraction = {self._max_fraction} (of at least "
                f"{LEAST_DRAWS}) allows: {self._where} says which and why; mend the data, or set "
                "data.max_bad_fraction higher"
            )


def _for_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Spells numbers that are not finite as text, since JSON has none."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def check_memory(
    model: UniCL, config: TrainConfig, *, images_per_step: int, device: torch.device
) -> None:
    """Warns before the first step where one will hardly fit, and refuses where it cannot.

    A process that runs out of memory on the host is ended without a message, often late in the run.
    So the bytes that backward needs of one image are measured, and multiplied by `images_per_step`
    of this rank, both views counted: a lower bound (except for compiled encoders), since texts come
    in all lengths and the rest is small.

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
    free = _fields_of(Path("/proc/meminfo"))["MemAvailable"] * 1024
    for folder in control_groups():
        limit = folder / "memory.max"
        if limit.is_file() and limit.read_text(encoding="utf-8").strip() != "max":
            free = min(free, _free_in_group(folder))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_in_group(folder: Path) -> int:
    limit, used = (
        int((folder / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current")
    )
    files = _fields_of(folder / "memory.stat")
    # files that were read count as used, and make room when it is needed
    return limit - used + files["inactive_file"] + files["active_file"]


def _fields_of(path: Path) -> dict[str, int]:
    lines = (
        line.replace(":", " ").split() for line in path.read_text(encoding="utf-8").splitlines()
    )
    return {name: int(value) for name, value, *_ in lines}


def _advice(model: UniCL, fitting: int) -> str:
    if fitting < 1:
        return "not even one image fits; take a smaller image encoder or data.image_size"
    smaller = 1 << max(0, fitting.bit_length() - 2)  # half of what would fit, or less
    if has_batch_norm(model):
        return f"set run.global_batch_size to {smaller} a rank, or use more ranks"
    return f"set efficiency.micro_batch_size to {smaller} (the same result), or use more ranks"
