"""The two encoders as modules of one input and one output, for what exports such modules.

Each holds its own weights and not those of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.conversion.comparison import Samples
from unicl_fast.models.unicl import UniCL

IMAGE, TEXT = "image", "text"
INPUTS = {IMAGE: "images", TEXT: "tokens"}
OUTPUTS = {IMAGE: "image_features", TEXT: "text_features"}


class Tower(nn.Module):
    """Normalised pictures [b 3 h w], or token rows [b l], to unit-norm features [b d]."""

    def __init__(self, encoder: nn.Module, projection: nn.Parameter) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection

    def forward(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.encoder(inputs) @ self.projection, dim=-1)


def towers_of(model: UniCL) -> dict[str, Tower]:
    """Both towers, of the own weights of a model with texts, in fp32 and evaluation mode."""
    assert model.image_projection is not None
    assert model.text_encoder is not None
    assert model.text_projection is not None
    return {
        IMAGE: Tower(model.image_encoder, model.image_projection).eval(),
        TEXT: Tower(model.text_encoder, model.text_projection).eval(),
    }


def inputs_and_features(samples: Samples) -> dict[str, tuple[Tensor, Tensor]]:
    """What each tower is given, and should give."""
    return {
        IMAGE: (samples.images, samples.image_features),
        TEXT: (samples.tokens, samples.text_features),
    }


def batches_of(inputs: Tensor) -> list[Tensor]:
    """One, as many as there are, and 7 samples: sizes that an export may have been fixed to."""
    repeated = inputs.repeat(7, *[1] * (inputs.ndim - 1))
    return [inputs[:1], inputs, torch.as_tensor(repeated[:7])]
