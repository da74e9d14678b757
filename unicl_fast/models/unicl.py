"""UniCL: two encoders and two projections, or only those that the objective needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.config import Configured, DataConfig, ModelConfig
from unicl_fast.models.image_encoder import (
    DropPathKey,
    build_image_encoder,
    feature_width,
    set_image_size,
)
from unicl_fast.models.text_encoder import build_text_encoder
from unicl_fast.objectives.objective import Objective
from unicl_fast.objectives.operands import Encoded
from unicl_fast.system.keyed_random import fold_key, fold_key_tensor, normal_tensor

_NOISE = 0x201E
LEAST_DEVIATION = 1e-3  # of the largest: what hardly varies must not blow up a test image

Tower = Literal["image", "text"]


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


class Head(NamedTuple):
    """The way from an encoder's features [n w] into the common space [n d].

    Standardises, then multiplies once, or twice with GELU between; a part that is None is skipped.
    """

    mean: Tensor | None = None
    """[w], of the encoder's features on the training data."""
    factor: Tensor | None = None
    """[w], one over their standard deviations; [] for texts, which need one for all."""
    hidden: Tensor | None = None
    """[w h]."""
    hidden_bias: Tensor | None = None
    """[h]."""
    weight: Tensor | None = None
    """[w d], or [h d]."""
    bias: Tensor | None = None
    """[d]."""

    def __call__(
        self, features: Float[Tensor, "n w"], noise: Float[Tensor, "n w"] | None = None
    ) -> Float[Tensor, "n d"]:
        """Maps features; `noise` is added to standardised ones."""
        if self.mean is not None:
            features = features - self.mean
        if self.factor is not None:
            features = features * self.factor
        if noise is not None:
            features = features + noise
        if self.hidden is not None:
            features = features @ self.hidden
            features = features if self.hidden_bias is None else features + self.hidden_bias
            features = F.gelu(features)
        if self.weight is not None:
            features = features @ self.weight
        return features if self.bias is None else features + self.bias


class UniCL(nn.Module, Configured):
    """Maps images and texts to unit vectors in one space; also holds the objective's parameters.

    `text_encoder` and the text's head are None if the objective has no texts, heads if it has no
    common space; `head` says which tensors a head has. `learnt_names` names the objective's
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
        seed: int = 0,
    ) -> None:
        """Builds the model with initial weights.

        Args:
            config: its encoders and its space.
            objective: says whether there are texts and a space; adds its own parameters.
            image_size: side of the square images, in pixels.
            other_sizes: further image sizes, from `run.stages`.
            seed: of the initial weights and of drop path.

        Raises:
            ValueError: timm cannot build the encoder, or a projection is missing between widths.
        """
        super().__init__()
        self.frozen = FrozenParts()
        self.drop_path_key = DropPathKey(seed)
        for tower in ("image", "text"):
            for part in Head._fields:
                if part in ("mean", "factor"):
                    self.register_buffer(_name_of(tower, part), None)
                else:
                    setattr(self, _name_of(tower, part), None)
        self.has_space = objective.has_space
        self.noise_deviation = config.feature_noise
        self._noise_keys: Tensor | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.image_encoder = build_image_encoder(
                config.image_encoder,
                image_size=image_size,
                drop_path=config.drop_path,
                key=self.drop_path_key,
                other_sizes=other_sizes,
            )
            self.text_encoder: Any = build_text_encoder(config) if objective.uses_texts else None
            image_width = feature_width(self.image_encoder)
            if objective.has_space:
                self._build_head("image", image_width, config)
            if objective.uses_texts:
                self._build_head("text", config.text_width, config)
            learnt = objective.parameters(image_width)
        for name, parameter in learnt.items():
            self.register_parameter(name, parameter)
        self.learnt_names = tuple(learnt)

    def _build_head(self, tower: Tower, width: int, config: ModelConfig) -> None:
        """Draws a projection into the common space, like CLIP's; features about keep their norm.

        An MLP has the shapes of open_clip's, so that it can be exported (timm_proj=mlp).
        """
        is_image = tower == "image"
        kind = config.image_projection if is_image else config.text_projection
        if kind == "none" and width != config.embed_dim:
            raise ValueError(
                f"model.{tower}_projection=none uses features as they are: model.embed_dim "
                f"({config.embed_dim}) must be the width of the {tower} encoder's, {width}"
            )

        def drawn(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(nn.init.normal_(torch.empty(rows, columns), std=rows**-0.5))

        own: dict[str, Tensor] = {}
        if config.standardise:  # the identity, until the statistics are known
            own["factor"] = torch.ones(width if is_image else ())
            own |= {"mean": torch.zeros(width)} if is_image else {}
        if kind == "mlp":
            inner = 2 * config.embed_dim if is_image else (width + config.embed_dim) // 2
            own["hidden"] = drawn(width, inner)
            if is_image:
                own["hidden_bias"] = nn.Parameter(torch.zeros(inner))
            width = inner
        if kind != "none":
            own["weight"] = drawn(width, config.embed_dim)
        if kind == "biased":
            own["bias"] = nn.Parameter(torch.zeros(config.embed_dim))
        for part, value in own.items():
            setattr(self, _name_of(tower, part), value)

    def head(self, tower: Tower) -> Head:
        """The way from a tower's encoder into the common space, with the tensors of this model."""
        return Head(*(getattr(self, _name_of(tower, part)) for part in Head._fields))

    def set_statistics(
        self, tower: Tower, mean: Float[Tensor, " w"], deviation: Float[Tensor, " w"]
    ) -> None:
        """Sets the statistics by which `model.standardise` standardises features.

        Texts get one factor only, since a text's head has no place for more in other libraries;
        what their mean adds to similarities, training can remove.
        """
        head = self.head(tower)
        assert head.factor is not None
        if head.mean is None:
            deviation = deviation.square().mean().sqrt()
        else:
            head.mean.copy_(mean)
        least = LEAST_DEVIATION * deviation.max().item() or 1.0
        head.factor.copy_(1 / deviation.clamp(min=least))

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
        return _unit_norm(self.head("image")(features, self._noise_of(features)))

    def encode_text(
        self, tokens: Int[Tensor, "u l"] | Float[Tensor, "u w"], num_tokens: int | None = None
    ) -> Float[Tensor, "u d"]:
        """Unit-norm features of token rows, padded after the end-of-text token.

        Also accepts precomputed encoder features [u w]; the encoder is then skipped. Only
        `num_tokens` tokens are computed (None: all): at least all real ones, which is not checked,
        since that would read the device. Raises ValueError without a text encoder.
        """
        if self.text_encoder is None:
            raise ValueError(
                f"this model was trained with objective.name={self.config.objective.name} and has "
                "no text encoder: use unicl-eval linear-probe or knn"
            )
        is_encoded = tokens.is_floating_point()
        features = tokens if is_encoded else self.text_encoder(tokens, num_tokens)
        return _unit_norm(self.head("text")(features))

    def forward(
        self,
        images: Float[Tensor, "b c h w"] | Float[Tensor, "b w"],
        tokens: Int[Tensor, "u l"] | Float[Tensor, "u v"] | None = None,
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
        """Sets what the next forward passes drop, and their noise, in training mode."""
        self.drop_path_key.set(step=step, global_index=global_index)
        if self.noise_deviation:
            key = fold_key(self.drop_path_key.seed, _NOISE, step)
            self._noise_keys = fold_key_tensor(key, global_index)

    def _noise_of(self, features: Float[Tensor, "b w"]) -> Float[Tensor, "b w"] | None:
        """Noise of `model.feature_noise`, a function of seed, step and global index."""
        if not self.training or not self.noise_deviation or self._noise_keys is None:
            return None
        noise = normal_tensor(self._noise_keys, features.shape[1])
        return (noise * self.noise_deviation).to(features.dtype)


@torch.no_grad()
def fold_statistics(model: UniCL) -> None:
    """Makes the standardisation of features a part of the heads' first layers, for other libraries.

    Features change by rounding only.
    """
    if not model.config.model.standardise:
        return
    projections: dict[str, str] = {}
    for tower in ("image", "text"):
        head = model.head(tower)
        if head.factor is None:
            continue
        first = "weight" if head.hidden is None else "hidden"
        matrix: Tensor = getattr(head, first)
        matrix.mul_(head.factor[:, None] if head.mean is not None else head.factor)
        if head.mean is not None:
            name = _name_of(tower, "bias" if head.hidden is None else "hidden_bias")
            old = getattr(model, name)
            shift = -(head.mean @ matrix)
            setattr(model, name, nn.Parameter(shift if old is None else old + shift))
            if head.hidden is None:
                projections[f"{tower}_projection"] = "biased"
        for part in ("mean", "factor"):
            setattr(model, _name_of(tower, part), None)
    model.noise_deviation = 0.0
    plain = {"standardise": False, "feature_noise": 0.0}
    model.config = model.config.changed(model=plain | projections)


def weights_digest(model: UniCL, *prefixes: str) -> str:
    """XXH3 of all weights and buffers whose names begin with `prefixes`, as 16 hex digits."""
    digest = xxhash.xxh3_64()
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _name_of(tower: str, part: str) -> str:
    """The attribute that holds a part of a tower's head."""
    names = {"weight": "projection", "bias": "projection_bias"}
    return f"{tower}_{names.get(part, part)}"


def _unit_norm(features: Tensor) -> Tensor:
    # the norm of bf16 vectors would be off by a percent
    return F.normalize(_at_least_fp32(features), dim=-1)


def _at_least_fp32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(torch.float32, features.dtype))
