"""UniCL: two encoders, two projections and a scale.

Holds the model and how it is built from a config. Where weights are stored is
`unicl_fast.checkpoint`'s business, what the features are compared with is `unicl_fast.loss`'s.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.config import TrainConfig
from unicl_fast.models.activation_checkpointing import checkpoint_blocks
from unicl_fast.models.drop_path import DropPathKey
from unicl_fast.models.image_encoder import build_image_encoder, feature_width
from unicl_fast.models.text_encoder import TextEncoder


class UniCL(nn.Module):
    """Pictures and texts to unit vectors of one space, and the scale of their products."""

    def __init__(self, config: TrainConfig) -> None:
        """Builds the model with fresh weights drawn from `run.seed`.

        Raises:
            ValueError: an encoder that timm does not know or that cannot be built so.
        """
        super().__init__()
        self.config = config
        model = config.model
        self.drop_path_key = DropPathKey(config.run.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            self.image_encoder = build_image_encoder(
                model.image_encoder,
                image_size=config.data.image_size,
                drop_path=model.drop_path,
                key=self.drop_path_key,
            )
            self.text_encoder = TextEncoder(
                vocab_size=model.vocab_size,
                context_length=model.context_length,
                width=model.text_width,
                layers=model.text_layers,
                heads=model.text_heads,
            )
            image_width = feature_width(self.image_encoder)
            self.image_projection = nn.Parameter(torch.empty(image_width, model.embed_dim))
            self.text_projection = nn.Parameter(torch.empty(model.text_width, model.embed_dim))
            nn.init.trunc_normal_(self.image_projection, std=0.02)
            nn.init.trunc_normal_(self.text_projection, std=0.02)
        self.logit_scale = nn.Parameter(torch.tensor(model.logit_scale_init))
        if config.efficiency.activation_checkpointing:
            checkpoint_blocks(self.image_encoder)
            checkpoint_blocks(self.text_encoder)

    def encode_image(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Unit-norm features [b d] of normalised pictures [b c h w]."""
        return _unit_norm(self.image_encoder(images) @ self.image_projection)

    def encode_text(
        self, tokens: Int[Tensor, "u l"], num_tokens: int | None = None
    ) -> Float[Tensor, "u d"]:
        """Unit-norm features [u d] of token rows [u l] that end with the end-of-text token.

        Args:
            tokens: int64 [u l], padded behind the end-of-text token.
            num_tokens: how many of them are not padding, to compute those only; not fewer, which
                is not checked (that would read the device). None computes all.
        """
        return _unit_norm(self.text_encoder(tokens, num_tokens) @ self.text_projection)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        tokens: Int[Tensor, "u l"],
        num_tokens: int | None = None,
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "u d"], Float[Tensor, ""]]:
        """Image features, text features, and the scale of their products."""
        texts = self.encode_text(tokens, num_tokens)
        return self.encode_image(images), texts, self.logit_scale.exp()

    def set_drop_path_key(self, *, step: int, slots: Int[Tensor, " b"]) -> None:
        """Fixes which branches the next forward passes drop, in training mode."""
        self.drop_path_key.set(step=step, slots=slots)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keeps the learnt log-scale at or below its maximum; called after each update."""
        self.logit_scale.clamp_(max=self.config.model.logit_scale_max)


def _unit_norm(features: Tensor) -> Tensor:
    # in fp32 at least: the norm of bf16 vectors would be off by a percent
    return F.normalize(features.to(torch.promote_types(torch.float32, features.dtype)), dim=-1)


def build_model(name: str) -> UniCL:
    """The model of a preset with fresh weights, for example `build_model("swin-tiny")`.

    Raises:
        ValueError: no preset of that name.
    """
    from unicl_fast.presets import build_preset  # presets name models; not the other way round

    return UniCL(build_preset(name))
