"""Pictures and token rows to features, as every evaluation needs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from unicl_fast.evaluation.progress import may_go_on
from unicl_fast.models.unicl import UniCL
from unicl_fast.precision import Precision, normalise_images


@torch.no_grad()
def encode_pictures(model: UniCL, images: Tensor) -> Float[Tensor, "b d"]:
    """Unit-norm features of decoded pictures, in the precision the model was trained in.

    Args:
        model: in evaluation mode.
        images: uint8 [b h w c].
    """
    config = model.config
    precision = Precision(config.efficiency.precision)
    device = model.logit_scale.device
    normalised = normalise_images(
        images.to(device, non_blocking=True),
        mean=config.data.mean,
        std=config.data.std,
        dtype=precision.compute_type,
        channels_last=config.efficiency.channels_last,
    )
    with precision.autocast(device.type):
        return model.encode_image(normalised)


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
    device = model.logit_scale.device
    # texts of like length together: what is padded is computed for nothing
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    features = []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="encode texts", disable=not progress):
        may_go_on()  # shows progress; asked to stop, the pictures are left off, and all ranks know
        chosen = [rows[row] for row in order[start : start + batch_size]]
        tokens = torch.zeros(len(chosen), len(chosen[-1]), dtype=torch.int64)
        for number, row in enumerate(chosen):
            tokens[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
        with precision.autocast(device.type):
            features.append(model.encode_text(tokens.to(device)))
    return torch.cat(features)[torch.tensor(order).argsort()]
