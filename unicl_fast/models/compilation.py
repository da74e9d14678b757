"""Encoders compiled by block or as a whole, and windows of Swin attended to by kernels.

Numbers and lengths of texts are rounded up to a few sizes, so that they meet graphs that exist
(docs/architecture.md). Padding tokens come after what is read, and added texts have count 0.
"""

from __future__ import annotations

import logging
import os
import shutil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.config import Compilation, EfficiencyConfig, WindowAttention
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import Ranks, gather_integers, gather_objects
from unicl_fast.models.blocks import KNOWN_BLOCKS, SWIN_BLOCK, find_blocks, has_batch_norm
from unicl_fast.models.precision import Precision
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.gpu_kernels import fault_in_trial, obstacle_to_triton

logger = logging.getLogger(__name__)

_ALONE = Ranks()
_MOST_GRAPHS = 128
_OLDEST_FOR_TRITON = (7, 0)
_OLDEST_FOR_WINDOWS = (8, 0)  # products of bf16


def has_compiler() -> bool:
    """Whether there is the C++ compiler that torch.compile takes: $CXX, or g++."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def settle_compilation(
    efficiency: EfficiencyConfig, model: UniCL, device: torch.device, *, ranks: Ranks = _ALONE
) -> Compilation:
    """Settles `efficiency.compile`: for auto, blocks where all ranks can, on a GPU, or off."""
    if efficiency.compile != "auto":
        return efficiency.compile
    obstacle = _obstacle_to_blocks(model, device)
    return "blocks" if all_can("compile", "blocks", "off", obstacle, device, ranks) else "off"


def all_can(
    switch: str,
    best: str,
    otherwise: str,
    obstacle: str,
    device: torch.device,
    ranks: Ranks,
    *,
    fault: str = "",
) -> bool:
    """Whether no rank has an obstacle to what `auto` would take; says on a GPU what it takes.

    A `fault` is an obstacle that should not be there: the log warns of it.
    """
    can = not any(gather_integers(bool(obstacle or fault), ranks))
    if device.type == "cuda":
        level, reason = logging.INFO, ""
        if not can:
            everyone = gather_objects([obstacle, fault], ranks)
            rank, (obstacle, fault) = next(one for one in enumerate(everyone) if any(one[1]))
            level = logging.WARNING if fault else logging.INFO
            reason = f": {f'rank {rank}: ' if rank else ''}{obstacle or fault}"
        chosen = best if can else otherwise
        logger.log(level, "%s: %s (efficiency.%s=auto)%s", switch, chosen, switch, reason)
    return can


def _obstacle_to_blocks(model: UniCL, device: torch.device) -> str:
    """Says why `auto` compiles nothing; empty where it does."""
    if device.type != "cuda":
        return "a CPU gains nothing"
    if not has_compiler():
        return "no C++ compiler is found"
    if obstacle := obstacle_to_triton(device.index, oldest=_OLDEST_FOR_TRITON):
        return obstacle
    if model.config.efficiency.activation_checkpointing and has_batch_norm(model):
        return "blocks with BatchNorm are recomputed"
    if _has_dora(model):
        return "torch cannot trace the layers of peft's DoRA"
    if not all(map(find_blocks, model.encoders)):
        return "an encoder has no known blocks"
    return ""


def _has_dora(model: UniCL) -> bool:
    adapters = model.config.optim.adapters
    return adapters is not None and adapters.dora


def compile_encoders(model: UniCL, what: Compilation, *, backend: str = "inductor") -> None:
    """Makes encoders, or their blocks, compile themselves at their next calls.

    Names of weights stay the same. Blocks of the same class and sizes share one graph.

    Raises:
        ValueError: no C++ compiler, no blocks that are known, blocks with BatchNorm that are
            recomputed in backward, or DoRA.
    """
    if backend == "inductor" and not has_compiler():
        raise ValueError(
            f"efficiency.compile needs a C++ compiler, and {os.environ.get('CXX', 'g++')} is not "
            "found: install one (for example the package g++ of your distribution), name it in "
            "the environment variable CXX, or set efficiency.compile=off"
        )
    if model.config.efficiency.activation_checkpointing and has_batch_norm(model):
        raise ValueError(
            "efficiency.compile cannot leave BatchNorm's averages alone in recomputed blocks: "
            "take an image encoder without BatchNorm (Swin, ViT, FocalNet), or set "
            "efficiency.activation_checkpointing=False or efficiency.compile=off"
        )
    if _has_dora(model):
        raise ValueError(
            "efficiency.compile cannot trace the layers of peft's DoRA: leave dora out of "
            "optim.lora, or set efficiency.compile=off"
        )
    if what == "encoders":
        for encoder in model.encoders:
            encoder.compile(backend=backend)
        return
    from torch._dynamo import config as dynamo  # takes seconds to import

    # All blocks count as one function: Swin has 8 kinds, each in training and in evaluation, for
    # one size and for any. Beyond torch's limit of 8 graphs the others would silently stay eager.
    dynamo.cache_size_limit = max(dynamo.cache_size_limit, _MOST_GRAPHS)
    # it cuts an encoder into pieces, so that reductions begin before its backward pass ends; blocks
    # are pieces already
    dynamo.optimize_ddp = False
    for encoder in model.encoders:
        blocks = find_blocks(encoder)
        if not blocks:
            raise ValueError(
                f"efficiency.compile=blocks knows the blocks {', '.join(sorted(KNOWN_BLOCKS))}; "
                f"{type(encoder).__name__} has none of them: set efficiency.compile=encoders or "
                "add its block class"
            )
        for block in blocks:
            block.compile(backend=backend)


def settle_window_attention(
    efficiency: EfficiencyConfig, model: UniCL, device: torch.device, *, ranks: Ranks = _ALONE
) -> WindowAttention:
    """Settles `efficiency.window_attention`: for auto, triton where all ranks can, or timm.

    One rank of each machine tries the kernels that `auto` would take.

    Raises:
        SharedRefusal: triton is asked for and cannot work on some rank; all ranks raise it.
    """
    chosen: WindowAttention = efficiency.window_attention
    has_swin_blocks = any(type(one).__name__ == SWIN_BLOCK for one in find_blocks(model))
    if chosen == "timm" or (chosen == "auto" and not has_swin_blocks):
        return "timm"
    obstacle = obstacle_to_window_attention(efficiency, model, device)
    if chosen == "triton":
        with refused_together(ranks):  # the others would wait for a rank that has ended
            refuse_window_attention(obstacle)
        return "triton"
    fault = ""
    if not obstacle and not ranks.local_rank:
        name = str(Precision(efficiency.precision).compute_type).removeprefix("torch.")
        fault = fault_in_trial("unicl_fast.models.window_trial", device, name)
    can = all_can("window_attention", "triton", "timm", obstacle, device, ranks, fault=fault)
    return "triton" if can else "timm"


def refuse_window_attention(obstacle: str) -> None:
    """Raises a ValueError where there is an obstacle to the triton that was asked for."""
    if obstacle:
        raise ValueError(
            f"efficiency.window_attention=triton cannot work here, since {obstacle}: set auto or "
            "timm"
        )


def obstacle_to_window_attention(
    efficiency: EfficiencyConfig, model: UniCL, device: torch.device
) -> str:
    """Says why the kernels cannot compute a model's attention; empty where they can."""
    if device.type != "cuda":
        return "the kernels run on CUDA devices only"
    if efficiency.precision == "fp64":
        return "the kernels do not compute in fp64"
    if obstacle := obstacle_to_triton(device.index, oldest=_OLDEST_FOR_WINDOWS):
        return obstacle
    from unicl_fast.models.window_attention import LARGEST_HEAD, LARGEST_WINDOW, blocks_that_fit

    if not blocks_that_fit(model.image_encoder):
        return (
            f"the model has no block of timm's Swin with windows of at most {LARGEST_WINDOW} "
            f"tokens, heads of at most {LARGEST_HEAD} values and no dropout in its attention"
        )
    return ""


def fuse_window_attention(encoder: nn.Module) -> int:
    """Gives the kernels the attention of all blocks that they can take; returns how many."""
    from unicl_fast.models.window_attention import blocks_that_fit, fuse  # imports triton

    blocks = blocks_that_fit(encoder)
    for block in blocks:
        fuse(block)
    return len(blocks)


def rounds_sizes(efficiency: EfficiencyConfig, device: torch.device) -> bool:
    """Whether numbers and lengths of texts are rounded up.

    Compiled encoders need it. On a GPU eager ones have it too: with a few sizes torch's allocator
    finds freed blocks that fit. On a CPU what is added would be computed for nothing.
    """
    return efficiency.compile in ("blocks", "encoders") or device.type == "cuda"


def round_up_length(length: int) -> int:
    """The next multiple of 8: at most ten lengths for a context of 77."""
    return -(-length // 8) * 8


def round_up_count(count: int) -> int:
    """The next of four sizes an octave (8, 16, 24, 32, 40, 48, 56, 64, 80, ..., 512, 640, ...).

    At most a quarter is added from 32 on. A run whose batches are alike meets one or two sizes.
    """
    step = max(8, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step


def pad_texts(
    tokens: Tensor, num_tokens: int | None, class_ids: Tensor, counts: Tensor
) -> tuple[Tensor, int | None, Tensor, Tensor]:
    """Rounds up how many texts there are, and how many of their tokens are computed.

    Takes and returns tokens int64 [u l], how many of them are computed (None for all), class ids
    int64 [u] and counts int64 [u]; l stays the same, and the texts that are added have count 0.
    """
    added = round_up_count(len(tokens)) - len(tokens)
    tokens = F.pad(tokens, (0, 0, 0, added))
    if num_tokens is not None:  # the encoder reads the first token of an empty row
        num_tokens = min(round_up_count(num_tokens + added), tokens.numel())
    return tokens, num_tokens, F.pad(class_ids, (0, added)), F.pad(counts, (0, added))
