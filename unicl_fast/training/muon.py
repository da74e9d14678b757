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
from torch.optim.adamw import adamw

_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Coefficients of each Newton-Schulz step, as in modded-nanogpt; also timm's default."""
_SIZE_OF_ADAMW = 0.2
"""Root mean square of AdamW's updates in long runs. Muon's are scaled to it (Liu et al., arXiv
2502.16982), so that learning rates and weight decay mean the same."""


class Muon(torch.optim.Optimizer):
    """Muon for groups in which `use_muon` is true, AdamW for the others.

    Parameters with more than two dimensions are matrices of their first dimension by all others.
    `lr` is of AdamW's size; `betas`, `eps` and `fused` are AdamW's; `momentum` is the decay rate of
    Muon's (Nesterov) average of the gradient. Groups can override lr and weight_decay.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        fused: bool | None = None,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "fused": fused}
        super().__init__(groups, {**settings, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters that have gradients."""
        assert closure is None, "Muon evaluates no closure"
        for group in self.param_groups:
            parameters = [one for one in group["params"] if one.grad is not None]
            if parameters:
                (self._step_muon if group["use_muon"] else self._step_adamw)(group, parameters)
        return None

    def _step_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            gradient, average = parameter.grad, state["momentum_buffer"]
            assert gradient is not None
            average.lerp_(gradient, 1 - momentum)
            update = orthogonalize(gradient.lerp(average, momentum).flatten(1))
            size = _SIZE_OF_ADAMW * max(update.shape) ** 0.5
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(update.view_as(parameter), alpha=-lr * size)

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device if group["fused"] else None),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[one] for one in parameters]
        adamw(
            parameters,
            [one.grad for one in parameters if one.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


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
