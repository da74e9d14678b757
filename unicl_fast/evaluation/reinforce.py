"""A teacher's features of a packed data set, stored once for the runs that learn from them.

Vasu et al., "MobileCLIP", arXiv 2311.17049, reinforce a data set: what a large model says of K
views of each image and of all texts is stored, and costs a run a read. The views come out of the
training loader in the order of the samples, so a run that shows view k later shows the pixels that
the teacher saw.

Features go to `teacher.partial` first. What is done is noted there every few seconds, so what was
killed resumes, with the same batches and hence the same bytes. `dataset.teacher_files` has the
format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from unicl_fast.augmentation import augmentations_of
from unicl_fast.config import (
    DataConfig,
    DeviceName,
    EfficiencyConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainConfig,
)
from unicl_fast.conversion.initial import initialise
from unicl_fast.conversion.sources import read_source
from unicl_fast.dataset.feature_files import (
    RowsWriter,
    feature_key,
    has_features,
    make_rows,
    seal_features,
)
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.teacher_files import (
    FACTS_NAME,
    TEACHER_FOLDER,
    TEACHER_VERSION,
    UNFINISHED_TEACHER,
    describe_views,
    identity_of,
    num_prompts,
    read_facts,
)
from unicl_fast.evaluation.features import (
    device_of,
    encode_images,
    encode_token_rows,
    on_device,
    require_finite,
)
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.unicl import UniCL, weights_digest
from unicl_fast.system.atomic_files import (
    flush_to_disk,
    naming_full_disk,
    sole_writer,
    write_text_atomically,
)
from unicl_fast.system.checksums import dump_checksummed_json, parse_checksummed_json
from unicl_fast.system.machine import choose_device
from unicl_fast.system.wording import count_of, without_secrets
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import CONTEXT_LENGTH, Tokenizer
from unicl_fast.training.data import check_tokenizer

_IMAGES_ALONE = ("timm", "pypi")
_TEXTS_AT_ONCE = 4096
_SECONDS_BETWEEN_NOTES = 5.0
_PROGRESS_NAME = "progress.json"
_TYPE = "float16"

Chunk = tuple[NDArray[np.int64], NDArray[np.float16], Iterable[int]]
"""Numbers of rows, the rows, and samples whose image cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reinforcement:
    """The outcome of `reinforce`."""

    folder: Path
    num_images: int
    num_views: int
    num_texts: int
    """0 of a teacher that knows none."""
    num_unreadable: int
    num_bytes: int
    was_complete: bool


def load_teacher(given: str, *, precision: Literal["fp32", "bf16", "fp16"]) -> UniCL:
    """A model that encodes images as they were encoded in its training, in evaluation mode.

    `given` is one of the sources of `conversion.sources`. An image encoder alone, or a model of
    ours that was trained without texts, has no `text_encoder`.

    Raises:
        ValueError, FileNotFoundError, OSError: as `read_source`.
    """
    scheme = given.partition(":")[0]
    if scheme == "timm-file":
        raise ValueError(f"{given} does not say of which encoder it is: take timm:NAME, or a run")
    source = read_source(given, image_encoder="", text=scheme not in _IMAGES_ALONE)
    settings, data = dict(source.settings), dict(source.data)
    knows_texts = "text_width" in settings
    if not knows_texts:  # its encoder's features are taken, whatever came after them
        settings = {"image_encoder": settings["image_encoder"]}
    settings["init" if knows_texts else "init_image"] = given
    size = data.get("image_size", DataConfig().image_size)
    config = TrainConfig(
        data=DataConfig(**data, evaluation_resize=max(size, DataConfig().evaluation_resize)),
        model=ModelConfig(**settings),
        objective=ObjectiveConfig(name="unicl" if knows_texts else "supcon"),
        efficiency=EfficiencyConfig(precision=precision),
    )
    model = UniCL(config)
    initialise(model)
    return model.eval()


def reinforce(
    folder: str,
    *,
    teacher: str,
    num_views: int,
    views: DataConfig,
    image_size: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    device: DeviceName = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Reinforcement:
    """Stores a teacher's features of all images of a data set, in their views, and of all texts.

    Args:
        folder: the data set.
        teacher: as for `load_teacher`.
        num_views: of each image.
        views: how images are cropped, flipped, augmented and resized.
        image_size: side of the views, in place of that; the teacher's if it is 0. Others are
            resized once more for the teacher.
        seed: decides the views.
        batch_size: images that are encoded at once.
        device: encodes.
        precision: of the teacher's arithmetic.
        progress: shows bars.
        say: is told beforehand how much room it takes.

    Raises:
        ValueError: a data set that cannot be trained on, of other texts than the teacher's, without
            room on its disk, or with features of another teacher or other views already.
        FileNotFoundError: no data set or no teacher.
        OSError: the disk failed.
    """
    with PackedDataset(folder) as dataset:
        if dataset.remote is not None:
            raise ValueError(
                f"{dataset.location} lies under a URL: reinforce a local data set, and train on it"
            )
        model = on_device(load_teacher(teacher, precision=precision), choose_device(device))
        size = image_size or model.config.data.image_size
        resize = max(size, views.evaluation_resize)
        views = dataclasses.replace(views, image_size=size, evaluation_resize=resize)
        making = _Making(dataset, model, views, num_views, seed, batch_size)
        place, facts = dataset.folder / TEACHER_FOLDER, making.facts(teacher)
        if place.exists():
            if read_facts(place)["key"] != facts["key"]:
                raise ValueError(
                    f"{place} holds features of {read_facts(place)['teacher']} or of other views: "
                    "remove it to store others"
                )
            return making.summary(place, was_complete=True)
        making.say_what_is_needed(say)
        aside = dataset.folder / UNFINISHED_TEACHER
        with sole_writer(aside) as check:
            work = _Work(aside, {"key": facts["key"], "batch_size": batch_size}, progress, check)
            with _advising_to_resume(), naming_full_disk(aside):
                for part, (rows, chunks, count) in making.parts().items():
                    work.fill(part, rows, making.width, chunks, count)
            facts["num_unreadable"] = work.num_unreadable
            (aside / _PROGRESS_NAME).unlink()
            write_text_atomically(aside / FACTS_NAME, dump_checksummed_json(facts))
        aside.rename(place)
        flush_to_disk(dataset.folder)
        return making.summary(place, was_complete=False)


class _Making:
    """A data set, a teacher, and how the features of one come from the other."""

    def __init__(
        self,
        dataset: PackedDataset,
        model: UniCL,
        views: DataConfig,
        num_views: int,
        seed: int,
        batch_size: int,
    ) -> None:
        self._dataset, self._model, self._views = dataset, model, views
        self._num_views, self._seed = num_views, seed
        self._batch_size = min(batch_size, len(dataset))
        self._knows_texts = model.text_encoder is not None
        length = model.config.model.context_length
        if self._knows_texts:
            check_tokenizer(dataset, context_length=length)
        manifest = dataset.manifest
        above = () if manifest.hierarchy is None else manifest.hierarchy.names
        self._prompts = ClassPrompts(
            [((*manifest.class_names, *above), manifest.templates)],
            Tokenizer(min(length, CONTEXT_LENGTH)),
        )
        self.width: int = model.config.model.embed_dim
        if not self._knows_texts:
            self.width = feature_width(model.image_encoder)

    def facts(self, teacher: str) -> dict[str, Any]:
        """The facts for teacher.json, but for those that are found on the way."""
        views, seed = self._views, self._seed
        (augmentation,) = augmentations_of(views.augment, [self._dataset.location])
        described = describe_views(views, augmentation)
        # what comes after the encoder of a teacher of images alone is not looked at
        weights = weights_digest(self._model, "" if self._knows_texts else "image_encoder.")
        return {
            "version": TEACHER_VERSION,
            "teacher": without_secrets(teacher),
            "key": feature_key(
                self._model.config,
                self._dataset,
                weights=weights,
                device_type=device_of(self._model).type,
                view=[described, self._num_views, seed, views.resample],
                version=TEACHER_VERSION,
                data=identity_of(self._dataset.manifest),
            ),
            "weights": weights,
            "data": identity_of(self._dataset.manifest),
            "knows_texts": self._knows_texts,
            "scale": float(self._model.logit_scale.detach().exp()) if self._knows_texts else 0.0,
            "num_views": self._num_views,
            "seed": seed,
            "views": described,
        }

    def sizes(self) -> dict[str, int]:
        """Rows of each file."""
        sizes = {"images": len(self._dataset) * self._num_views}
        if self._knows_texts:
            manifest = self._dataset.manifest
            sizes |= {"captions": manifest.num_captions, "prompts": num_prompts(manifest)}
        return {part: size for part, size in sizes.items() if size}

    def say_what_is_needed(self, say: Callable[[str], None]) -> None:
        """Tells, and refuses (ValueError) a disk without so much room."""
        folder, sizes = self._dataset.folder, self.sizes()
        num_bytes = 2 * self.width * sum(sizes.values())
        aside = folder / UNFINISHED_TEACHER
        free = shutil.disk_usage(folder).free
        if aside.is_dir():
            # of files made at full size what is written so far, without their holes
            free += sum(512 * path.stat().st_blocks for path in aside.iterdir())
        what = f"{num_bytes / 1e6:,.1f} MB in {folder / TEACHER_FOLDER}"
        if num_bytes > free:
            raise ValueError(f"the features take {what}, and {free / 1e6:,.1f} MB are free there")
        say(
            f"{count_of(sizes['images'], 'view')} of {count_of(len(self._dataset), 'image')} and "
            f"{count_of(sum(sizes.values()) - sizes['images'], 'text')}: {what}, of "
            f"{free / 1e9:,.1f} GB that are free"
        )

    def parts(self) -> dict[str, tuple[int, Callable[[int], Iterator[Chunk]], int]]:
        """For each file its rows, its chunks from a number on, and how many these are."""
        found: dict[str, tuple[int, Callable[[int], Iterator[Chunk]], int]] = {}
        for part, size in self.sizes().items():
            if part == "images":
                found[part] = size, self._of_images, -(-size // self._batch_size)
                continue
            row = self._caption if part == "captions" else self._prompt

            def chunks(start: int, size: int = size, row: Any = row) -> Iterator[Chunk]:
                for first in range(start * _TEXTS_AT_ONCE, size, _TEXTS_AT_ONCE):
                    numbers = np.arange(first, min(first + _TEXTS_AT_ONCE, size))
                    texts = [row(number) for number in numbers.tolist()]
                    yield numbers, _stored(encode_token_rows(self._model, texts)), ()

            found[part] = size, chunks, -(-size // _TEXTS_AT_ONCE)
        return found

    def _of_images(self, start: int) -> Iterator[Chunk]:
        # here, so that the protocols serve where DALI is not installed
        from unicl_fast.pipelines.loader import TrainLoader
        from unicl_fast.pipelines.plan.plan import StoredViews

        config = dataclasses.replace(
            self._model.config,
            data=self._views,
            objective=ObjectiveConfig(),
            run=RunConfig(global_batch_size=self._batch_size),
        )
        loader = TrainLoader(
            config,
            [self._dataset],
            None,
            self._prompts,
            device=device_of(self._model),
            in_order=StoredViews(count=self._num_views, seed=self._seed),
        )
        size = self.sizes()["images"]
        with contextlib.closing(loader):
            for step, batch in enumerate(loader.batches(start), start):
                assert batch.sample_ids is not None
                assert batch.scheduled_ids is not None
                first = step * self._batch_size
                numbers = np.arange(first, min(first + self._batch_size, size))
                replaced = batch.scheduled_ids[batch.sample_ids != batch.scheduled_ids]
                rows = _stored(self._encode(batch.images))[: len(numbers)]
                yield numbers, rows, replaced.tolist()
                if numbers[-1] == size - 1:
                    return

    def _encode(self, images: Tensor) -> Tensor:
        """Features of views uint8 [b h w c], at the teacher's own size."""
        side = self._model.config.data.image_size
        if images.shape[1] != side:
            pixels = images.permute(0, 3, 1, 2).float()
            pixels = F.interpolate(pixels, size=side, mode="bicubic", antialias=True)
            images = pixels.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous()
        return encode_images(
            self._model, images, layer="projection" if self._knows_texts else "encoder"
        )

    def _caption(self, number: int) -> NDArray[np.uint16]:
        row = self._dataset.captions[number]
        start, length = int(row["tokens_start"]), int(row["tokens_length"])
        return np.asarray(self._dataset.tokens[start : start + length])

    def _prompt(self, number: int) -> NDArray[np.uint16]:
        row: NDArray[np.uint16] = self._prompts.tokens[number]
        return row[: 1 + int(np.flatnonzero(row)[-1])]  # 0 is padding after the end token

    def summary(self, place: Path, *, was_complete: bool) -> Reinforcement:
        sizes = self.sizes()
        return Reinforcement(
            folder=place,
            num_images=len(self._dataset),
            num_views=self._num_views,
            num_texts=sum(sizes.values()) - sizes["images"],
            num_unreadable=read_facts(place)["num_unreadable"],
            num_bytes=sum(path.stat().st_size for path in place.iterdir()),
            was_complete=was_complete,
        )


def _stored(features: Tensor) -> NDArray[np.float16]:
    """Features as they are stored: of unit norm, float16."""
    require_finite(features)
    rows: NDArray[np.float16] = F.normalize(features.float(), dim=1).half().cpu().numpy()
    return rows


class _Work:
    """The folder of what is being made, and how far it is."""

    def __init__(
        self, folder: Path, request: dict[str, Any], progress: bool, check: Callable[[], None]
    ) -> None:
        """Takes up what an earlier start of the same request has left, and removes all else."""
        self._folder, self._progress, self._check = folder, progress, check
        self._noted: dict[str, Any] = {**request, "done": {}, "unreadable": []}
        path = folder / _PROGRESS_NAME
        with contextlib.suppress(OSError, ValueError):
            noted = parse_checksummed_json(path.read_bytes())
            if {name: noted.get(name) for name in request} == request:
                self._noted = noted
        if not self._noted["done"]:
            for old in (*folder.glob("*.npy"), *folder.glob("*.json")):
                old.unlink()
        self._note()

    @property
    def num_unreadable(self) -> int:
        return len(self._noted["unreadable"])

    def fill(
        self,
        part: str,
        num_rows: int,
        width: int,
        chunks: Callable[[int], Iterator[Chunk]],
        num_chunks: int,
    ) -> None:
        """Writes what is missing of a file, and seals it."""
        if has_features(self._folder, part):
            return
        path, done = self._folder / f"{part}.npy", self._noted["done"]
        if not path.is_file() or not done.get(part):
            done[part] = 0
            make_rows(path, num_samples=num_rows, width=width, kind="<f2")
        start, unreadable = done[part], set(self._noted["unreadable"])
        bar = tqdm(total=num_chunks, initial=start, desc=part, disable=not self._progress)
        with contextlib.closing(RowsWriter(path)) as rows, bar:
            noted = time.monotonic()
            for number, (numbers, values, bad) in enumerate(
                itertools.islice(chunks(start), num_chunks - start), start + 1
            ):
                rows.write(numbers, values)
                unreadable.update(bad)
                bar.update()
                if time.monotonic() - noted > _SECONDS_BETWEEN_NOTES or number == num_chunks:
                    rows.flush()
                    done[part], self._noted["unreadable"] = number, sorted(unreadable)
                    self._note()
                    noted = time.monotonic()
        of_images = self._noted["unreadable"] if part == "images" else ()
        seal_features(path, self._folder, part, dtype=_TYPE, unreadable=of_images)

    def _note(self) -> None:
        self._check()
        text = dump_checksummed_json(self._noted)
        write_text_atomically(self._folder / _PROGRESS_NAME, text)


@contextlib.contextmanager
def _advising_to_resume() -> Iterator[None]:
    """Tells whoever ends it that it can be resumed."""
    try:
        yield
    except BaseException as error:
        error.add_note("what is done is kept: give the same command again to resume")
        raise
