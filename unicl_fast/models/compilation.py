"""Compiles the encoders' blocks, and chooses Triton kernels for Swin's window attention.

Text counts and lengths are rounded up to a few sizes, to reuse compiled graphs
(docs/architecture.md). Padding follows the end-of-text token, and added texts have count 0.
"""

import dataclasses
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.config import Compilation, EfficiencyConfig, TrainConfig, WindowAttention
from unicl_fast.config_json import config_to_dict
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import Ranks, gather_integers, gather_objects
from unicl_fast.models.blocks import KNOWN_BLOCKS, SWIN_BLOCK, find_blocks, has_batch_norm
from unicl_fast.models.precision import Precision
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.checked_fields import require
from unicl_fast.system.gpu_kernels import fault_in_trial, obstacle_to_triton
from unicl_fast.system.version import __version__

logger = logging.getLogger(__name__)

_ALONE = Ranks()
_MOST_GRAPHS = 128
_OLDEST_FOR_TRITON = (7, 0)
_OF_BLOCKS = ("precision", "activation_checkpointing", "window_attention")
_OLDEST_FOR_WINDOWS = (8, 0)  # bf16 tensor cores


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler: $CXX, or g++."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def settle_compilation(
    efficiency: EfficiencyConfig, model: UniCL, device: torch.device, *, ranks: Ranks = _ALONE
) -> Compilation:
    """Resolves `efficiency.compile=auto`: blocks if all ranks have a GPU that can, else off.

    One rank of each machine tries the compiled blocks first, with the `efficiency` of the run.
    """
    if efficiency.compile != "auto":
        return efficiency.compile
    config = dataclasses.replace(model.config, efficiency=efficiency)
    obstacle = _obstacle_to_blocks(model, device)
    trial = functools.partial(_fault_of_blocks, config, device)
    can = all_can("compile", "blocks", "off", obstacle, device, ranks, trial=trial)
    return "blocks" if can else "off"


def all_can(
    switch: str,
    best: str,
    otherwise: str,
    obstacle: str,
    device: torch.device,
    ranks: Ranks,
    *,
    trial: Callable[[], str],
) -> bool:
    """Whether no rank has an obstacle to `best`; logs it on a GPU, as a warning for a fault.

    One rank of each machine without an obstacle calls `trial`, which returns a fault or "".
    """
    fault = "" if obstacle or ranks.local_rank else trial()
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
    """Why `auto` does not compile; empty if it does."""
    if device.type != "cuda":
        return "a CPU gains nothing"
    if not has_compiler():
        return "no C++ compiler is found"
    if obstacle := obstacle_to_triton(device.index, oldest=_OLDEST_FOR_TRITON):
        return obstacle
    if model.config.efficiency.activation_checkpointing and has_batch_norm(model):
        return "blocks with BatchNorm are recomputed"
    if not all(map(find_blocks, model.encoders)):
        return "an encoder has no known blocks"
    return ""


def _fault_of_blocks(config: TrainConfig, device: torch.device) -> str:
    """How a compiled block of a config's encoders fails its trial; empty if none does."""
    values, size = config_to_dict(config), config.data.image_size
    kept = {"optim": ("freeze", "lora"), "efficiency": _OF_BLOCKS}
    settings = {group: {name: values[group][name] for name in kept[group]} for group in kept}
    settings |= {group: values[group] for group in ("model", "objective")}
    settings["data"] = {"image_size": size, "evaluation_resize": size}
    arguments = config.efficiency.precision, json.dumps(settings), __version__, timm.__version__
    return fault_in_trial("unicl_fast.training.block_trial", device, *arguments)


def compile_blocks(model: UniCL, *, backend: str = "inductor") -> None:
    """Makes the encoders' blocks compile at their next call; weight names stay the same.

    Raises ValueError without a C++ compiler or known blocks, and for blocks with BatchNorm under
    activation checkpointing.
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
            "choose an image encoder without BatchNorm (Swin, ViT, FocalNet), or set "
            "efficiency.activation_checkpointing=False or efficiency.compile=off"
        )
    from torch._dynamo import config as dynamo  # takes seconds to import

    # All blocks count as one function: Swin has 8 kinds, each in training and in evaluation, for
    # one size and for any. Beyond torch's limit of 8 graphs the rest would silently stay eager.
    dynamo.cache_size_limit = max(dynamo.cache_size_limit, _MOST_GRAPHS)
    # it splits an encoder's graph to overlap reductions with backward; blocks are split already
    dynamo.optimize_ddp = False
    for encoder in model.encoders:
        blocks = find_blocks(encoder)
        if not blocks:
            raise ValueError(
                f"efficiency.compile=blocks knows the blocks {', '.join(sorted(KNOWN_BLOCKS))}; "
                f"{type(encoder).__name__} has none of them: set efficiency.compile=off or "
                "add its block class"
            )
        for block in blocks:
            block.compile(backend=backend)


def settle_window_attention(
    efficiency: EfficiencyConfig, model: UniCL, device: torch.device, *, ranks: Ranks = _ALONE
) -> WindowAttention:
    """Resolves `efficiency.window_attention=auto`: triton if all ranks can, else timm.

    One rank of each machine tries the kernels first. If triton was requested and some rank cannot
    run it, all ranks raise SharedRefusal.
    """
    chosen: WindowAttention = efficiency.window_attention
    has_swin_blocks = any(type(one).__name__ == SWIN_BLOCK for one in find_blocks(model))
    if chosen == "timm" or (chosen == "auto" and not has_swin_blocks):
        return "timm"
    obstacle = _obstacle_to_window_attention(efficiency, model, device)
    if chosen == "triton":
        with refused_together(ranks):  # the others would wait for a rank that has exited
            require(
                not obstacle,
                f"efficiency.window_attention=triton cannot work here, since {obstacle}: set auto "
                "or timm",
            )
        return "triton"
    name = str(Precision(efficiency.precision).compute_type).removeprefix("torch.")

    def trial() -> str:
        return fault_in_trial("unicl_fast.models.window_trial", device, name)

    can = all_can("window_attention", "triton", "timm", obstacle, device, ranks, trial=trial)
    return "triton" if can else "timm"


def _obstacle_to_window_attention(
    efficiency: EfficiencyConfig, model: UniCL, device: torch.device
) -> str:
    """Why the kernels cannot compute a model's attention; empty if they can."""
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
    """Switches all blocks that fit to the kernels; returns how many."""
    from unicl_fast.models.window_attention import blocks_that_fit, fuse  # imports triton

    blocks = blocks_that_fit(encoder)
    for block in blocks:
        fuse(block)
    return len(blocks)


def rounds_sizes(efficiency: EfficiencyConfig, device: torch.device) -> bool:
    """Whether numbers and lengths of texts are rounded up.

    Compiled blocks need it. Eager ones on a GPU benefit: with few sizes, torch's allocator finds
    freed blocks that fit. On a CPU the padding would only cost time.
    """
    return efficiency.compile == "blocks" or device.type == "cuda"


def round_up_length(length: int) -> int:
    """The next multiple of 8: at most ten lengths for a context of 77."""
    return -(-length // 8) * 8


def round_up_count(count: int) -> int:
    """The next of four sizes an octave: 8, 16, 24, 32, 40, 48, 56, 64, 80, ..., 512, 640, ..."""
    step = max(8, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step


def pad_texts(
    tokens: Tensor, num_tokens: int | None, class_ids: Tensor, counts: Tensor
) -> tuple[Tensor, int | None, Tensor, Tensor]:
    """Rounds up the number of texts, and how many of their tokens are computed.

    Accepts and returns tokens int64 [u l], how many of them are computed (None for all), class ids
    int64 [u] and counts int64 [u]. l does not change; added texts have count 0.
    """
    added = round_up_count(len(tokens)) - len(tokens)
    tokens = F.pad(tokens, (0, 0, 0, added))
    if num_tokens is not None:  # the encoder reads the first token of an empty row
        num_tokens = min(round_up_count(num_tokens + added), tokens.numel())
    return tokens, num_tokens, F.pad(class_ids, (0, added)), F.pad(counts, (0, added))
