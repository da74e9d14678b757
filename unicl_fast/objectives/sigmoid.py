"""SigLIP's form of UniCL's and CLIP's objectives (Zhai et al., arXiv 2303.15343)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import Meta

from unicl_fast.objectives.label_objective import LabelObjective
from unicl_fast.objectives.operands import LossForm
from unicl_fast.objectives.text_objective import PairObjective, TextObjective
from unicl_fast.system.checked_fields import LARGEST_FLOAT

if TYPE_CHECKING:
    from torch import Tensor, nn

    from unicl_fast.objectives.operands import Operands

_BIAS_INIT = -10.0  # as SigLIP: all pairs start as negatives, which nearly all are


@dataclass(frozen=True, kw_only=True)
class _Sigmoid(TextObjective):
    """A binary question for each image-text pair."""

    logit_scale_init: Annotated[float, Meta(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT)] = math.log(10)
    forms: ClassVar[tuple[LossForm, ...]] = ("auto", "dense", "tiled")

    def parameters(self, image_width: int) -> dict[str, nn.Parameter]:
        """The logarithm of the scale, and the bias of the logits, [0-d] each."""
        import torch

        bias = torch.nn.Parameter(torch.tensor(_BIAS_INIT))
        return {**super().parameters(image_width), "logit_bias": bias}

    def loss(self, operands: Operands) -> Tensor:
        """The cross-entropy of all pairs of this rank's images and all texts."""
        from unicl_fast.objectives.loss_sigmoid import sigmoid_contrastive_loss
        from unicl_fast.objectives.text_columns import all_reduce_over

        assert operands.texts is not None
        return sigmoid_contrastive_loss(
            operands.images,
            operands.texts.features,
            operands.classes,
            operands.learnt["logit_scale"].exp(),
            operands.learnt["logit_bias"],
            text_class_ids=operands.texts.class_ids,
            text_counts=operands.texts.counts,
            form=operands.form,
            all_reduce=all_reduce_over(operands.ranks),
        )


@dataclass(frozen=True, kw_only=True)
class SigmoidObjective(LabelObjective, _Sigmoid):
    """UniCL's positives under the sigmoid form."""

    name: str = "sigmoid"
    about: ClassVar[str] = "unicl's positives, each pair separately by a sigmoid"


@dataclass(frozen=True, kw_only=True)
class SigLIPObjective(_Sigmoid, PairObjective):
    """CLIP's positives under the sigmoid form."""

    name: str = "siglip"
    about: ClassVar[str] = "clip's positives, each pair separately by a sigmoid (SigLIP)"
