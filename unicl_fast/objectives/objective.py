"""The base of objectives: options, parameters besides the encoders, targets, loss.

The trunk (model, loader, step, trainer, checkpoints) asks an `Objective` and never names one; each
is a file of its own, found by `registry.OBJECTIVES`. docs/objectives.md shows how to add one.

Options are read from these classes, and `--help` must not wait seconds for torch: so the files of
objectives import torch and NumPy inside methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from unicl_fast.objectives.operands import Classes, LossForm, Operands
from unicl_fast.objectives.registry import objective_class
from unicl_fast.system.checked_fields import check_fields, require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from unicl_fast.batch import Batch, Targets
    from unicl_fast.objectives.targets import HostTargets, ImageLabels, PromptLookup


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The base of all objectives; its fields are their options, `objective.NAME`."""

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
    num_views: ClassVar[int] = 1
    """Views of each image in a batch."""
    evaluation: ClassVar[Literal["zero_shot", "accuracy", ""]] = "zero_shot"
    """How data with labels are evaluated: against texts, against learnt rows, or not at all."""
    forms: ClassVar[tuple[LossForm, ...]] = ("auto", "dense", "tiled", "triton")
    """Values of efficiency.loss that it supports; without tiled, logits are stored."""
    takes_levels: ClassVar[bool] = True
    """Whether texts may be classes above the labels (data.prompts=levels)."""

    def __post_init__(self) -> None:
        check_fields(self, name="objective")
        own = type(self).__dataclass_fields__["name"].default
        require(self.name == own, f"objective.name must be {own}, not {self.name!r}")

    @classmethod
    def class_for(cls, values: Any) -> type[Any]:
        """The class of an objective by its options as JSON has them; this one if they name none."""
        own = cls.__dataclass_fields__["name"].default
        if isinstance(values, dict) and "name" in values:
            return objective_class(values["name"])
        return objective_class(own) if isinstance(own, str) else objective_class()

    @property
    def takes_all_labels(self) -> bool:
        """Whether an image counts with all its labels, also if it is shown with a caption."""
        return False

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are blended, two by two."""
        return False

    def settle(self, num_classes: tuple[int, ...], *, num_several: int) -> Objective:
        """Fills in the options that depend on the data.

        `num_classes` has a number for each label space. `num_several` samples may be shown with the
        text of one class while they have others: another label, or a label besides a caption.

        Raises:
            ValueError: the options say something else.
        """
        return self

    def parameters(self, image_width: int) -> dict[str, nn.Parameter]:
        """Parameters besides encoders and projections, by the names that checkpoints keep."""
        return {}

    def limit(self, learnt: Mapping[str, Tensor]) -> None:
        """Keeps the parameters in their range; called without gradients after each update."""

    def map_targets(
        self,
        rows: NDArray[Any],
        labels: NDArray[np.int64],
        prompts: PromptLookup | None,
        *,
        size: int,
        all_labels: Callable[[], ImageLabels],
    ) -> list[HostTargets]:
        """TargetM for consecutive local batches of `size` samples, on the host.

        Arguments are as in `targets.map_steps`; `all_labels` gathers the labels of all images.
        """
        from unicl_fast.objectives.targets import map_steps

        labels_of_images = all_labels() if self.takes_all_labels else None
        return map_steps(rows, labels, prompts, size=size, image_labels=labels_of_images)

    def check_targets(self, targets: Targets) -> None:
        """Refuses (ValueError) targets of a loader that were made for another objective."""
        if (targets.image_classes is None) == self.takes_all_labels:
            found = "none" if targets.image_classes is None else "some"
            raise ValueError(
                f"the loader's batches have {found} of Targets.image_classes, and these options of "
                f"objective.name={self.name} take {'all' if self.takes_all_labels else 'none'}: "
                "collate makes them of image_labels"
            )

    def check_local_batch(self, batch_size: int) -> None:
        """Refuses (ValueError) a number of images on each rank that the objective cannot handle."""

    def mix(
        self,
        images: Tensor,
        classes: Classes,
        batch: Batch,
        *,
        seed: int,
        global_batch_size: int,
    ) -> tuple[Tensor, Classes]:
        """Changes this rank's normalised images [b c h w] and their classes before encoding."""
        return images, classes

    def num_columns(self, *, num_images: int, num_texts: int) -> int:
        """The number of texts, rows or views that an image is compared with, for estimates."""
        return num_texts

    def loss(self, operands: Operands) -> Tensor:
        """The loss of the global batch, a scalar equal on all ranks.

        Its gradient with respect to a rank's own features is exact, so that gradients of the
        parameters are to be summed over ranks.
        """
        raise NotImplementedError
