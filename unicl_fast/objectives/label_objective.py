"""Objectives with labels: several for each image."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Literal, Self

from unicl_fast.objectives.objective import Objective
from unicl_fast.system.wording import count_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LabelObjective(Objective):
    """Images of one class are positives; an image may have several classes."""

    positives: Literal["auto", "text", "labels"] = "auto"
    """Classes of an image: auto, text or labels. text uses the class of the text that it is paired
    with; labels uses all its labels too, even if it is paired with a caption. auto means labels if
    samples have several labels, or labels and captions."""

    def settle(self, num_classes: tuple[int, ...], *, num_several: int) -> Self:
        """Resolves `positives=auto`; logs if it means all labels."""
        if self.positives != "auto":
            return self
        if num_several:
            logger.info(
                "objective.positives: labels, since %s several labels, or labels and captions: a "
                "prompt is a positive of each image that has its label",
                f"{count_of(num_several, 'sample')} {'has' if num_several == 1 else 'have'}",
            )  # fmt: skip
        return dataclasses.replace(self, positives="labels" if num_several else "text")

    @property
    def takes_all_labels(self) -> bool:
        return self.positives == "labels"
