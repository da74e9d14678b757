"""The two encoders as modules of one input and one output, for what exports such modules.

Each holds its own weights and not those of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.checkpoints.export import Preprocessing
from unicl_fast.conversion.comparison import require_equal, samples_of
from unicl_fast.conversion.new_files import new_folder, write_json
from unicl_fast.models.unicl import UniCL

PREPROCESSING_FILE = "preprocessing.json"
IMAGE, TEXT = "image", "text"
INPUTS = {IMAGE: "images", TEXT: "tokens"}
OUTPUTS = {IMAGE: "image_features", TEXT: "text_features"}
_OTHER_SIZE = 7
"""Samples of a batch, beside one and as many as were traced: an export may be fixed to a size."""


class Tower(nn.Module):
    """Normalised images [b 3 h w], or token rows [b l], to unit-norm features [b d]."""

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


def write_towers(
    model: UniCL,
    folder: Path,
    suffix: str,
    *,
    export: Callable[[Tower, Tensor, Path, str], None],
    load: Callable[[Path, str], Callable[[Tensor], Tensor]],
) -> float:
    """Exports both towers into a new folder, `image` and `text`, and runs the files.

    Args:
        model: in fp32 and evaluation mode.
        folder: to be made.
        suffix: of the files.
        export: a tower, traced with inputs, into a file; the last is the tower's name.
        load: a file of a tower, as a function of its inputs.

    Returns:
        The largest difference of a feature's coordinates, at three batch sizes.

    Raises:
        ValueError: the folder is there already.
        RuntimeError: the features are not ours.
        OSError: it cannot be written.
    """
    samples = samples_of(model)
    inputs_and_features = {
        IMAGE: (samples.images, samples.image_features),
        TEXT: (samples.tokens, samples.text_features),
    }
    differences = []
    with new_folder(folder) as aside:
        for name, tower in towers_of(model).items():
            path = aside / f"{name}{suffix}"
            inputs, features = inputs_and_features[name]
            export(tower, inputs, path, name)
            run = load(path, name)
            for size in (1, len(inputs), _OTHER_SIZE):
                found = run(_repeated(inputs, size))
                differences.append(
                    require_equal(_repeated(features, size), found, what=OUTPUTS[name])
                )
        values = Preprocessing.of(model.config).as_words()
        write_json(aside / PREPROCESSING_FILE, values | {"logit_scale": model.logit_scale.item()})
    return max(differences)


def _repeated(rows: Tensor, count: int) -> Tensor:
    """So many rows, from the first on, and again."""
    return rows.repeat(-(-count // len(rows)), *[1] * (rows.ndim - 1))[:count]
