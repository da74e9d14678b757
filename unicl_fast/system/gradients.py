"""Functions of autograd that know no second derivative, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Gradients = Callable[..., Any]


def first_only(backward: Gradients) -> Gradients:
    """Has a `backward` refuse (RuntimeError) gradients that are to be differentiated again.

    torch's `once_differentiable` looks at what comes in, which is constant behind a mean: with
    `create_graph=True` gradients then pass for constants, and second derivatives are silently 0.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "tiled losses and texts of other ranks have no second derivative "
                '(create_graph=True): take form="dense" (efficiency.loss=dense), on one rank'
            )
        return backward(ctx, *gradients)

    return checked
