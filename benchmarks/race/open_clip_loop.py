"""Trains by open_clip's own program, as a job of `race.py` says.

Registers the model's description, and our small encoders with timm; all else is open_clip's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    """Trains what a job describes, and leaves open_clip's checkpoint where its options say."""
    job = json.loads(path.read_text(encoding="utf-8"))
    import open_clip
    from open_clip_train.main import main as train

    import unicl_fast.models.small  # noqa: F401  registers its encoders

    description = path.parent / "race.json"  # the file's name is the model's
    description.write_text(json.dumps(job["model"]), encoding="utf-8")
    open_clip.add_model_config(description)
    train(job["options"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
