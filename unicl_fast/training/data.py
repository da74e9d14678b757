"""Packed data sets for training: opened with their weights, checked, described."""

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.dataset.block_cache import DEFAULT_BLOCK_BYTES, CacheOptions
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.other_tokens import take_tokens
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import shared_images
from unicl_fast.system.checked_fields import plain_number
from unicl_fast.system.phases import START_PATIENCE, mark
from unicl_fast.system.wording import count_of, without_secrets
from unicl_fast.text.file_tokenizer import FileTokenizer, make_tokenizer
from unicl_fast.text.prompts import LABEL_BITS, ClassPrompts
from unicl_fast.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MOST_TIMES = 1.2  # that machines together read a remote data set in an epoch, without a warning


def open_datasets(
    data: DataConfig, *, verify: bool = True
) -> tuple[list[PackedDataset], list[float] | None]:
    """Opens the data sets of `data.train`, DIR or DIR=WEIGHT each, up to their `data.fraction`.

    Without `verify`, for a first look before the run opens them, checksums of arrays are not
    compared, nothing is warned of, and any number of samples may be missing.

    Returns:
        The data sets and their weights; None if no weight was given.

    Raises:
        ValueError: none are given, or some have a weight and some have none.
        FileNotFoundError: not a packed data set, or too much of it missing.
    """
    if not data.train:
        raise ValueError("nothing to train on: give --data.train DIR (made by unicl-pack build)")
    folders, weights = zip(*map(folder_and_weight, data.train), strict=True)
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        given_text = " ".join(data.train)
        raise ValueError(
            f"data.train: give every data set a weight (DIR=WEIGHT) or none, not {given_text}"
        )
    for folder, weight in zip(folders, weights, strict=True):
        if weight is None and "=" in folder and not is_url(folder) and not Path(folder).exists():
            raise ValueError(
                f"data.train: there is no folder {folder}; in DIR=WEIGHT, WEIGHT must be a number"
            )
    fractions = data.fraction if len(data.fraction) > 1 else data.fraction * len(folders)
    limit, cache = data.max_bad_fraction if verify else None, cache_options(data)
    datasets = []
    for folder, fraction in zip(folders, fractions, strict=True):
        mark(f"opening {without_secrets(folder)}", patience=START_PATIENCE)
        opened = PackedDataset(
            folder, fraction=fraction, max_bad_fraction=limit, verify=verify, cache=cache
        )
        datasets.append(opened)
    if not verify:
        return datasets, given or None
    for dataset in datasets:
        _warn_of_traffic(dataset, data)
    if given and not math.isclose(total := sum(given), 1, rel_tol=1e-6):
        named = zip(folders, given, strict=True)
        parts = ", ".join(f"{folder} {weight / total:.1%}" for folder, weight in named)
        logger.warning("data.train: weights sum to %g, not 1; of each batch are: %s", total, parts)
    return datasets, given or None


def folder_and_weight(spec: str) -> tuple[str, float | None]:
    """Splits DIR=WEIGHT; the folder's own name can contain a =."""
    folder, equals, weight = spec.rpartition("=")
    try:
        return (folder, plain_number(weight, float)) if equals else (spec, None)
    except ValueError:
        return spec, None


def held_out_beside(train: str) -> str:
    """The part that `unicl-pack build --split` held out of a data set, or ""."""
    folder = folder_and_weight(train)[0]
    path = Path(folder).parent / "held-out"
    return str(path) if not is_url(folder) and path.is_dir() else ""


def cache_options(data: DataConfig) -> CacheOptions:
    """The config's settings of the cache for data sets under URLs."""
    return CacheOptions(
        folder=Path(data.cache_folder) if data.cache_folder else None,
        max_bytes=data.cache_bytes,
        block_bytes=max(4096, min(DEFAULT_BLOCK_BYTES, data.cache_bytes // 16)),
    )


def distinct_names(locations: Sequence[str], *, may_repeat: bool = False) -> list[str]:
    """A name for each data set in metrics and results, from the folder or URL of each.

    It is the last part of the path, with as many parts before it as tell data sets apart: a-test
    and b-test for a/test and b/test. If a data set `may_repeat`, its second name ends in -2.

    Raises ValueError: one data set is there twice, or names cannot be told apart.
    """
    paths: list[tuple[str, ...]] = []
    shown = list(map(without_secrets, locations))  # names are shown and stored
    given = list(map(_parts_of, shown))
    for number, path in enumerate(given):
        count = given[:number].count(path)
        if count and not may_repeat:
            raise ValueError(
                f"{shown[number]} is the same data set as {shown[given.index(path)]}: name it once"
            )
        paths.append((*path[:-1], f"{path[-1]}-{count + 1}") if count else path)
    lengths = [1] * len(paths)
    while True:
        names = ["-".join(path[-length:]) for path, length in zip(paths, lengths, strict=True)]
        alike = [number for number, name in enumerate(names) if names.count(name) > 1]
        if not alike:
            return names
        if all(lengths[number] >= len(paths[number]) for number in alike):
            raise ValueError(
                f"{shown[alike[0]]} and {shown[alike[1]]} would both be called "
                f"{names[alike[0]]}: rename one of the folders"
            )
        for number in alike:
            lengths[number] += 1


def _parts_of(location: str) -> tuple[str, ...]:
    """The parts of a URL without its scheme, or below the root of a path with links followed."""
    if is_url(location):
        return tuple(part for part in location.partition("://")[2].split("/") if part)
    path = Path(location).resolve()
    return path.parts[1:] or path.parts


def _warn_of_traffic(dataset: PackedDataset, data: DataConfig) -> None:
    """Warns if the order of training will read much more from a store than it needs."""
    if dataset.cache is None:
        return
    manifest, num_samples = dataset.manifest, len(dataset)
    elsewhere = manifest.pixels or manifest.in_place
    files = manifest.shards if elsewhere is None else [elsewhere]
    total = sum(one.num_bytes for one in files) * num_samples // max(1, manifest.num_samples)
    if total <= data.cache_bytes:
        return
    machines = _num_machines()
    if data.shuffle_window and (times := _times_read(machines, data.shuffle_groups)) > _MOST_TIMES:
        logger.warning(
            "DATA: %s: %d machines with data.shuffle_groups = %d will together read it %.1f times "
            "an epoch. Set that to a multiple of %d in a new run; one that is resumed keeps it",
            dataset.location, machines, data.shuffle_groups, times, machines,
        )  # fmt: skip
    part = _times_read(machines, data.shuffle_groups) / machines
    window = min(data.shuffle_window or num_samples, num_samples)
    # a machine's part of a window and of the next one, which is fetched meanwhile
    at_once = 2 * total * window / num_samples * part if data.shuffle_window else total
    if at_once <= data.cache_bytes:
        return
    fitting = max(16, int(data.cache_bytes * num_samples / (2.5 * total * part)))
    cause = f"two windows of data.shuffle_window = {window:,} samples need {at_once / 1e9:.1f} GB"
    if not data.shuffle_window:
        cause = f"all of it is shuffled together, {total / 1e9:.1f} GB"
    logger.warning(
        "DATA: %s: %s, and data.cache_bytes keeps %.1f GB: the same blocks will be read again and "
        "again. Set data.shuffle_window to %d or less, or give the cache more room",
        dataset.location, cause, data.cache_bytes / 1e9, fitting,
    )  # fmt: skip


def _times_read(machines: int, groups: int) -> float:
    """How often machines read a data set in an epoch: those that share a group both need it."""
    return 1 + (machines - math.gcd(machines, groups)) / groups


def _num_machines() -> int:
    """Machines of this job, if each has as many ranks as this one."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def longest_text(datasets: Sequence[PackedDataset], prompts: ClassPrompts) -> int:
    """Tokens of the longest caption or prompt, start and end tokens included."""
    lengths = [dataset.captions["tokens_length"].max(initial=0) for dataset in datasets]
    return int(max([prompts.tokens.shape[1], *lengths]))


def describe_datasets(
    datasets: Sequence[PackedDataset], weights: Sequence[float] | None
) -> dict[str, Any]:
    """Describes the training data by contents, not paths, so that data can be moved.

    Checkpoints hold it, and a run that resumes compares it.
    """
    manifests = [dataset.manifest for dataset in datasets]
    hierarchies = [one.hierarchy and dataclasses.asdict(one.hierarchy) for one in manifests]
    # left out if there are none, as in checkpoints of versions without them
    optional: dict[str, Any] = {"hierarchies": hierarchies} if any(hierarchies) else {}
    if any(one.label_columns for one in manifests):
        optional["label_columns"] = [one.columns for one in manifests]
    return optional | {
        "shares": list(weights) if weights else None,
        "sources": [
            {
                "num_samples": len(dataset),
                "shards": [shard.xxh3 for shard in manifest.shards]
                + [one.xxh3 for one in (manifest.pixels, manifest.in_place) if one is not None],
                "num_classes": len(manifest.class_names),
            }
            for dataset, manifest in zip(datasets, manifests, strict=True)
        ],
        "vocabulary_hash": [dataset.vocabulary_hash for dataset in datasets],
        "class_names": [list(manifest.class_names) for manifest in manifests],
        "templates": [list(manifest.templates) for manifest in manifests],
    }


def rows_of_class_names(
    datasets: Sequence[PackedDataset], names: Sequence[str], *, prompts: ClassPrompts
) -> NDArray[np.int64]:
    """Finds the row that cross-entropy learns for each of some class names.

    Classes with a prompt in common share a row, so the training's own prompts are needed.

    Raises ValueError: no data set of the training has such a name.
    """
    starts = np.cumsum(prompts.num_classes) - prompts.num_classes
    row_of: dict[str, int] = {}
    for number, dataset in enumerate(datasets):
        class_names = dataset.manifest.class_names
        ids = prompts.classes_of(number, np.arange(len(class_names)))
        rows = starts[ids >> LABEL_BITS] + (ids & ((1 << LABEL_BITS) - 1))
        for name, row in zip(class_names, rows.tolist(), strict=True):
            row_of.setdefault(name, row)
    if unknown := [name for name in names if name not in row_of]:
        raise ValueError(
            f"data.evaluate has {count_of(len(unknown), 'class')} that the run does not learn, "
            f"such as {unknown[0]!r}; the model knows no others"
        )
    return np.array([row_of[name] for name in names], dtype=np.int64)


def warn_of_shared_images(
    datasets: Sequence[PackedDataset], evaluated: Sequence[PackedDataset]
) -> None:
    """Warns of images that are trained on and evaluated, byte for byte."""
    for held_out in evaluated:
        for dataset in datasets:
            if count := shared_images(dataset, held_out):
                logger.warning(
                    "DATA: %s of the %s of %s are in %s too, so its results say nothing of new "
                    "images: divide the sources anew by unicl-pack build SOURCE... --split 0.9",
                    f"{count:,}", count_of(len(held_out), "image"), held_out.location,
                    dataset.location,
                )  # fmt: skip


def check_tokenizer(dataset: PackedDataset, config: TrainConfig) -> None:
    """Gives captions the model's tokens, and refuses token ids that it would misread.

    Raises ValueError: packed with another vocabulary, or for another one than the model's.
    """
    tokenizer, size = tokenizer_of(config), config.model.vocab_size
    if config.objective.uses_texts:
        if config.model.tokenizer and dataset.manifest.num_captions:
            take_tokens(dataset, tokenizer, cache=cache_options(config.data).place / "tokens")
        if not fits_vocabulary(tokenizer, size):
            raise ValueError(
                f"model.vocab_size={size:,}, and its tokenizer {tokenizer.name} has "
                f"{tokenizer.vocab_size:,} tokens: use only the image encoder of a model whose "
                "tokenizer is missing, --init-image"
            )
    others = dataset.vocabulary_hash != tokenizer.vocabulary_hash
    if others and (dataset.manifest.num_captions or not config.model.tokenizer):
        raise ValueError(
            f"{dataset.location} was packed with the tokenizer {dataset.manifest.tokenizer} of "
            f"vocabulary {dataset.vocabulary_hash[:16]}, this version has {tokenizer.name} "
            f"{tokenizer.vocabulary_hash[:16]}: pack it again"
        )
    if dataset.largest_token is not None and dataset.largest_token >= tokenizer.vocab_size:
        raise ValueError(
            f"{dataset.folder / 'tokens.npy'} is damaged: token {dataset.largest_token} is beyond "
            f"the vocabulary of {tokenizer.vocab_size}; copy the data set again"
        )


def fits_vocabulary(tokenizer: Tokenizer | FileTokenizer, size: int) -> bool:
    """Whether the tokenizer suits a model's table of tokens; those of others can be padded."""
    own = tokenizer.vocab_size
    return own <= size if isinstance(tokenizer, FileTokenizer) else own == size


def check_end_of_texts(config: TrainConfig) -> None:
    """Refuses (ValueError) texts that do not end where the model reads them."""
    tokenizer, reads_largest = tokenizer_of(config), config.model.text_pool == "end"
    if reads_largest and isinstance(tokenizer, FileTokenizer) and not tokenizer.ends_in_largest():
        raise ValueError(
            f"model.text_pool=end reads a text at its largest token; {tokenizer.name} ends texts "
            "with a smaller one: take model.text_pool=last"
        )


def tokenizer_of(config: TrainConfig) -> Tokenizer | FileTokenizer:
    """The tokenizer of a run's texts; CLIP's if it has none."""
    place = config.model.tokenizer if config.objective.uses_texts else ""
    pads = not config.model.text_kind  # transformers' encoders mask padding
    return make_tokenizer(place, config.model.context_length, pads=pads)


def log_cut_captions(dataset: PackedDataset, context_length: int) -> None:
    """Logs how many captions are longer than the model's context, if any."""
    if number := dataset.count_longer_captions(context_length):
        logger.info(
            "%s: %s of %s are cut to model.context_length=%d tokens",
            dataset.location, f"{number:,}", count_of(len(dataset.captions), "caption"),
            context_length,
        )  # fmt: skip


def build_prompts(datasets: Sequence[PackedDataset], config: TrainConfig) -> ClassPrompts:
    """Builds the prompts of all classes of all data sets, cut to the model's context.

    So classes whose prompts it cannot tell apart are joined here (see `map_targets`).
    """
    sources = []
    for manifest in (dataset.manifest for dataset in datasets):
        names = manifest.class_names
        if config.data.prompts == "levels" and manifest.hierarchy is not None:
            names = (*names, *manifest.hierarchy.names)  # classes above come after the others
        sources.append((names, manifest.templates))
    # token rows are kept there, since 1.7 million of them cost a start 40 s of CPU time
    cache_folder = cache_options(config.data).place / "prompts"
    return ClassPrompts(sources, tokenizer_of(config), cache_folder=cache_folder)
