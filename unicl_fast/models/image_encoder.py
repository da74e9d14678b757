"""Image encoders: timm's models without their classifier, whose drop path needs no generator.

A drop-path mask is a function of (seed, step, layer, global index), and so are the tokens that a
ViT leaves out. So a sample drops the same whichever rank holds it and however often its forward
pass is run, and resuming, other numbers of ranks, activation checkpointing and cached gradients
need no random state. Drop path, "stochastic depth": Huang et al., arXiv 1603.09382. Leaving out
tokens: Li et al., "Scaling Language-Image Pre-training via Masking", arXiv 2212.00794.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
from typing import Any

import timm
import torch
from timm.layers import DropPath, PatchEmbed
from torch import Tensor, nn

import unicl_fast.models.small  # noqa: F401  registers the small networks with timm
from unicl_fast.system.keyed_random import fold_key, fold_key_tensor, uniform_tensor

_PURPOSE, _TOKENS = 0xD409, 0x70C3
_NOT_BUILT = (TypeError, ValueError, AssertionError, RuntimeError)
_TRIED_SIZES = 12


def build_image_encoder(
    name: str, *, image_size: int, drop_path: float, token_drop: float = 0.0, key: DropPathKey
) -> nn.Module:
    """A timm model that maps images [b 3 image_size image_size] to features [b num_features].

    In training it leaves out the part `token_drop` of its tokens, at the steps that `key` says.

    Raises:
        ValueError: timm knows no such model, or the model cannot take this size or drop tokens.
    """
    if not timm.is_model(name):
        similar = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5)) or "none"
        raise ValueError(
            f"model.image_encoder: timm knows no model {name!r}; similar names: {similar}"
        )
    try:
        encoder = _create(name, image_size=image_size, drop_path=drop_path)
    except _NOT_BUILT as error:
        raise ValueError(
            f"model.image_encoder: {name} cannot be built for data.image_size={image_size} and "
            f"model.drop_path={drop_path}: {error}{_suggest_sizes(name, image_size)}"
        ) from error
    _replace_drop_path(encoder, key)
    if token_drop:
        if not isinstance(getattr(encoder, "patch_drop", None), nn.Module):
            raise ValueError(
                f"model.token_drop leaves out tokens of timm's ViTs, and {name} is none: set it to "
                "0; other encoders save by a smaller data.image_size"
            )
        prefix = int(encoder.num_prefix_tokens)  # type: ignore[arg-type]
        key.tokens = encoder.patch_drop = KeyedTokenDrop(token_drop, num_prefix_tokens=prefix)
    return encoder


def _create(name: str, *, image_size: int, drop_path: float = 0.0) -> nn.Module:
    """Builds timm's model; raises one of _NOT_BUILT if it cannot take this size or drop path."""
    arguments: dict[str, Any] = {}
    pretrained_cfg = timm.get_pretrained_cfg(name)
    has_one_size = pretrained_cfg is not None and pretrained_cfg.fixed_input_size
    if has_one_size:
        arguments["img_size"] = image_size  # position tables and windows are made for one size
    encoder: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=0, drop_path_rate=drop_path, **arguments
    )
    if has_one_size:
        _try_size(encoder, image_size)
    return encoder


def _try_size(encoder: nn.Module, image_size: int) -> None:
    """Raises what an image would meet: many models are built for a size that they cannot take."""
    for embedding in encoder.modules():
        # timm leaves out the pixels beyond the last whole patch, and says nothing
        if isinstance(embedding, PatchEmbed) and not embedding.dynamic_img_pad:
            patch = max(embedding.patch_size)
            if image_size % patch:
                raise ValueError(f"its patches of {patch} pixels do not divide {image_size}")
    tensors = itertools.chain(encoder.named_parameters(), encoder.named_buffers())
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors}
    size = 1, 3, image_size, image_size
    encoder.eval()
    with torch.no_grad():
        try:  # shapes alone, in milliseconds
            torch.func.functional_call(encoder, shapes, torch.empty(size, device="meta"))
        except Exception:  # it may be a tensor that is made in passing, and not the size
            encoder(torch.zeros(size))
    encoder.train()


def _suggest_sizes(name: str, image_size: int) -> str:
    """Names the nearest sizes that a model takes, as the end of a sentence; or nothing."""

    def fits(size: int) -> bool:
        try:
            with torch.device("meta"):
                _create(name, image_size=size)
        except _NOT_BUILT:
            return False
        return True

    if fits(image_size):  # the size is not what is wrong
        return ""
    # sides of patches, windows and strides are multiples of 4, or of 14
    sizes = [size for size in range(1, 8192) if size % 4 == 0 or size % 14 == 0]
    at = bisect.bisect_left(sizes, image_size)
    below, above = sizes[max(0, at - _TRIED_SIZES) : at][::-1], sizes[at : at + _TRIED_SIZES]
    found = [
        str(size) for side in (below, above) for size in itertools.islice(filter(fits, side), 1)
    ]
    return f"; take data.image_size={' or '.join(found)}" if found else ""


def feature_width(encoder: nn.Module) -> int:
    """Width of what a timm model without classifier returns, which is not always num_features."""
    return int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)  # type: ignore[arg-type]


class DropPathKey:
    """Decides the masks of one forward pass; shared by all layers of a model."""

    def __init__(self, seed: int, *, all_tokens_from: int = 0) -> None:
        """From step `all_tokens_from` on no token is left out."""
        self.seed, self.all_tokens_from = seed, all_tokens_from
        self.layers: list[KeyedDropPath] = []
        self.tokens: KeyedTokenDrop | None = None
        self._keep_probs: Tensor | None = None

    def set(self, *, step: int, global_index: Tensor) -> None:
        """Fixes the masks of the forward passes of samples `global_index` (int64 [b]) at `step`."""
        if self.tokens is not None:
            key = fold_key(self.seed, _TOKENS, step)
            self.tokens.keys = None
            if step < self.all_tokens_from:
                self.tokens.keys = fold_key_tensor(key, global_index)
        if not self.layers:
            return
        device = global_index.device
        if self._keep_probs is None or len(self._keep_probs) != len(self.layers):
            keep_probs = [[1.0 - layer.drop_prob] for layer in self.layers]
            self._keep_probs = torch.tensor(keep_probs, dtype=torch.float64)
        self._keep_probs = self._keep_probs.to(device)  # once: the copy makes a GPU wait
        numbers = torch.arange(len(self.layers), device=device)
        keys = fold_key_tensor(fold_key(self.seed, _PURPOSE, step), numbers)
        uniform = uniform_tensor(keys.unsqueeze(1), global_index.unsqueeze(0))
        factors = (uniform < self._keep_probs) / self._keep_probs
        for layer, its_factors in zip(self.layers, factors.unbind(), strict=True):
            layer.factors = its_factors


class KeyedDropPath(nn.Module):
    """timm's DropPath with the random tensor replaced by the key's.

    Layers differ in a tensor only, so that equal blocks share one compiled graph.
    """

    def __init__(self, *, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob, self.drops = drop_prob, drop_prob > 0
        self.factors: Tensor | None = None
        """The key sets them: each sample's branch is multiplied by its own, float64 [b]."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drops:
            return x
        if self.factors is None:
            raise RuntimeError(
                "drop path in training mode needs its key: call model.set_drop_path_key(step=..., "
                "global_index=...) before the forward pass"
            )
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class KeyedTokenDrop(nn.Module):
    """Leaves out tokens [b t w] in training, as many of each image and others of each image."""

    def __init__(self, part: float, *, num_prefix_tokens: int) -> None:
        """Leaves out the part `part` of the tokens behind the first, which are no patches."""
        super().__init__()
        self.part, self.num_prefix_tokens = part, num_prefix_tokens
        self.keys: Tensor | None = None
        """int64 [b], of the images of this forward pass; None leaves out nothing."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.keys is None:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        count = max(1, round(patches.shape[1] * (1 - self.part)))
        numbers = torch.arange(patches.shape[1], device=x.device)
        order = uniform_tensor(self.keys.unsqueeze(1), numbers.unsqueeze(0)).argsort(dim=1)
        kept = order[:, :count].sort(dim=1).values  # in their order, so that sums are the same
        index = kept.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return torch.cat([prefix, patches.gather(1, index)], dim=1)


def _replace_drop_path(encoder: nn.Module, key: DropPathKey) -> None:
    """Exchanges every timm DropPath, numbering layers in order of appearance."""
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                layer = KeyedDropPath(drop_prob=float(child.drop_prob))
                setattr(parent, name, layer)
                key.layers.append(layer)
