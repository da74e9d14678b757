"""Cross-entropy: UniCL's image-to-text loss with one learnt row for each class as texts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from msgspec import Meta

from unicl_fast.objectives.label_objective import LabelObjective
from unicl_fast.system.checked_fields import require

if TYPE_CHECKING:
    from torch import Tensor, nn

    from unicl_fast.objectives.operands import Operands
    from unicl_fast.objectives.positives import Membership


@dataclass(frozen=True, kw_only=True)
class CrossEntropyObjective(LabelObjective):
    """A linear classifier on the image encoder's features, without texts."""

    name: str = "ce"
    num_classes: tuple[Annotated[int, Meta(ge=0, le=2**24)], ...] = ()
    """Learnt rows for each data set; empty for the data's number of classes."""

    about: ClassVar[str] = "cross-entropy over a learnt row for each class, without texts"
    uses_texts: ClassVar[bool] = False
    has_space: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    evaluation: ClassVar[Literal["zero_shot", "accuracy"]] = "accuracy"
    takes_levels: ClassVar[bool] = False

    def settle(self, num_classes: tuple[int, ...], *, num_several: int) -> CrossEntropyObjective:
        """Sets the number of rows to the data's number of classes."""
        require(
            self.num_classes in ((), num_classes),
            f"objective.num_classes is {self.num_classes}, but the data has {num_classes}: leave "
            "it empty, or make the class lists equal",
        )
        settled = super().settle(num_classes, num_several=num_several)
        return dataclasses.replace(settled, num_classes=num_classes)

    def parameters(self, image_width: int) -> dict[str, nn.Parameter]:
        """`class_rows` [k width + 1]; the last column holds the biases."""
        import torch

        require(
            sum(self.num_classes) > 0,
            "objective.num_classes: cross-entropy needs classes, and there are none",
        )
        rows = torch.empty(sum(self.num_classes), image_width + 1)
        torch.nn.init.trunc_normal_(rows, std=0.02)
        torch.nn.init.zeros_(rows[:, -1])
        return {"class_rows": torch.nn.Parameter(rows)}

    def num_columns(self, num_texts: int) -> int:
        return sum(self.num_classes)

    def loss(self, operands: Operands) -> Tensor:
        import torch
        from torch.nn import functional as F

        from unicl_fast.objectives.loss import unified_contrastive_loss
        from unicl_fast.objectives.text_columns import all_reduce_over

        rows = operands.learnt["class_rows"]
        return unified_contrastive_loss(
            F.pad(operands.images, (0, 1), value=1.0),  # for the biases
            rows,
            _rows_of_classes(operands.classes, self.num_classes),
            1.0,
            text_class_ids=torch.arange(len(rows), device=rows.device),
            directions="i2t",
            form=operands.form,
            all_reduce=all_reduce_over(operands.ranks),
        )


def _rows_of_classes(
    class_ids: Tensor | Membership, num_classes: tuple[int, ...]
) -> Tensor | Membership:
    """Maps class ids (see `ClassPrompts`) to rows of the classifier."""
    import torch

    from unicl_fast.objectives.positives import Membership
    from unicl_fast.text.prompts import LABEL_BITS

    if isinstance(class_ids, Membership):
        labels = _rows_of_classes(class_ids.labels, num_classes)
        assert isinstance(labels, torch.Tensor)
        return class_ids._replace(labels=labels)
    row = class_ids & ((1 << LABEL_BITS) - 1)
    start = 0
    for source, count in enumerate(num_classes[:-1], start=1):
        start += count
        row = torch.where(class_ids >> LABEL_BITS == source, row + start, row)
    return row
