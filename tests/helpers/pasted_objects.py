"""Detection data of COCO's form whose boxes are known: small images pasted into photographs.

The COCO photographs of the test data come without boxes. So things of Tiny ImageNet are pasted into
them: real pixels and exact boxes, but an easier task than real objects, whose edges are not square.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def paste_objects(
    shared_data: Path, out: Path, *, count: int, num_classes: int = 5, side: int = 320
) -> Path:
    """Writes OUT/instances.json and OUT/images/*.png.

    Args:
        shared_data: the test data.
        out: folder to make.
        count: images.
        num_classes: kinds of objects, each of which has several images.
        side: of the square images, in pixels. Objects take a fifth to a half of it.
    """
    generator = np.random.default_rng(0)
    archive = zipfile.ZipFile(shared_data / "tiny-imagenet" / "tiny-imagenet-200-subset.zip")
    objects: dict[str, list[str]] = {}
    with (shared_data / "tiny-imagenet" / "labels.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            objects.setdefault(row["words"], []).append(row["file"])
    names = sorted(objects)[:: max(1, len(objects) // num_classes)][:num_classes]
    photos = sorted((shared_data / "captions" / "coco" / "images").glob("*.jpg"))[:count]
    (out / "images").mkdir(parents=True)
    images, annotations = [], []
    for number, photo in enumerate(photos, start=1):
        canvas = Image.open(photo).convert("RGB").resize((side, side))
        taken = np.zeros((side, side), dtype=bool)
        for _ in range(int(generator.integers(1, 4))):
            kind = int(generator.integers(num_classes))
            size = int(generator.integers(side // 5, side // 2))
            x, y = (int(value) for value in generator.integers(0, side - size, 2))
            if taken[y : y + size, x : x + size].any():
                continue
            taken[y : y + size, x : x + size] = True
            chosen = objects[names[kind]][int(generator.integers(len(objects[names[kind]])))]
            thing = Image.open(io.BytesIO(archive.read(chosen))).convert("RGB").resize((size, size))
            canvas.paste(thing, (x, y))
            corners = [x, y, x + size, y, x + size, y + size, x, y + size]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": 10 * (kind + 1),
                 "bbox": [x, y, size, size], "area": size * size, "iscrowd": 0,
                 "segmentation": [corners]}
            )  # fmt: skip
        name = f"{number:04d}.png"
        canvas.save(out / "images" / name)
        images.append({"id": number, "file_name": name, "height": side, "width": side})
    categories = [{"id": 10 * (place + 1), "name": name} for place, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (out / "instances.json").write_text(json.dumps(content))
    return out
