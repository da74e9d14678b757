"""The moving average of the weights: timm's `ModelEmaV3` over a UniCL model.

It is a function of the weights after each step, and of the step: no random state, nothing read from
the device, equal on all ranks. Parameters and BatchNorm's averages are both averaged, as in timm's
own training script; counters are copied.
"""

from __future__ import annotations

from typing import cast

import torch
from timm.utils import ModelEmaV3

from unicl_fast.config import OptimConfig
from unicl_fast.models.activation_checkpointing import undo_in_copy
from unicl_fast.models.unicl import UniCL


class WeightAverage:
    """Holds a model of its own, in evaluation mode, whose weights follow another's."""

    def __init__(self, model: UniCL, optim: OptimConfig) -> None:
        """Starts with the model's present weights, on its device and in their type and layout.

        Args:
            model: where it will be trained; it may be compiled (the average is not) or recompute
                its activations (the average has none to keep).
            optim: with an ema_decay above 0.
        """
        # timm's own defaults of the warm-up, named here since they decide the result
        self._average = ModelEmaV3(
            model,
            decay=optim.ema_decay,
            use_warmup=optim.ema_warmup,
            warmup_gamma=1.0,
            warmup_power=2 / 3,
        )
        self.model = cast(UniCL, self._average.module)
        self.model.requires_grad_(False)
        undo_in_copy(self.model)

    def update(self, model: UniCL, *, step: int) -> None:
        """Moves towards the model's weights.

        Called after every step, also after one whose update was left out: to know which those are
        would mean to wait for the device, and weights that stayed as they were do no harm.

        Args:
            model: the one given first.
            step: optimizer steps done, this one included; the first gives the model's weights.
        """
        self._average.update(model, step=step)

    @torch.no_grad()
    def start_from(self, model: UniCL) -> None:
        """Takes the model's present weights, where a run resumes that had no average so far."""
        self._average.set(model)
