"""Settings that can make a run faster, and the data that some of them need."""

import contextlib
import functools
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.writer import DatasetWriter, PackedSample
from unicl_fast.images.check import check_image
from unicl_fast.pipelines.train_loader import decoder_of
from unicl_fast.training.data import build_prompts

from .bench import Bench, Parts
from .model import CHECKPOINT, LOGGING, READ, Change, Measured

_SMALLEST_BATCH = 64  # smaller local batches are tried larger
_RARE = 0.01  # part of the time for checkpoints and evaluations, above which rarer ones are tried
_SELDOM_LOGGED = 50


def candidates(bench: Bench, measured: Measured) -> list[Change]:
    """Changes to try with these settings; for each stage, the most promising first."""
    config, device = bench.config, bench.device.type
    efficiency, data, cores = config.efficiency, config.data, int(bench.cores)
    of_step = functools.partial(_switch, "efficiency", side="step", stage="image encoder")
    of_loader = functools.partial(_switch, "data", side="loader", stage=decoding_stage(bench))
    found = list(_rarer(bench, measured))
    if 0 < efficiency.micro_batch_size < bench.local_batch:
        about = "encodes each image once; needs more memory"
        found.append(of_step("micro_batch_size", 0, about, stage="forward and backward"))
    if device == "cpu" and torch.get_num_threads() != cores:
        about = "a thread of torch's operators for each core"
        found.append(Change(
            option=f"OMP_NUM_THREADS={cores}", about=about, stage="image encoder", side="nothing",
            compute_threads=cores,
        ))  # fmt: skip
    if efficiency.activation_checkpointing:
        about = "keeps activations; needs more memory"
        found.append(of_step("activation_checkpointing", False, about))
    other = "bf16" if efficiency.precision in ("fp32", "fp64") else "fp32"
    found.append(of_step("precision", other, "arithmetic of the encoders; rounds differently"))
    if efficiency.compile == "off" and device == "cuda":
        found.append(of_step("compile", "blocks", "compiled blocks; a minute more at the start"))
    if bench.local_batch < _SMALLEST_BATCH:
        size = max(2, _SMALLEST_BATCH // bench.local_batch) * config.run.global_batch_size
        about = "fixed costs of a step are shared by more"
        found.append(_switch(
            "run", "global_batch_size", size, about, side="both", stage="clip and update",
            same_results=False,
        ))  # fmt: skip
    if data.threads != cores:
        found.append(of_loader("threads", cores, "a thread for each core"))
    found += _of_images(bench)
    found += no_augmentation(bench)
    if device == "cuda":
        other = "cpu" if decoder_of(data, bench.device).type == "cuda" else "gpu"
        found.append(of_loader("decode_device", other, "levels differ a little"))
    return found


def no_augmentation(bench: Bench) -> list[Change]:
    """Only crops and flips, if the run has more."""
    if bench.loader.augmentation is None:
        return []
    return [Change(
        option="--data.augment none", about="only crops and flips", stage="augment",
        side="loader", set={"data": {"augment": ["none"]}}, same_results=False,
    )]  # fmt: skip


def _switch(group: str, name: str, value: Any, about: str, **more: Any) -> Change:
    option = f"--{group}.{name.replace('_', '-')} {value}"
    if isinstance(value, bool):
        option = f"--{group}.{'' if value else 'no-'}{name.replace('_', '-')}"
    return Change(option=option, about=about, set={group: {name: value}}, **more)


def _rarer(bench: Bench, measured: Measured) -> Iterator[Change]:
    """Checkpoints, evaluations and lines of metrics that come more rarely."""
    for work in measured.periodic:
        if (part := measured.part_of(work)) > _RARE:
            steps = work.every_steps * part / (_RARE * (1 - min(part, 0.99)))
            digits = 10 ** max(0, math.floor(math.log10(steps)) - 1)
            about, of = f"{work.name}s are then 1 % of the time", ("run", "evaluate_every_steps")
            if work.name == CHECKPOINT:
                about, of = f"{about}; a failure costs more steps", ("checkpoint", "every_steps")
            value = math.ceil(steps / digits) * digits
            yield _switch(*of, value, about, side="nothing", stage=work.name)
    if measured.logging > _RARE and bench.config.run.log_every_steps < _SELDOM_LOGGED:
        about, of = "fewer lines in metrics.jsonl and trackers", ("run", "log_every_steps")
        yield _switch(*of, _SELDOM_LOGGED, about, side="nothing", stage=LOGGING)


def decoding_stage(bench: Bench) -> str:
    """The name of the stage that decodes images or crops stored pixels."""
    kind = image_kind(bench.parts.datasets[0])
    if bench.loader.form != "crops":
        return f"{kind} decode"
    return (f"{kind} decode, " if bench.loader.reading.decodes_files else "") + "crop and resize"


def image_kind(dataset: PackedDataset) -> str:
    """The first sample's format: JPEG, PNG, WebP or raw."""
    first = bytes(dataset.image_bytes(0)[:12])
    if first.startswith(b"\xff\xd8"):
        return "JPEG"
    if first.startswith(b"\x89PNG"):
        return "PNG"
    return "WebP" if first[8:12] == b"WEBP" else "raw"


def _of_images(bench: Bench) -> Iterator[Change]:
    if not bench.loader.reading.decodes_files or len(bench.parts.datasets) > 1:
        return
    rows = bench.parts.datasets[0].samples[:1000]
    short = float(min(rows["height"].mean(), rows["width"].mean()))
    side = -(-bench.config.data.image_size * 8 // 7 // 8) * 8  # 256 for 224
    kind = image_kind(bench.parts.datasets[0])
    make = functools.partial(Change, side="images", stage=decoding_stage(bench), same_results=False)
    if bench.parts.datasets[0].cache is not None:
        yield make(
            option="copy the data set to a disk of this machine", stage=READ, image={},
            about="as from the second epoch on, if --data.cache-bytes holds all of it",
        )  # fmt: skip
    if short > 1.2 * side:
        yield make(
            option=f"unicl-pack build SOURCES --resize short:{side} --out DIR",
            about="images that are no larger than crops need",
            image={"short_side": side, "format": "jpeg"},
        )
    elif kind in ("PNG", "WebP"):
        yield make(
            option="unicl-pack build SOURCES --format jpeg --out DIR",
            about=f"JPEGs are decoded faster than {kind}",
            image={"format": "jpeg"},
        )
    yield make(
        option=f"unicl-pack build SOURCES --resize square:{side} --format raw --out DIR",
        about="nothing is decoded; more bytes are read",
        image={"square_side": side, "format": "raw"},
    )


@contextlib.contextmanager
def data_of(
    bench: Bench, change: Change, folder: Path, *, seconds: float
) -> Iterator[Parts | None]:
    """A change's data: a few images packed anew within `seconds`; None for the run's own.

    Raises ImageError for images that cannot be packed so.
    """
    if change.image is None:
        yield None
        return
    out = Path(tempfile.mkdtemp(dir=folder)) / "packed"
    count = max(bench.config.run.global_batch_size, 128)
    pack_again(bench.parts.datasets[0], out, count=count, seconds=seconds, **change.image)
    with PackedDataset(out) as dataset:
        yield Parts([dataset], None, build_prompts([dataset], bench.config))


def pack_again(
    dataset: PackedDataset, out: Path, *, count: int, seconds: float, **image: Any
) -> None:
    """Packs `count` samples with `check_image(**image)`, or copies them if `image` is empty.

    They are the first ones (samples lie in random order), repeated if `seconds` run out.
    """
    manifest = dataset.manifest
    form: Literal["raw", "encoded"] = "raw" if image.get("format") == "raw" else "encoded"
    deadline = time.perf_counter() + seconds
    made: list[PackedSample] = []
    for index in range(min(count, len(dataset))):
        made.append(_sample(dataset, index, image or {"format": "packed"}))
        if time.perf_counter() > deadline:
            break
    with DatasetWriter(out, images=form) as writer:
        for sample in itertools.islice(itertools.cycle(made), count):
            writer.add(sample)
        writer.finish(
            tokenizer=manifest.tokenizer, vocabulary_hash=manifest.vocabulary_hash,
            context_length=manifest.context_length, class_names=manifest.class_names,
            templates=manifest.templates, source=["unicl-bench run"], seed=0, tool_version="0",
        )  # fmt: skip


def _sample(dataset: PackedDataset, index: int, image: dict[str, Any]) -> PackedSample:
    made = check_image(bytes(dataset.image_bytes(index)), **image)
    captions = range(int(dataset.samples[index]["captions_count"]))
    return PackedSample(
        image=made.data, extension=made.extension, height=made.height, width=made.width,
        xxh3=xxhash.xxh3_64_intdigest(made.data), labels=dataset.labels_of(index).tolist(),
        captions=["" for _ in captions],
        tokens=[dataset.caption_tokens(index, which) for which in captions],
    )  # fmt: skip
