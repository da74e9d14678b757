"""Model FLOP/s utilisation: the products that a step needs, beside those that the device could do.

The products are those of the plain step (Chowdhery et al., arXiv 2204.02311, appendix B): what
activation checkpointing or micro-batches compute once more does not count, nor does padding to
rounded sizes. torch's counter counts the forward pass of a second model of fake tensors, which has
no content, so the run's model, its random numbers and its results are left alone. The backward pass
is taken for twice as much, once for each operand; frozen parts have none.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.models.freezing import is_trained
from unicl_fast.models.precision import Precision
from unicl_fast.models.unicl import UniCL
from unicl_fast.training.memory_plan import build_on_meta

logger = logging.getLogger(__name__)

_TERAFLOPS: dict[str, tuple[float, float]] = {
    "GH200": (989, 67),
    "H200$": (989, 67),
    "H100 80GB HBM3": (989, 67),
    "H100 PCIe": (756, 51),
    "A100": (312, 19.5),
    "A40": (149.7, 37.4),
    "A10": (125, 31.2),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "V100-SXM2": (125, 15.7),
    "V100-PCIE": (112, 14),
    "T4": (65, 8.1),
}
"""Peaks by a part of the device's name, in 16 bits with sums in fp32 and in fp32: NVIDIA's data
sheets. Those of tensor cores are without sparsity, half of what data sheets since Hopper print."""
_WITHOUT_TF32 = ("V100-SXM2", "V100-PCIE", "T4")
"""GPUs before Ampere, where the switch does nothing. The other ones have half of the peak of 16
bits in TF32."""


class Utilisation:
    """Gives `mfu` for lines of metrics, on a GPU; one that is not known is logged once."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """Counts nothing yet; `config` is the run's, with its precision resolved."""
        self._config, self._device = config, device
        self._step_seconds_at_peak: float | None = None
        self._is_known = True

    def values(self, batch: Batch, *, step_seconds: float) -> dict[str, float]:
        """`mfu`, the part of the device's peak, or nothing; the first call counts.

        Args:
            batch: a local batch whose size is that of all; the first one's texts stand for others.
            step_seconds: a step's mean time.
        """
        if self._step_seconds_at_peak is None and self._is_known:
            try:
                self._step_seconds_at_peak = self._measure(batch)
            except Exception as error:  # of an encoder that runs on no fake tensors; no run ends
                logger.warning("no mfu in the metrics: %s: %s", type(error).__name__, error)
            self._is_known = self._step_seconds_at_peak is not None
        if self._step_seconds_at_peak is None:
            return {}
        return {"mfu": self._step_seconds_at_peak / step_seconds}

    def _measure(self, batch: Batch) -> float | None:
        peak = _peak_of(self._device, Precision(self._config.efficiency.precision))
        if peak is None:
            return None
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):  # which building a model seeds
            flops = flops_of_step(self._config, batch)
        logger.info(
            "a step needs %.3g TFLOP on a rank; mfu is relative to %.3g TFLOP/s",
            flops / 1e12, peak / 1e12,
        )  # fmt: skip
        return flops / peak


def flops_of_step(config: TrainConfig, batch: Batch) -> float:
    """Floating-point operations of one rank's step on such a batch, forward and backward.

    What `optim.freeze` names has no backward pass, whatever the step.
    """
    efficiency = dataclasses.replace(config.efficiency, activation_checkpointing=False)
    model = build_on_meta(dataclasses.replace(config, efficiency=efficiency), "cuda")
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # the counter does not know the CPU's fused kernel
            module.fused_attn = False  # type: ignore[assignment]
    views = 1 if batch.second_images is None else 2
    num_rows, num_texts, of_texts = views * batch.batch_size, 0, 0
    weight_type = Precision(efficiency.precision).weight_type
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cpu").eval()
        side = config.data.image_size
        shape = (3, side, side) if batch.images.ndim == 4 else batch.images.shape[1:]
        shown = torch.empty(1, *shape, dtype=weight_type)
        if (tokens := model.drop_path_key.tokens) is not None:
            model.set_drop_path_key(step=batch.step, global_index=torch.zeros(1, dtype=torch.int64))
            tokens.train()
        of_image, features = _count(model, "image", lambda: model.encode_image(shown))
        if model.text_encoder is not None:
            rows, num_tokens = _fake_texts(config, batch)
            num_texts = len(rows)
            of_texts, _ = _count(model, "text", lambda: model.encode_text(rows, num_tokens))
    world_size = config.run.global_batch_size // batch.batch_size
    num_columns = config.objective.num_columns(
        num_images=world_size * batch.batch_size, num_texts=world_size * num_texts
    )
    sides = is_trained(model, "image"), model.text_encoder is None or is_trained(model, "text")
    logits = (1 + sum(sides)) * 2 * num_rows * num_columns * features.shape[1]
    return float(num_rows * of_image + of_texts + logits)


def _count(
    model: UniCL, tower: Literal["image", "text"], encode: Callable[[], Tensor]
) -> tuple[int, Tensor]:
    """Operations of a tower, forward and backward, and the features that it makes."""
    frozen, begun = 0, 0

    def begin(*_: object) -> None:
        nonlocal begun
        begun = counter.get_total_flops()

    def end(*_: object) -> None:
        nonlocal frozen
        frozen += counter.get_total_flops() - begun

    handles = [module.register_forward_pre_hook(begin) for module in model.frozen.modules]
    handles += [module.register_forward_hook(end) for module in model.frozen.modules]
    with FlopCounterMode(display=False) as counter:
        features = encode()
    for handle in handles:
        handle.remove()
    forward = counter.get_total_flops()
    return int(frozen + _passes(model, tower) * (forward - frozen)), features


def _passes(model: UniCL, tower: Literal["image", "text"]) -> float:
    """Forward passes that forward and backward of a tower take, but for what is frozen whole.

    A layer below an adapter has no gradient of its weight, and takes two.
    """
    if not is_trained(model, tower):
        return 1
    frozen = {one for module in model.frozen.modules for one in module.modules()}
    layers = [
        module.weight
        for module in getattr(model, f"{tower}_encoder").modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in frozen
    ]
    trained = sum(weight.numel() for weight in layers if weight.requires_grad)
    return 2 + trained / sum(map(torch.numel, layers)) if layers else 3


def _fake_texts(config: TrainConfig, batch: Batch) -> tuple[Tensor, int | None]:
    """Texts of the sizes of a batch's, as `texts_to_encode` gives them, and how many tokens."""
    lengths = batch.texts.lengths
    return torch.empty(len(lengths), int(lengths.max()), dtype=torch.int64), int(lengths.sum())


def _peak_of(device: torch.device, precision: Precision) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # auto takes no TF32 with fp32
    peak = peak_of_gpu(name, precision.compute_type, tf32=precision.name == "tf32")
    if peak is None:
        logger.info("no mfu in the metrics: the peak of %s is not known", name)
    return peak


def peak_of_gpu(name: str, compute_type: torch.dtype, *, tf32: bool = False) -> float | None:
    """FLOP/s of a GPU by its name and the type that it computes in; None where they are unknown.

    `tf32` is whether products of fp32 may be computed in TF32.
    """
    if "MIG" in name or compute_type.itemsize > 4:  # a part of a GPU; fp64
        return None
    for part, (narrow, wide) in _TERAFLOPS.items():
        if re.search(rf"\b{part}(?![0-9A-Za-z])" if part[-1].isalnum() else rf"\b{part}", name):
            if compute_type.itemsize == 2:
                return 1e12 * narrow
            return 1e12 * (narrow / 2 if tf32 and part not in _WITHOUT_TF32 else wide)
    return None
