"""The moving average of the weights: timm's `ModelEmaV3` over a UniCL model.

It is a function of the weights after each step, and of the step: no random state, nothing read from
the device, equal on all ranks. Parameters and BatchNorm's averages are both averaged, as in timm's
own training script; counters are copied. It is updated after every step, also after one whose
update was left out: to know which those are would mean to wait for the device, and weights that
stayed as they were do no harm.
"""

from __future__ import annotations

from timm.utils import ModelEmaV3

from unicl_fast.config import OptimConfig
from unicl_fast.models.activation_checkpointing import undo_in_copy
from unicl_fast.models.unicl import UniCL


def build_weight_average(model: UniCL, optim: OptimConfig) -> ModelEmaV3:
    """An average that starts with the model's present weights; its `module` is a `UniCL`.

    Args:
        model: on the device and in the types where it will be trained. It may be compiled (the
            average is not) or recompute its activations (the average has none to keep).
        optim: with an ema_decay above 0.
    """
    # timm's own defaults of the warm-up, named here since they decide the result
    average = ModelEmaV3(
        model,
        decay=optim.ema_decay,
        use_warmup=optim.ema_warmup,
        warmup_gamma=1.0,
        warmup_power=2 / 3,
    )
    average.module.requires_grad_(False)
    undo_in_copy(average.module)
    return average
