"""Operands of a loss: features, classes, and the parameters of the objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from unicl_fast.distributed.ranks import Ranks
    from unicl_fast.objectives.positives import Membership

LossForm = Literal["auto", "dense", "tiled", "triton"]


class Encoded(NamedTuple):
    """The features of a local batch."""

    images: Tensor
    """[b d], of unit norm unless the objective uses raw encoder features."""
    texts: Tensor | None
    """[u d], of unit norm: this rank's distinct texts, or all ranks' once gathered; or None."""
    learnt: Mapping[str, Tensor]
    """The objective's own parameters, by name."""


class Classes(NamedTuple):
    """The classes of a local batch, which determine positives."""

    images: Tensor | Membership
    """The class of each image, int64 [b], or all its classes."""
    texts: Tensor | None
    """The class of each text, int64 [u]; None without texts."""
    counts: Tensor | None
    """int64 [u]: how many samples have each text; None without texts."""
    max_num_texts: Callable[[], int] | None = None
    """The largest u of all ranks, if they have exchanged it ahead."""
    weights: Tensor | None = None
    """The weight of each image in the loss, [b]; None if all are equal."""
    text_weights: Tensor | None = None
    """The sum of the weights of each text's images, without padded texts."""


class Columns(NamedTuple):
    """The texts of all ranks."""

    features: Tensor
    """[n d], of unit norm."""
    class_ids: Tensor
    """int64 [n]."""
    counts: Tensor
    """int64 [n]: how many samples have each text; 0 for padding."""
    weights: Tensor | None = None
    """[n]: the sum of these samples' weights; None if all samples' are equal."""


class Operands(NamedTuple):
    """The inputs of a loss on one rank."""

    images: Tensor
    """Features of this rank's images [b d]."""
    texts: Columns | None
    """None without texts."""
    classes: Tensor | Membership
    """The class of each image, int64 [b], or all its classes."""
    learnt: Mapping[str, Tensor]
    """The objective's own parameters, by name."""
    form: LossForm
    """The loss's form, as in `loss.unified_contrastive_loss`."""
    ranks: Ranks
    """Each rank has equally many images of the batch, and the same texts."""
    weights: tuple[Tensor, Tensor] | None = None
    """Weights of this rank's images [b] and of all texts [n]; None if all samples' are equal."""
