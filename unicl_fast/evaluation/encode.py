"""Images and token rows to features, as every evaluation needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from unicl_fast.models.precision import Precision, normalise_images
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.progress import heartbeat_and_check_stop

Layer = Literal["encoder", "projection"]
"""Which features of an image: what the image encoder gives, or its unit-norm projection into the
space that texts are compared in. A model trained by cross-entropy has no such space."""


def device_of(model: UniCL) -> torch.device:
    """Where the model lies."""
    return next(model.image_encoder.parameters()).device


def require_text_encoder(model: UniCL, what: str) -> None:
    """Refuses a model that was trained without texts.

    Args:
        model: any.
        what: needs texts, for the message.

    Raises:
        ValueError: it has no text encoder.
    """
    if model.text_encoder is None:
        raise ValueError(
            f"{what} compares images with texts, and this model has no text encoder, since it "
            "was trained without one: take linear-probe, knn, finetune or detect"
        )


def require_layer(model: UniCL, layer: Layer) -> None:
    """Refuses features that a model does not have.

    Args:
        model: any.
        layer: which features are asked for.

    Raises:
        ValueError: the projection of a model that has none.
    """
    if layer == "projection" and model.image_projection is None:
        raise ValueError(
            "features behind the projection were asked for, and this model, trained by "
            "cross-entropy, has no projection: take those of the encoder (--layer encoder)"
        )


def prepare_images(model: UniCL, images: Tensor) -> Float[Tensor, "b c h w"]:
    """Decoded images as the model's image encoder takes them, on its device.

    Args:
        model: says how images are normalised.
        images: uint8 [b h w c].
    """
    config = model.config
    return normalise_images(
        images.to(device_of(model), non_blocking=True),
        mean=config.data.mean,
        std=config.data.std,
        dtype=Precision(config.efficiency.precision).compute_type,
        channels_last=config.efficiency.channels_last,
    )


@torch.no_grad()
def encode_images(
    model: UniCL, images: Tensor, *, layer: Layer = "projection"
) -> Float[Tensor, "b d"]:
    """Features of decoded images, in the precision the model was trained in.

    Args:
        model: in evaluation mode.
        images: uint8 [b h w c].
        layer: "projection" gives the unit-norm features (under cross-entropy what `class_rows` is
            multiplied by, see `UniCL.encode_image`), "encoder" those before the projection, in
            fp32 at least.
    """
    normalised = prepare_images(model, images)
    with Precision(model.config.efficiency.precision).autocast(normalised.device.type):
        if layer == "projection":
            return model.encode_image(normalised)
        features: Tensor = model.image_encoder(normalised)
    return features.to(torch.promote_types(torch.float32, features.dtype))


@torch.no_grad()
def encode_token_rows(
    model: UniCL,
    rows: Sequence[npt.NDArray[np.uint16]],
    *,
    batch_size: int = 512,
    progress: bool = False,
) -> Float[Tensor, "m d"]:
    """Unit-norm features of m texts.

    Args:
        model: in evaluation mode.
        rows: token ids of each text, start and end tokens included, unpadded.
        batch_size: texts encoded at once.
        progress: show a progress bar.
    """
    if not rows:
        raise ValueError("there are no texts to encode")
    precision = Precision(model.config.efficiency.precision)
    device = device_of(model)
    # texts of like length together: what is padded is computed for nothing
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    features = []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="encode texts", disable=not progress):
        heartbeat_and_check_stop()  # asked to stop, the images are left off, and all ranks know
        chosen = [rows[row] for row in order[start : start + batch_size]]
        tokens = torch.zeros(len(chosen), len(chosen[-1]), dtype=torch.int64)
        for number, row in enumerate(chosen):
            tokens[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
        with precision.autocast(device.type):
            features.append(model.encode_text(tokens.to(device)))
    return torch.cat(features)[torch.tensor(order).argsort()]
