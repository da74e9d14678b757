"""UniCL: two encoders, two projections and a scale; for objectives without texts a part of it.

This is the model and how it is built from a config. Files of weights are the business of
`unicl_fast.checkpoints.load`, the loss on the features that of `unicl_fast.objectives`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.config import TEXT_KINDS, ModelConfig, Projection, TextKind, TrainConfig
from unicl_fast.models.efficiency import checkpoint_blocks
from unicl_fast.models.freezing import FrozenParts
from unicl_fast.models.image_encoder import (
    DropPathKey,
    build_image_encoder,
    feature_width,
    set_image_size,
)
from unicl_fast.models.text_encoder import TextEncoder, TextSettings, shallow_copy

Encoded = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Image features [b d], the features they are contrasted with [n d], their scale [], the bias of
the sigmoid form [], and the rows of words [k d + 1]; None where there is none."""


TRAINING_ONLY = ("word_rows",)
"""Parameters of terms of the objective, which no feature depends on."""


class UniCL(nn.Module):
    """Images and texts to unit vectors of one space, and the scale of their products.

    `text_encoder` and `text_projection` are None where the objective has no texts. SupCon compares
    images with each other. Cross-entropy has `class_rows` [k width + 1] in place of a space: for
    each class a row of weights whose last entry is the bias. A projection may be None, or have a
    bias beside it, as `model.image_projection` and `model.text_projection` say. `logit_bias` is
    None but under `objective.form=sigmoid`, `word_rows` [k d + 1], rows as those of classes, but
    under `objective.words`.

    A model that `tells_kinds` takes the kind of each text, a number of `TEXT_KINDS`. With a
    projection for each kind, [w 2d], an image has two features one after the other and a text has
    zeros in the other kind's place; a scale for each kind, [2], is a factor of the texts. So the
    loss, which only sees their products, is that of other models. `of_kind` gives the model for
    texts of one kind, an ordinary one.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Builds the model with fresh weights drawn from `run.seed`.

        Raises:
            ValueError: an encoder that timm does not know or that cannot be built so,
                cross-entropy without a number of classes or `objective.words` without one of words,
                or no projection between an encoder and a space of another width.
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
        if objective.words and not objective.num_words:
            raise ValueError("objective.num_words: objective.words needs words, and there are none")
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
            self.word_rows = None
            if objective.words:
                self.word_rows = _rows(objective.num_words, model.projected_width)
        per_kind = objective.temperature == "per_kind"
        self.logit_scale = nn.Parameter(
            torch.full([len(TEXT_KINDS)] if per_kind else [], _initial_logit_scale(config)),
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
        """Factor of the products of features; 1 where texts bring that of their kind along."""
        if self.logit_scale.ndim:
            return torch.ones_like(self.logit_scale[0])
        return self.logit_scale.exp()

    def encode_image(
        self, images: Float[Tensor, "b c h w"] | Float[Tensor, "b w"]
    ) -> Float[Tensor, "b d"]:
        """Features of normalised images, of unit norm; with projections per kind one for each kind.

        In place of images, what the image encoder gives of them may come: it is not run then.

        Under cross-entropy they are what `class_rows` is multiplied by, [b width + 1]: those of the
        encoder, and a 1 for the bias.
        """
        features: Tensor = images if images.ndim == 2 else self.image_encoder(images)
        if self.class_rows is not None:
            return F.pad(_at_least_fp32(features), (0, 1), value=1.0)
        features = project(features, self.image_projection, self.image_projection_bias)
        if self.config.model.projections == "shared":
            return _unit_norm(features)
        return self._of_each_kind(features).flatten(1)

    def encode_text(
        self,
        tokens: Int[Tensor, "u l"],
        num_tokens: int | None = None,
        kinds: Int[Tensor, " u"] | None = None,
    ) -> Float[Tensor, "u d"]:
        """Features of token rows, padded after the end-of-text token, of unit norm.

        `num_tokens` is how many of them are not padding, to compute those only; not fewer, which is
        not checked (that would read the device). None computes all. `kinds` are the numbers of the
        texts' kinds in `TEXT_KINDS`, for a model that tells them apart.

        Raises:
            ValueError: the model was trained without texts, or needs to know their kinds.
        """
        if self.text_encoder is None:
            raise ValueError(
                f"this model was trained with objective.name={self.config.objective.name} and has "
                "no text encoder: take unicl-eval linear-probe or knn"
            )
        if not self.config.tells_kinds:
            features = self.text_encoder(tokens, num_tokens)
            return _unit_norm(project(features, self.text_projection, self.text_projection_bias))
        if kinds is None:
            raise ValueError(
                "this model tells prompts of labels from captions: say what each text is (kinds), "
                "or take the model for one kind (of_kind)"
            )
        features = self.text_encoder(tokens, num_tokens, kinds)
        features = project(features, self.text_projection, self.text_projection_bias)
        features = self._of_each_kind(features)
        if features.shape[1] > 1:
            numbers = torch.arange(len(TEXT_KINDS), device=kinds.device)
            # F.one_hot would read the device
            features = features * (kinds[:, None] == numbers).unsqueeze(2)
        if self.logit_scale.ndim:
            # not by an index: the gradient of one is added up in any order by several threads
            scales = F.embedding(kinds, self.logit_scale.exp().unsqueeze(1))
            features = features * scales.unsqueeze(2)
        return features.flatten(1)

    def _of_each_kind(self, features: Float[Tensor, "n k"]) -> Float[Tensor, "n pairs d"]:
        """Unit vectors of the space of each pair of projections, one after the other."""
        if self.config.model.projections == "shared":
            return _unit_norm(features).unsqueeze(1)
        return _unit_norm(features.unflatten(1, (len(TEXT_KINDS), -1)))

    @torch.no_grad()
    def of_kind(self, kind: TextKind) -> UniCL:
        """The model for texts of one kind, to use and not to train; shares all weights it can.

        Its features of images and texts, their products and their scale are those of this model for
        such texts. A model that does not tell kinds apart is returned itself.
        """
        if not self.config.tells_kinds:
            return self
        replace, number = dataclasses.replace, TEXT_KINDS.index(kind)
        model = shallow_copy(self)
        model.config = replace(
            self.config,
            model=replace(self.config.model, source_token=False, projections="shared"),
            objective=replace(self.config.objective, temperature="shared"),
        )
        if self.config.model.projections == "per_kind":
            for side in ("image", "text"):
                for name in (f"{side}_projection", f"{side}_projection_bias"):
                    if (both := getattr(self, name)) is not None:
                        own = both.detach().chunk(len(TEXT_KINDS), dim=-1)[number].contiguous()
                        setattr(model, name, nn.Parameter(own, requires_grad=False))
        if self.logit_scale.ndim:
            model.logit_scale = nn.Parameter(self.logit_scale.detach()[number], requires_grad=False)
        assert self.text_encoder is not None
        model.text_encoder = self.text_encoder.of_kind(number)
        return model

    def forward(
        self,
        images: Float[Tensor, "b c h w"] | Float[Tensor, "b w"],
        tokens: Int[Tensor, "u l"] | None = None,
        num_tokens: int | None = None,
        kinds: Int[Tensor, " u"] | None = None,
        after_texts: Callable[[Tensor], Tensor] | None = None,
    ) -> Encoded:
        """Computes features, and what else is learnt that the loss needs.

        Images are contrasted with the features of texts if there are tokens, else with the learnt
        rows of classes, else with their own. `after_texts` may begin to send the texts' to other
        ranks, and returns what takes their place.
        """
        # texts first: their order decides how gradients are added up, and sending takes time
        contrast = None if tokens is None else self.encode_text(tokens, num_tokens, kinds)
        if contrast is not None and after_texts is not None:
            contrast = after_texts(contrast)
        features = self.encode_image(images)
        if contrast is None:
            contrast = features if self.class_rows is None else self.class_rows
        return features, contrast, self.scale, self.logit_bias, self.word_rows

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
        source_token=model.source_token,
    )


def _projection(
    kind: Projection, width: int, model: ModelConfig
) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """The weight [width d] and the bias [d]; or [width 2d] and [2d], with both kinds equal."""
    embed_dim = model.embed_dim
    if kind == "none":
        if width != embed_dim:
            raise ValueError(
                f"model.image_projection=none takes features as they are: model.embed_dim "
                f"({embed_dim}) must be the width of the image encoder's, {width}"
            )
        return None, None
    weight = _matrix(width, embed_dim)
    weight.data = weight.data.repeat(1, model.projected_width // embed_dim)
    bias = nn.Parameter(torch.zeros(model.projected_width)) if kind == "biased" else None
    return weight, bias


def _rows(count: int, width: int) -> nn.Parameter:
    """Rows of a linear layer [count width + 1], whose last column holds the biases."""
    rows = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, width + 1), std=0.02))
    nn.init.zeros_(rows.data[:, -1])
    return rows


def _matrix(width: int, columns: int) -> nn.Parameter:
    """A projection that, as CLIP's fresh ones, leaves features about as long as they are."""
    return nn.Parameter(nn.init.normal_(torch.empty(width, columns), std=width**-0.5))


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
