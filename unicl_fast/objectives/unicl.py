"""UniCL (Yang et al., CVPR 2022), and CLIP (arXiv 2103.00020): a class for each text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from unicl_fast.objectives.label_objective import LabelObjective
from unicl_fast.objectives.text_objective import PairObjective, TextObjective

if TYPE_CHECKING:
    from torch import Tensor

    from unicl_fast.objectives.operands import Operands


class _Softmax:
    takes_weights: ClassVar[bool] = True

    def loss(self, operands: Operands) -> Tensor:
        """Equations 2 and 3 of the paper, over the images and texts of all ranks."""
        from unicl_fast.objectives.loss import unified_contrastive_loss
        from unicl_fast.objectives.text_columns import all_reduce_over

        assert operands.texts is not None
        return unified_contrastive_loss(
            operands.images,
            operands.texts.features,
            operands.classes,
            operands.learnt["logit_scale"].exp(),
            text_class_ids=operands.texts.class_ids,
            text_counts=operands.texts.counts,
            weights=operands.weights,
            form=operands.form,
            all_reduce=all_reduce_over(operands.ranks),
        )


@dataclass(frozen=True, kw_only=True)
class UniCLObjective(_Softmax, LabelObjective, TextObjective):
    """Images and texts of one class are positives of each other."""

    name: str = "unicl"
    about: ClassVar[str] = "images and texts of one class are positives (UniCL)"


@dataclass(frozen=True, kw_only=True)
class CLIPObjective(_Softmax, PairObjective):
    """An image is a positive of its own text and of equal ones."""

    name: str = "clip"
    about: ClassVar[str] = "an image and its own text are positives; labels are ignored (CLIP)"
