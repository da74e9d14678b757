"""Training state divided over the ranks (`efficiency.shard`).

`optimizer` is ZeRO-1 (Rajbhandari et al., arXiv 1910.02054) by whole parameters, so that results
equal one process's bit for bit. Torch's ZeroRedundancyOptimizer gathers its state as pickles, which
this package never reads, and hides the attributes that a fused kernel needs to skip a bad step.
`full` is torch's `fully_shard`, by block; parameters outside the encoders stay whole on every rank.
"""

import contextlib
import copy
import heapq
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from unicl_fast.config import EfficiencyConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.blocks import (
    KNOWN_BLOCKS,
    find_blocks,
    has_batch_norm,
    keep_activations_in_copy,
)
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.phases import WaitingForRanks

_NARROW = {"cuda"}  # devices that gather in bf16
# `None`, below; torch 2.6 has no such choice
_CHOOSES_WHAT_RESHARDS = signature(fully_shard).parameters["reshard_after_forward"].default is None


def check_sharding(efficiency: EfficiencyConfig, *, optimizer: str) -> None:
    """Refuses (ValueError) settings that `efficiency.shard=full` cannot work with."""
    if efficiency.shard != "full":
        return
    refused = {
        f"optim.name={optimizer}, which needs whole parameters: take optim.name=adamw": (
            optimizer != "adamw"
        ),
        "efficiency.precision=fp16, whose loss scaler sees the gradients of one rank only: take "
        "efficiency.precision=bf16": efficiency.precision == "fp16",
    }
    for what, is_set in refused.items():
        if is_set:
            raise ValueError(f"efficiency.shard=full does not go with {what}, or "
                             "efficiency.shard=optimizer")  # fmt: skip


def divides_optimizer(efficiency: EfficiencyConfig, ranks: Ranks) -> bool:
    return efficiency.shard == "optimizer" and ranks.world_size > 1


def divides_all(efficiency: EfficiencyConfig, ranks: Ranks) -> bool:
    return efficiency.shard == "full" and ranks.world_size > 1


def choose_owners(sizes: Sequence[int], world_size: int) -> list[int]:
    """The rank of each parameter: the largest first, each to the least loaded rank.

    Uses the fewest ranks that keep the largest load, since each owner costs a broadcast: often a
    few, because no division is finer than the token embedding.
    """
    owners, most = _divide(sizes, world_size)
    for count in range(max(1, sum(sizes) // max(most, 1)), world_size):
        fewer, load = _divide(sizes, count)
        if load <= most:
            return fewer
    return owners


def largest_load(sizes: Sequence[int], world_size: int) -> int:
    """Parameter values updated by the rank that has most."""
    return _divide(sizes, world_size)[1]


def _divide(sizes: Sequence[int], count: int) -> tuple[list[int], int]:
    """The rank of each parameter, for `count` ranks, and the largest load."""
    loads = [(0, rank) for rank in range(count)]
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, owners[index] = loads[0]
        heapq.heapreplace(loads, (load + sizes[index], owners[index]))
    return owners, max(loads)[0]


class ParameterOwners:
    """The rank that updates each trainable parameter (`efficiency.shard=optimizer`)."""

    def __init__(self, model: UniCL, ranks: Ranks) -> None:
        """Decides by parameter sizes alone: the same on all ranks and at every start."""
        parameters = [one for one in model.parameters() if one.requires_grad]
        owners = choose_owners([one.numel() for one in parameters], ranks.world_size)
        self._rank = ranks.rank
        self._parameters: list[list[nn.Parameter]] = [[] for _ in range(ranks.world_size)]
        for parameter, owner in zip(parameters, owners, strict=True):
            self._parameters[owner].append(parameter)
        self.own = set(self._parameters[ranks.rank])

    def drop_other_gradients(self) -> None:
        """Drops the gradients of other ranks' parameters, which the optimizer then skips."""
        for rank, parameters in enumerate(self._parameters):
            if rank != self._rank:
                for parameter in parameters:
                    parameter.grad = None

    def send_updates(self) -> None:
        """Broadcasts the parameters that each rank has updated."""
        with WaitingForRanks():
            for owner, parameters in enumerate(self._parameters):
                trained = [one for one in parameters if one.requires_grad]
                send_from(owner, trained, rank=self._rank)


@torch.no_grad()
def send_from(source: int, tensors: Iterable[Tensor], *, rank: int) -> None:
    """Copies `tensors` from rank `source` to all ranks, in one broadcast for each type."""
    for same in _by_type(tensors):
        if rank == source:
            dist.broadcast(_flatten(same), src=source)
        else:
            flat = same[0].new_empty(sum(tensor.numel() for tensor in same))
            dist.broadcast(flat, src=source)
            _copy_from(flat, same)


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _copy_from(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    pieces = flat.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view(tensor.shape))


def shard_encoders(model: UniCL, ranks: Ranks) -> None:
    """Divides encoders over all ranks, by block; ValueError without known blocks."""
    device_type = model.device.type
    parts: list[nn.Module] = []
    for encoder in model.encoders:
        blocks = find_blocks(encoder)
        if not blocks:
            raise ValueError(
                f"efficiency.shard=full divides encoders by blocks, and {type(encoder).__name__} "
                "has none that are known: set efficiency.shard=optimizer, or add its block class"
            )
        parts += [*blocks, encoder]
    # gloo's own averaging was missing, and silently wrong (pytorch issue 162338)
    averages = device_type != "cpu" or hasattr(FSDPModule, "set_force_sum_reduction_for_comms")
    if not (averages and _CHOOSES_WHAT_RESHARDS):
        raise ValueError(
            f"efficiency.shard=full{' on a CPU' * (not averages)} needs a newer torch than "
            f"{torch.__version__}: set efficiency.shard=optimizer, or update torch"
        )
    mesh = init_device_mesh(device_type, (ranks.world_size,))
    # encoders return views; nothing here changes them in place
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    for part in parts:
        # torch keeps weights outside blocks whole until backward, which never reaches a part
        # without gradients
        reshards = None if any(one.requires_grad for one in part.parameters()) else True
        policy = _policy_of(part, model.config.efficiency, device_type)
        divided = fully_shard(part, mesh=mesh, reshard_after_forward=reshards, mp_policy=policy)
        if device_type == "cpu":
            divided.set_force_sum_reduction_for_comms(True)


def _policy_of(
    part: nn.Module, efficiency: EfficiencyConfig, device_type: str
) -> MixedPrecisionPolicy:
    """Blocks are gathered in bf16 if they compute in it: half the traffic, gradients in fp32.

    Not what is outside of blocks, whose embeddings would make the stream between them bf16; nor
    BatchNorm, whose averages are fp32; nor on a CPU, whose norms accept one type only.
    """
    is_block = type(part).__name__ in KNOWN_BLOCKS and not has_batch_norm(part)
    if not is_block or efficiency.precision != "bf16" or device_type not in _NARROW:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def split_divided(tensors: Iterable[Tensor]) -> tuple[list[DTensor], list[Tensor]]:
    """Tensors divided over ranks, and whole ones: no kernel accepts both at once."""
    divided: list[DTensor] = []
    others: list[Tensor] = []
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            divided.append(tensor)
        else:
            others.append(tensor)
    return divided, others


@torch.no_grad()
def average_whole_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Averages the gradients of undivided parameters, in one all-reduce for each type."""
    whole_ones = split_divided(model.parameters())[1]
    gradients = [one.grad for one in whole_ones if one.grad is not None]
    for same in _by_type(gradients):
        sums = _flatten(same)
        with WaitingForRanks():
            dist.all_reduce(sums)
        _copy_from(sums / ranks.world_size, same)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all ranks; a collective call if it is divided."""
    if not isinstance(tensor, DTensor):
        return tensor
    with WaitingForRanks():
        return tensor.full_tensor()


def divided_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This rank's part of a whole tensor if `other` is divided; else the tensor."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


class WholeCopy:
    """A copy of a model whose parameters use no memory until they are needed whole.

    Evaluations run on it: ranks then encode different numbers of batches, and each forward pass of
    a divided encoder is a collective.
    """

    def __init__(self, model: UniCL) -> None:
        """Copies the model, which is not compiled or divided yet."""
        meta = {id(one): nn.Parameter(one.detach().to("meta")) for one in model.parameters()}
        self._model = copy.deepcopy(model, meta)
        self._model.requires_grad_(False)
        keep_activations_in_copy(self._model)
        self._empty = dict(self._model.named_parameters())

    @contextlib.contextmanager
    def filled(self, model: UniCL) -> Iterator[UniCL]:
        """The copy with the weights of a divided model; a collective call."""
        self._load({name: whole(one) for name, one in model.state_dict().items()})
        try:
            yield self._model
        finally:
            self._load(self._empty)

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        self._model.load_state_dict(tensors, assign=True, strict=False)
