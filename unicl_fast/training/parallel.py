"""How ranks train one model together: DDP, or with their training state divided over them.

`Parallel` does nothing on a single rank. Under DDP and `efficiency.shard=optimizer` each rank has
the whole model; under `full` none has.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from unicl_fast.config import EfficiencyConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models import sharding
from unicl_fast.models.blocks import has_batch_norm
from unicl_fast.models.compilation import compile_blocks
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.operands import Encoded
from unicl_fast.system.phases import WaitingForRanks

# torch 2.13 renames DDP's argument.
_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = next(
    name for name in ("forward_sync_buffers", "broadcast_buffers") if name in _ARGUMENTS
)


class Parallel:
    """A model on all ranks: encodes, joins gradients, sends updates."""

    def __init__(self, model: UniCL, efficiency: EfficiencyConfig, ranks: Ranks) -> None:
        """Compiles the blocks if the config says so, and divides or replicates the model.

        Raises ValueError: `efficiency.shard=full` cannot divide these encoders.
        """
        self._model, self._ranks = model, ranks
        self._whole_copy: sharding.WholeCopy | None = None
        self._owners: sharding.ParameterOwners | None = None
        divides_all = sharding.divides_all(efficiency, ranks)
        if divides_all:
            self._whole_copy = sharding.WholeCopy(model)
        if efficiency.compile != "off":
            compile_blocks(model)
        self.encode: Callable[..., Encoded] = model
        if divides_all:
            sharding.shard_encoders(model, ranks)
        elif ranks.world_size > 1:
            self.encode = _build_ddp(model)
        if sharding.divides_optimizer(efficiency, ranks):
            self._owners = sharding.ParameterOwners(model, ranks)

    @property
    def has_buckets(self) -> bool:
        """Whether gradients travel in DDP's buckets."""
        return isinstance(self.encode, DistributedDataParallel)

    @property
    def is_divided(self) -> bool:
        """Whether all ranks are needed to collect the training state."""
        return self._owners is not None or self._whole_copy is not None

    def rebuild(self) -> None:
        """Rebuilds DDP's buckets as they are at a start."""
        self._model.zero_grad()  # gradients are parts of the old buckets
        if self.has_buckets:
            self.encode = self._model  # which frees the old ones
            self.encode = _build_ddp(self._model)

    def order_buckets(self) -> None:
        """Orders DDP's buckets as gradients came in the first backward pass; needs empty gradients.

        DDP would do it at its next forward pass. By then gradients of earlier micro-batches are
        there; it would divide them by the number of ranks once, and later multiply by the inverse.
        """
        if isinstance(self.encode, DistributedDataParallel):
            self.encode.reducer._rebuild_buckets()

    def begin_step(self) -> None:
        """Gives all ranks rank 0's averages of BatchNorm, as DDP does by itself."""
        if self._whole_copy is not None and has_batch_norm(self._model):
            self._share_buffers()

    def join_gradients(self) -> None:
        """Averages the gradients over ranks, as DDP and `fully_shard` do by themselves."""
        if self._whole_copy is not None:
            sharding.average_whole_gradients(self._model, self._ranks)

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Around an update: this rank's parameters change, then all ranks get all."""
        if self._owners is not None:
            self._owners.drop_other_gradients()
        yield
        if self._owners is not None:
            self._owners.send_updates()

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[UniCL]:
        """The model, whole and equal on all ranks, which call it together."""
        if self._ranks.world_size > 1:  # DDP shares BatchNorm's averages before forward passes only
            self._share_buffers()
        if self._whole_copy is None:
            yield self._model
            return
        with self._whole_copy.filled(self._model) as whole:
            yield whole

    def _share_buffers(self) -> None:
        with WaitingForRanks():
            sharding.send_from(0, self._model.buffers(), rank=self._ranks.rank)


def _build_ddp(model: UniCL) -> DistributedDataParallel:
    # only BatchNorm's ever change
    buffers: dict[str, Any] = {_SYNC_BUFFERS: has_batch_norm(model)}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **buffers)
