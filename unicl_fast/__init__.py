"""Unified contrastive learning in image-text-label space, as a fast data and training pipeline.

The names below are loaded on first use, so that `import unicl_fast.shards` in a packing worker
does not pay for importing torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unicl_fast.batch import Batch as Batch
    from unicl_fast.checkpoint import load_model as load_model
    from unicl_fast.loss import unified_contrastive_loss as unified_contrastive_loss
    from unicl_fast.models.unicl import UniCL as UniCL
    from unicl_fast.models.unicl import build_model as build_model
    from unicl_fast.tokenizer import Tokenizer as Tokenizer
    from unicl_fast.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOMES = {
    "Batch": "unicl_fast.batch",
    "load_model": "unicl_fast.checkpoint",
    "unified_contrastive_loss": "unicl_fast.loss",
    "UniCL": "unicl_fast.models.unicl",
    "build_model": "unicl_fast.models.unicl",
    "Tokenizer": "unicl_fast.tokenizer",
    "Trainer": "unicl_fast.trainer",
}
__all__ = sorted(_HOMES)

# In a bare checkout pipelines/, tools/ and benchmarks/ lie beside this folder, not inside it as
# in an install (see setup.py). Looking there too lets both resolve the same names.
_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "setup.py").is_file() and (_CHECKOUT / "pipelines").is_dir():
    __path__.append(str(_CHECKOUT))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unicl_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
