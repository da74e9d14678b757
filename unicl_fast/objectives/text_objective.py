"""Objectives of images and texts: a learnt scale, and the texts of all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import Meta

from unicl_fast.objectives.objective import Objective
from unicl_fast.system.checked_fields import LARGEST_FLOAT

if TYPE_CHECKING:
    from torch import Tensor, nn

    from unicl_fast.batch import Targets

_ROUNDING = 0.02


@dataclass(frozen=True, kw_only=True)
class TextObjective(Objective):
    """Images against the texts of all ranks; subclasses define the loss."""

    logit_scale_init: Annotated[float, Meta(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT)] = math.log(
        1 / 0.07
    )
    """Initial logarithm of the learnt scale of the logits. CLIP's is ln(1/0.07), SigLIP's ln 10;
    the paper's code starts at 1.0."""
    logit_scale_max: Annotated[float, Meta(ge=-LARGEST_FLOAT)] = math.log(100)
    """Upper limit of the logarithm of the scale; inf for none, as in the paper."""

    def parameters(self, image_width: int) -> dict[str, nn.Parameter]:
        """The logarithm of the scale, [0-d]."""
        import torch

        return {"logit_scale": torch.nn.Parameter(torch.tensor(self.logit_scale_init))}

    def limit(self, learnt: Mapping[str, Tensor]) -> None:
        """Keeps the scale at or below its maximum."""
        learnt["logit_scale"].clamp_(max=self.logit_scale_max)

    def warn_of_limits(self, learnt: Mapping[str, Tensor]) -> Iterator[str]:
        """A phrase for a scale above its maximum by more than bf16 rounds."""
        if (scale := learnt["logit_scale"].item()) > self.logit_scale_max + _ROUNDING:
            yield (
                f"a scale of exp({scale:.4g}), and the first step lowers it to "
                f"exp({self.logit_scale_max:.4g}): --objective.logit-scale-max inf keeps it"
            )


@dataclass(frozen=True, kw_only=True)
class PairObjective(TextObjective):
    """Only equal texts have the same class: labels are ignored."""

    ignores_labels: ClassVar[bool] = True

    def check_targets(self, targets: Targets) -> None:
        """Refuses texts with labels: the loss would make positives of each class."""
        from unicl_fast.objectives.targets import CAPTION_KEYS_START

        super().check_targets(targets)
        if (targets.text_class_ids < CAPTION_KEYS_START).any():
            raise ValueError(
                f"objective.name={self.name}: the loader's samples have classes, and the loss "
                "would treat samples of one class as positives of each other: make batches with "
                "labels of -1 and without prompts, or choose an objective that uses labels"
            )
