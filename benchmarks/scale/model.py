"""The time of a training step on many ranks, from its parts: a model, which measures nothing.

A step computes and sends. `collectives` and `gradient_buckets` say what it sends, and are compared
with the real step's (tests/golden/collectives.json). `simulate` plays the trainer's order with two
clocks: the device computes one part after another; the network takes one collective after another,
each when it is asked for and the one before it is done; and the device waits where the trainer
waits. A collective costs latency + bytes times passes / rate; `Nccl` and `Gloo` know these.

Left out: slower ranks, the loader, checkpoints, logging, and networks that others use too.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import (
    _DEFAULT_FIRST_BUCKET_BYTES,
    _compute_bucket_assignment_by_size,
)
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unicl_fast.config import TrainConfig
from unicl_fast.models.efficiency import has_batch_norm
from unicl_fast.models.unicl import UniCL

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "broadcast"]

# DDP's own: its first bucket is small, so that sending begins early.
_BUCKET_BYTES = [_DEFAULT_FIRST_BUCKET_BYTES, 25 << 20]
_FLOAT, _INT = 4, 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """One exchange between ranks; `num_bytes` are of its larger side, which ranks hold alike."""

    kind: Kind
    num_bytes: int
    dtype: torch.dtype = torch.float32
    on_host: bool = False
    """Between processors, beside the device; else in order with the other collectives of it."""


def collectives(
    world_size: int, *, num_texts: int, embed_dim: int, buffers: Mapping[torch.dtype, int]
) -> dict[str, Collective]:
    """A step's collectives beside its gradients, under UniCL or CLIP, in the order of sending.

    Args:
        world_size: the number of ranks.
        num_texts: distinct texts of the rank that has the most; the others pad theirs to it.
        embed_dim: entries of a feature.
        buffers: bytes of BatchNorm's averages by type; empty without BatchNorm.
    """
    columns = world_size * num_texts
    features = _FLOAT * embed_dim * columns
    averages = {
        f"averages, {dtype}": Collective(kind="broadcast", num_bytes=size, dtype=dtype)
        for dtype, size in buffers.items()
    }
    return {
        "text counts": Collective(
            kind="all-reduce", num_bytes=_INT, dtype=torch.int64, on_host=True
        ),
        **averages,
        "texts": Collective(kind="all-gather", num_bytes=features),
        "classes": Collective(kind="all-gather", num_bytes=2 * _INT * columns, dtype=torch.int64),
        "loss: maxima": Collective(kind="all-reduce", num_bytes=_FLOAT * columns),
        "loss: sums": Collective(kind="all-reduce", num_bytes=_FLOAT * (3 * columns + 1)),
        "text gradients": Collective(kind="reduce-scatter", num_bytes=features),
        "stop flag": Collective(kind="all-reduce", num_bytes=_INT, dtype=torch.int64, on_host=True),
    }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Gradients that DDP sends together, once the last of them is there."""

    num_bytes: int
    of_texts: bool
    """Whether the text encoder's backward pass completes it; else the image encoder's."""
    ready: float
    """Part of that backward pass, from 0 to 1, after which it is complete."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The sizes of a model that the time of a step depends on."""

    image_operations: float
    """Operations of the matrix products and convolutions of one image's forward pass."""
    text_operations: float
    """The same of one text, with its padding."""
    embed_dim: int
    buckets: tuple[Bucket, ...]
    buffers: Mapping[torch.dtype, int]

    def step_operations(self, local_batch: int, num_texts: int) -> float:
        """Counts both encoders; a backward pass has twice the products of the forward pass."""
        return 3 * (local_batch * self.image_operations + num_texts * self.text_operations)


def measure_size(config: TrainConfig) -> ModelSize:
    """Sizes of a config's model, which is built without memory for its weights.

    Raises:
        ValueError: its objective has no texts.
    """
    with torch.device("meta"):
        model = UniCL(config).eval()
        side, length = config.data.image_size, config.model.context_length
        images, tokens = torch.zeros(1, 3, side, side), torch.zeros(1, length, dtype=torch.int64)
        with torch.no_grad(), _Products() as of_image:
            model.encode_image(images)
        with torch.no_grad(), _Products() as of_text:
            model.encode_text(tokens)
    buffers: dict[torch.dtype, int] = {}
    if has_batch_norm(model):
        for buffer in model.buffers():
            buffers[buffer.dtype] = buffers.get(buffer.dtype, 0) + buffer.nbytes
    return ModelSize(
        image_operations=sum(of_image.operations.values()),
        text_operations=sum(of_text.operations.values()),
        embed_dim=config.model.embed_dim,
        buckets=tuple(gradient_buckets(model, of_image.operations | of_text.operations)),
        buffers=buffers,
    )


class _Products(TorchFunctionMode):
    """Counts the operations of linear layers and convolutions by the weight that is multiplied.

    Attention's products of activations, a few percent, and lookups of rows count nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[Tensor, float] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (F.linear, F.conv2d):
            weight = args[1]
            self.operations[weight] = 2.0 * weight.numel() * result.numel() / len(weight)
        return result


def gradient_buckets(model: UniCL, operations: Mapping[Tensor, float]) -> Iterator[Bucket]:
    """DDP's buckets after its first step, in the order in which they are complete and sent.

    Images are back-propagated first, each encoder from its end to its start.
    """
    assert model.text_encoder is not None
    assert model.image_projection is not None
    assert model.text_projection is not None
    parts = [
        [model.logit_scale, model.image_projection, *_as_they_arrive(model.image_encoder)],
        [model.text_projection, *_as_they_arrive(model.text_encoder)],
    ]
    done = []
    for side in parts:
        counted = list(itertools.accumulate(operations.get(weight, 0.0) for weight in side))
        done += [count / max(counted[-1], 1.0) for count in counted]
    weights: list[Tensor] = [weight for side in parts for weight in side]
    indices, _ = _compute_bucket_assignment_by_size(weights, _BUCKET_BYTES)
    for members in indices:
        last = max(members)
        yield Bucket(
            num_bytes=sum(weights[index].nbytes for index in members),
            of_texts=last >= len(parts[0]),
            ready=done[last],
        )


def _as_they_arrive(encoder: nn.Module) -> list[nn.Parameter]:
    """From the last to the first; positions, the encoder's own, are added after its first child."""
    first, *others = [
        child for child in encoder.children() if any(True for _ in child.parameters())
    ]
    own = encoder.parameters(recurse=False)
    later = itertools.chain.from_iterable(child.parameters() for child in others)
    return [*first.parameters(), *own, *later][::-1]


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
    def split(cls, seconds: float, size: ModelSize, *, local_batch: int, num_texts: int) -> Compute:
        """Divides the time of a whole step by operations, of which the update has none."""
        images, texts = local_batch * size.image_operations, num_texts * size.text_operations
        one = seconds / (3 * (images + texts))
        return cls(
            text_forward=one * texts,
            image_forward=one * images,
            loss=0.0,
            image_backward=2 * one * images,
            text_backward=2 * one * texts,
            update=0.0,
        )

    def with_columns(
        self, added: int, size: ModelSize, *, local_batch: int, rate: float
    ) -> Compute:
        """The loss compares with so many more texts: four products, at so many operations/s."""
        more = 4 * 2 * local_batch * added * size.embed_dim / rate
        return dataclasses.replace(self, loss=self.loss + more)


class Network(Protocol):
    """How long a collective takes when it has the network to itself."""

    def latency(self, collective: Collective, world_size: int) -> float:
        """Seconds that do not depend on its bytes."""

    def transfer(self, collective: Collective, world_size: int) -> float:
        """Seconds of its bytes."""


def passes(kind: Kind, world_size: int) -> float:
    """How often a collective sends its bytes over the narrowest link of a ring of ranks."""
    if kind == "broadcast":
        return 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (world_size - 1) / world_size


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Nccl:
    """NCCL's rings over machines that are all alike; host collectives are gloo's.

    Channels of a ring share a machine's cards, so bytes move at the lower of two rates: NVLink's,
    and that of all network cards of a machine together. Latencies are NCCL's own estimates for its
    protocol Simple (src/graph/tuning.cc): a fixed one, and one for each hop of a ring; an
    all-reduce takes a tree where that has fewer.
    """

    link_gbit: float
    """Gb/s of one machine, all its network cards together; infinite is allowed."""
    gpus_per_node: int = 8
    nvlink_gbyte: float = 360.0
    """GB/s of a GPU within its machine: 80 % of the 450 that an H100 has in each direction."""
    achieved: float = 0.85
    """Part of the network's rate that collectives reach."""
    start_us: float = 8.4
    nvlink_hop_us: float = 3.4
    network_hop_us: float = 14.0
    host_hop_us: float = 50.0
    """One hop of gloo's ring: 2 to 4 ms were expected of the 63 hops of 64 ranks."""

    def latency(self, collective: Collective, world_size: int) -> float:
        if collective.on_host:
            return 1e-6 * self.host_hop_us * 2 * (world_size - 1)
        nodes = max(1, world_size // self.gpus_per_node)
        crossing = nodes if nodes > 1 else 0
        ring = crossing * self.network_hop_us + (world_size - crossing) * self.nvlink_hop_us
        inside = (world_size / nodes - 1) * self.nvlink_hop_us
        tree = inside + math.log2(nodes) * self.network_hop_us
        hops = {"all-reduce": 2 * min(ring, tree), "broadcast": tree}.get(collective.kind, ring)
        return 1e-6 * (self.start_us + hops)

    def transfer(self, collective: Collective, world_size: int) -> float:
        if collective.on_host:
            return 0.0
        rate = 1e9 * self.nvlink_gbyte
        if world_size > self.gpus_per_node:
            rate = min(rate, 1e9 / 8 * self.link_gbit * self.achieved)
        return passes(collective.kind, world_size) * collective.num_bytes / rate


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gloo:
    """Gloo's rings, each rank on a link of its own.

    It has no reduce-scatter: torch's sums everything on all ranks, and takes a part of it.
    """

    link_mbit: float
    """Mb/s of the link of a rank, as the kernel counts them: with the headers of packets."""
    hop_us: float

    def latency(self, collective: Collective, world_size: int) -> float:
        rounds = 1 if collective.kind in ("all-gather", "broadcast") else 2
        return 1e-6 * self.hop_us * rounds * (world_size - 1)

    def transfer(self, collective: Collective, world_size: int) -> float:
        kind: Kind = "all-reduce" if collective.kind == "reduce-scatter" else collective.kind
        payload = 1448 / 1514  # of an Ethernet frame with TCP's timestamps
        rate = 1e6 / 8 * self.link_mbit * payload
        return passes(kind, world_size) * collective.num_bytes / rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """A modelled step."""

    seconds: float
    waits: Mapping[str, float]
    """Seconds in which the device waits: for text counts, averages, texts, loss statistics, text
    gradients, gradients (of all buckets)."""
    last_bucket: float
    """Seconds that the last bucket takes by itself."""
    latencies: Mapping[str, float]
    """The part of each wait that does not depend on bytes, at most."""


class _Clocks:
    """Two clocks: of a device that computes and waits, and of its network."""

    def __init__(self, network: Network, world_size: int) -> None:
        self._network, self._world_size = network, world_size
        self.now = 0.0
        self._free = {True: 0.0, False: 0.0}  # host and device have networks of their own
        self._done: dict[str, float] = {}
        self._latency: dict[str, float] = {}
        self.waits: dict[str, float] = {}
        self.latencies: dict[str, float] = {}

    def send(self, name: str, collective: Collective, *, at: float | None = None) -> None:
        start = max(self.now if at is None else at, self._free[collective.on_host])
        latency = self._network.latency(collective, self._world_size)
        done = start + latency + self._network.transfer(collective, self._world_size)
        self._free[collective.on_host] = self._done[name] = done
        self._latency[name] = latency

    def wait(self, name: str, *, called: str = "") -> None:
        waited = max(0.0, self._done[name] - self.now)
        self.now += waited
        called = called or name
        self.waits[called] = self.waits.get(called, 0.0) + waited
        added = min(self._latency[name], waited)
        self.latencies[called] = self.latencies.get(called, 0.0) + added


def simulate(
    compute: Compute,
    size: ModelSize,
    network: Network,
    *,
    world_size: int,
    num_texts: int,
    host_ahead: bool = True,
    host_seconds: float = 0.0,
) -> StepTime:
    """Plays one step in the trainer's order (training/global_loss.py; DDP, while back-propagating).

    Args:
        compute: seconds of the parts, with a loss of the global batch.
        size: the model's sizes.
        network: costs of collectives.
        world_size: ranks.
        num_texts: distinct texts of a rank.
        host_ahead: the host launches work before the device has done what was launched earlier,
            as on a GPU. So the device waits for host collectives only if all that the host does
            in a step takes longer than the device's. Else it waits as it waits for the others.
        host_seconds: of the host's launches in a step; for `host_ahead` alone.
    """
    sent = collectives(
        world_size, num_texts=num_texts, embed_dim=size.embed_dim, buffers=size.buffers
    )
    if world_size == 1:
        return StepTime(seconds=compute.total, waits={}, last_bucket=0.0, latencies={})
    clocks = _Clocks(network, world_size)

    def exchange(name: str, called: str) -> None:
        clocks.send(name, sent[name])
        clocks.wait(name, called=called)

    clocks.send("text counts", sent["text counts"])
    for name in sent:
        if name.startswith("averages"):
            exchange(name, "averages")
    clocks.now += compute.text_forward
    if not host_ahead:
        clocks.wait("text counts")
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
    _back_propagate(clocks, size.buckets, compute)
    clocks.now += compute.update
    seconds, waits = clocks.now, clocks.waits
    if host_ahead:
        of_host = host_seconds + network.latency(sent["text counts"], world_size)
        waits["text counts"] = max(0.0, of_host - seconds)
        clocks.latencies["text counts"] = waits["text counts"]
        seconds = max(seconds, of_host)
    last = Collective(kind="all-reduce", num_bytes=size.buckets[-1].num_bytes)
    alone = network.latency(last, world_size) + network.transfer(last, world_size)
    return StepTime(seconds=seconds, waits=waits, last_bucket=alone, latencies=clocks.latencies)


def _back_propagate(clocks: _Clocks, buckets: Sequence[Bucket], compute: Compute) -> None:
    """Images, then texts, whose gradients must have come back; buckets are sent when ready."""
    for of_texts, seconds in ((False, compute.image_backward), (True, compute.text_backward)):
        if of_texts:
            clocks.wait("text gradients")
        for number, bucket in enumerate(buckets):
            if bucket.of_texts == of_texts:
                gradients = Collective(kind="all-reduce", num_bytes=bucket.num_bytes)
                at = clocks.now + bucket.ready * seconds
                clocks.send(f"bucket {number}", gradients, at=at)
        clocks.now += seconds
    for number in range(len(buckets)):
        clocks.wait(f"bucket {number}", called="gradients")


def without_overlap(
    compute: Compute, size: ModelSize, network: Network, *, world_size: int, num_texts: int
) -> float:
    """Seconds of a step that sends nothing while it computes: what overlap saves is the rest."""
    sent = collectives(
        world_size, num_texts=num_texts, embed_dim=size.embed_dim, buffers=size.buffers
    )
    gradients = [Collective(kind="all-reduce", num_bytes=b.num_bytes) for b in size.buckets]
    return compute.total + sum(
        network.latency(one, world_size) + network.transfer(one, world_size)
        for one in [*sent.values(), *gradients]
    )


def binding(step: StepTime, *, compute: float, loss_growth: float) -> str:
    """Names what costs the most beside computing; "compute" where all of it is below 3 %."""
    costs = {**step.waits, "loss of the global batch": loss_growth}
    name = max(costs, key=lambda each: costs[each])
    if costs[name] < 0.03 * compute:
        return "compute"
    if name == "gradients":
        is_last = costs[name] < 2 * step.last_bucket
        name = "gradients, last bucket" if is_last else "gradients, all buckets"
    elif step.latencies.get(name, 0.0) > costs[name] / 2:
        name += " (latency)"
    return name
