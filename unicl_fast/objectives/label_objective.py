"""Objectives with labels: several for each image, and mixed images."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from unicl_fast.objectives.objective import Objective
from unicl_fast.objectives.operands import Classes
from unicl_fast.system.checked_fields import NonNegative, require
from unicl_fast.system.wording import count_of

if TYPE_CHECKING:
    from torch import Tensor

    from unicl_fast.batch import Batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LabelObjective(Objective):
    """Images of one class are positives; an image may have several classes."""

    positives: Literal["auto", "text", "labels"] = "auto"
    """Classes of an image: auto, text or labels. text uses the class of the text that it is paired
    with; labels uses all its labels too, even if it is paired with a caption. auto means labels if
    samples have several labels, or labels and captions, and nothing is mixed."""
    mixup: NonNegative = 0.0
    """Alpha of mixup between labelled images; 0 disables it. Pairs are mixed with lambda from
    Beta(mixup, mixup)."""

    def __post_init__(self) -> None:
        Objective.__post_init__(self)
        require(
            self.positives != "labels" or not self.mixes,
            "objective.positives=labels cannot be used with objective.mixup, which mixes one label "
            "an image: set objective.positives=text, or objective.mixup=0",
        )

    def settle(self, num_classes: tuple[int, ...], *, num_several: int) -> Self:
        """Resolves `positives=auto`; logs if it means all labels."""
        if self.positives != "auto":
            return self
        takes_all = num_several > 0 and not self.mixes
        if takes_all:
            logger.info(
                "objective.positives: labels, since %s several labels, or labels and captions: a "
                "prompt is a positive of each image that has its label",
                f"{count_of(num_several, 'sample')} {'has' if num_several == 1 else 'have'}",
            )  # fmt: skip
        return dataclasses.replace(self, positives="labels" if takes_all else "text")

    @property
    def takes_all_labels(self) -> bool:
        return self.positives == "labels"

    @property
    def mixes(self) -> bool:
        return self.mixup > 0

    def check_local_batch(self, batch_size: int) -> None:
        """Refuses an odd number of images on a rank, which would split a pair."""
        require(
            not self.mixes or batch_size % 2 == 0,
            f"objective.mixup mixes images two by two, and a rank has {batch_size} of them: make "
            "run.global_batch_size an even multiple of the number of ranks",
        )

    def mix(
        self, images: Tensor, classes: Classes, batch: Batch, *, seed: int, global_batch_size: int
    ) -> tuple[Tensor, Classes]:
        """Mixes neighbours and their labels; each image then has a text of its own."""
        if not self.mixes:
            return images, classes
        import torch

        from unicl_fast.objectives.mixup import draw_lambdas, mix

        pairs = global_batch_size // 2
        lambdas = draw_lambdas(self.mixup, seed=seed, step=batch.step, num_pairs=pairs)
        images, labels = mix(images, batch, lambdas)
        if classes.texts is None:
            return images, classes._replace(images=labels)
        counts = torch.ones_like(batch.targets.class_ids)
        return images, Classes(labels, labels, counts, rows=batch.texts.index)
