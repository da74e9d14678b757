"""timm's image encoders without classifier; drop path uses no random state.

Its mask (Huang et al., arXiv 1603.09382) is a function of (seed, step, layer, global index): the
same on any rank and in each recomputation.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
import math
from collections.abc import Collection
from typing import Any

import timm
import torch
from timm.layers import DropPath, Format, PatchEmbed
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import unicl_fast.models.small  # noqa: F401  registers the small networks with timm
from unicl_fast.models import vits
from unicl_fast.system.keyed_random import fold_key, fold_key_tensor, uniform_tensor

_PURPOSE = 0xD409
_NOT_BUILT = (TypeError, ValueError, AssertionError, RuntimeError)
_TRIED_SIZES = 12
_FEW_PRODUCTS = 3 * 10**11
"""Up to this number of pixels times parameters (EfficientNet-Lite0 and ViT-Ti at 224 pixels have 2
and 3), a real forward pass is 3 to 10 times as fast as one of only shapes."""


def build_image_encoder(
    name: str,
    *,
    image_size: int,
    drop_path: float,
    key: DropPathKey,
    other_sizes: Collection[int] = (),
) -> nn.Module:
    """A timm model that maps images [b 3 image_size image_size] to features [b num_features].

    `key` decides its drop path. It accepts images of `other_sizes` after `set_image_size`. Raises
    ValueError if timm knows no such model, or the model cannot use these sizes.
    """
    vits.register(name)
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
    for size in sorted(set(other_sizes) - {image_size}):
        try:
            set_image_size(encoder, size)
            _try_size(encoder, size)
        except _NOT_BUILT as error:
            raise ValueError(
                f"run.stages: {name} of data.image_size={image_size} cannot take images of {size} "
                f"pixels: {error}{_suggest_sizes(name, size)}"
            ) from error
    set_image_size(encoder, image_size)
    _replace_drop_path(encoder, key)
    return encoder


def set_image_size(encoder: nn.Module, image_size: int) -> None:
    """Lets an encoder accept another image size, with its present weights.

    Position tables keep the size they were built for: a ViT resamples its own in each forward pass
    (timm's `dynamic_img_size`), and a Swin's smaller windows look up the middle of theirs, which
    holds the smaller distances. Convolutions need no change; other tables raise ValueError.
    """
    embedding = getattr(encoder, "patch_embed", None)
    if not isinstance(embedding, PatchEmbed) or image_size == embedding.img_size[0]:
        return
    if isinstance(encoder, SwinTransformer):
        _set_swin_size(encoder, image_size)
    elif not isinstance(encoder, VisionTransformer):
        raise ValueError("of encoders built for one size, only ViTs and Swins can change it")
    elif not encoder.dynamic_img_size:
        # same as timm's argument of that name
        encoder.dynamic_img_size = True
        embedding.strict_img_size, embedding.flatten = False, False
        embedding.output_fmt = Format.NHWC


def _set_swin_size(encoder: SwinTransformer, image_size: int) -> None:
    """Gives all blocks the windows of timm's model for this size."""
    encoder.patch_embed.set_input_size(img_size=(image_size, image_size))
    side = encoder.patch_embed.grid_size[0]
    for number, layer in enumerate(encoder.layers):
        side = -(-side // 2) if number else side
        for block in layer.modules():
            if not isinstance(block, SwinTransformerBlock):
                continue
            table = block.attn.relative_position_bias_table
            largest = (math.isqrt(len(table)) + 1) // 2
            window = min(side, largest)
            block.input_resolution = side, side
            block.window_size = block.attn.window_size = window, window
            block.window_area = block.attn.window_area = window * window
            block.shift_size = (0, 0) if side <= window else block.target_shift_size
            mask = None if block.dynamic_mask else block.get_attn_mask()
            mask = None if mask is None else mask.to(table)
            block.register_buffer("attn_mask", mask, persistent=False)
            place = torch.arange(window, device=table.device)
            row, column = place.repeat_interleave(window), place.repeat(window)
            down = row[:, None] - row + largest - 1
            right = column[:, None] - column + largest - 1
            block.attn.relative_position_index = down * (2 * largest - 1) + right


def _create(name: str, *, image_size: int, drop_path: float = 0.0) -> nn.Module:
    """Builds timm's model; raises one of _NOT_BUILT if the size or drop path is impossible."""
    arguments: dict[str, Any] = {}
    pretrained_cfg = timm.get_pretrained_cfg(name)
    has_one_size = pretrained_cfg is not None and pretrained_cfg.fixed_input_size
    if has_one_size:
        arguments["img_size"] = image_size  # position tables and windows are made for one size
    arguments |= {"pretrained": False, "num_classes": 0}
    try:
        encoder: nn.Module = timm.create_model(name, drop_path_rate=drop_path, **arguments)
    except TypeError:
        if drop_path:
            raise
        encoder = timm.create_model(name, **arguments)  # older networks have no such argument
    if has_one_size:
        _try_size(encoder, image_size)
    return encoder


def _try_size(encoder: nn.Module, image_size: int) -> None:
    """Runs one image: timm builds many models for sizes that they cannot run."""
    own: Any = getattr(encoder, "pretrained_cfg", None) or {"input_size": [0]}
    for embedding in encoder.modules():
        # timm silently drops pixels beyond the last whole patch; some models were trained that way
        # (SigLIP so400m, 384 pixels in patches of 14)
        if isinstance(embedding, PatchEmbed) and not embedding.dynamic_img_pad:
            patch = max(embedding.patch_size)
            if image_size % patch and image_size != own["input_size"][-1]:
                raise ValueError(f"its patches of {patch} pixels do not divide {image_size}")
    size = 1, 3, image_size, image_size
    encoder.eval()
    with torch.no_grad():
        num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
        is_quick = image_size**2 * num_parameters <= _FEW_PRODUCTS
        if is_quick or not _takes_shapes(encoder, size):
            # shapes also fail for a model that creates a tensor in forward: run it for real
            encoder(torch.zeros(size))
    encoder.train()


def _takes_shapes(encoder: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether a pass of shapes alone works: 0.04 to 0.2 s for any model and image size."""
    tensors = itertools.chain(encoder.named_parameters(), encoder.named_buffers())
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors}
    try:
        torch.func.functional_call(encoder, shapes, torch.empty(size, device="meta"))
    except Exception:
        return False
    return True


def _suggest_sizes(name: str, image_size: int) -> str:
    """The nearest sizes that a model accepts, as the end of a sentence; or nothing."""

    def fits(size: int) -> bool:
        try:
            with torch.device("meta"):
                _create(name, image_size=size)
        except _NOT_BUILT:
            return False
        return True

    if fits(image_size):  # the size is not the problem
        return ""
    # sides of patches, windows and strides are multiples of 4, or of 14
    sizes = [size for size in range(1, 8192) if size % 4 == 0 or size % 14 == 0]
    at = bisect.bisect_left(sizes, image_size)
    below, above = sizes[max(0, at - _TRIED_SIZES) : at][::-1], sizes[at : at + _TRIED_SIZES]
    found = [
        str(size) for side in (below, above) for size in itertools.islice(filter(fits, side), 1)
    ]
    return f"; set data.image_size={' or '.join(found)}" if found else ""


def feature_width(encoder: nn.Module) -> int:
    """Feature width of a timm model without classifier, which is not always num_features."""
    return int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)  # type: ignore[arg-type]


class DropPathKey:
    """Decides the masks of a forward pass; shared by all layers of a model."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.layers: list[KeyedDropPath] = []
        self._keep_probs: Tensor | None = None

    def set(self, *, step: int, global_index: Tensor) -> None:
        """Sets the masks for samples `global_index` (int64 [b]) at `step`."""
        if not self.layers:
            return
        device = global_index.device
        if self._keep_probs is None or len(self._keep_probs) != len(self.layers):
            keep_probs = [[1.0 - layer.drop_prob] for layer in self.layers]
            self._keep_probs = torch.tensor(keep_probs, dtype=torch.float64)
        self._keep_probs = self._keep_probs.to(device)  # once: the copy synchronises a GPU
        numbers = torch.arange(len(self.layers), device=device)
        keys = fold_key_tensor(fold_key(self.seed, _PURPOSE, step), numbers)
        uniform = uniform_tensor(keys.unsqueeze(1), global_index.unsqueeze(0))
        factors = (uniform < self._keep_probs) / self._keep_probs
        for layer, its_factors in zip(self.layers, factors.unbind(), strict=True):
            layer.factors = its_factors


class KeyedDropPath(nn.Module):
    """timm's DropPath with keyed factors, a tensor so that equal blocks share a compiled graph."""

    def __init__(self, *, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob, self.drops = drop_prob, drop_prob > 0
        self.factors: Tensor | None = None
        """Set by the key: a factor for each sample's branch, float64 [b]."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drops:
            return x
        if self.factors is None:
            raise RuntimeError(
                "drop path in training mode needs its key: call model.set_drop_path_key(step=..., "
                "global_index=...) before the forward pass"
            )
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _replace_drop_path(encoder: nn.Module, key: DropPathKey) -> None:
    """Replaces every timm DropPath, numbering layers in order of appearance."""
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                layer = KeyedDropPath(drop_prob=float(child.drop_prob))
                setattr(parent, name, layer)
                key.layers.append(layer)
