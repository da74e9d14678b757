"""`unicl-bench`: measures each part beside alternatives; README.md here explains the results."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from unicl_fast.system.program import begin_program

STAGES = {
    "run": ("diagnosis.run:Run", "what limits your run, what to change, and how long it takes"),
    "race": ("race.race:Race", "accuracy by images and CPU seconds, against open_clip's own loop"),
    "input": ("input.race:Input", "images/s, against nine other loaders and the limits"),
    "pack": ("packing:Pack", "packing, against webdataset, img2dataset and a bare loop"),
    "storage": (
        "input.loaders:Storage",
        "a data set under a URL against a folder; bytes by window",
    ),
    "augment": ("input.loaders:Augment", "cost of augmentation in the loader, fused and DALI's"),
    "loss": ("loss.run:Loss", "tokens, targets, texts and the loss, against open_clip and others"),
    "step": ("training.step:Step", "training steps, against open_clip's own"),
    "efficiency": ("training.efficiency:Efficiency", "effect of each switch of efficiency"),
    "memory": ("training.efficiency:Memory", "peak memory of a large batch in micro-batches"),
    "profile": ("training.efficiency:Profile", "a training step by its parts, against matmul"),
    "scale": ("scale.run:Scale", "a model of steps on many GPUs; its check on slow links"),
    "gpu": ("gpu.run:Gpu", "all there is to measure on a GPU, in one report"),
    "checkpoint": ("training.records:Checkpoint", "writing a checkpoint beside training"),
}
_HELP = """usage: unicl-bench STAGE [OPTIONS]

Measures a part beside alternatives: medians over rounds in which all contestants take turns.
Contestants that disagree are not timed.

{stages}

unicl-bench STAGE --help explains the options of a stage."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input."""
    stage, *options = (begin_program() if argv is None else list(argv)) or ["--help"]
    if stage not in STAGES:
        lines = [f"  {name:14}{about}" for name, (_, about) in STAGES.items()]
        asked = stage in ("-h", "--help")
        print(_HELP.format(stages="\n".join(lines)), file=sys.stdout if asked else sys.stderr)
        if not asked:
            print(f"\nunicl-bench: there is no stage {stage!r}", file=sys.stderr)
        sys.exit(0 if asked else 2)
    # only this stage is imported: each one loads its contestants
    module, name = STAGES[stage][0].split(":")
    found = getattr(importlib.import_module(f"unicl_fast.benchmarks.{module}"), name)
    chosen = found.parse(options, prog=f"unicl-bench {stage}")
    try:
        chosen.run()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"unicl-bench: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
