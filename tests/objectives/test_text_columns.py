"""Ranks know a step ahead how many texts each of them has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fake_ranks import fake_ranks
from small_runs import labelled_batch

from unicl_fast.batch import Batch, Texts
from unicl_fast.config import EfficiencyConfig
from unicl_fast.distributed.ranks import PendingMaximum, Ranks
from unicl_fast.distributed.signals import Interrupted
from unicl_fast.objectives import text_columns
from unicl_fast.objectives.text_columns import asked_ahead
from unicl_fast.training import encoding, micro_batches
from unicl_fast.training.encoding import max_num_texts, texts_to_encode
from unicl_fast.training.micro_batches import _texts_in_pieces

TWO = Ranks(world_size=2)


def some_batches(count: int) -> Iterator[Batch]:
    batch = labelled_batch(torch.zeros(12, 32, 32, 3, dtype=torch.uint8), objective="unicl")
    return (dataclasses.replace(batch, step=step) for step in range(count))


class Asked:
    """In place of `PendingMaximum`: remembers questions, and which of them were waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.questions = 0
        self.answered: list[int] = []
        monkeypatch.setattr(text_columns, "PendingMaximum", self.ask)

    def ask(self, value: int, ranks: Ranks) -> Asked:
        self.questions += ranks.world_size > 1
        return self

    def wait(self) -> int:
        self.answered.append(self.questions)
        return 7


def test_the_next_batch_is_asked_about_before_this_one_is_handed_over(monkeypatch):
    asked = Asked(monkeypatch)
    with asked_ahead(some_batches(3), TWO) as batches:
        seen = [(batch.step, asked.questions) for batch in batches]
    assert seen == [(0, 2), (1, 3), (2, 3)]
    assert asked.answered == []


def test_a_rank_that_stops_waits_for_its_question_and_one_that_fails_does_not(monkeypatch):
    asked = Asked(monkeypatch)

    def leave(error: type[Exception]) -> None:
        with asked_ahead(some_batches(3), TWO) as batches:
            next(batches)
            raise error

    for error in (Interrupted, OSError):
        with pytest.raises(error):
            leave(error)
    assert asked.answered == [2]


def test_a_rank_of_one_asks_nothing():
    with asked_ahead(some_batches(2), Ranks()) as batches:
        assert [batch.texts.max_num_texts for batch in batches] == [None, None]


@pytest.mark.parametrize("piece", [0, 8, 20, 64])
@pytest.mark.parametrize("rounds", [False, True])
def test_the_most_texts_are_those_that_a_rank_with_the_most_encodes(piece, rounds, monkeypatch):
    for module in (encoding, micro_batches):
        monkeypatch.setattr(module, "rounds_sizes", lambda *_: rounds, raising=False)
    efficiency = EfficiencyConfig(micro_batch_size=piece)
    batch = next(some_batches(1))
    encoded = []
    for count in range(1, 130):
        texts = Texts(
            tokens=torch.ones(count, 9, dtype=torch.int64),
            lengths=np.full(count, 9),
            index=torch.zeros(12, dtype=torch.int64),
            counts=torch.ones(count, dtype=torch.int64),
            max_num_texts=lambda count=count: count,
        )
        ids = torch.zeros(count, dtype=torch.int64)
        if piece:
            targets = dataclasses.replace(batch.targets, text_class_ids=ids)
            its = dataclasses.replace(batch, texts=texts, targets=targets)
            counts = _texts_in_pieces(its, efficiency, Ranks())[2]
        else:
            counts = texts_to_encode(texts, ids, efficiency)[3]
        largest = max_num_texts(texts, efficiency, piece=piece)
        assert largest() == len(counts)
        encoded.append(len(counts))
    assert encoded == sorted(encoded)  # so the rank with the most texts encodes the most


def test_ranks_on_gpus_ask_by_the_network_of_their_gpus():
    with fake_ranks(8) as ranks:
        assert PendingMaximum(5, ranks).wait() == 5


@pytest.mark.gpu
def test_a_maximum_over_gpus_does_not_wait_for_the_step():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        PendingMaximum(1, TWO).wait()  # NCCL connects
        torch.cuda._sleep(2_000_000_000)
        launched = torch.cuda.current_stream().record_event()
        assert PendingMaximum(3, TWO).wait() == 3
        assert not launched.query()
    finally:
        dist.destroy_process_group()
