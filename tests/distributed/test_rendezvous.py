"""Ranks agree on who runs now, whatever an earlier attempt has left in the store."""

from __future__ import annotations

import datetime
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from unicl_fast.distributed.rendezvous import agree_on_session

SOON = datetime.timedelta(seconds=20)


def agree(store: dist.Store, *, late: int, world_size: int = 3) -> list[str]:
    """The names that the ranks of one attempt come to; rank `late` comes last."""

    def enter(rank: int) -> str:
        time.sleep(0.3 if rank == late else 0)
        return agree_on_session(store, rank=rank, world_size=world_size, timeout=SOON)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(enter, range(world_size)))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_each_attempt_has_a_name_of_its_own(late: int) -> None:
    store = dist.HashStore()
    names = [agree(store, late=late) for _ in range(3)]
    assert all(len(set(of_ranks)) == 1 for of_ranks in names)
    assert len({of_ranks[0] for of_ranks in names}) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_does_not_take_those_of_an_earlier_attempt_for_its_peers(rank: int) -> None:
    store = dist.HashStore()
    agree(store, late=2)
    with pytest.raises(RuntimeError, match="not all 3 ranks came"):
        agree_on_session(store, rank=rank, world_size=3, timeout=datetime.timedelta(seconds=0.3))
    assert len(set(agree(store, late=1))) == 1


def test_one_rank_waits_for_nobody() -> None:
    assert agree(dist.HashStore(), late=0, world_size=1)
