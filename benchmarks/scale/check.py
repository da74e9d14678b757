"""Real ranks on slow links, compared with the model: `unicl-bench scale --check`.

Each rank has a network namespace of its own and a link into a switch, at a rate that the kernel
keeps (`tc`'s tbf); so a machine stands in for a few of a cluster. It needs Linux, root, `ip` and
`tc`. The ranks train with the program's own trainer, DDP and gloo.

Nothing is fitted to the steps that are compared. The rate is the stated one; the latency of a hop
is that of all-reduces of 8 bytes; the parts of a step are those of as many trainers that run at the
same time and know of no ranks, in turns with the steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks, gather_objects, sum_integers
from unicl_fast.distributed.rendezvous import process_group

from ..step.parts import StepInParts, build_trainer, random_batch, step_config
from .model import Compute, Gloo, simulate, without_overlap
from .sizes import ModelSize, measure_size

_PIXELS, _LOCAL_BATCH = 64, 8
_CARD = "eth0"
_PINGS = 50
Values = dict[str, list[float]]


class LinksUnavailableError(RuntimeError):
    """This process may not make network namespaces with slow links."""


def error_of(values: Mapping[str, Sequence[float]]) -> float:
    """How far the modelled step is from the measured one: the median over rounds."""
    pairs = zip(values["modelled, s"], values["measured, s"], strict=True)
    return statistics.median(modelled / measured - 1 for modelled, measured in pairs)


def run_check(
    *, ranks: Sequence[int], rates: Sequence[float], rounds: int
) -> Iterator[tuple[str, Values]]:
    """Measures and models steps of each number of ranks at each rate of links, in Mb/s.

    Yields a name, and for each round the seconds of a step of the slowest rank, those of the model,
    those of a model without overlap, and those of a step that sends nothing.

    Raises:
        LinksUnavailableError: no root, or no `ip` and `tc`.
        RuntimeError: a rank failed; its messages are on standard error.
    """
    for world_size in ranks:
        size = measure_size(_config(world_size))
        with (
            tempfile.TemporaryDirectory(prefix="unicl-scale-") as folder,
            machines_on_links(world_size) as machines,
        ):
            out = Path(folder, "measured.json")
            settings = {"rates": rates, "rounds": rounds, "out": str(out)}
            _run_ranks(machines, json.dumps(settings))
            for case in json.loads(out.read_text(encoding="utf-8")):
                name = f"{world_size} ranks, {case['link_mbit']:g} Mb/s"
                yield name, _with_model(case, size, world_size)


def _config(world_size: int) -> TrainConfig:
    """ResNet-18 and a small text encoder: 58 MB of gradients, of which DDP makes four buckets."""
    return step_config(
        "resnet18",
        image_size=_PIXELS,
        batch_size=_LOCAL_BATCH * world_size,
        device="cpu",
        text={"text_width": 64, "text_heads": 2, "text_layers": 2, "embed_dim": 64},
        precision="fp32",
    )


def _with_model(case: dict[str, Any], size: ModelSize, world_size: int) -> Values:
    network = Gloo(link_mbit=case["link_mbit"], hop_us=case["hop_us"])
    ranks = {"world_size": world_size, "num_texts": _LOCAL_BATCH}
    computed = [Compute.from_parts(parts) for parts in case["parts"]]
    grown = [one.on_ranks(world_size, size, local_batch=_LOCAL_BATCH) for one in computed]
    return {
        "measured, s": case["measured"],
        "modelled, s": [
            simulate(one, size, network, host_seconds=None, **ranks).seconds for one in grown
        ],
        "computing, s": [one.total for one in computed],
        "without overlap, s": [without_overlap(one, size, network, **ranks) for one in grown],
        "a hop, us": [case["hop_us"]],
    }


@contextlib.contextmanager
def machines_on_links(count: int) -> Iterator[list[str]]:
    """Names of network namespaces with the addresses 10.99.0.1, 2 and so on, on one switch."""
    if not (shutil.which("ip") and shutil.which("tc")):
        raise LinksUnavailableError("slow links need the programs ip and tc (iproute2)")
    names = [f"unicl-{os.getpid()}-{number}" for number in range(count)]
    switch = f"unicl-{os.getpid()}-switch"
    made = []
    try:
        for name in [switch, *names]:
            _ip("netns", "add", name)
            made.append(name)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names):
            port = f"port{number}"
            pair = ("type", "veth", "peer", "name", port, "netns", switch)
            _ip("link", "add", _CARD, "netns", name, *pair)
            _ip("-n", name, "addr", "add", f"10.99.0.{number + 1}/24", "dev", _CARD)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", _CARD, "up")
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        _run("ip", "netns", "exec", names[0], *_throttling(100.0))
        yield names
    finally:
        for name in made:
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinksUnavailableError(
            f"slow links need root and Linux with network namespaces and tbf; `{' '.join(command)}`"
            f" said: {done.stderr.strip()}"
        )


def _throttling(mbit: float) -> list[str]:
    # tokens for 4 ms, the longest that a kernel's tick takes; a queue that never drops
    burst = max(32_000, int(mbit * 1e6 / 8 * 0.004))
    shape = ["tbf", "rate", f"{mbit:g}mbit", "burst", str(burst), "latency", "400ms"]
    return ["tc", "qdisc", "replace", "dev", _CARD, "root", *shape]


def _run_ranks(machines: Sequence[str], settings: str) -> None:
    """Runs this file in each machine, and waits; raises RuntimeError if a rank fails."""
    environment = os.environ | {
        "WORLD_SIZE": str(len(machines)),
        "MASTER_ADDR": "10.99.0.1",
        "MASTER_PORT": "29500",  # free, in a network of their own
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # the addresses have no names, of which torch warns
    }
    program = [sys.executable, "-W", "ignore", "-m", __name__, settings]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, machine in enumerate(machines):
            command = ["ip", "netns", "exec", machine, *program]
            processes.append(subprocess.Popen(command, env=environment | {"RANK": str(rank)}))
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                break
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()  # of those that have ended nothing is left to kill
            process.wait()
    if failed := [rank for rank, process in enumerate(processes) if process.returncode]:
        raise RuntimeError(f"ranks {failed} failed on their slow links; see their messages above")


def _measure(ranks: Ranks, *, rates: Sequence[float], rounds: int) -> list[dict[str, Any]]:
    """A rank's part: steps with the others, and in turns steps by itself, at each rate."""
    batch = random_batch(_LOCAL_BATCH, pixels=_PIXELS, num_texts=_LOCAL_BATCH, seed=1 + ranks.rank)
    together, _ = build_trainer(_config(ranks.world_size), batch, ranks=ranks)
    alone = StepInParts(*build_trainer(_config(1), batch))
    for _ in range(2):  # in the second DDP orders its buckets
        together.train_step(batch)
        alone.take()
    cases = []
    for rate in rates:
        _run(*_throttling(rate))
        measured, parts = [], []
        hop_us = _hop_us(ranks)
        for number in range(1 + rounds):
            sum_integers([0], ranks)  # all begin together
            own_parts = alone.take()
            sum_integers([0], ranks)
            started = time.perf_counter()
            together.train_step(batch)
            seconds = time.perf_counter() - started
            found: list[Any] = gather_objects([seconds, own_parts], ranks)
            if number:  # the first fills buffers
                measured.append(max(of_rank for of_rank, _ in found))
                # the others wait for the slowest
                parts.append(max((each for _, each in found), key=lambda each: sum(each.values())))
        cases.append({"link_mbit": rate, "hop_us": hop_us, "measured": measured, "parts": parts})
    return cases


def _hop_us(ranks: Ranks) -> float:
    """Microseconds of one of the 2 (W - 1) hops of an all-reduce of 8 bytes."""
    taken = []
    for _ in range(_PINGS):
        started = time.perf_counter()
        sum_integers([0], ranks)
        taken.append(time.perf_counter() - started)
    return 1e6 * statistics.median(taken) / (2 * (ranks.world_size - 1))


def _main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    with process_group(torch.device("cpu"), timeout_seconds=120) as ranks:
        cases = _measure(ranks, rates=settings["rates"], rounds=settings["rounds"])
    if ranks.is_main:
        Path(settings["out"]).write_text(json.dumps(cases), encoding="utf-8")


if __name__ == "__main__":
    _main()
