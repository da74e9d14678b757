"""The loss of the global batch, from each rank's local batch and a model.

    encode  this rank's distinct texts, then its images
    gather  the texts of all ranks, with gradient, while images are encoded, whose features are not
            sent
    loss    `unified_contrastive_loss`, whose column statistics are all-reduced

The other objectives are the same loss with other operands: for SupCon the texts are the images
themselves, seen twice; for cross-entropy they are one learnt row for each class, and nothing is
gathered. For CLIP it is the same call: whoever makes the batch gives each text a class of its own.
Under the sigmoid form images and texts go to `sigmoid_contrastive_loss`, which needs nothing of
other ranks' images. docs/objectives.md.

Every rank ends with the same scalar. Its gradient with respect to a rank's own features is exact,
so summing parameter gradients over ranks gives the gradient of one process on the joined batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicl_fast.batch import Batch
from unicl_fast.config import LossForm, TrainConfig
from unicl_fast.distributed.ranks import (
    PendingMaximum,
    Ranks,
    RowsInFlight,
    gather_rows,
    max_over_ranks,
    sum_over_ranks,
)
from unicl_fast.models.efficiency import pad_texts, round_up_length, rounds_sizes
from unicl_fast.models.precision import Precision, normalise_images
from unicl_fast.models.sharding import divides_all
from unicl_fast.models.unicl import Encoded
from unicl_fast.objectives.loss import (
    AllReduce,
    LogitStatistics,
    one_rank,
    sigmoid_contrastive_loss,
    unified_contrastive_loss,
)
from unicl_fast.objectives.mixup import mix
from unicl_fast.objectives.positives import Membership
from unicl_fast.text.prompts import LABEL_BITS
from unicl_fast.training.step_clock import Part

Encode = Callable[..., Encoded]
"""The model, or its DDP wrapper: from images and, where there are texts, tokens and how many of
them to compute."""


def encoder_autocast(
    config: TrainConfig, ranks: Ranks, device_type: str
) -> contextlib.AbstractContextManager[object]:
    """The context in which encoders run in training."""
    # where ranks divide the blocks, the cache would keep a whole copy in 16 bits of every block
    # until the end of the forward pass
    cache_enabled = not divides_all(config, ranks)
    return Precision(config.efficiency.precision).autocast(device_type, cache_enabled=cache_enabled)


def global_loss(
    encode: Encode,
    batch: Batch,
    config: TrainConfig,
    ranks: Ranks,
    *,
    begin: Callable[[Part], None] = lambda part: None,
) -> Tensor:
    """The loss of the global batch under `objective.name`: a scalar, equal on all ranks.

    `begin` is called when the encoders are done.
    """
    objective = config.objective
    images = encoder_input(shown_images(batch), config)
    class_ids = classes_of_images(batch)
    if objective.mixes:
        images, class_ids = mix(images, batch, config)
    columns, encode_both = None, encode
    if objective.has_texts:
        tokens, num_tokens, text_class_ids, text_counts = texts_to_encode(batch, config)
        if objective.mixes:
            # equal texts have other labels now, and are columns of their own
            rows = batch.text_index if config.efficiency.unique_texts else None
            columns = TextColumns(class_ids, torch.ones_like(batch.class_ids), ranks, rows=rows)
        else:
            columns = TextColumns(text_class_ids, text_counts, ranks)
        encode_both = functools.partial(
            encode, tokens=tokens, num_tokens=num_tokens, after_texts=columns.send
        )
    with encoder_autocast(config, ranks, batch.images.device.type):
        image_features, contrast_features, scale, bias = encode_both(images)
    begin("loss")
    form = config.efficiency.loss
    if columns is not None:
        return columns.contrast(
            image_features,
            contrast_features,
            class_ids=class_ids,
            scale=scale,
            bias=bias,
            form=form,
        )
    one_direction = functools.partial(
        unified_contrastive_loss, directions="i2t", form=form, all_reduce=all_reduce_over(ranks)
    )
    if objective.name == "ce":  # the learnt rows, which all ranks have
        return one_direction(
            image_features,
            contrast_features,
            _rows_of_classes(class_ids, objective.num_classes),
            scale,
            text_class_ids=torch.arange(len(contrast_features), device=images.device),
        )
    # SupCon: Khosla et al., arXiv 2004.11362, L_out
    view_ids = batch.class_ids.repeat(2)
    # a rank's own views first, so that the pair of a view with itself is (i, i) on every rank
    shift = -ranks.rank * len(view_ids)
    # every view is a row and a column, so one direction is the mean of both
    return one_direction(
        image_features,
        gather_rows(contrast_features, ranks).roll(shift, 0),
        view_ids,
        scale,
        text_class_ids=gather_rows(view_ids, ranks).roll(shift, 0),
        exclude_self=True,
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


def classes_of_images(batch: Batch) -> Int[Tensor, " b"] | Membership:
    """The class of each image, or all its classes where it has several.

    Texts keep the one class that they have, so other ranks need to know nothing more.
    """
    if batch.image_classes is None:
        return batch.class_ids
    samples, labels = batch.image_classes
    return Membership(samples, labels, torch.ones_like(labels, dtype=torch.float64))


def encoder_input(images: Tensor, config: TrainConfig) -> Tensor:
    """Turns decoded images uint8 [b h w c] into the image encoder's input: normalised [b c h w].

    Stored features [b w] stay as they are.
    """
    if images.ndim == 2:
        return images
    data, channels_last = config.data, config.efficiency.channels_last
    dtype = Precision(config.efficiency.precision).compute_type
    return normalise_images(
        images, mean=data.mean, std=data.std, dtype=dtype, channels_last=channels_last
    )


def texts_to_encode(batch: Batch, config: TrainConfig) -> tuple[Tensor, int | None, Tensor, Tensor]:
    """Selects the texts to encode, as `efficiency` says.

    Returns:
        Token rows [u l]; the number of their tokens to compute, None for all with the padding;
        class ids [u] and counts [u] of the texts. `rounds_sizes` says where sizes are rounded up.
    """
    efficiency = config.efficiency
    tokens = batch.tokens
    rounds = rounds_sizes(config, tokens.device)
    if efficiency.text_layout != "padded":
        longest = int(batch.text_lengths.max())
        tokens = tokens[:, : round_up_length(longest) if rounds else longest]
    if not efficiency.unique_texts:
        class_ids = batch.class_ids
        return tokens[batch.text_index], None, class_ids, torch.ones_like(class_ids)
    num_tokens = int(batch.text_lengths.sum()) if efficiency.text_layout == "packed" else None
    texts = tokens, num_tokens, batch.text_class_ids, batch.text_counts
    return pad_texts(*texts) if rounds else texts


class TextColumns:
    """The texts of all ranks, which are the columns of the loss of UniCL and CLIP.

    They are sent as soon as they are encoded, and arrive while images are encoded. Ranks have
    different numbers of texts, and pad them to the largest with texts of count 0: so all ranks
    send and compute the same shapes.
    """

    def __init__(
        self,
        class_ids: Int[Tensor, " u"] | Membership,
        counts: Int[Tensor, " u"],
        ranks: Ranks,
        *,
        rows: Int[Tensor, " u"] | None = None,
    ) -> None:
        """Tells the other ranks how many texts this one has; all ranks come here together.

        Args:
            class_ids: the class of each text. A `Membership` has as many entries on each rank.
            counts: how many samples have each text.
            ranks: the ranks of the run.
            rows: which rows of the encoded texts to take; None means all.
        """
        self._class_ids, self._counts, self._ranks, self._rows = class_ids, counts, ranks, rows
        self._num_texts = PendingMaximum(len(counts), ranks)
        self._features = RowsInFlight(ranks)
        self._tables: list[tuple[RowsInFlight, Tensor]] = []

    def send(self, text_features: Float[Tensor, "u d"]) -> Float[Tensor, "n d"]:
        """Begins to send this rank's texts; those of all, which it returns, are for `contrast`."""
        if self._rows is not None:
            text_features = text_features[self._rows]
        if self._ranks.world_size == 1:
            return text_features
        num_texts = self._num_texts.wait()
        gathered = self._features.send(text_features, num_rows=num_texts)
        if isinstance(self._class_ids, Membership):
            samples, labels, weights = self._class_ids
            first = self._ranks.rank * num_texts  # samples are numbered as in the joined batch
            self._send_table(torch.stack([samples + first, labels], dim=1), len(samples))
            self._send_table(weights, len(samples))
            self._send_table(self._counts, num_texts)
        else:
            self._send_table(torch.stack([self._class_ids, self._counts], dim=1), num_texts)
        return gathered

    def _send_table(self, rows: Tensor, num_rows: int) -> None:
        in_flight = RowsInFlight(self._ranks)
        self._tables.append((in_flight, in_flight.send(rows, num_rows=num_rows)))

    def contrast(
        self,
        image_features: Float[Tensor, "b d"],
        text_features: Float[Tensor, "n d"],
        *,
        class_ids: Int[Tensor, " b"] | Membership,
        scale: Tensor,
        bias: Tensor | None = None,
        form: LossForm = "auto",
    ) -> Float[Tensor, ""]:
        """The loss of this rank's images against what `send` returned: equal on all ranks.

        A bias asks for the sigmoid form.
        """
        text_class_ids, text_counts = self._receive_tables()
        texts = self._features.receive(text_features)
        loss = unified_contrastive_loss
        if bias is not None:
            # texts have several classes where images are mixed, and nowhere else
            mixed = isinstance(self._class_ids, Membership)
            loss = functools.partial(sigmoid_contrastive_loss, bias=bias, cosines=mixed)
        return loss(
            image_features,
            texts,
            class_ids,
            scale,
            text_class_ids=text_class_ids,
            text_counts=text_counts,
            form=form,
            all_reduce=all_reduce_over(self._ranks),
        )

    def _receive_tables(self) -> tuple[Tensor | Membership, Tensor]:
        """Classes and counts of all ranks' texts."""
        if self._ranks.world_size == 1:
            return self._class_ids, self._counts
        tables = [in_flight.receive(table) for in_flight, table in self._tables]
        if isinstance(self._class_ids, Membership):
            entries, weights, counts = tables
            samples, labels = entries.T.contiguous()
            return Membership(samples, labels, weights), counts
        class_ids, counts = tables[0].T.contiguous()
        return class_ids, counts


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
