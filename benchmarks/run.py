"""`unicl-bench`: how fast the parts are, beside what one would take instead.

Each stage is a module with `Settings` and `run`. It first proves that the contestants compute the
same thing, and times nothing if they do not; then they take turns (harness.py).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import tyro

STAGES = {
    "input": ("input.pipeline", "images/s, against nine other loaders and the limits"),
    "pack": ("packing.pack", "packing, against decoding, scaling and encoding in a bare loop"),
    "storage": ("input.storage", "a data set under a URL against a folder; bytes by window"),
    "augment": ("input.augmentation", "what augmentation costs the loader, fused and with DALI's"),
    "targets": ("training.targets", "equal texts and classes, against np.unique and others"),
    "tokenize": ("packing.tokenize", "texts a second, against open_clip's tokenizer"),
    "loss": (
        "training.loss",
        "time and memory of the loss, against open_clip's and the dense form",
    ),
    "text": ("training.text", "what captions cost in the text encoder, padded, trimmed, packed"),
    "step": ("training.step", "training steps, against open_clip's own"),
    "efficiency": ("training.efficiency", "what each switch of efficiency does to a training step"),
    "checkpoint": ("training.checkpoint", "what a checkpoint costs, written beside and waited for"),
    "memory": (
        "training.memory",
        "peak memory of a large batch in micro-batches, and of small ones",
    ),
    "profile": ("training.profile", "a training step by its parts, against the matmul floor"),
    "ledger": ("training.ledger", "a ledger's record beside a small step; visits proven a second"),
}
_HELP = """usage: unicl-bench STAGE [OPTIONS]

Measures a part beside what one would take instead: medians over rounds in which all take turns.
Contestants that disagree are not timed.

{stages}

unicl-bench STAGE --help explains the options of a stage."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input."""
    stage, *options = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if stage not in STAGES:
        lines = [f"  {name:12}{what}" for name, (_, what) in STAGES.items()]
        asked = stage in ("-h", "--help")
        print(_HELP.format(stages="\n".join(lines)), file=sys.stdout if asked else sys.stderr)
        if not asked:
            print(f"\nunicl-bench: there is no stage {stage!r}", file=sys.stderr)
        sys.exit(0 if asked else 2)
    # only the stage that is asked for is imported: each takes its contenders along
    module = importlib.import_module(f"unicl_fast.benchmarks.{STAGES[stage][0]}")
    settings = tyro.cli(module.Settings, args=options, prog=f"unicl-bench {stage}")
    try:
        module.run(settings)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"unicl-bench: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
