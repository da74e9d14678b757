"""What the graph of a run must hold for the augmentations of its sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from unicl_fast.augmentation import Augmentation

from ..plan.augment import num_stages
from ..plan.policies import Operator, operators_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GraphParts:
    """What the graph of a run must hold for the augmentations of its sources."""

    operators: tuple[Operator, ...]
    """Of policies, in order."""
    stages: int
    twists: bool
    blurs: bool
    erases: bool
    fill: tuple[int, int, int]
    """Levels that an erased rectangle shows."""

    @property
    def is_empty(self) -> bool:
        """Whether images leave the graph as they were resampled."""
        return not (self.stages or self.twists or self.blurs or self.erases)

    @property
    def grey(self) -> int:
        """What a warp shows where there was no image: DALI takes one level for all channels."""
        return (sum(self.fill) + 1) // 3


def parts_for(augmentations: Sequence[Augmentation], mean: Sequence[float]) -> GraphParts:
    """The parts that at least one source uses.

    Args:
        augmentations: of the sources.
        mean: colour, in 0 to 1, of erased rectangles.
    """
    operators: set[Operator] = set()
    for each in augmentations:
        operators |= operators_of(each.policy)
    red, green, blue = (round(255 * min(max(level, 0.0), 1.0)) for level in mean)
    return GraphParts(
        operators=tuple(sorted(operators)),
        stages=num_stages(augmentations),
        twists=any(each.changes_colours for each in augmentations),
        blurs=any(each.blur > 0 for each in augmentations),
        erases=any(each.erase > 0 for each in augmentations),
        fill=(red, green, blue),
    )
