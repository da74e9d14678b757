"""One step's forward half: a batch and a model to the loss of the global batch.

    encode  this rank's pictures and distinct texts
    gather  the texts of all ranks, with gradient; pictures stay where they are
    loss    this rank's rows are complete; column statistics are merged over ranks

Every rank ends with the same scalar. Its gradient with respect to a rank's own features is exact,
so summing parameter gradients over ranks gives the gradient of one process on the joined batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from unicl_fast.batch import Batch
from unicl_fast.compilation import pad_texts, round_up_length
from unicl_fast.config import LossForm, TrainConfig
from unicl_fast.dist import Ranks, gather_integers, gather_rows, max_over_ranks, sum_over_ranks
from unicl_fast.loss import Statistics, compare, losses
from unicl_fast.precision import Precision, normalise_images

Encode = Callable[[Tensor, Tensor, int | None], tuple[Tensor, Tensor, Tensor]]


def global_loss(encode: Encode, batch: Batch, config: TrainConfig, ranks: Ranks) -> Tensor:
    """The unified contrastive loss of the global batch.

    Args:
        encode: the model (or its DDP wrapper): pictures, tokens and how many of them to compute,
            to features and scale.
        batch: this rank's share, on the model's device.
        config: the run's settings.
        ranks: this process among its peers.

    Returns:
        A scalar, equal on all ranks.
    """
    precision = Precision(config.efficiency.precision)
    images = encoder_input(batch.images, config)
    tokens, num_tokens, text_class_ids, text_counts = texts_to_encode(batch, config)
    with precision.autocast(batch.images.device.type):
        image_features, text_features, scale = encode(images, tokens, num_tokens)
    return contrast_over_ranks(
        image_features,
        text_features,
        class_ids=batch.class_ids,
        text_class_ids=text_class_ids,
        text_counts=text_counts,
        scale=scale,
        ranks=ranks,
        form=config.efficiency.loss,
    )


def encoder_input(images: Tensor, config: TrainConfig) -> Tensor:
    """Decoded pictures uint8 [b h w c] as the image encoder takes them: normalised [b c h w]."""
    return normalise_images(
        images,
        mean=config.data.mean,
        std=config.data.std,
        dtype=Precision(config.efficiency.precision).compute_type,
        channels_last=config.efficiency.channels_last,
    )


def texts_to_encode(batch: Batch, config: TrainConfig) -> tuple[Tensor, int | None, Tensor, Tensor]:
    """What to encode, as `efficiency` wants it.

    Returns:
        Token rows [u l]; how many of their tokens to compute, None for all with the padding; class
        ids [u] and counts [u] of the texts. Where encoders are compiled, sizes are rounded up.
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
    class_ids: Tensor,
    text_class_ids: Tensor,
    text_counts: Tensor,
    scale: Tensor,
    ranks: Ranks,
    form: LossForm = "auto",
) -> Float[Tensor, ""]:
    """`unified_contrastive_loss` of the features of all ranks, each logit computed once."""
    sizes = gather_integers(len(text_features), ranks)
    text_features = gather_rows(text_features, sizes)
    text_class_ids = gather_rows(text_class_ids, sizes)
    text_counts = gather_rows(text_counts, sizes)
    with torch.autocast(image_features.device.type, enabled=False):
        rows, mine = compare(
            image_features, text_features, class_ids, text_class_ids, text_counts, scale, form=form
        )
        columns = _merge_over_ranks(mine, ranks)
        num_samples = text_counts.sum()
        i2t = sum_over_ranks(losses(rows).sum(), ranks) / num_samples
        t2i = (text_counts * losses(columns)).sum() / num_samples
    return (i2t + t2i) / 2


def _merge_over_ranks(mine: Statistics, ranks: Ranks) -> Statistics:
    """What all ranks' pictures together say about the texts: two all-reduces of a few [u]."""
    if ranks.world_size == 1:
        return mine
    maximum = max_over_ranks(mine.log_sum_exp.detach(), ranks)
    exp_sum, positive_sum, positive_weight = sum_over_ranks(
        torch.stack([(mine.log_sum_exp - maximum).exp(), mine.positive_sum, mine.positive_weight]),
        ranks,
    )
    return Statistics(maximum + exp_sum.log(), positive_sum, positive_weight)
