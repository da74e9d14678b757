"""A model of a training step on many ranks: two clocks, of the device and of its network.

The device computes one part after another, and waits where the trainer waits; the network takes one
collective after another. Left out: slower ranks, the loader, checkpoints, and networks that others
use too. `sizes.py` says what is sent; tests compare that with the real step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from .sizes import Collective, Kind, ModelSize, collectives


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Seconds of the parts of one rank's step that sends nothing."""

    text_forward: float
    image_forward: float
    loss: float
    image_backward: float
    text_backward: float
    update: float

    @property
    def total(self) -> float:
        return float(sum(dataclasses.astuple(self)))

    @classmethod
    def from_parts(cls, seconds: Mapping[str, float]) -> Compute:
        """From the parts of a step as `StepInParts` names and times them."""
        return cls(
            text_forward=seconds["text encoder forward"],
            image_forward=seconds["normalise images"] + seconds["image encoder forward"],
            loss=seconds["loss and its gradient"],
            image_backward=seconds["image encoder backward"],
            text_backward=seconds["text encoder backward"],
            update=seconds["clip and update"],
        )

    @classmethod
    def split(cls, seconds: float, size: ModelSize) -> Compute:
        """Divides the time of a step by operations; each image has a text of its own."""
        one = seconds / size.step_operations(1, 1)
        images, texts = one * size.image_operations, one * size.text_operations
        return cls(
            text_forward=texts,
            image_forward=images,
            loss=0.0,
            image_backward=2 * images,
            text_backward=2 * texts,
            update=0.0,
        )

    def enlarged(self, size: ModelSize, *, batch: int, local_batch: int) -> Compute:
        """The same parts for a larger batch than the one that was timed; the update stays.

        The loss grows by the four products of the larger square, at the rate of the step's own.
        """
        factor = local_batch / batch
        rate = size.step_operations(batch, batch) / self.total
        more = 4 * 2 * (local_batch**2 - batch**2) * size.embed_dim / rate
        return Compute(
            text_forward=factor * self.text_forward,
            image_forward=factor * self.image_forward,
            loss=self.loss + more,
            image_backward=factor * self.image_backward,
            text_backward=factor * self.text_backward,
            update=self.update,
        )

    def on_ranks(self, world_size: int, size: ModelSize, *, local_batch: int) -> Compute:
        """The same parts where the loss compares with the texts of all ranks.

        That is four products for the texts of the others, at the rate of the step's own products.
        """
        rate = size.step_operations(local_batch, local_batch) / self.total
        added = (world_size - 1) * local_batch
        more = 4 * 2 * local_batch * added * size.embed_dim / rate
        return dataclasses.replace(self, loss=self.loss + more)


def seconds_of(collective: Collective, network: Nccl, world_size: int) -> float:
    """Returns the time of a collective that has the network to itself."""
    return network.latency(collective, world_size) + network.transfer(collective, world_size)


def passes(kind: Kind, world_size: int) -> float:
    """How often a collective sends its bytes over the narrowest link of a ring of ranks."""
    if kind == "broadcast":
        return 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (world_size - 1) / world_size


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Nccl:
    """NCCL's rings over machines that are all alike.

    Bytes move at the lower rate of NVLink's and that of a machine's network cards together.
    Latencies are NCCL's own estimates for its protocol Simple (src/graph/tuning.cc).
    """

    link_gbit: float
    """Gb/s of one machine, all its network cards together; infinite is allowed."""
    gpus_per_node: int = 8
    nvlink_gbyte: float = 360.0
    """GB/s of a GPU within its machine: 80 % of the 450 that an H100 has in each direction."""
    achieved: float = 0.85
    """Part of the network's rate that collectives reach: assumed."""
    start_us: float = 8.4
    nvlink_hop_us: float = 3.4
    network_hop_us: float = 14.0

    def latency(self, collective: Collective, world_size: int) -> float:
        nodes = max(1, world_size // self.gpus_per_node)
        crossing = nodes if nodes > 1 else 0
        ring = crossing * self.network_hop_us + (world_size - crossing) * self.nvlink_hop_us
        inside = (world_size / nodes - 1) * self.nvlink_hop_us
        tree = inside + math.log2(nodes) * self.network_hop_us
        hops = {"all-reduce": 2 * min(ring, tree), "broadcast": tree}.get(collective.kind, ring)
        return 1e-6 * (self.start_us + hops)

    def transfer(self, collective: Collective, world_size: int) -> float:
        rate = 1e9 * self.nvlink_gbyte
        if world_size > self.gpus_per_node:
            rate = min(rate, 1e9 / 8 * self.link_gbit * self.achieved)
        return passes(collective.kind, world_size) * collective.num_bytes / rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """A modelled step."""

    seconds: float
    waits: Mapping[str, float]
    """Seconds in which the device waits: for averages, texts, loss statistics, text gradients,
    gradients (of all buckets), the host."""
    last_bucket: float
    """Seconds that the last bucket takes by itself."""


class _Clocks:
    """Two clocks: of a device that computes and waits, and of its network."""

    def __init__(self, network: Nccl, world_size: int) -> None:
        self._network, self._world_size = network, world_size
        self.now = 0.0
        self._free = 0.0
        self._done: dict[str, float] = {}
        self.waits: dict[str, float] = {}

    def send(self, name: str, collective: Collective, *, at: float | None = None) -> None:
        start = max(self.now if at is None else at, self._free)
        done = start + seconds_of(collective, self._network, self._world_size)
        self._free = self._done[name] = done

    def wait(self, name: str, *, called: str = "") -> None:
        waited = max(0.0, self._done[name] - self.now)
        self.now += waited
        called = called or name
        self.waits[called] = self.waits.get(called, 0.0) + waited


def simulate(
    compute: Compute,
    size: ModelSize,
    network: Nccl,
    *,
    world_size: int,
    num_texts: int,
    host_seconds: float = 0.0,
) -> StepTime:
    """Plays one step in the trainer's order (training/step.py; DDP, while back-propagating).

    `compute` has a loss of the global batch, and each rank `num_texts` distinct texts. The device
    waits for the host's launches only if these take longer than its own work.
    """
    sent = collectives(
        world_size, num_texts=num_texts, embed_dim=size.embed_dim, buffers=size.buffers
    )
    if world_size == 1:
        return StepTime(seconds=compute.total, waits={}, last_bucket=0.0)
    clocks = _Clocks(network, world_size)

    def exchange(name: str, called: str) -> None:
        clocks.send(name, sent[name])
        clocks.wait(name, called=called)

    clocks.send("text counts", sent["text counts"])  # of the next step: nothing waits for them
    for name in sent:
        if name.startswith("averages"):
            exchange(name, "averages")
    clocks.now += compute.text_forward
    clocks.send("texts", sent["texts"])
    clocks.send("classes", sent["classes"])
    clocks.now += compute.image_forward
    clocks.wait("classes", called="texts")
    clocks.wait("texts")
    clocks.now += compute.loss / 2
    exchange("loss: maxima", "loss statistics")
    exchange("loss: sums", "loss statistics")
    clocks.now += compute.loss / 2
    clocks.send("text gradients", sent["text gradients"])
    _back_propagate(clocks, size, compute)
    clocks.now += compute.update
    seconds, waits = clocks.now, clocks.waits
    waits["host"] = max(0.0, host_seconds - seconds)
    seconds = max(seconds, host_seconds)
    last = Collective(kind="all-reduce", num_bytes=size.buckets[-1].num_bytes)
    last_bucket = seconds_of(last, network, world_size)
    return StepTime(seconds=seconds, waits=waits, last_bucket=last_bucket)


def _back_propagate(clocks: _Clocks, size: ModelSize, compute: Compute) -> None:
    """Most of the images, texts, whose gradients must be back, the rest; buckets when ready."""
    images, texts, middle = compute.image_backward, compute.text_backward, size.before_texts

    def send_while(seconds: float, *, of_texts: bool, begun: float, ended: float) -> None:
        for number, bucket in enumerate(size.buckets):
            is_now = (begun < bucket.ready or not begun) and bucket.ready <= ended
            if bucket.of_texts == of_texts and is_now:
                gradients = Collective(kind="all-reduce", num_bytes=bucket.num_bytes)
                at = clocks.now + (bucket.ready - begun) * seconds
                clocks.send(f"bucket {number}", gradients, at=at)
        clocks.now += (ended - begun) * seconds

    send_while(images, of_texts=False, begun=0.0, ended=middle)
    clocks.wait("text gradients")
    send_while(texts, of_texts=True, begun=0.0, ended=1.0)
    send_while(images, of_texts=False, begun=middle, ended=1.0)
    for number in range(len(size.buckets)):
        clocks.wait(f"bucket {number}", called="gradients")


def binding(step: StepTime, *, compute: float, loss_growth: float) -> str:
    """Names what costs the most besides computing; "compute" where that is below 3 %."""
    costs = {**step.waits, "loss of the global batch": loss_growth}
    name = max(costs, key=lambda each: costs[each])
    if costs[name] < 0.03 * compute:
        return "compute"
    if name == "gradients":
        is_last = costs[name] < 2 * step.last_bucket
        name = "gradients, last bucket" if is_last else "gradients, all buckets"
    return name
