"""The bytes that a training step sends, and the operations that it computes, without running it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import (
    _DEFAULT_FIRST_BUCKET_BYTES,
    _compute_bucket_assignment_by_size,
)
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig
from unicl_fast.models.blocks import has_batch_norm
from unicl_fast.models.unicl import UniCL
from unicl_fast.training.encoding import quarter_parameter

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "broadcast"]

# DDP's own: its first bucket is small, so that sending begins early.
_BUCKET_BYTES = [_DEFAULT_FIRST_BUCKET_BYTES, 25 << 20]
_FLOAT, _INT = 4, 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """One exchange between ranks; `num_bytes` is the size of its larger side."""

    kind: Kind
    num_bytes: int
    dtype: torch.dtype = torch.float32


def collectives(
    world_size: int, *, num_texts: int, embed_dim: int, buffers: Mapping[torch.dtype, int]
) -> dict[str, Collective]:
    """A step's collectives without its gradients, under UniCL or CLIP, in the order of sending.

    `num_texts` are those of the rank that has the most; the others pad theirs to it. `buffers` are
    bytes of BatchNorm's averages by type.
    """
    columns = world_size * num_texts
    features = _FLOAT * embed_dim * columns
    averages = {
        f"averages, {dtype}": Collective(kind="broadcast", num_bytes=size, dtype=dtype)
        for dtype, size in buffers.items()
    }
    return {
        "text counts": Collective(kind="all-reduce", num_bytes=_INT, dtype=torch.int64),
        **averages,
        "texts": Collective(kind="all-gather", num_bytes=features),
        "classes": Collective(kind="all-gather", num_bytes=2 * _INT * columns, dtype=torch.int64),
        "loss: maxima": Collective(kind="all-reduce", num_bytes=_FLOAT * columns),
        "loss: sums": Collective(kind="all-reduce", num_bytes=_FLOAT * (3 * columns + 1)),
        "text gradients": Collective(kind="reduce-scatter", num_bytes=features),
        "stop flag": Collective(kind="all-reduce", num_bytes=_INT, dtype=torch.int64),
    }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Gradients that DDP sends together, once the last of them is there."""

    num_bytes: int
    of_texts: bool
    """Whether the text encoder's backward pass completes it; else the image encoder's."""
    ready: float
    """Part of that encoder's backward pass, from 0 to 1, after which it is complete."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The sizes of a model that the time of a step depends on."""

    image_operations: float
    """Operations of the matrix products and convolutions of one image's forward pass."""
    text_operations: float
    """The same of one text, with its padding."""
    embed_dim: int
    before_texts: float
    """Part of the images' backward pass that comes before that of the texts."""
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
        model = build_model(config).eval()
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
    before_texts, buckets = gradient_buckets(model, of_image.operations | of_text.operations)
    return ModelSize(
        image_operations=sum(of_image.operations.values()),
        text_operations=sum(of_text.operations.values()),
        embed_dim=config.model.embed_dim,
        before_texts=before_texts,
        buckets=tuple(buckets),
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


def gradient_buckets(
    model: UniCL, operations: Mapping[Tensor, float]
) -> tuple[float, list[Bucket]]:
    """DDP's buckets after its first step, in the order in which they are complete and sent.

    Each encoder is back-propagated from its end to its start; texts come after the part of the
    images that is returned, too.
    """
    assert model.text_encoder is not None
    assert model.image_projection is not None
    assert model.text_projection is not None
    images = [model.logit_scale, model.image_projection, *_as_they_arrive(model.image_encoder)]
    texts = [model.text_projection, *_as_they_arrive(model.text_encoder)]
    done: dict[Tensor, float] = {}
    for side in (images, texts):
        counted = list(itertools.accumulate(operations.get(weight, 0.0) for weight in side))
        done |= {
            weight: count / max(counted[-1], 1.0)
            for weight, count in zip(side, counted, strict=True)
        }
    last = quarter_parameter(model.image_encoder)
    assert last is not None
    later = 1 + next(number for number, weight in enumerate(images) if weight is last)
    weights: list[Tensor] = [*images[:later], *texts, *images[later:]]
    indices, _ = _compute_bucket_assignment_by_size(weights, _BUCKET_BYTES)
    return done[last], [
        Bucket(
            num_bytes=sum(weights[index].nbytes for index in members),
            of_texts=later <= max(members) < later + len(texts),
            ready=done[weights[max(members)]],
        )
        for members in indices
    ]


def _as_they_arrive(encoder: nn.Module) -> list[nn.Parameter]:
    """From the last to the first; positions, the encoder's own, are added after its first child."""
    first, *others = [
        child for child in encoder.children() if any(True for _ in child.parameters())
    ]
    own = encoder.parameters(recurse=False)
    later = itertools.chain.from_iterable(child.parameters() for child in others)
    return [*first.parameters(), *own, *later][::-1]
