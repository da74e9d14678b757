"""UniCL: two encoders, two projections and a scale; for objectives without texts a part of it.

This is the model and how it is built from a config. Files of weights are the business of
`unicl_fast.checkpoints.load`, the loss on the features that of `unicl_fast.objectives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.config import ModelConfig, Projection, TrainConfig
from unicl_fast.models.efficiency import checkpoint_blocks
from unicl_fast.models.freezing import FrozenParts
from unicl_fast.models.image_encoder import (
    DropPathKey,
    build_image_encoder,
    feature_width,
    set_image_size,
)
from unicl_fast.models.text_encoder import TextEncoder, TextSettings

Encoded = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Image features [b d], the features they are contrasted with [n d], their scale [], and the bias
[] of the sigmoid form or None."""


class UniCL(nn.Module):
    """Images and texts to unit vectors of one space, and the scale of their products.

    `text_encoder` and `text_projection` are None where the objective has no texts. SupCon compares
    images with each other. Cross-entropy has `class_rows` [k width + 1] in place of a space: for
    each class a row of weights whose last entry is the bias. A projection may be None, or have a
    bias beside it, as `model.image_projection` and `model.text_projection` say. `logit_bias` is
    None but under `objective.form=sigmoid`.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Builds the model with fresh weights drawn from `run.seed`.

        Raises:
            ValueError: an encoder that timm does not know or that cannot be built so,
                cross-entropy without a number of classes, or no projection between an encoder and
                a space of another width.
        """
        super().__init__()
        self.config = config
        self.frozen = FrozenParts()
        model, objective = config.model, config.objective
        classifies = objective.name == "ce"
        if classifies and not sum(objective.num_classes):
            raise ValueError(
                "objective.num_classes: cross-entropy needs classes, and there are none"
            )
        self.drop_path_key = DropPathKey(config.run.seed)
        settings = config.settings_of_stages
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            self.image_encoder = build_image_encoder(
                model.image_encoder,
                image_size=config.data.image_size,
                drop_path=model.drop_path,
                key=self.drop_path_key,
                drops_tokens=any(stage.model.token_drop for stage in settings),
                other_sizes=[stage.data.image_size for stage in settings],
            )
            self.text_encoder = _text_encoder(model) if objective.has_texts else None
            image_width = feature_width(self.image_encoder)
            self.image_projection = self.image_projection_bias = self.class_rows = None
            self.text_projection = self.text_projection_bias = None
            if classifies:
                self.class_rows = _rows(sum(objective.num_classes), image_width)
            else:
                self.image_projection, self.image_projection_bias = _projection(
                    model.image_projection, image_width, model
                )
            if objective.has_texts:
                self.text_projection, self.text_projection_bias = _projection(
                    model.text_projection, model.text_width, model
                )
        self.logit_scale = nn.Parameter(
            torch.tensor(_initial_logit_scale(config)),
            requires_grad=model.learn_logit_scale and not classifies,
        )
        self.logit_bias = None
        if objective.form == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor(model.logit_bias_init))
        if config.efficiency.activation_checkpointing:
            for encoder in self.encoders:
                checkpoint_blocks(encoder)
        self.set_stage(config)

    def train(self, mode: bool = True) -> UniCL:
        """Sets training mode, in which frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self.frozen.modules:
            module.eval()
        return self

    def set_stage(self, config: TrainConfig) -> None:
        """Takes images and texts of the sizes of a stage's config from now on, or of the run's.

        Weights stay what they are, in their shapes.
        """
        set_image_size(self.image_encoder, config.data.image_size)
        if self.text_encoder is not None:
            self.text_encoder.longest = config.model.context_length
        if self.drop_path_key.tokens is not None:
            self.drop_path_key.tokens.part = config.model.token_drop

    @property
    def encoders(self) -> list[nn.Module]:
        """The image encoder and, where there is one, the text encoder."""
        return [one for one in (self.image_encoder, self.text_encoder) if one is not None]

    @property
    def scale(self) -> Float[Tensor, ""]:
        """Factor of the products of features."""
        return self.logit_scale.exp()

    def encode_image(
        self, images: Float[Tensor, "b c h w"] | Float[Tensor, "b w"]
    ) -> Float[Tensor, "b d"]:
        """Features of normalised images, of unit norm.

        In place of images, what the image encoder gives of them may come: it is not run then.

        Under cross-entropy they are what `class_rows` is multiplied by, [b width + 1]: those of the
        encoder, and a 1 for the bias.
        """
        features: Tensor = images if images.ndim == 2 else self.image_encoder(images)
        if self.class_rows is not None:
            return F.pad(_at_least_fp32(features), (0, 1), value=1.0)
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
        """Computes features, and what else is learnt that the loss needs.

        Images are contrasted with the features of texts if there are tokens, else with the learnt
        rows of classes, else with their own. `after_texts` may begin to send the texts' to other
        ranks, and returns what takes their place.
        """
        # texts first: their order decides how gradients are added up, and sending takes time
        contrast = None if tokens is None else self.encode_text(tokens, num_tokens)
        if contrast is not None and after_texts is not None:
            contrast = after_texts(contrast)
        features = self.encode_image(images)
        if contrast is None:
            contrast = features if self.class_rows is None else self.class_rows
        return features, contrast, self.scale, self.logit_bias

    def set_drop_path_key(self, *, step: int, global_index: Int[Tensor, " b"]) -> None:
        """Fixes which branches the next forward passes drop, in training mode."""
        self.drop_path_key.set(step=step, global_index=global_index)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keeps the learnt log-scale at or below its maximum; called after each update."""
        self.logit_scale.clamp_(max=self.config.model.logit_scale_max)


def _initial_logit_scale(config: TrainConfig) -> float:
    if config.objective.name == "ce":  # which has none
        return 0.0
    if config.model.logit_scale_init is not None:
        return config.model.logit_scale_init
    return math.log(10) if config.objective.form == "sigmoid" else math.log(1 / 0.07)


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


def _text_encoder(model: ModelConfig) -> TextEncoder:
    return TextEncoder(
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        width=model.text_width,
        layers=model.text_layers,
        heads=model.text_heads,
        settings=TextSettings(
            activation=model.text_activation,
            causal=model.text_causal,
            pool=model.text_pool,
            mlp_ratio=model.text_mlp_ratio,
            norm_eps=model.text_norm_eps,
        ),
    )


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


def _rows(count: int, width: int) -> nn.Parameter:
    """Rows of a linear layer [count width + 1], whose last column holds the biases."""
    rows = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, width + 1), std=0.02))
    nn.init.zeros_(rows.data[:, -1])
    return rows


def _unit_norm(features: Tensor) -> Tensor:
    # the norm of bf16 vectors would be off by a percent
    return F.normalize(_at_least_fp32(features), dim=-1)


def _at_least_fp32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(torch.float32, features.dtype))


def build_model(name: str) -> UniCL:
    """The model of a preset with fresh weights, for example `build_model("swin-tiny")`.

    Raises:
        ValueError: no preset of that name.
    """
    from unicl_fast.presets import build_preset  # presets name models; not the other way round

    return UniCL(build_preset(name))
