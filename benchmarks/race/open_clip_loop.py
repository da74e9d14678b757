"""Trains by open_clip's own program, as a job of `race.py` says."""

import json
import sys
from pathlib import Path

from .contestants import register_open_clip_model

if __name__ == "__main__":
    from open_clip_train.main import main

    path = Path(sys.argv[1])
    job = json.loads(path.read_text(encoding="utf-8"))
    register_open_clip_model(path.parent, job["model"])
    main(job["options"])
