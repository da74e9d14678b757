"""The loss of the global batch, from each rank's local batch and a model.

    encode  this rank's images and distinct texts
    gather  the texts of all ranks, with gradient; images stay where they are
    loss    `unified_contrastive_loss`, whose column statistics are all-reduced

The other objectives are the same loss with other operands: for SupCon the texts are the images
themselves, seen twice; for cross-entropy they are one learnt row for each class, and nothing is
gathered. For CLIP it is the same call: whoever makes the batch gives each text a class of its own.
docs/objectives.md.

Every rank ends with the same scalar. Its gradient with respect to a rank's own features is exact,
so summing parameter gradients over ranks gives the gradient of one process on the joined batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicl_fast.batch import Batch
from unicl_fast.config import LossForm, TrainConfig
from unicl_fast.distributed.ranks import (
    Ranks,
    gather_integers,
    gather_rows,
    max_over_ranks,
    sum_over_ranks,
)
from unicl_fast.models.efficiency import pad_texts, round_up_length
from unicl_fast.models.precision import Precision, normalise_images
from unicl_fast.objectives.loss import (
    AllReduce,
    LogitStatistics,
    one_rank,
    unified_contrastive_loss,
)
from unicl_fast.objectives.mixup import mix
from unicl_fast.objectives.positives import Membership
from unicl_fast.text.prompts import LABEL_BITS

Encode = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""The model, or its DDP wrapper: from images and, where there are texts, tokens and how many of
them to compute, to image features, the features they are contrasted with, and the scale."""


def global_loss(encode: Encode, batch: Batch, config: TrainConfig, ranks: Ranks) -> Tensor:
    """The loss of the global batch under `objective.name`: a scalar, equal on all ranks."""
    objective = config.objective
    images = encoder_input(shown_images(batch), config)
    class_ids: Tensor | Membership = batch.class_ids
    if objective.mixes:
        images, class_ids = mix(images, batch, config)
    inputs: tuple[Tensor, int | None] | tuple[()] = ()
    if objective.has_texts:
        tokens, num_tokens, text_class_ids, text_counts = texts_to_encode(batch, config)
        inputs = tokens, num_tokens
    with Precision(config.efficiency.precision).autocast(batch.images.device.type):
        image_features, contrast_features, scale = encode(images, *inputs)
    one_direction = functools.partial(
        unified_contrastive_loss,
        directions="i2t",
        form=config.efficiency.loss,
        all_reduce=all_reduce_over(ranks),
    )
    if objective.name == "ce":  # the learnt rows, which all ranks have
        return one_direction(
            image_features,
            contrast_features,
            _rows_of_classes(class_ids, objective.num_classes),
            scale,
            text_class_ids=torch.arange(len(contrast_features), device=images.device),
        )
    if objective.name == "supcon":  # Khosla et al., arXiv 2004.11362, L_out
        view_ids = batch.class_ids.repeat(2)
        sizes = [len(view_ids)] * ranks.world_size
        # a rank's own views first, so that the pair of a view with itself is (i, i) on every rank
        shift = -ranks.rank * len(view_ids)
        # every view is a row and a column, so one direction is the mean of both
        return one_direction(
            image_features,
            gather_rows(contrast_features, sizes).roll(shift, 0),
            view_ids,
            scale,
            text_class_ids=gather_rows(view_ids, sizes).roll(shift, 0),
            exclude_self=True,
        )
    column_ids: Tensor | Membership = text_class_ids
    if isinstance(class_ids, Membership):
        # equal texts have other labels now, and are columns of their own
        unique = config.efficiency.unique_texts
        contrast_features = contrast_features[batch.text_index if unique else ...]
        column_ids, text_counts = class_ids, torch.ones_like(batch.class_ids)
    return contrast_over_ranks(
        image_features,
        contrast_features,
        class_ids=class_ids,
        text_class_ids=column_ids,
        text_counts=text_counts,
        scale=scale,
        ranks=ranks,
        form=config.efficiency.loss,
    )


def shown_images(batch: Batch) -> Tensor:
    """uint8 [b h w c], or [2b h w c] where there are two views: all first ones, then the others."""
    if batch.second_images is None:
        return batch.images
    return torch.cat([batch.images, batch.second_images])


def shown_indices(batch: Batch, *, global_batch_size: int) -> Int[Tensor, " b"]:
    """Global index of each of `shown_images`; second views come after all first views."""
    if batch.second_images is None:
        return batch.global_index
    return torch.cat([batch.global_index, batch.global_index + global_batch_size])


def encoder_input(images: Tensor, config: TrainConfig) -> Tensor:
    """Turns decoded images uint8 [b h w c] into the image encoder's input: normalised [b c h w]."""
    data, channels_last = config.data, config.efficiency.channels_last
    dtype = Precision(config.efficiency.precision).compute_type
    return normalise_images(
        images, mean=data.mean, std=data.std, dtype=dtype, channels_last=channels_last
    )


def texts_to_encode(batch: Batch, config: TrainConfig) -> tuple[Tensor, int | None, Tensor, Tensor]:
    """Selects the texts to encode, as `efficiency` says.

    Returns:
        Token rows [u l]; the number of their tokens to compute, None for all with the padding;
        class ids [u] and counts [u] of the texts. For compiled encoders sizes are rounded up.
    """
    efficiency = config.efficiency
    tokens = batch.tokens
    if efficiency.text_layout != "padded":
        longest = int(batch.text_lengths.max())
        tokens = tokens[:, : round_up_length(longest) if efficiency.compile else longest]
    if not efficiency.unique_texts:
        class_ids = batch.class_ids
        return tokens[batch.text_index], None, class_ids, torch.ones_like(class_ids)
    num_tokens = int(batch.text_lengths.sum()) if efficiency.text_layout == "packed" else None
    texts = tokens, num_tokens, batch.text_class_ids, batch.text_counts
    return pad_texts(*texts) if efficiency.compile else texts


def contrast_over_ranks(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "u d"],
    *,
    class_ids: Tensor | Membership,
    text_class_ids: Tensor | Membership,
    text_counts: Tensor,
    scale: Tensor,
    ranks: Ranks,
    form: LossForm = "auto",
) -> Float[Tensor, ""]:
    """UniCL and CLIP: this rank's images against all ranks' texts, each logit computed once."""
    sizes = gather_integers(len(text_features), ranks)
    text_features = gather_rows(text_features, sizes)
    if isinstance(text_class_ids, Membership):
        text_class_ids = _gather_membership(text_class_ids, sizes, ranks)
        text_counts = gather_rows(text_counts, sizes)
    else:
        both = torch.stack([text_class_ids, text_counts], dim=1)
        text_class_ids, text_counts = gather_rows(both, sizes).T.contiguous()
    return unified_contrastive_loss(
        image_features,
        text_features,
        class_ids,
        scale,
        text_class_ids=text_class_ids,
        text_counts=text_counts,
        form=form,
        all_reduce=all_reduce_over(ranks),
    )


def all_reduce_over(ranks: Ranks) -> AllReduce:
    """Completes the loss's statistics over ranks that hold disjoint images and the same texts.

    Two all-reduces: of maxima [u], so that no exponential overflows, and of sums [3 u + 1], with
    the images' mean loss among them.
    """
    if ranks.world_size == 1:
        return one_rank

    def all_reduce(
        columns: LogitStatistics | None, mean_loss: Tensor
    ) -> tuple[LogitStatistics | None, Tensor]:
        mean_loss = mean_loss / ranks.world_size
        if columns is None:
            return None, sum_over_ranks(mean_loss, ranks)
        maximum = max_over_ranks(columns.log_sum_exp.detach(), ranks)
        parts = (columns.log_sum_exp - maximum).exp(), columns.positive_sum, columns.positive_weight
        sums = sum_over_ranks(torch.cat([*parts, mean_loss.reshape(1)]), ranks)
        exp_sum, positive_sum, positive_weight = sums[:-1].view(3, -1)
        return LogitStatistics(maximum + exp_sum.log(), positive_sum, positive_weight), sums[-1]

    return all_reduce


def _rows_of_classes(
    class_ids: Tensor | Membership, num_classes: tuple[int, ...]
) -> Tensor | Membership:
    """Maps class ids (see `ClassPrompts`) to rows of the classifier."""
    if isinstance(class_ids, Membership):
        labels = _rows_of_classes(class_ids.labels, num_classes)
        assert isinstance(labels, Tensor)
        return class_ids._replace(labels=labels)
    row = class_ids & ((1 << LABEL_BITS) - 1)
    start = 0
    for source, count in enumerate(num_classes[:-1], start=1):
        start += count
        row = torch.where(class_ids >> LABEL_BITS == source, row + start, row)
    return row


def _gather_membership(membership: Membership, sizes: list[int], ranks: Ranks) -> Membership:
    """Joins the entries of all ranks; samples are numbered as in the joined batch."""
    samples, labels, weights = membership
    entries = gather_integers(len(samples), ranks)
    return Membership(
        gather_rows(samples + sum(sizes[: ranks.rank]), entries),
        gather_rows(labels, entries),
        gather_rows(weights, entries),
    )
