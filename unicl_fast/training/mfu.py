"""Model FLOP/s utilisation on a GPU: the FLOPs that a step needs, relative to the GPU's peak.

The FLOPs are the plain step's (Chowdhery et al., arXiv 2204.02311, appendix B), without the
recomputation of activation checkpointing or micro-batches, and without padding to rounded sizes.
torch's counter watches a copy of the model on fake tensors (shapes without content), so the run's
model and results are not touched.
"""

import logging
import re

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.models.precision import Precision
from unicl_fast.training.memory_plan import build_on_meta

logger = logging.getLogger(__name__)

_TERAFLOPS: dict[str, tuple[float, float]] = {
    "GH200": (989, 67), "H200$": (989, 67), "H100 80GB HBM3": (989, 67), "H100 PCIe": (756, 51),
    "A100": (312, 19.5), "A40": (149.7, 37.4), "A10": (125, 31.2),
    "L40S": (362, 91.6), "L40": (181, 90.5), "L4": (121, 30.3),
    "V100-SXM2": (125, 15.7), "V100-PCIE": (112, 14), "T4": (65, 8.1),
}  # fmt: skip
"""Peaks by a part of the device's name, in 16 bits (sums in fp32) and in fp32, from NVIDIA's
sheets, without sparsity: half of the figures printed since Hopper."""
_WITHOUT_TF32 = ("V100-SXM2", "V100-PCIE", "T4")
"""GPUs before Ampere. The TF32 peak of all others is half of the 16-bit one."""


def seconds_at_peak(config: TrainConfig, batch: Batch, device: torch.device) -> float | None:
    """The time of a rank's step at the GPU's peak; `mfu` is this divided by the real time.

    None on a CPU, and, with a line in the log, for an unknown GPU or an encoder that cannot be
    counted. `config` is the run's, or a stage's, with its precision resolved.
    """
    if device.type != "cuda":
        return None
    name, precision = torch.cuda.get_device_name(device), Precision(config.efficiency.precision)
    peak = peak_of_gpu(name, precision.compute_type, tf32=precision.name == "tf32")
    if peak is None:
        logger.info("no mfu in the metrics: the peak of %s is not known", name)
        return None
    try:
        with torch.random.fork_rng(devices=[device]):  # building a model seeds them
            flops = flops_of_step(config, batch)
    except Exception as error:  # some encoders do not run on fake tensors; no reason to end a run
        logger.warning("no mfu in the metrics: %s: %s", type(error).__name__, error)
        return None
    logger.info(
        "a step needs %.3g TFLOP on a rank; mfu is relative to %.3g TFLOP/s",
        flops / 1e12, peak / 1e12,
    )  # fmt: skip
    return flops / peak


def flops_of_step(config: TrainConfig, batch: Batch) -> float:
    """Floating-point operations of one rank's step on such a batch, forward and backward."""
    model = build_on_meta(config.changed(efficiency={"activation_checkpointing": False}), "cuda")
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # the counter does not know the CPU's fused kernel
            module.fused_attn = False  # type: ignore[assignment]
    lengths = batch.texts.lengths
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        model.to_empty(device="cpu").eval()
        side = config.data.image_size
        shape = (3, side, side) if batch.images.ndim == 4 else batch.images.shape[1:]
        weight_type = Precision(config.efficiency.precision).weight_type
        images = model.encode_image(torch.empty(batch.batch_size, *shape, dtype=weight_type))
        features = [images]
        if model.text_encoder is not None:
            rows, num_tokens = torch.empty_like(batch.texts.tokens, device="cpu"), None
            if not rows.is_floating_point():
                rows, num_tokens = rows[:, : int(lengths.max())], int(lengths.sum())
            features.append(model.encode_text(rows, num_tokens))
        trained = [one for one in features if one.requires_grad]
        torch.autograd.backward(trained, [torch.ones_like(one) for one in trained])
    world_size = config.run.global_batch_size // batch.batch_size
    num_columns = config.objective.num_columns(world_size * len(lengths))
    # logits, and the gradient of each of their two operands
    products = 1 + (images.requires_grad) + (len(features) == 1 or features[-1].requires_grad)
    of_logits = products * 2 * batch.batch_size * num_columns * images.shape[1]
    return float(counter.get_total_flops() + of_logits)


def peak_of_gpu(name: str, compute_type: torch.dtype, *, tf32: bool = False) -> float | None:
    """FLOP/s of a GPU by its name and the type that it computes in; None if unknown.

    `tf32` says whether products of fp32 can be computed in TF32.
    """
    if "MIG" in name or compute_type.itemsize > 4:  # a part of a GPU; fp64
        return None
    for part, (narrow, wide) in _TERAFLOPS.items():
        if re.search(rf"\b{part}(?![0-9A-Za-z])" if part[-1].isalnum() else rf"\b{part}", name):
            if compute_type.itemsize == 2:
                return 1e12 * narrow
            return 1e12 * (narrow / 2 if tf32 and part not in _WITHOUT_TF32 else wide)
    return None
