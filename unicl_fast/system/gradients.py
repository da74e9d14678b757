"""Autograd functions without a second derivative, which say so."""

import functools
from collections.abc import Callable
from typing import Any

import torch

Gradients = Callable[..., Any]


def first_only(backward: Gradients) -> Gradients:
    """Makes a `backward` refuse (RuntimeError) gradients that are to be differentiated again.

    torch's `once_differentiable` checks the incoming gradient, which is constant behind a mean:
    with `create_graph=True` second derivatives would silently be 0.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "tiled losses and texts of other ranks have no second derivative "
                '(create_graph=True): use form="dense" (efficiency.loss=dense), on one rank'
            )
        return backward(ctx, *gradients)

    return checked
