"""Averages of two models of one architecture, as WiSE-FT takes them before and after fine-tuning.

Wortsman et al., arXiv 2109.01903: between the two lie models that are better on both data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unicl_fast.models.unicl import UniCL
from unicl_fast.system.wording import first_difference, shorten

_ARCHITECTURE = (
    "image_encoder", "text_width", "text_layers", "text_heads", "text_activation", "text_causal",
    "text_pool", "text_norm_eps", "embed_dim", "context_length",
)  # fmt: skip
_PREPROCESSING = ("evaluation_resize", "image_size", "interpolation", "mean", "std")


def averaged_weights(first: UniCL, second: UniCL, alpha: float) -> dict[str, Tensor]:
    """Weights and buffers between those of two models: (1 - alpha) first + alpha second, in fp32.

    At 0 and 1 they are one model's own. What is not made of fractions is the first one's.

    Raises:
        ValueError: the models differ in their architecture or preprocessing; shows the difference.
    """
    refuse_another_architecture(first, second)
    others = second.state_dict()
    return {
        name: torch.lerp(one.float(), others[name].float(), alpha)
        if one.is_floating_point()
        else one
        for name, one in first.state_dict().items()
    }


def refuse_another_architecture(first: UniCL, second: UniCL) -> None:
    """Refuses models whose weights do not stand for the same things; raises ValueError."""
    ours, theirs = map(_describe, (first, second))
    differences = [
        f"{name} is {shorten(ours.get(name, 'not there'))} in the first and "
        f"{shorten(theirs.get(name, 'not there'))} in the second"
        for name in ours | theirs
        if ours.get(name) != theirs.get(name)
    ]
    if differences:
        raise ValueError(
            f"the models cannot be averaged: {first_difference(differences)}; take two of one "
            "architecture and preprocessing"
        )


def _describe(model: UniCL) -> dict[str, Any]:
    """Describes what two models must have in common, settings before tensors."""
    settings = {name: getattr(model.config.model, name) for name in _ARCHITECTURE}
    settings |= {name: getattr(model.config.data, name) for name in _PREPROCESSING}
    tensors = model.state_dict().items()
    return settings | {f"tensor {name}": list(one.shape) for name, one in tensors}
