"""The encoders through torch.compile, and texts in few shapes, so that it seldom recompiles.

Images come in few shapes, but distinct texts in another shape at every step. Rounded up to a few
sizes they meet graphs that exist; the first change of a size makes torch compile once more, for any
value of it. What is added does not count: padding tokens come after what is read, and a text of
count 0 is as if it were not there.
"""

from __future__ import annotations

import os
import shutil

from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from unicl_fast.models.unicl import UniCL


def has_compiler() -> bool:
    """Whether there is the C++ compiler that torch.compile takes: $CXX, or g++."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def compile_encoders(model: UniCL, *, backend: str = "inductor") -> None:
    """Makes both encoders compile themselves at their next calls; names of weights stay the same.

    Raises:
        ValueError: no C++ compiler, or blocks with BatchNorm that are recomputed in backward.
    """
    if backend == "inductor" and not has_compiler():
        raise ValueError(
            f"efficiency.compile needs a C++ compiler, and {os.environ.get('CXX', 'g++')} is not "
            "found: install one (for example the package g++ of your distribution), name it in "
            "the environment variable CXX, or set efficiency.compile=False"
        )
    checkpointed = model.config.efficiency.activation_checkpointing
    if checkpointed and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ValueError(
            "efficiency.compile cannot leave BatchNorm's averages alone in recomputed blocks: "
            "take an image encoder without BatchNorm (Swin, ViT, FocalNet), or set "
            "efficiency.activation_checkpointing=False or efficiency.compile=False"
        )
    for encoder in model.encoders:
        encoder.compile(backend=backend)


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
    """Rounds up how many texts [u] there are, and how many tokens are computed.

    Args:
        tokens: int64 [u l]; l stays the same.
        num_tokens: how many of them are not padding; None where all are computed.
        class_ids: int64 [u].
        counts: int64 [u].

    Returns:
        The same four, for more texts: the last rows are padding of count 0.
    """
    added = round_up_count(len(tokens)) - len(tokens)
    tokens = F.pad(tokens, (0, 0, 0, added))
    if num_tokens is not None:  # the encoder reads the first token of an empty row
        num_tokens = min(round_up_count(num_tokens + added), tokens.numel())
    return tokens, num_tokens, F.pad(class_ids, (0, added)), F.pad(counts, (0, added))
