"""Drawings of patterns in colours, packed with labels and with captions: data that tests make."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from unicl_fast.tools.pack import __main__ as pack_dataset

COLOURS = ("red", "green", "blue", "grey")
SHAPES = ("stripes", "waves", "rings")


def draw(number: int, *, side: int) -> tuple[bytes, str, str]:
    """A PNG of a pattern in a colour, with the names of both."""
    rng = np.random.default_rng(number)
    colour, shape = int(rng.integers(len(COLOURS))), int(rng.integers(len(SHAPES)))
    y, x = np.mgrid[:side, :side] / side - rng.uniform(0.3, 0.7, 2)[:, None, None]
    where = (x + y, x + 0.2 * np.sin(9 * y), np.hypot(x, y))[shape]
    pattern = 127.5 + 100 * np.sin(rng.uniform(20, 40) * where)
    gains = np.eye(3)[colour] * 0.7 + 0.3 if colour < 3 else np.full(3, 0.7)
    pixels = pattern[..., None] * gains + rng.normal(0, 8, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, format="PNG")
    return file.getvalue(), COLOURS[colour], SHAPES[shape]


def pack_drawings(folder: Path) -> tuple[Path, Path]:
    """Class folders of 120 drawings and a list of 80 with captions, both packed."""
    lines = []
    for number in range(200):
        image, colour, shape = draw(number, side=40)
        name = f"{colour}/{number:03}.png" if number < 120 else f"captioned/{number:03}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
        if number >= 120:
            captions = [f"{shape} in {colour}", f"a drawing of {colour} {shape}"]
            lines.append(json.dumps({"image": name, "captions": captions}))
    (folder / "captioned.jsonl").write_text("\n".join(lines))
    classes = folder / "classes"
    classes.mkdir()
    for colour in COLOURS:
        (folder / colour).rename(classes / colour)
    labels, captions = folder / "packed-labels", folder / "packed-captions"
    prompts = ["--templates", "imagenet"]
    pack_dataset.main(["build", str(classes), "--out", str(labels), *prompts])
    pack_dataset.main(["build", str(folder / "captioned.jsonl"), "--out", str(captions)])
    return labels, captions
