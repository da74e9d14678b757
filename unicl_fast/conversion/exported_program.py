"""Both encoders as programs of torch.export, `image.pt2` and `text.pt2`, for any number of samples.

A .pt2 file is the graph with its weights: torch runs it, or compiles it ahead of time, without
this package or timm.
"""

from __future__ import annotations

from pathlib import Path

import torch

from unicl_fast.conversion.comparison import require_equal, samples_of
from unicl_fast.conversion.new_files import new_folder, write_json
from unicl_fast.conversion.towers import OUTPUTS, batches_of, inputs_and_features, towers_of
from unicl_fast.models.unicl import UniCL
from unicl_fast.preprocessing import Preprocessing

PREPROCESSING_FILE = "preprocessing.json"


@torch.no_grad()
def write_exported_programs(model: UniCL, folder: Path) -> float:
    """Writes the folder, and runs both programs as they are read back, at three batch sizes.

    Args:
        model: in fp32 and evaluation mode.
        folder: a new one.

    Returns:
        The largest difference of a feature's coordinates.

    Raises:
        ValueError: the folder is there already.
        RuntimeError: the encoder cannot be traced, or the features are not ours.
        OSError: it cannot be written.
    """
    differences = []
    with new_folder(folder) as aside:
        expected = inputs_and_features(samples_of(model))
        for name, tower in towers_of(model).items():
            path = aside / f"{name}.pt2"
            inputs, features = expected[name]
            batch = torch.export.Dim("batch")
            program = torch.export.export(tower, (inputs,), dynamic_shapes=({0: batch},))
            torch.export.save(program, path)
            run = torch.export.load(path).module()
            for rows in batches_of(inputs):
                wanted = features.repeat(-(-len(rows) // len(features)), 1)[: len(rows)]
                differences.append(require_equal(wanted, run(rows), what=OUTPUTS[name]))
        values = Preprocessing.of(model.config).as_words()
        write_json(aside / PREPROCESSING_FILE, values | {"logit_scale": model.logit_scale.item()})
    return max(differences)
