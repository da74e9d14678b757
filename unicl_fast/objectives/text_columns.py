"""The texts of all ranks: the columns of an image-text loss.

They are sent as soon as they are encoded, and arrive while images are encoded. Ranks pad their
texts to the largest number with texts of count 0, so that all send and compute the same shapes.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from unicl_fast.batch import Batch
from unicl_fast.distributed.ranks import (
    PendingMaximum,
    Ranks,
    RowsInFlight,
    max_over_ranks,
    sum_over_ranks,
)
from unicl_fast.distributed.signals import Interrupted
from unicl_fast.objectives.loss import AllReduce, LogitStatistics, one_rank
from unicl_fast.objectives.operands import Classes, Columns


class TextColumns:
    """Exchanges this rank's texts with all ranks."""

    def __init__(self, classes: Classes, ranks: Ranks) -> None:
        """Starts exchanging the number of texts, if unknown; a collective call."""
        assert classes.texts is not None
        assert classes.counts is not None
        self._class_ids, self._counts = classes.texts, classes.counts
        self._weights = classes.text_weights
        if self._weights is not None:  # 0 for padded texts, here or between micro-batches
            is_text = self._counts > 0
            self._weights = torch.where(is_text, self._weights[is_text.cumsum(0) - 1], 0)
        self._ranks = ranks
        self._max_num_texts = classes.max_num_texts or PendingMaximum(len(self._counts), ranks).wait
        self._features = RowsInFlight(ranks)
        self._tables: list[tuple[RowsInFlight, Tensor]] = []

    def send(self, text_features: Float[Tensor, "u d"]) -> Float[Tensor, "n d"]:
        """Starts sending this rank's texts; returns all ranks' texts, to be passed to `receive`."""
        if self._ranks.world_size == 1:
            return text_features
        num_texts = self._max_num_texts()
        gathered = self._features.send(text_features, num_rows=num_texts)
        self._send_table(torch.stack([self._class_ids, self._counts], dim=1), num_texts)
        if self._weights is not None:
            self._send_table(self._weights, num_texts)
        return gathered

    def receive(self, text_features: Float[Tensor, "n d"]) -> Columns:
        """Waits for the texts that `send` returned, and for their classes, counts and weights."""
        return Columns(self._features.receive(text_features), *self._receive_tables())

    def _send_table(self, rows: Tensor, num_rows: int) -> None:
        in_flight = RowsInFlight(self._ranks)
        self._tables.append((in_flight, in_flight.send(rows, num_rows=num_rows)))

    def _receive_tables(self) -> tuple[Tensor, Tensor, Tensor | None]:
        if self._ranks.world_size == 1:
            return self._class_ids, self._counts, self._weights
        tables = [in_flight.receive(table) for in_flight, table in self._tables]
        text_weights = None if self._weights is None else tables.pop()
        class_ids, counts = tables[0].T.contiguous()
        return class_ids, counts, text_weights


@contextlib.contextmanager
def asked_ahead(batches: Iterator[Batch], ranks: Ranks) -> Iterator[Iterator[Batch]]:
    """Draws each batch a step early, and starts exchanging how many texts each rank has.

    The answer is there when the step needs it. All ranks must draw the same number of batches.
    """
    if ranks.world_size == 1:
        yield batches
        return
    asked = PendingMaximum(0, Ranks())

    def ask(batch: Batch | None) -> Batch | None:
        nonlocal asked
        if batch is None:
            return None
        asked = PendingMaximum(len(batch.texts.tokens), ranks)
        texts = dataclasses.replace(batch.texts, max_num_texts=asked.wait)
        return dataclasses.replace(batch, texts=texts)

    def each() -> Iterator[Batch]:
        coming = ask(next(batches, None))
        while coming is not None:
            batch, coming = coming, ask(next(batches, None))
            yield batch
            del batch  # before the batch after the next is drawn

    try:
        yield each()
    except Interrupted:
        asked.wait()  # all ranks have asked; none may leave before the answer
        raise


def all_reduce_over(ranks: Ranks) -> AllReduce:
    """Completes the loss's statistics over ranks that hold disjoint images and the same texts.

    Two all-reduces: of maxima [u], so that no exponential overflows, and of sums [3 u + 1], which
    include the images' mean loss.
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
