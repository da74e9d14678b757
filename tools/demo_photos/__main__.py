"""The program: photographs and texts, packed, trained on, and a page of what was learnt."""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unicl_fast.images.codec import MAX_PIXELS, open_image, pillow_limits, pixels_of
from unicl_fast.packing.sources.read_sources import read_source
from unicl_fast.system.installation import install_command
from unicl_fast.system.pages import fill_page
from unicl_fast.system.program import begin_program
from unicl_fast.system.untrusted_files import read_file
from unicl_fast.system.wording import count_of
from unicl_fast.text.class_lists import SIMPLE_TEMPLATES, fill_template

from .. import pretrain
from ..demo import make_anew, run
from ..pack import __main__ as pack_dataset

_LISTS = ("captions.jsonl", "captions.csv")
_HELD_OUT = 5  # every fifth photograph
_MOST_FILE_BYTES = 512_000_000
_MOST_SHOWN = 100
_NEAREST = 5
_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photograph, by its name under the folder of all."""

    name: str
    captions: tuple[str, ...] = ()
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The photographs to train on, and those to be asked for a text."""

    folder: Path
    train: Sequence[Photo]
    asked: Sequence[Photo]
    """With the texts that are right for them, which training has not seen (labels aside)."""
    about: str

    def texts(self) -> dict[str, str]:
        """All texts that are asked for, each with what the text encoder gets for it."""
        if self.asked[0].label:
            names = sorted({photo.label for photo in [*self.train, *self.asked]})
            return {name: fill_template(SIMPLE_TEMPLATES[0], name) for name in names}
        return {text: text for photo in self.asked for text in photo.captions}


def main() -> None:
    """Entry point of `python -m unicl_fast.tools.demo_photos`."""
    parser = argparse.ArgumentParser(description=sys.modules[__package__].__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-photos-run"), help="made anew")
    parser.add_argument(
        "--photos",
        type=Path,
        help="folder of class folders, or with captions.jsonl or captions.csv (image, caption)",
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of training")
    arguments = parser.parse_args(begin_program())
    out: Path = arguments.out
    started = time.perf_counter()
    make_anew(out)
    photos: Path | None = arguments.photos
    task = shipped_photos(out / "photos") if photos is None else own_photos(photos)

    print(f"1. Packing {count_of(len(task.train), 'photograph')} to learn from")
    source, packed, trained = out / "train.jsonl", out / "packed", out / "run"
    write_list(task.train, source)
    root = ("--image-root", task.folder)
    run(pack_dataset.main, "unicl-pack", "build", source, *root, "--out", packed)

    print("\n2. Teaching a text encoder what an image encoder of ImageNet's sees")
    length = ("--run.samples", "0", "--run.steps", str(arguments.steps))
    batch = ("--run.global-batch-size", str(min(_BATCH_SIZE, len(task.train))))
    settings = ("--preset", "photos-small", "--data.train", packed, *batch, *length)
    run(pretrain.main, "unicl-pretrain", *settings, "--out", trained)

    print("\n3. Asking for the nearest texts of each photograph")
    text, accuracy = make_page(task, trained)
    page = out / "page.html"
    page.write_text(text, encoding="utf-8")
    seconds = time.perf_counter() - started
    print(f"Done in {seconds:.0f} s. Open {page}; with your own photographs: --photos DIR")
    print(f"right text first: {100 * accuracy:.1f}")


def shipped_captions() -> dict[str, tuple[str, ...]]:
    """Captions of the photographs that Python packages ship, by PACKAGE/FILE."""
    found: dict[str, tuple[str, ...]] = {}
    with Path(__file__).with_name("captions.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[row["image"]] = (*found.get(row["image"], ()), row["caption"])
    return found


def shipped_photos(folder: Path) -> Task:
    """Takes the photographs of installed packages into a folder; SystemExit where one is not."""
    train, asked = [], []
    for path, captions in shipped_captions().items():
        package, _, inside = path.partition("/")
        found = find_spec(package)
        if found is None or found.origin is None:
            raise SystemExit(
                f"the photographs are those of packages, and {package} is not installed: "
                f"{install_command('photos')}, or name a folder: --photos DIR"
            )
        name = f"{Path(inside).stem}.jpg"
        folder.mkdir(parents=True, exist_ok=True)
        # as JPEG: a PNG of theirs has a colour profile that libpng complains of at each reading
        (folder / name).write_bytes(_as_jpeg(Path(found.origin).parent / inside, side=640))
        train.append(Photo(name=name, captions=captions[:-1]))
        asked.append(Photo(name=name, captions=captions[-1:]))
    about = (
        f"{len(train)} photographs that scikit-image, scikit-learn and matplotlib ship. The text "
        "encoder learnt three captions of each; below are the nearest of the fourth ones, which "
        "it has not seen, of all photographs."
    )
    return Task(folder=folder, train=train, asked=asked, about=about)


def own_photos(folder: Path) -> Task:
    """Somebody's photographs, every fifth of them (of each class) held out.

    SystemExit: no such folder, or neither captions nor two photographs of each of two classes.
    """
    if not folder.is_dir():
        raise SystemExit(f"--photos {folder} is no folder")
    lists = [folder / name for name in _LISTS if (folder / name).is_file()]
    groups: dict[str, list[Photo]] = {}
    try:
        for item in read_source(str((lists or [folder])[0])).items:
            label = "" if lists else str(*item.labels).replace("_", " ")
            if item.problem is None:
                photo = Photo(name=item.name, captions=tuple(item.captions), label=label)
                groups.setdefault(label, []).append(photo)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"--photos {folder}: {error}") from error
    train = [photo for group in groups.values() for photo in _parted(group, held_out=False)]
    asked = [photo for group in groups.values() for photo in _parted(group, held_out=True)]
    if not asked or (not lists and len(groups) < 2):
        raise SystemExit(
            f"--photos {folder} has {count_of(len(train) + len(asked), 'photograph')} in "
            f"{count_of(len(groups), 'group')}: expected two class folders or more with two "
            f"photographs or more each, or {' or '.join(_LISTS)} with columns image and caption"
        )
    texts = "of all their captions" if lists else "classes"
    about = (
        f"The text encoder learnt {count_of(len(train), 'photograph')} of {folder.name}. It was "
        f"asked about {len(asked)} others; each below has the {texts} that it is most similar to."
    )
    return Task(folder=folder, train=train, asked=asked, about=about)


def _parted(group: Sequence[Photo], *, held_out: bool) -> list[Photo]:
    """The photographs of a group that are held out, or the others; one of a few is."""
    step = min(_HELD_OUT, max(2, len(group)))
    return [photo for number, photo in enumerate(group) if (number % step == step - 1) == held_out]


def write_list(photos: Iterable[Photo], path: Path) -> None:
    """Writes a list as unicl-pack build reads it."""
    with path.open("w", encoding="utf-8") as file:
        for photo in photos:
            labels = [photo.label] if photo.label else []
            row = {"image": photo.name, "captions": photo.captions, "labels": labels}
            file.write(json.dumps(row) + "\n")


def make_page(task: Task, trained: Path) -> tuple[str, float]:
    """The page, and the part of the photographs whose nearest text is right."""
    from unicl_fast import load_model  # torch and timm take seconds

    model = load_model(trained)
    texts = task.texts()
    paths = [task.folder / photo.name for photo in task.asked]
    similarity = model.embed_images(paths) @ model.embed_texts(list(texts.values())).T
    names = list(texts)
    photos: list[dict[str, Any]] = []
    num_right, num_near, guessed = 0, 0, 0.0
    for photo, path, row in zip(task.asked, paths, similarity, strict=True):
        right = {photo.label, *photo.captions}
        nearest = [
            (names[column], float(row[column]), names[column] in right)
            for column in np.argsort(-row, kind="stable")[:_NEAREST]
        ]
        guessed += len(right & texts.keys()) / len(texts)
        num_right += nearest[0][2]
        num_near += any(is_right for _, _, is_right in nearest)
        if len(photos) < _MOST_SHOWN:
            photos.append({"name": photo.name, "uri": _thumbnail(path), "texts": nearest})
    total = len(task.asked)
    tiles = [
        (f"{100 * num_right / total:.1f} %", f"have a right text first, of {len(names)}"),
        (f"{100 * num_near / total:.1f} %", f"have one among the nearest {_NEAREST}"),
        (f"{100 * guessed / total:.1f} %", "would, by guessing"),
        (f"{total:,}", "photographs" if total <= _MOST_SHOWN else f"the first {_MOST_SHOWN} below"),
    ]
    page = fill_page(
        Path(__file__).with_name("page.html"),
        title="Photographs and their nearest texts",
        about=task.about,
        tiles=tiles,
        photos=photos,
        command=f"unicl_fast, preset photos-small; the model is in {trained}",
    )
    return page, num_right / total


def _thumbnail(path: Path) -> str:
    """The photograph, scaled down, as an address that a page carries in itself."""
    return f"data:image/jpeg;base64,{base64.b64encode(_as_jpeg(path, side=320)).decode('ascii')}"


def _as_jpeg(path: Path, *, side: int) -> bytes:
    """The photograph, upright, with sides of at most `side` pixels."""
    with pillow_limits(MAX_PIXELS):
        pixels = pixels_of(open_image(read_file(path, most_bytes=_MOST_FILE_BYTES)))
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, format="jpeg", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()
