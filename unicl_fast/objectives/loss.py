"""The unified contrastive loss: a pure function of features and class ids.

Yang et al., "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022: equations 2 and 3,
averaged over the batch and both directions as in Algorithm 1, which `reference_loss` spells out.
Training calls `unified_contrastive_loss`, which gives the same number; docs/loss.md says how it
saves memory and time. It knows nothing of ranks: `all_reduce` completes the columns of a rank's
images.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.objectives.loss_tiled import TiledStatistics, Tiles, TorchTiles
from unicl_fast.objectives.operands import LossForm
from unicl_fast.objectives.positives import Membership, find_positives
from unicl_fast.system.gpu_kernels import fault_in_trial, obstacle_to_triton

logger = logging.getLogger(__name__)

# Logits (b u) from which "auto" stores none. Below, the dense form is at least as fast, and small.
# The CPU's number is measured, the GPU's only modelled; docs/loss.md.
_SMALLEST_TILED = {"cpu": 1 << 20, "cuda": 1 << 22}
_OLDEST_FOR_TRITON = (8, 0)  # A100 and later have the matrix instructions it needs
TRIAL = "unicl_fast.objectives.loss_trial"


def reference_loss(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "n d"],
    class_ids: Int[Tensor, " n"],
    scale: Float[Tensor, ""] | float,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """The definition for n samples with one text each: equations 2 and 3 of the paper.

    With x_i and v_k the features of images and texts, s the scale, and P(i) the samples of i's
    class, by `class_ids` from TargetM (`targets.map_targets`):

        L_i2t = 1/n sum_i -1/|P(i)| sum_{k in P(i)} log( exp(s x_i.v_k) / sum_j exp(s x_i.v_j) )
        L_t2i = the same with images and texts exchanged
        L     = (L_i2t + L_t2i) / 2

    With `weights` w_i of the samples, the mean 1/n sum_i becomes sum_i w_i / sum_j w_j, in both
    directions; other samples, as negatives or positives, count as without.

    Training calls `unified_contrastive_loss`, which a test compares with this on a real step.
    """
    logits = scale * image_features @ text_features.T
    positives = (class_ids[:, None] == class_ids[None, :]).to(logits.dtype)
    targets = positives / positives.sum(dim=1, keepdim=True)  # for texts too, by symmetry
    of_images, of_texts = (
        F.cross_entropy(one, targets, reduction="none") for one in (logits, logits.T)
    )
    weights = torch.ones_like(of_images) if weights is None else weights
    return (weights * (of_images + of_texts)).sum() / (2 * weights.sum())


class LogitStatistics(NamedTuple):
    """Statistics of each row (image) or column (text) of logits, enough to compute its loss.

    To merge statistics of the same texts over disjoint sets of images, take the log-sum-exp of
    `log_sum_exp` and add the others.
    """

    log_sum_exp: Float[Tensor, " n"]
    """log of the sum of exp(logit)."""
    positive_sum: Float[Tensor, " n"]
    """Weighted sum of the logits of its positives."""
    positive_weight: Float[Tensor, " n"]
    """Sum of the weights of its positives: their number if each sample has one label."""

    def losses(self) -> Float[Tensor, " n"]:
        """The loss of each row or column; 0 without a positive."""
        has_positive = self.positive_weight > 0
        mean = self.positive_sum / torch.where(has_positive, self.positive_weight, 1)
        return torch.where(has_positive, self.log_sum_exp - mean, 0)


AllReduce = Callable[[LogitStatistics | None, Tensor], tuple[LogitStatistics | None, Tensor]]
"""Maps this rank's column statistics (None if only rows count) and its images' mean loss to those
over the images of all ranks."""


def one_rank(
    columns: LogitStatistics | None, mean_loss: Tensor
) -> tuple[LogitStatistics | None, Tensor]:
    """The `AllReduce` of a single process."""
    return columns, mean_loss


def unified_contrastive_loss(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "u d"],
    class_ids: Int[Tensor, " b"] | Membership,
    scale: Float[Tensor, ""] | float,
    *,
    text_class_ids: Int[Tensor, " u"] | None = None,
    text_counts: Int[Tensor, " u"] | None = None,
    weights: tuple[Float[Tensor, " b"], Float[Tensor, " u"]] | None = None,
    directions: Literal["both", "i2t", "t2i"] = "both",
    form: LossForm = "auto",
    all_reduce: AllReduce = one_rank,
) -> Float[Tensor, ""]:
    """The loss of images against texts; equal class ids are positives.

    Special cases: all classes distinct is CLIP's InfoNCE; one learnt row for each class as text
    features with `directions="i2t"` is cross-entropy.

    Args:
        image_features: of unit norm.
        text_features: of unit norm, the distinct texts.
        class_ids: any int64; or a `Membership`, for several labels an image. Text k is then a
            positive of image i with the weight of its class among i's labels, each row's weights
            divided by their sum.
        scale: factor of the products, exp(logit_scale).
        text_class_ids: None means `class_ids`, one text for each image; not for a `Membership`.
        text_counts: how many samples have each text; None means 1. A text of count 0 has no
            effect.
        weights: positive weights w_i of images and v_k of texts, v_k the sum over the samples of
            text k on all ranks; None means equal ones. With the losses l of rows and columns,
            L_i2t = sum_i w_i l_i / sum_i w_i (over all ranks) and
            L_t2i = sum_k v_k l_k / sum_k v_k.
        directions: which of the two terms to compute; "both" is their mean.
        form: "dense" stores the logits [b u]; "tiled" computes them twice in O((b + u) d) memory;
            "triton" does the same by kernels on a CUDA device; "auto" chooses the fastest one for
            the size and the device.
        all_reduce: completes the statistics if the images are divided equally over ranks, and the
            texts are all ranks' texts.

    Returns:
        A scalar, fp64 if features are, else fp32. An image or text without positives contributes
        0. The tiled form rounds products of bf16 features to bf16, as autocast does, and sums in
        fp32: the loss is off by less than 0.1 %, a gradient by 1 % (scale 15) to 3 % (100) of its
        norm. Triton does not round logits, only their gradients.

    Raises:
        ValueError: shapes that do not fit together, or "triton" for features that are not on a
            CUDA device.
        ModuleNotFoundError: "triton" is not installed.
    """
    text_class_ids = check_shapes(
        image_features, text_features, class_ids, text_class_ids, text_counts
    )
    with torch.autocast(image_features.device.type, enabled=False):
        rows, columns = logit_statistics(
            image_features,
            text_features,
            class_ids,
            text_class_ids,
            scale,
            text_counts=text_counts,
            form=form,
            with_columns=directions != "i2t",
        )
        return mean_loss(rows, columns, text_counts, directions, all_reduce, weights)


def mean_loss(
    rows: LogitStatistics,
    columns: LogitStatistics | None,
    text_counts: Tensor | None,
    directions: Literal["both", "i2t", "t2i"],
    all_reduce: AllReduce,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The mean loss over the images and texts of all ranks, from this rank's statistics."""
    row_losses = rows.losses()
    if weights is not None:
        of_images, of_texts = (one.to(row_losses.dtype) for one in weights)
        num_samples = len(of_texts) if text_counts is None else text_counts.sum()
        # the mean of the factors over all ranks is 1
        row_losses = row_losses * (of_images * (num_samples / of_texts.sum()))
        text_counts = of_texts
    complete, i2t = all_reduce(columns, row_losses.mean())
    if complete is None:
        return i2t
    text_losses = complete.losses()
    if text_counts is None:
        t2i = text_losses.mean()
    else:
        t2i = (text_counts * text_losses).sum() / text_counts.sum()
    return t2i if directions == "t2i" else (i2t + t2i) / 2


def stores_logits(form: LossForm, num_logits: int, device_type: str) -> bool:
    """Whether a form stores all logits at once; "auto" does so while they are few."""
    smallest_tiled = _SMALLEST_TILED.get(device_type, _SMALLEST_TILED["cpu"])
    return form == "dense" or (form == "auto" and num_logits < smallest_tiled)


def logit_statistics(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "u d"],
    class_ids: Int[Tensor, " b"] | Membership,
    text_class_ids: Int[Tensor, " u"],
    scale: Float[Tensor, ""] | float,
    *,
    text_counts: Int[Tensor, " u"] | None = None,
    form: LossForm = "auto",
    with_columns: bool = True,
) -> tuple[LogitStatistics, LogitStatistics | None]:
    """Statistics of rows and (if wanted) columns of the logits s x_i.v_k; arguments are checked."""
    b, u = len(image_features), len(text_features)
    if form == "auto":
        form = _fastest_form(b * u, image_features.device, image_features.dtype)
    images, texts, arithmetic = as_operands(image_features, text_features, dense=form == "dense")
    counts = None if text_counts is None else text_counts.to(arithmetic)
    scale = scalar_like(images, scale, arithmetic)
    if form == "dense":
        weights = positive_weights(class_ids, text_class_ids, b, u, arithmetic)
        logits = scale * (images @ texts.T)
        return dense_statistics(logits, weights, counts, with_columns=with_columns)
    positives, transposed = find_positives(class_ids, text_class_ids, b, u, dtype=arithmetic)
    tiles_type = _triton_tiles() if form == "triton" else TorchTiles
    row_logs, row_sums, *of_columns = TiledStatistics.apply(  # type: ignore[no-untyped-call]
        images, texts, scale, counts, positives, transposed, tiles_type, with_columns
    )
    row_weights = positives.times(scale.new_ones(u, 1), counts).squeeze(1)
    rows = LogitStatistics(row_logs, row_sums, row_weights)
    if not with_columns:
        return rows, None
    column_logs, column_sums = of_columns
    column_weights = transposed.times(scale.new_ones(b, 1)).squeeze(1)
    return rows, LogitStatistics(column_logs, column_sums, column_weights)


def as_operands(
    image_features: Tensor, text_features: Tensor, *, dense: bool
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Features in the type of the products, and the type of all other arithmetic."""
    operands = torch.promote_types(image_features.dtype, text_features.dtype)
    arithmetic = torch.promote_types(operands, torch.float32)
    if operands == torch.float16 or dense:
        operands = arithmetic  # gradients of logits underflow in fp16
    return image_features.to(operands), text_features.to(operands), arithmetic


def scalar_like(features: Tensor, value: Tensor | float, dtype: torch.dtype) -> Tensor:
    """A number [0-d] on the features' device; created there, since a copy would block the host."""
    if isinstance(value, Tensor):
        return value.to(features.device, dtype)
    return torch.full((), value, dtype=dtype, device=features.device)


def _fastest_form(num_logits: int, device: torch.device, dtype: torch.dtype) -> LossForm:
    if stores_logits("auto", num_logits, device.type):
        return "dense"
    takes_triton = device.type == "cuda" and _takes_triton(device, dtype)
    return "triton" if takes_triton else "tiled"


@functools.cache
def _takes_triton(device: torch.device, dtype: torch.dtype) -> bool:
    if obstacle_to_triton(device.index, oldest=_OLDEST_FOR_TRITON):
        return False
    if fault := fault_of_triton(device, dtype):
        logger.warning("form=auto: tiles of torch replace Triton's: %s", fault)
    return not fault


def fault_of_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """How Triton's kernels fail on a device, or ""; tried once on a machine, for half a minute."""
    if obstacle_to_triton(device.index, oldest=_OLDEST_FOR_TRITON):
        return ""  # "auto" uses none
    return fault_in_trial(TRIAL, device, str(dtype).removeprefix("torch."))


def _triton_tiles() -> type[Tiles]:
    try:
        from unicl_fast.objectives.loss_triton import TritonTiles
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"form (efficiency.loss) triton needs the package triton ({error}): install it by "
            "`pip install triton`, or use auto, which does without"
        ) from error
    return TritonTiles


def dense_statistics(
    logits: Float[Tensor, "b u"], weights: Tensor, counts: Tensor | None, *, with_columns: bool
) -> tuple[LogitStatistics, LogitStatistics | None]:
    """Statistics of rows and columns from all logits and pair weights [b u]."""
    weighted = weights * logits

    def statistics(logits: Tensor, weights: Tensor, weighted: Tensor, dim: int) -> LogitStatistics:
        return LogitStatistics(
            logits.logsumexp(dim), weighted.sum(dim), weights.sum(dim, dtype=logits.dtype)
        )

    columns = statistics(logits, weights, weighted, dim=0) if with_columns else None
    if counts is not None:
        logits = logits + counts.log()
        weighted, weights = weighted * counts, weights * counts
    return statistics(logits, weights, weighted, dim=1), columns


def positive_weights(
    class_ids: Tensor | Membership, text_class_ids: Tensor, b: int, u: int, dtype: torch.dtype
) -> Tensor:
    """Pair weights [b u]: those of several labels, else bool, a quarter of the memory."""
    if isinstance(class_ids, Tensor):
        return class_ids.unsqueeze(1) == text_class_ids.unsqueeze(0)
    positives, transposed = find_positives(class_ids, text_class_ids, b, u, dtype=dtype)
    # times the smaller identity: there may be many more learnt rows than images
    unit = torch.eye(min(b, u), dtype=dtype, device=text_class_ids.device)
    return positives.times(unit) if u <= b else transposed.times(unit).T


def check_shapes(
    image_features: Tensor,
    text_features: Tensor,
    class_ids: Tensor | Membership,
    text_class_ids: Tensor | None,
    text_counts: Tensor | None,
) -> Tensor:
    """Returns the class ids of texts: the images' if they are None. Raises ValueError."""
    b, u = len(image_features), len(text_features)
    if image_features.ndim != 2 or text_features.ndim != 2 or b == 0 or u == 0:
        raise ValueError(
            "expected features [b d] and [u d] with b and u at least 1, got "
            f"{list(image_features.shape)} and {list(text_features.shape)}"
        )
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            f"image and text features differ in dimension: {image_features.shape[1]} and "
            f"{text_features.shape[1]}"
        )
    if isinstance(class_ids, Membership):
        shapes = [list(field.shape) for field in class_ids]
        if shapes != [shapes[0]] * 3 or len(shapes[0]) != 1 or not shapes[0][0]:
            raise ValueError(
                f"expected samples, labels and weights of a Membership to be [e], got {shapes}"
            )
        if text_class_ids is None:
            raise ValueError("a Membership needs text_class_ids")
    elif class_ids.shape != (b,):
        raise ValueError(f"expected {b} class_ids, one per image, got {list(class_ids.shape)}")
    elif text_class_ids is None:
        text_class_ids = class_ids
    if text_class_ids.shape != (u,):
        raise ValueError(
            f"expected {u} text_class_ids, one per text, got {list(text_class_ids.shape)}; "
            "pass text_class_ids when there are not as many texts as images"
        )
    if text_counts is not None and text_counts.shape != (u,):
        raise ValueError(f"expected {u} text_counts, got {list(text_counts.shape)}")
    return text_class_ids
