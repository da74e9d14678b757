"""Whether all ranks run the same thing: settings, data, code and, now and then, weights.

Ranks that disagree do not fail: they sum gradients of different losses and exit with 0. So their
descriptions are compared before the first step of every start, and a fingerprint of the weights now
and then. That costs a hash of the package's files and a small gather.
"""

import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unicl_fast.distributed.ranks import Ranks, gather_integers, gather_objects
from unicl_fast.system.wording import config_diff, count_of

_PACKAGES = (
    *("torch", "timm", "numpy", "numba", "nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    *("tokenizers", "triton"),
)
# The place of the data and the way they are fetched can differ between nodes.
_OF_A_NODE = ("train", "evaluate", "threads", "cache_folder", "cache_bytes")


def describe_rank(settings: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Describes all that ranks must have in common, in JSON's types.

    `settings` are of `config_to_dict`, as this rank will use them; `data` is of
    `describe_datasets`.
    """
    data_settings = {k: v for k, v in settings["data"].items() if k not in _OF_A_NODE}
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        **settings,
        "data": data_settings,
        "contents of data": dict(data),
        "code": code_digest(),
        "version of": versions,
    }


@functools.cache
def code_digest() -> str:
    """Hashes all code that trains; the same for an install and for a checkout."""
    digests = sorted(hashlib.blake2b(path.read_bytes()).digest() for path in source_files())
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def source_files() -> set[Path]:
    """Finds the Python files of the library and of pipelines/, wherever it is."""
    rooms = [path for path in Path(__file__).parents[1].iterdir() if path.name != "tools"]
    pipelines = find_spec("unicl_fast.pipelines")  # beside the package in a checkout
    rooms += map(Path, (pipelines and pipelines.submodule_search_locations) or ())
    files = {file for room in rooms for file in (room.rglob("*.py") if room.is_dir() else [room])}
    return {file for file in files if file.suffix == ".py"}


def check_ranks_agree(description: Mapping[str, Any], ranks: Ranks) -> None:
    """Compares the description of every rank with rank 0's; all ranks call it together.

    Raises ValueError: names, on every rank, the first rank that differs and its first difference.
    """
    text = json.dumps(description, sort_keys=True)
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
    if len(set(gather_integers(digest, ranks))) == 1:
        return
    own, *others = map(json.loads, gather_objects(text, ranks))
    for rank, its in enumerate(others, start=1):
        says = f"{{}} is {{}} on rank 0 and {{}} on rank {rank}"
        if differences := list(config_diff(own, its, says=says)):
            more = len(differences) - 1
            raise ValueError(
                f"ranks disagree: {differences[0]}"
                + (f" ({count_of(more, 'more difference')})" if more else "")
                + "; start all ranks with the same arguments, data and installation"
            )


def check_weights_agree(model: nn.Module, ranks: Ranks, *, step: int) -> None:
    """Compares the bits of all ranks' weights; all ranks call it together. Waits for the device.

    BatchNorm's averages are not compared: each rank's are of its local batches. Nor are tensors
    that `efficiency.shard=full` divides.

    Raises RuntimeError: names the parameters that differ.
    """
    if ranks.world_size == 1:
        return
    named = model.named_parameters()
    compared = {name: one.detach() for name, one in named if not isinstance(one, DTensor)}
    prints = torch.stack([_fingerprint(weights) for weights in compared.values()]).tolist()
    everyone = gather_objects(prints, ranks)
    by_name = zip(compared, zip(*everyone, strict=True), strict=True)
    different = [name for name, each in by_name if len(set(each)) > 1]
    if different:
        raise RuntimeError(
            f"weights differ between ranks after step {step}, in "
            f"{count_of(len(different), 'parameter')} such as {different[0]}: a device or a "
            "library computes wrongly on one of them, or training was changed; checkpoints hold "
            "rank 0's. Resume from one that was written before the ranks parted"
        )


def _fingerprint(weights: Tensor) -> Tensor:
    """The sum of a tensor's bits as whole numbers, which wraps around; int64 []."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    return weights.contiguous().view(kind).sum(dtype=torch.int64)
