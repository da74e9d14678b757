"""Features of all images of a data set: extracted once, over all ranks, and kept in a folder.

A linear probe and its many fits, nearest neighbours and retrieval need the same features again and
again, and the encoder is all that takes long. What a stored file holds is told by its name, a
checksum of everything that decides the features; so nothing stale is ever read.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from unicl_fast.batch import EvaluationLoader
from unicl_fast.distributed.ranks import Ranks, gather_integers
from unicl_fast.evaluation.encode import Layer, encode_images
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.atomic_files import replacing
from unicl_fast.system.progress import EvaluationStopped, WaitingForRanks, heartbeat_and_check_stop

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 8192
"""Rows that each rank sends in one collective: 25 MB of 768 numbers."""


def extract_features(
    model: UniCL,
    loader: EvaluationLoader,
    *,
    num_samples: int,
    layer: Layer = "projection",
    ranks: Ranks | None = None,
    num_batches: int | None = None,
) -> Float[Tensor, "n d"] | None:
    """Features of every sample, in the order of the data set.

    Args:
        model: in evaluation mode.
        loader: over all ranks, each sample once; rank r of w has r, r + w, r + 2 w, ...
        num_samples: of the data set.
        layer: which features.
        ranks: who shares the work.
        num_batches: for the progress bar; None shows none.

    Returns:
        [num_samples d] on the host, fp32 or fp64; None on all ranks but rank 0.

    Raises:
        EvaluationStopped: it was asked to leave off, on all ranks.
    """
    ranks = ranks or Ranks()
    expected = torch.arange(ranks.rank, num_samples, ranks.world_size)
    parts: list[Tensor] = []
    stopped, done = False, 0
    for batch in tqdm(loader, desc="encode images", total=num_batches, disable=num_batches is None):
        if not heartbeat_and_check_stop():
            stopped = True
            break
        ids = batch.sample_ids
        assert torch.equal(ids, expected[done : done + len(ids)]), "samples out of order"
        parts.append(encode_images(model, batch.images, layer=layer).cpu())
        done += len(ids)
    if any(gather_integers(int(stopped), ranks)):
        raise EvaluationStopped
    return collect_rows(torch.cat(parts) if parts else None, num_rows=num_samples, ranks=ranks)


def collect_rows(
    mine: Float[Tensor, "m d"] | None, *, num_rows: int, ranks: Ranks
) -> Float[Tensor, "n d"] | None:
    """Rows r, r + w, r + 2 w, ... of rank r of w, put together on rank 0.

    Args:
        mine: this rank's rows, on the host; None if it has none.
        num_rows: of all ranks.
        ranks: who has some.

    Returns:
        [num_rows d]; None on all ranks but rank 0.
    """
    if ranks.world_size == 1:
        return mine
    # a rank without rows does not know how long one is, nor of which type
    width = max(gather_integers(0 if mine is None else mine.shape[1], ranks))
    double = max(gather_integers(int(mine is not None and mine.dtype == torch.float64), ranks))
    dtype = torch.float64 if double else torch.float32
    mine = torch.empty(0, width, dtype=dtype) if mine is None else mine
    whole = torch.empty(num_rows, width, dtype=dtype) if ranks.is_main else None
    most = -(-num_rows // ranks.world_size)
    for start in range(0, most, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, most - start)
        sent = torch.zeros(count, width, dtype=dtype)
        part = mine[start : start + count]
        sent[: len(part)] = part
        received = (
            [torch.empty_like(sent) for _ in range(ranks.world_size)] if ranks.is_main else None
        )
        with WaitingForRanks():
            dist.gather(sent, received, dst=0, group=ranks.host_group)
        if whole is not None and received is not None:
            for rank, rows in enumerate(received):
                places = whole[rank + start * ranks.world_size :: ranks.world_size][:count]
                places.copy_(rows[: len(places)])
    return whole


class FeatureCache:
    """A folder of feature files, one for each key."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` is made when something is stored; None keeps nothing."""
        self._folder = folder

    def has(self, key: str) -> bool:
        """Whether features are stored under a key."""
        return self._folder is not None and self._path(key).is_file()

    def load(self, key: str, *, num_samples: int) -> Float[Tensor, "n d"]:
        """Stored features.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(key)
        try:
            values = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged: {error}; remove it") from error
        if values.ndim != 2 or len(values) != num_samples or values.dtype.kind != "f":
            raise ValueError(
                f"{path} is damaged: {num_samples} rows of features were expected, "
                f"{values.dtype} {list(values.shape)} came; remove it"
            )
        return torch.from_numpy(values)

    def store(self, key: str, features: Float[Tensor, "n d"]) -> None:
        """Writes features whole or not at all; a disk that refuses is said, and no more."""
        if self._folder is None:
            return
        path = self._path(key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, flush=False) as aside, aside.open("wb") as file:
                np.save(file, features.numpy(), allow_pickle=False)
        except OSError as error:
            logger.warning("features are not kept: %s cannot be written: %s", path, error)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.npy"
