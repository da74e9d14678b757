"""Muon (Jordan et al., 2024): the update of a matrix is made orthogonal, all of it equally large.

Torch's and timm's Muon compute in bf16 on every processor. On CPUs without bf16 instructions a step
of the small presets needs 1.4 s with them, and 0.07 s here, in the parameters' own precision.
Elsewhere that costs no more than bf16, since all steps but the last work on the small square X X^T:
a convolution's matrix is nine times as wide.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Coefficients of each Newton-Schulz step, as in modded-nanogpt; also timm's default."""
_MOMENTUM = 0.95  # the decay rate of Muon's (Nesterov) average of the gradient
_SIZE_OF_ADAMW = 0.2
"""Root mean square of AdamW's updates in long runs. Muon's are scaled to it (Liu et al., arXiv
2502.16982), so that learning rates and weight decay mean the same."""


class Muon(torch.optim.AdamW):
    """Muon for groups in which `use_muon` is true, AdamW for the others.

    Parameters with more than two dimensions are matrices of their first dimension by all others.
    `lr` is of AdamW's size; `betas`, `eps` and `fused` are AdamW's, whose other settings are not
    for matrices. Groups can override lr and weight_decay.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, weight_decay=0.0, **settings)
        # the fused AdamW clips, and skips what is not finite, by itself; matrices are not its own
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's expects its own state of all

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters that have gradients."""
        assert closure is None, "Muon evaluates no closure"
        groups = self.param_groups
        for group in groups:
            if group["use_muon"]:
                self._step_muon(group)
        try:
            self.param_groups = [group for group in groups if not group["use_muon"]]
            super().step()
        finally:
            self.param_groups = groups
        return None

    def _step_muon(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if (gradient := parameter.grad) is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            average = state["momentum_buffer"]
            average.lerp_(gradient, 1 - _MOMENTUM)
            update = orthogonalize(gradient.lerp(average, _MOMENTUM).flatten(1))
            size = _SIZE_OF_ADAMW * max(update.shape) ** 0.5
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.view_as(parameter), alpha=-group["lr"] * size)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Moves all singular values of a matrix [rows, columns] to about 1; zeros stay zeros.

    A Newton-Schulz step is X <- (a + b A + c A^2) X with A = X X^T. All factors are polynomials of
    the first A, so their product is computed from A, and multiplies X once. In fp32 or fp64.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.mT).mT
    matrix = matrix / matrix.norm().clamp_min(1e-7)
    first = matrix @ matrix.mT
    product: Tensor | None = None
    for a, b, c in _COEFFICIENTS:
        square = first if product is None else product @ first @ product
        factor = torch.addmm(square, square, square, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
    assert product is not None
    return product @ matrix
