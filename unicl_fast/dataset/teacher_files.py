"""A teacher's features of a packed data set, in the folder `teacher` beside its shards.

    images.npy     float16 [N * K, width]: row i * K + k is view k of sample i
    captions.npy   float16 [captions, width], in the order of captions.npy of the data set
    prompts.npy    float16 [classes * templates, width]: label by label, its templates in turn
    teacher.json   the teacher, the views, and the data set that they are of; written last

Features are of unit norm. Each .npy has its .json with a checksum (`feature_files`). A teacher that
knows no texts has images alone. View k of a sample is a crop, a flip and an augmentation that are
functions of (seed, sample, k) and of nothing else, so training can show the very pixels that the
teacher saw; `describe_views` is what they depend on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from unicl_fast.augmentation import Augmentation, augmentations_of
from unicl_fast.config import DataConfig
from unicl_fast.dataset.feature_files import read_features
from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.system.checksums import parse_checksummed_json

TEACHER_FOLDER = "teacher"
UNFINISHED_TEACHER = f"{TEACHER_FOLDER}.partial"
FACTS_NAME = "teacher.json"
TEACHER_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTeacher:
    """A teacher's features of one data set, read where they lie."""

    name: str
    """As it was given."""
    key: str
    """A hash of all that the features depend on."""
    weights: str
    """A hash of the teacher alone, the same for all data sets."""
    scale: float
    """exp(logit_scale) of its own training; 0 where it knows no texts."""
    num_views: int
    seed: int
    views: dict[str, Any]
    """`describe_views` of them."""
    images: NDArray[np.float16]
    unreadable: frozenset[int]
    """Samples whose image could not be read."""
    captions: NDArray[np.float16] | None
    prompts: NDArray[np.float16] | None
    """None of a teacher that knows no texts."""

    @property
    def width(self) -> int:
        return int(self.images.shape[1])


def identity_of(manifest: Manifest) -> str:
    """A hash of a data set's images, captions, classes and prompts, whatever part of it is used."""
    hierarchy = manifest.hierarchy
    facts = [
        [shard.xxh3 for shard in manifest.shards],
        None if manifest.pixels is None else manifest.pixels.xxh3,
        [manifest.class_names, () if hierarchy is None else hierarchy.names, manifest.templates],
        manifest.vocabulary_hash,
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())


def num_prompts(manifest: Manifest) -> int:
    """Prompts of all classes, those above others included."""
    above = 0 if manifest.hierarchy is None else len(manifest.hierarchy.names)
    return (len(manifest.class_names) + above) * len(manifest.templates)


def describe_views(data: DataConfig, augmentation: Augmentation) -> dict[str, Any]:
    """All that decides a view beside its seed and number, in JSON's types."""
    settings = dataclasses.asdict(augmentation)
    views = {
        "image_size": data.image_size,
        "interpolation": data.interpolation,
        "crop_scale": settings.pop("crop_scale") or data.crop_scale,
        "crop_ratio": data.crop_ratio,
        "flip_probability": settings.pop("flip"),
        "augmentation": settings,
    }
    if views["flip_probability"] is None:
        views["flip_probability"] = data.flip_probability
    if augmentation.erase:
        views["mean"] = data.mean  # which rectangles are filled with
    found: dict[str, Any] = json.loads(json.dumps(views))
    return found


def read_teacher(dataset: PackedDataset, *, check: bool = False) -> StoredTeacher:
    """Opens the teacher's features of a data set; `check` reads them all for their checksums.

    Raises:
        ValueError: there are none, they are damaged, or of another data set.
        OSError: they cannot be read.
    """
    folder = dataset.folder / TEACHER_FOLDER
    if not (folder / FACTS_NAME).is_file():
        where = " (it lies under a URL, where none can)" if dataset.remote is not None else ""
        raise ValueError(
            f"{dataset.location} has no teacher's features{where}: store them by unicl-pack "
            f"reinforce {dataset.location} --teacher MODEL, or set objective.distillation=off"
        )
    return open_teacher(folder, dataset.manifest, check=check)


def open_teacher(folder: Path, manifest: Manifest, *, check: bool) -> StoredTeacher:
    """Opens a teacher's features in their folder, as `read_teacher`."""
    facts = read_facts(folder)
    if facts["data"] != identity_of(manifest):
        raise ValueError(
            f"{folder} is of other images or texts than the data set: remove it, and store the "
            "features again by unicl-pack reinforce"
        )
    sizes = {"images": manifest.num_samples * facts["num_views"]}
    if facts["knows_texts"]:
        sizes |= {"captions": manifest.num_captions, "prompts": num_prompts(manifest)}
    files = {
        name: read_features(folder, name, num_samples=size, check=check)
        for name, size in sizes.items()
        if size
    }
    empty = np.empty((0, files["images"].rows.shape[1]), np.float16)
    rows = {name: files[name].rows if name in files else empty for name in sizes}
    return StoredTeacher(
        name=facts["teacher"],
        key=facts["key"],
        weights=facts["weights"],
        scale=facts["scale"],
        num_views=facts["num_views"],
        seed=facts["seed"],
        views=facts["views"],
        images=rows["images"],
        unreadable=files["images"].unreadable,
        captions=rows.get("captions"),
        prompts=rows.get("prompts"),
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """Reads teacher.json; ValueError where it is damaged or of another version."""
    path = folder / FACTS_NAME
    try:
        facts = parse_checksummed_json(path.read_bytes())
        if facts.get("version") != TEACHER_VERSION:
            raise ValueError(f"version {TEACHER_VERSION} is expected, {facts.get('version')} came")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}; remove {folder}, and store it again"
        ) from error
    return facts


def read_teachers(datasets: Sequence[PackedDataset], data: DataConfig) -> list[StoredTeacher]:
    """The teacher's features of all data sets of a run, whose views must be those of the run.

    Raises:
        ValueError: some data set has none, they are of different teachers, or of other views.
    """
    teachers = [read_teacher(dataset) for dataset in datasets]
    augmentations = augmentations_of(data.augment, [dataset.location for dataset in datasets])
    for dataset, teacher, augmentation in zip(datasets, teachers, augmentations, strict=True):
        if teacher.weights != teachers[0].weights:
            raise ValueError(
                f"{dataset.location} has features of the teacher {teacher.name}, and "
                f"{datasets[0].location} those of {teachers[0].name}: all need the same"
            )
        present = describe_views(data, augmentation)
        wrong = [name for name in present if present[name] != teacher.views.get(name)]
        moves_pixels = augmentation.stages or max(augmentation.blur, augmentation.erase) > 0
        if not moves_pixels and "image_size" in wrong:
            wrong.remove("image_size")  # the same part of the image at another size
        if wrong:
            phrases = (f"{n} {teacher.views.get(n)} and not {present[n]}" for n in wrong)
            raise ValueError(
                f"the teacher's views of {dataset.location} are others than the run's: they have "
                f"{'; '.join(phrases)}. Set data.{wrong[0].replace('augmentation', 'augment')} so, "
                "or store the features again by unicl-pack reinforce"
            )
    return teachers
