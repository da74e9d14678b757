"""UniCL: two encoders and two projections; for objectives without texts a part of it.

`unicl_fast.checkpoints.load` builds it from a run's settings, and loads it from files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.config import Configured, DataConfig, ModelConfig, Projection
from unicl_fast.models.image_encoder import (
    DropPathKey,
    build_image_encoder,
    feature_width,
    set_image_size,
)
from unicl_fast.models.text_encoder import build_text_encoder
from unicl_fast.objectives.objective import Objective
from unicl_fast.objectives.operands import Encoded


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenParts:
    """The parts of one model that are not trained now."""

    names: frozenset[str] = frozenset()
    """The names of their parameters."""
    modules: tuple[nn.Module, ...] = ()
    """The modules that are frozen whole, the outermost ones."""
    in_base: frozenset[str] = frozenset()
    """The names of tensors that checkpoints leave out: those of `model.init`, which are found
    again."""
    base_digest: str = ""
    """`weights_digest` of them; empty if nothing is left out."""


class UniCL(nn.Module, Configured):
    """Images and texts to unit vectors of one space, and what the objective learns besides.

    `text_encoder` and `text_projection` are None where the objective has no texts, projections
    where it has no common space or `model.image_projection` is none. The objective's parameters are
    attributes of the names in `learnt_names`, such as `logit_scale`.
    """

    logit_scale: nn.Parameter

    def __init__(
        self,
        config: ModelConfig,
        objective: Objective,
        *,
        image_size: int = 224,
        other_sizes: Sequence[int] = (),
        drops_tokens: bool = False,
        seed: int = 0,
    ) -> None:
        """Builds the model with fresh weights.

        Args:
            config: its encoders and its space.
            objective: says whether there are texts and a space, and what else is learnt.
            image_size: side of the square images, in pixels.
            other_sizes: those of `run.stages`.
            drops_tokens: whether tokens of images are ever left out (`model.token_drop`).
            seed: of the fresh weights and of drop path.

        Raises:
            ValueError: an encoder that timm does not know or that cannot be built so, or no
                projection between an encoder and a space of another width.
        """
        super().__init__()
        self.frozen = FrozenParts()
        self.drop_path_key = DropPathKey(seed)
        self.image_projection = self.image_projection_bias = None
        self.text_projection = self.text_projection_bias = None
        self.has_space = objective.has_space
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.image_encoder = build_image_encoder(
                config.image_encoder,
                image_size=image_size,
                drop_path=config.drop_path,
                key=self.drop_path_key,
                drops_tokens=drops_tokens,
                other_sizes=other_sizes,
            )
            self.text_encoder: Any = build_text_encoder(config) if objective.uses_texts else None
            image_width = feature_width(self.image_encoder)
            if objective.has_space:
                self.image_projection, self.image_projection_bias = _projection(
                    config.image_projection, image_width, config
                )
            if objective.uses_texts:
                self.text_projection, self.text_projection_bias = _projection(
                    config.text_projection, config.text_width, config
                )
            learnt = objective.parameters(image_width)
        for name, parameter in learnt.items():
            self.register_parameter(name, parameter)
        self.learnt_names = tuple(learnt)

    def train(self, mode: bool = True) -> UniCL:
        """Sets training mode, in which frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self.frozen.modules:
            module.eval()
        return self

    def set_stage(self, data: DataConfig, model: ModelConfig) -> None:
        """Takes images and texts of the sizes of a stage from now on; weights keep their shapes."""
        set_image_size(self.image_encoder, data.image_size)
        if self.text_encoder is not None:
            self.text_encoder.longest = model.context_length
        if self.drop_path_key.tokens is not None:
            self.drop_path_key.tokens.part = model.token_drop

    @property
    def encoders(self) -> list[nn.Module]:
        """The image encoder and, where there is one, the text encoder."""
        return [one for one in (self.image_encoder, self.text_encoder) if one is not None]

    @property
    def learnt(self) -> dict[str, Tensor]:
        """The parameters of the objective, besides encoders and projections, by name."""
        return {name: getattr(self, name) for name in self.learnt_names}

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.parameters()).device

    def encode_image(
        self, images: Float[Tensor, "b c h w"] | Float[Tensor, "b w"]
    ) -> Float[Tensor, "b d"]:
        """Features of normalised images, of unit norm; the encoder's own without a common space.

        In place of images, what the image encoder gives of them may come: it is not run then.
        """
        features: Tensor = images if images.ndim == 2 else self.image_encoder(images)
        if not self.has_space:
            return _at_least_fp32(features)
        return _unit_norm(project(features, self.image_projection, self.image_projection_bias))

    def encode_text(
        self, tokens: Int[Tensor, "u l"], num_tokens: int | None = None
    ) -> Float[Tensor, "u d"]:
        """Features of token rows, padded after the end-of-text token, of unit norm.

        `num_tokens` is how many of them are not padding, to compute those only; not fewer, which is
        not checked (that would read the device). None computes all.

        Raises:
            ValueError: the model was trained without texts.
        """
        if self.text_encoder is None:
            raise ValueError(
                f"this model was trained with objective.name={self.config.objective.name} and has "
                "no text encoder: take unicl-eval linear-probe or knn"
            )
        features = self.text_encoder(tokens, num_tokens)
        return _unit_norm(project(features, self.text_projection, self.text_projection_bias))

    def forward(
        self,
        images: Float[Tensor, "b c h w"] | Float[Tensor, "b w"],
        tokens: Int[Tensor, "u l"] | None = None,
        num_tokens: int | None = None,
        after_texts: Callable[[Tensor], Tensor] | None = None,
    ) -> Encoded:
        """Computes the features of a batch, and what else is learnt that the loss needs.

        `after_texts` may begin to send the texts' to other ranks, and returns what takes their
        place.
        """
        # texts first: their order decides how gradients are added up, and sending takes time
        texts = None if tokens is None else self.encode_text(tokens, num_tokens)
        if texts is not None and after_texts is not None:
            texts = after_texts(texts)
        return Encoded(self.encode_image(images), texts, self.learnt)

    def set_drop_path_key(self, *, step: int, global_index: Int[Tensor, " b"]) -> None:
        """Fixes which branches the next forward passes drop, in training mode."""
        self.drop_path_key.set(step=step, global_index=global_index)


def project(
    features: Float[Tensor, "n w"], weight: Tensor | None, bias: Tensor | None
) -> Float[Tensor, "n d"]:
    """Features in the common space: times [w d], plus [d]; None leaves a step out."""
    if weight is not None:
        features = features @ weight
    return features if bias is None else features + bias


def weights_digest(model: UniCL, *prefixes: str) -> str:
    """XXH3 of all weights and buffers whose names begin so, as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _projection(
    kind: Projection, width: int, model: ModelConfig
) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """The weight [width d] and the bias [d] of a projection into the common space."""
    embed_dim = model.embed_dim
    if kind == "none":
        if width != embed_dim:
            raise ValueError(
                f"model.image_projection=none takes features as they are: model.embed_dim "
                f"({embed_dim}) must be the width of the image encoder's, {width}"
            )
        return None, None
    bias = nn.Parameter(torch.zeros(embed_dim)) if kind == "biased" else None
    # as CLIP's fresh ones: features are about as long after it as they were
    weight = nn.init.normal_(torch.empty(width, embed_dim), std=width**-0.5)
    return nn.Parameter(weight), bias


def _unit_norm(features: Tensor) -> Tensor:
    # the norm of bf16 vectors would be off by a percent
    return F.normalize(_at_least_fp32(features), dim=-1)


def _at_least_fp32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(torch.float32, features.dtype))
