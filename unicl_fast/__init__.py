"""Unified contrastive learning in image-text-label space, as a fast data and training pipeline.

The names below are loaded on first use, so that `import unicl_fast.dataset.reader` in a packing
worker does not pay for importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unicl_fast.system.version import __version__ as __version__

if TYPE_CHECKING:
    from unicl_fast.batch import Batch as Batch
    from unicl_fast.checkpoints.load import build_model as build_model
    from unicl_fast.evaluation.inference import Model as Model
    from unicl_fast.evaluation.inference import load_model as load_model
    from unicl_fast.models.unicl import UniCL as UniCL
    from unicl_fast.objectives.loss import unified_contrastive_loss as unified_contrastive_loss
    from unicl_fast.objectives.loss_sigmoid import (
        sigmoid_contrastive_loss as sigmoid_contrastive_loss,
    )
    from unicl_fast.text.tokenizer import Tokenizer as Tokenizer
    from unicl_fast.training.assembly import make_trainer as make_trainer
    from unicl_fast.training.trainer import Trainer as Trainer

_HOMES = {
    "Batch": "unicl_fast.batch",
    "load_model": "unicl_fast.evaluation.inference",
    "Model": "unicl_fast.evaluation.inference",
    "sigmoid_contrastive_loss": "unicl_fast.objectives.loss_sigmoid",
    "unified_contrastive_loss": "unicl_fast.objectives.loss",
    "UniCL": "unicl_fast.models.unicl",
    "build_model": "unicl_fast.checkpoints.load",
    "Tokenizer": "unicl_fast.text.tokenizer",
    "make_trainer": "unicl_fast.training.assembly",
    "Trainer": "unicl_fast.training.trainer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unicl_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
