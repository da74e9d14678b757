"""Ranks agree on who runs now, in a store with keys of earlier attempts; SLURM names ranks."""

import datetime
import operator
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_workers import exchange_objects, run_on_ranks
from waiting import wait_until

from unicl_fast.distributed import rendezvous
from unicl_fast.distributed.launch import SharedRefusal
from unicl_fast.distributed.rendezvous import (
    address_towards,
    adopt_slurm_ranks,
    agree_on_session,
    claim_gpu,
    first_host,
    interface_with,
    process_group,
    tasks_of_node,
)
from unicl_fast.system.machine import usable_cores

pytestmark = pytest.mark.slow

SOON = datetime.timedelta(seconds=120)


def read(store: dist.Store, key: str) -> bytes:
    return store.get(key) if store.check([key]) else b""


def agree(store: dist.Store, *, late: int, world_size: int = 3) -> list[str]:
    """The names that the ranks of one attempt come to; rank `late` comes last."""
    keys = [f"unicl_fast/hello/{rank}" for rank in range(1, world_size) if rank != late]
    before = [read(store, key) for key in keys]

    def others_are_there() -> bool:
        return all(map(operator.ne, before, [read(store, key) for key in keys]))

    def enter(rank: int) -> str:
        if rank == late:
            wait_until(others_are_there)
        return agree_on_session(store, rank=rank, world_size=world_size, timeout=SOON)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(enter, range(world_size)))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_each_attempt_has_a_name_of_its_own(late):
    store = dist.HashStore()
    names = [agree(store, late=late) for _ in range(3)]
    assert all(len(set(of_ranks)) == 1 for of_ranks in names)
    assert len({of_ranks[0] for of_ranks in names}) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_does_not_take_those_of_an_earlier_attempt_for_its_peers(rank):
    store = dist.HashStore()
    agree(store, late=2)
    with pytest.raises(RuntimeError, match="not all 3 ranks came"):
        agree_on_session(store, rank=rank, world_size=3, timeout=datetime.timedelta(seconds=0.3))
    assert len(set(agree(store, late=1))) == 1


def test_forty_ranks_meet():
    store = dist.HashStore()
    assert len(set(agree(store, late=20, world_size=40))) == 1


def test_gloo_takes_the_interface_that_leads_to_rank_0():
    assert interface_with(address_towards("127.0.0.1")) == "lo"
    assert address_towards("no such host.invalid") == "127.0.0.1"
    assert interface_with("192.0.2.1") is None  # reserved for documentation


@pytest.mark.parametrize("address", ["127.0.1.1", "::1", "no such host.invalid"])
@pytest.mark.parametrize(("local", "interface"), [("2", "lo"), ("1", "eth7"), ("1", None)])
def test_no_rank_of_several_machines_takes_loopback(monkeypatch, caplog, address, local, interface):
    """Not even on the machine that MASTER_ADDR names; the default route leads to the others."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that monkeypatch restores it
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)

    def towards(host: str) -> str:
        outside = "10.7.7.7" if interface is not None else "127.0.0.1"
        return outside if host == rendezvous._ELSEWHERE else address_towards(host)

    monkeypatch.setattr(rendezvous, "address_towards", towards)
    found = {"127.0.0.1": "lo", "10.7.7.7": "eth7"}
    monkeypatch.setattr(rendezvous, "interface_with", found.get)
    rendezvous._prepare_sockets(2)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface
    assert ("name one in GLOO_SOCKET_IFNAME" in caplog.text) == (interface is None)


def test_ranks_with_one_gpu_are_refused_in_one_sentence(monkeypatch):
    """As if a machine showed one GPU to all its ranks; two machines have two."""
    gpus = [SimpleNamespace(uuid=f"GPU-{name}") for name in "abaa"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", mock.Mock(side_effect=gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    store, gpu = dist.HashStore(), torch.device("cuda", 0)
    for _ in range(2):
        claim_gpu(store, gpu)
    with pytest.raises(ValueError, match="2 ranks have the same GPU .*GPU-a; torch sees 1") as said:
        claim_gpu(store, gpu)
    assert not isinstance(said.value, SharedRefusal)
    with pytest.raises(SharedRefusal):  # which only rank 0 says
        claim_gpu(store, gpu)


def test_one_rank_waits_for_nobody():
    assert agree(dist.HashStore(), late=0, world_size=1)
    with process_group(torch.device("cpu")) as ranks:
        assert (ranks.world_size, ranks.cores) == (1, usable_cores())


def test_ranks_exchange_objects_unpickle_nothing_and_take_what_rank_0_measured():
    run_on_ranks(exchange_objects, 3)


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("node7", "node7"),
        ("node[007-012,020],gpu1", "node007"),
        ("a1,b[2-3]", "a1"),
        ("cluster-gpu[3]", "cluster-gpu3"),
        ("n[1-2]-ib", "n1-ib"),
        ("rack[1-2]node[1-4]", "rack1node1"),
        ("rack[01,03]node[07-12,20]-ib,gpu[1,2]", "rack01node07-ib"),
    ],
)
def test_first_host_of_a_node_list(node_list, first):
    assert first_host(node_list) == first


@pytest.mark.parametrize("node_list", ["", "n[1-2", "n[]", ",n1", "n]1["])
def test_what_is_no_node_list_is_refused(node_list):
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        first_host(node_list)


def test_each_node_has_its_own_number_of_tasks():
    assert [tasks_of_node("2,4(x2),1", node) for node in range(4)] == [2, 4, 4, 1]
    for wrong in ("2,4(x2)", "", "4(x", "4(x9)(x2)"):
        with pytest.raises(ValueError, match="start the ranks with torchrun"):
            tasks_of_node(wrong, 3)


SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "4711",
}
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(("tasks_per_node", "local"), [("4(x2)", "4"), ("2,6", "6")])
def test_slurm_tasks_become_ranks(monkeypatch, tasks_per_node, local):
    for name in TORCHRUN:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    for name, value in (SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks_per_node}).items():
        monkeypatch.setenv(name, value)
    adopt_slurm_ranks()
    assert [os.environ[name] for name in TORCHRUN[:5]] == ["5", "1", "8", local, "n1"]
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 32000
    for name in TORCHRUN:
        monkeypatch.delenv(name)


def test_torchrun_goes_first(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    adopt_slurm_ranks()
    assert os.environ["WORLD_SIZE"] == "2"
