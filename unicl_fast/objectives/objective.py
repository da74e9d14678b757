"""The base of objectives: options, own parameters, targets, loss.

The trunk (model, loader, step, trainer, checkpoints) uses an `Objective` and never names one. Each
has its own file, found by `registry.OBJECTIVES`; docs/objectives.md shows how to add one.

Command lines read their options from these classes before torch is imported, so objectives' files
import torch and NumPy inside methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from unicl_fast.objectives.operands import LossForm, Operands
from unicl_fast.objectives.registry import objective_class
from unicl_fast.system.checked_fields import check_fields, require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from unicl_fast.batch import Targets
    from unicl_fast.objectives.targets import HostTargets, ImageLabels, PromptLookup


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The base of all objectives; its fields are the options `objective.NAME`."""

    name: str
    """Objective, by its name in docs/objectives.md."""

    about: ClassVar[str] = ""
    """A line for the help."""
    uses_texts: ClassVar[bool] = True
    """Images are compared with texts, so the model has a text encoder."""
    has_space: ClassVar[bool] = True
    """Features are projected into a common space and have unit norm."""
    needs_labels: ClassVar[bool] = False
    """Every sample needs a label, and captions are not used."""
    ignores_labels: ClassVar[bool] = False
    """Each distinct text is a class; labels and prompts do not matter."""
    evaluation: ClassVar[Literal["zero_shot", "accuracy"]] = "zero_shot"
    """How labelled data is evaluated: against texts, or against learnt rows."""
    forms: ClassVar[tuple[LossForm, ...]] = ("auto", "dense", "tiled", "triton")
    """Values of efficiency.loss that the loss supports; without tiled, logits are stored."""
    takes_levels: ClassVar[bool] = True
    """Whether texts may be classes above the labels (data.prompts=levels)."""
    takes_weights: ClassVar[bool] = False
    """Whether the loss uses `operands.weights` (data.sample_weights=loss)."""

    def __post_init__(self) -> None:
        check_fields(self, name="objective")
        own = type(self).__dataclass_fields__["name"].default
        require(self.name == own, f"objective.name must be {own}, not {self.name!r}")

    @classmethod
    def class_for(cls, values: Any) -> type[Any]:
        """The class for options from JSON; this class if they name none."""
        own = cls.__dataclass_fields__["name"].default
        if isinstance(values, dict) and "name" in values:
            return objective_class(values["name"])
        return objective_class(own) if isinstance(own, str) else objective_class()

    @property
    def takes_all_labels(self) -> bool:
        """Whether all labels of an image count, even if it is paired with a caption."""
        return False

    def settle(self, num_classes: tuple[int, ...], *, num_several: int) -> Objective:
        """Fills in options from the data; ValueError if they contradict it.

        `num_classes` is for each label space. `num_several` samples have more classes than the one
        of their text: another label, or a label besides a caption.
        """
        return self

    def parameters(self, image_width: int) -> dict[str, nn.Parameter]:
        """Parameters besides encoders and projections, by their names in checkpoints."""
        return {}

    def limit(self, learnt: Mapping[str, Tensor]) -> None:
        """Clamps the parameters; called without gradients after each update."""

    def warn_of_limits(self, learnt: Mapping[str, Tensor]) -> Iterable[str]:
        """A phrase for each of a source's parameters that `limit` will change."""
        return ()

    def map_targets(
        self,
        rows: NDArray[Any],
        labels: NDArray[np.int64],
        prompts: PromptLookup | None,
        *,
        size: int,
        all_labels: Callable[[], ImageLabels],
    ) -> list[HostTargets]:
        """TargetM for consecutive local batches of `size` samples, on the host; see `map_steps`."""
        import numpy as np

        from unicl_fast.objectives.targets import map_steps

        if self.ignores_labels:
            labels, prompts = np.full_like(labels, -1), None
        labels_of_images = all_labels() if self.takes_all_labels else None
        return map_steps(rows, labels, prompts, size=size, image_labels=labels_of_images)

    def check_targets(self, targets: Targets) -> None:
        """Refuses (ValueError) targets that a loader made for another objective."""
        if (targets.image_classes is None) == self.takes_all_labels:
            found = "none" if targets.image_classes is None else "some"
            raise ValueError(
                f"the loader's batches have {found} of Targets.image_classes, and these options of "
                f"objective.name={self.name} take {'all' if self.takes_all_labels else 'none'}: "
                "collate makes them of image_labels"
            )

    def num_columns(self, num_texts: int) -> int:
        """The number of texts or rows that an image is compared with."""
        return num_texts

    def loss(self, operands: Operands) -> Tensor:
        """The loss of the global batch, a scalar equal on all ranks.

        The gradient is exact for a rank's own features, so parameter gradients must be summed over
        ranks.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NoObjective(Objective):
    """The objective of another library's image encoder by itself, which no run trains."""

    name: str = "none"
    uses_texts: ClassVar[bool] = False
