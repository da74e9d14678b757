"""Supervised contrastive learning: two views of each image against all others, by label.

Khosla et al., arXiv 2004.11362, L_out with a fixed temperature. It is UniCL's loss with all ranks'
views as texts, without each view's pair with itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from unicl_fast.objectives.objective import Objective
from unicl_fast.system.checked_fields import Positive

if TYPE_CHECKING:
    from torch import Tensor

    from unicl_fast.objectives.operands import Operands


@dataclass(frozen=True, kw_only=True)
class SupConObjective(Objective):
    """Views of images of one class are positives of each other."""

    name: str = "supcon"
    temperature: Positive = 0.1
    """Divisor of the feature products."""

    about: ClassVar[str] = "two views of each image against all others, by label (SupCon)"
    uses_texts: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    num_views: ClassVar[int] = 2
    evaluation: ClassVar[Literal["zero_shot", "accuracy", ""]] = ""

    def num_columns(self, *, num_images: int, num_texts: int) -> int:
        return 2 * num_images

    def loss(self, operands: Operands) -> Tensor:
        """The loss of this rank's views [2b d]: all first views, then all second ones."""
        from unicl_fast.distributed.ranks import gather_rows
        from unicl_fast.objectives.loss import unified_contrastive_loss
        from unicl_fast.objectives.positives import Membership
        from unicl_fast.objectives.text_columns import all_reduce_over

        assert not isinstance(operands.classes, Membership)
        view_ids = operands.classes.repeat(2)
        # a rank's own views first, so that a view's pair with itself is (i, i) on every rank
        shift = -operands.ranks.rank * len(view_ids)
        # every view is a row and a column, so one direction is the mean of both
        return unified_contrastive_loss(
            operands.images,
            gather_rows(operands.images, operands.ranks).roll(shift, 0),
            view_ids,
            1 / self.temperature,
            text_class_ids=gather_rows(view_ids, operands.ranks).roll(shift, 0),
            exclude_self=True,
            directions="i2t",
            form=operands.form,
            all_reduce=all_reduce_over(operands.ranks),
        )
