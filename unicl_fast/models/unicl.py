"""UniCL: two encoders and two projections, or only those that the objective needs."""

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
    """The parts of a model that are not trained now."""

    names: frozenset[str] = frozenset()
    """Names of their parameters."""
    modules: tuple[nn.Module, ...] = ()
    """The outermost fully frozen modules."""
    in_base: frozenset[str] = frozenset()
    """Names of tensors that checkpoints leave out, since `model.init` provides them."""
    base_digest: str = ""
    """`weights_digest` of `in_base`; empty if nothing is left out."""


class UniCL(nn.Module, Configured):
    """Maps images and texts to unit vectors in one space; also holds the objective's parameters.

    `text_encoder` and `text_projection` are None if the objective has no texts, projections if it
    has no common space or `model.image_projection` is none. `learnt_names` names the objective's
    parameters, such as `logit_scale`.
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
        """Builds the model with initial weights.

        Args:
            config: its encoders and its space.
            objective: says whether there are texts and a space; adds its own parameters.
            image_size: side of the square images, in pixels.
            other_sizes: further image sizes, from `run.stages`.
            drops_tokens: whether image tokens are ever dropped (`model.token_drop`).
            seed: of the initial weights and of drop path.

        Raises:
            ValueError: timm cannot build the encoder, or a projection is missing between widths.
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
        """Sets training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self.frozen.modules:
            module.eval()
        return self

    def set_stage(self, data: DataConfig, model: ModelConfig) -> None:
        """Accepts a stage's image and text sizes from now on; weights keep their shapes."""
        set_image_size(self.image_encoder, data.image_size)
        if self.text_encoder is not None:
            self.text_encoder.longest = model.context_length
        if self.drop_path_key.tokens is not None:
            self.drop_path_key.tokens.part = model.token_drop

    @property
    def encoders(self) -> list[nn.Module]:
        """The image encoder and, if there is one, the text encoder."""
        return [one for one in (self.image_encoder, self.text_encoder) if one is not None]

    @property
    def learnt(self) -> dict[str, Tensor]:
        """The objective's own parameters by name, such as `logit_scale`."""
        return {name: getattr(self, name) for name in self.learnt_names}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode_image(
        self, images: Float[Tensor, "b c h w"] | Float[Tensor, "b w"]
    ) -> Float[Tensor, "b d"]:
        """Unit-norm features of normalised images; raw encoder features without a common space.

        Also accepts precomputed encoder features [b w]; the encoder is then skipped.
        """
        features: Tensor = images if images.ndim == 2 else self.image_encoder(images)
        if not self.has_space:
            return _at_least_fp32(features)
        return _unit_norm(project(features, self.image_projection, self.image_projection_bias))

    def encode_text(
        self, tokens: Int[Tensor, "u l"], num_tokens: int | None = None
    ) -> Float[Tensor, "u d"]:
        """Unit-norm features of token rows, padded after the end-of-text token.

        Only `num_tokens` tokens are computed (None: all): at least all real ones, which is not
        checked, since that would read the device. Raises ValueError without a text encoder.
        """
        if self.text_encoder is None:
            raise ValueError(
                f"this model was trained with objective.name={self.config.objective.name} and has "
                "no text encoder: use unicl-eval linear-probe or knn"
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
        """Encodes a batch; `after_texts` can start gathering texts; its result replaces them."""
        # texts first: gathering overlaps the images, and the order fixes how gradients add up
        texts = None if tokens is None else self.encode_text(tokens, num_tokens)
        if texts is not None and after_texts is not None:
            texts = after_texts(texts)
        return Encoded(self.encode_image(images), texts, self.learnt)

    def set_drop_path_key(self, *, step: int, global_index: Int[Tensor, " b"]) -> None:
        """Sets the branches that the next forward passes drop, in training mode."""
        self.drop_path_key.set(step=step, global_index=global_index)


def project(
    features: Float[Tensor, "n w"], weight: Tensor | None, bias: Tensor | None
) -> Float[Tensor, "n d"]:
    """Features times weight [w d] plus bias [d]; each is skipped if None."""
    if weight is not None:
        features = features @ weight
    return features if bias is None else features + bias


def weights_digest(model: UniCL, *prefixes: str) -> str:
    """XXH3 of all weights and buffers whose names begin with `prefixes`, as 16 hex digits."""
    digest = xxhash.xxh3_64()
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _projection(
    kind: Projection, width: int, model: ModelConfig
) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Weight [width d] and bias [d] of a projection into the common space."""
    embed_dim = model.embed_dim
    if kind == "none":
        if width != embed_dim:
            raise ValueError(
                f"model.image_projection=none uses features as they are: model.embed_dim "
                f"({embed_dim}) must be the width of the image encoder's, {width}"
            )
        return None, None
    bias = nn.Parameter(torch.zeros(embed_dim)) if kind == "biased" else None
    # as in CLIP: about preserves the norm of features
    weight = nn.init.normal_(torch.empty(width, embed_dim), std=width**-0.5)
    return nn.Parameter(weight), bias


def _unit_norm(features: Tensor) -> Tensor:
    # the norm of bf16 vectors would be off by a percent
    return F.normalize(_at_least_fp32(features), dim=-1)


def _at_least_fp32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(torch.float32, features.dtype))
