"""Opens the data sets that `--data` and `--train` name, each as one packed data set.

A packed data set is used as it is. Class folders, zips of them and data sets that torchvision has
on the disk are packed into a temporary folder first: so an image reaches the model in one way
only, and what cannot be decoded is counted and named.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from unicl_fast.dataset.manifest import MANIFEST_NAME
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import Ranks, from_rank_0, rank_0_alone
from unicl_fast.evaluation.requests import Metric, MetricChoice
from unicl_fast.packing.build import build_dataset
from unicl_fast.packing.label_space import read_label_space
from unicl_fast.system.atomic_files import temporary_folder
from unicl_fast.system.wording import count_of, without_secrets
from unicl_fast.text.class_lists import (
    CLIP_BENCHMARK,
    clip_benchmark_list,
    has_clip_benchmark,
    read_class_names,
    read_templates,
)
from unicl_fast.training.data import distinct_names

TORCHVISION = "torchvision:"

# CLIP's protocol (arXiv 2103.00020, table 9) reports the mean over classes for these.
_MEAN_PER_CLASS = re.compile(
    r"(oxford(iiit)?)?pets?|(oxford)?flowers(102)?|(fgvc)?aircraft|caltech101"
)

# torchvision's class -> the key of clip-benchmark's templates, and of its class names where it has
# any and both number the classes alike (Caltech101: they do not).
_TEMPLATE_KEYS = {
    "CIFAR10": "cifar10", "CIFAR100": "cifar100", "Caltech101": "caltech101",
    "Country211": "country211", "DTD": "dtd", "EuroSAT": "eurosat", "FER2013": "fer2013",
    "FGVCAircraft": "fgvc_aircraft", "Flowers102": "flowers", "Food101": "food101",
    "GTSRB": "gtsrb", "ImageNet": "imagenet1k", "MNIST": "mnist", "OxfordIIITPet": "pets",
    "PCAM": "pcam", "RenderedSST2": "renderedsst2", "STL10": "stl10", "SUN397": "sun397",
    "SVHN": "svhn", "StanfordCars": "cars",
}  # fmt: skip
_WITH_NAMES = {
    *("Country211", "EuroSAT", "FER2013", "Flowers102", "GTSRB", "ImageNet", "MNIST"),
    *("OxfordIIITPet", "PCAM", "SVHN"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationData:
    """An opened data set and how it is to be evaluated."""

    name: str
    """Short, for tables and file names."""
    dataset: PackedDataset
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    metric: Metric
    """The metric that is reported first."""

    def labels(self) -> list[list[int]]:
        """The labels of each sample."""
        return [self.dataset.labels_of(sample).tolist() for sample in range(len(self.dataset))]

    def labels_among(self, other: EvaluationData) -> list[list[int]]:
        """The labels of each sample as numbers of another data set's classes, found by name."""
        if self.class_names == other.class_names:
            return self.labels()
        number_of = {name: number for number, name in enumerate(other.class_names)}
        if len(number_of) < len(other.class_names):
            raise ValueError(
                f"{other.name} has several classes of one name, and {self.name} has another list: "
                "pack both with the same --class-names"
            )
        if unknown := [name for name in self.class_names if name not in number_of]:
            others = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
            raise ValueError(
                f"{self.name} has the class {unknown[0]!r}{others}, which the training data "
                f"{other.name} lacks: pack both with the same --class-names"
            )
        table = [number_of[name] for name in self.class_names]
        return [[table[label] for label in own] for own in self.labels()]


def short_name(spec: str) -> str:
    """A data set's name in tables: that of its folder, or torchvision's."""
    if spec.startswith(TORCHVISION):
        return spec.split(":")[1]
    if is_url(spec):
        return without_secrets(spec).removesuffix("?...").rstrip("/").rpartition("/")[2]
    return Path(spec).resolve().name


def short_names(specs: Sequence[str]) -> list[str]:
    """A name for each, by `distinct_names`; torchvision's are told apart by split, then folder."""
    return distinct_names([_as_path(spec) for spec in specs])


def _as_path(spec: str) -> str:
    if not spec.startswith(TORCHVISION):
        return spec
    kind, folder, split, _ = _parse_torchvision(spec)
    return str(Path(folder) / split / kind.__name__)


def protocol_metric(name: str) -> Metric:
    """The metric that CLIP's protocol reports for a data set of this name."""
    plain = re.sub(r"(test|train|val|trainval)$", "", _plain(name))
    return "mean_per_class" if _MEAN_PER_CLASS.fullmatch(plain) else "top1"


def choose_metric(metric: MetricChoice, spec: str) -> Metric:
    """A metric as it was chosen; auto takes the protocol's for the name of the data set."""
    return protocol_metric(short_name(spec)) if metric == "auto" else metric


def check_data(spec: str) -> None:
    """Refuses a data set that is visibly wrong or not there, without packing anything."""
    if spec.startswith(TORCHVISION):
        _parse_torchvision(spec)
    elif _is_packed(spec):
        PackedDataset(spec, verify=False).close()
    elif not (Path(spec).exists() or Path(spec).parent.is_file() or "{" in spec):
        raise FileNotFoundError(
            f"nothing is at {spec}: give a packed data set, class folders, or "
            f"{TORCHVISION}CLASS:FOLDER"
        )


def _is_packed(spec: str) -> bool:
    if spec.startswith(TORCHVISION):
        return False
    return is_url(spec) or (Path(spec) / MANIFEST_NAME).is_file()


@contextlib.contextmanager
def open_data(
    spec: str,
    *,
    ranks: Ranks,
    metric: MetricChoice = "auto",
    class_names: str = "",
    templates: str = "",
    name: str = "",
) -> Iterator[EvaluationData]:
    """Opens the data set that a spec names, on all ranks; leaves nothing behind.

    Specs, metrics, class names and templates are those of `requests.ZeroShot`; empty ones are the
    data's own. What is not packed is packed by rank 0, while the others wait. `name` is for tables;
    empty takes `short_name`.

    Raises:
        ValueError: not such a data set, or class names that are not its own in number or order.
    """
    with contextlib.ExitStack() as stack:
        packed = spec
        if not (is_packed := _is_packed(spec)):
            with refused_together(ranks), rank_0_alone(ranks):
                if ranks.is_main:
                    folder = stack.enter_context(temporary_folder("unicl-eval-"))
                    packed = str(folder / "packed")
                    if spec.startswith(TORCHVISION):
                        _pack_torchvision(spec, folder, class_names=class_names)
                    else:
                        _pack(spec, folder, class_names=class_names)
            packed = from_rank_0(packed, ranks)
        dataset = stack.enter_context(PackedDataset(packed))
        if not is_packed:
            dataset.location = spec  # messages name what was given, not the temporary folder
        names = dataset.manifest.class_names
        if class_names:
            given = read_label_space(class_names).names
            if len(given) != len(names):
                raise ValueError(
                    f"{spec} has {count_of(len(names), 'class')}, {class_names} has "
                    f"{count_of(len(given), 'name')}"
                )
            _require_same_order(given, names, spec, where=class_names)
            names = given
        yield EvaluationData(
            name=name or short_name(spec),
            dataset=dataset,
            class_names=names,
            templates=_choose_templates(spec, templates, dataset),
            metric=choose_metric(metric, spec),
        )
        if not is_packed and ranks.world_size > 1:
            dist.barrier(group=ranks.host_group)  # rank 0 removes what the others still read


def _choose_templates(spec: str, templates: str, dataset: PackedDataset) -> tuple[str, ...]:
    if not templates and (key := _clip_benchmark_key(spec)):
        templates = f"{CLIP_BENCHMARK}{key}"
    return read_templates(templates) if templates else dataset.manifest.templates


def _clip_benchmark_key(spec: str) -> str | None:
    """The key of clip-benchmark's lists for a torchvision data set, if the package is installed."""
    if not spec.startswith(TORCHVISION) or not has_clip_benchmark():
        return None
    return _TEMPLATE_KEYS.get(spec.split(":")[1])


def _require_same_order(given: Sequence[str], own: Sequence[str], spec: str, *, where: str) -> None:
    """Refuses names whose order visibly differs from the data's."""
    number_of = {_plain(name): number for number, name in enumerate(own)}
    for number, name in enumerate(given):
        other = number_of.get(_plain(name), number)
        if other != number and _plain(given[other]) != _plain(own[other]):
            raise ValueError(
                f"class {number} of {spec} is {own[number]!r}, {where} calls it {name!r}, "
                f"which the data has as class {other}: the two number classes differently; give "
                "the names in the data's order, in a file by --class-names"
            )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _pack(source: str | Path, folder: Path, *, class_names: str = "", image_root: str = "") -> None:
    build_dataset(
        [source],
        folder / "packed",
        class_names=class_names,
        image_root=image_root,
        progress=sys.stderr.isatty(),
    )


def _parse_torchvision(spec: str) -> tuple[type[Any], str, str, dict[str, Any]]:
    """Reads torchvision:CLASS:FOLDER[:SPLIT]: class, folder, split, arguments of the class."""
    import torchvision.datasets

    parts = spec.split(":")
    if len(parts) not in (3, 4) or not parts[1] or not parts[2]:
        raise ValueError(
            f"a data set of torchvision is written {TORCHVISION}CLASS:FOLDER or "
            f"{TORCHVISION}CLASS:FOLDER:SPLIT, such as {TORCHVISION}CIFAR10:/data, not {spec}"
        )
    name, folder, split = parts[1], parts[2], parts[3] if len(parts) == 4 else "test"
    kind = getattr(torchvision.datasets, name, None)
    if name not in torchvision.datasets.__all__ or kind is None:
        raise ValueError(
            f"torchvision {torchvision.__version__} has no data set {name}; write it as "
            "torchvision.datasets does, such as OxfordIIITPet"
        )
    # The only one that unpickles files of any content: CIFAR's must have a known MD5 first, and
    # others have torch.load with weights_only (torchvision 0.28, all of its datasets/ was read for
    # this).
    if kind.__module__.endswith(".lsun"):
        raise ValueError(
            f"{spec}: torchvision's {name} unpickles a file _cache_* of the working directory, and "
            "a pickle can run any program: export its images into class folders, and give those"
        )
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{spec}: there is no folder {folder}")
    known = inspect.signature(kind.__init__).parameters
    arguments: dict[str, Any] = {"download": False} if "download" in known else {}
    if "split" in known:
        arguments["split"] = split
    elif "train" in known:
        if split not in ("train", "test"):
            raise ValueError(f"{name} has the splits train and test, not {split}")
        arguments["train"] = split == "train"
    elif len(parts) == 4 and split != "all":
        raise ValueError(f"torchvision's {name} has no splits: leave :{split} out")
    return kind, folder, split, arguments


def _pack_torchvision(spec: str, folder: Path, *, class_names: str) -> None:
    """Packs a torchvision data set into FOLDER/packed.

    Where torchvision lets a loader be given, the files are packed as they are; else its images
    are stored as PNG, which changes no pixel.
    """
    kind, root, _, arguments = _parse_torchvision(spec)
    takes_loader = "loader" in inspect.signature(kind.__init__).parameters
    try:
        dataset = kind(root, **arguments, **({"loader": str} if takes_loader else {}))
    except (RuntimeError, OSError, TypeError) as error:
        raise ValueError(
            f"{spec}: torchvision cannot open it: {error}. Nothing is fetched here: the files must "
            f"lie in {root} as torchvision's download leaves them"
        ) from error
    names = _torchvision_names(dataset, spec, class_names)
    image_root = root if takes_loader else str(folder)
    with (folder / "list.jsonl").open("w", encoding="utf-8") as file:
        for number in range(len(dataset)):
            image, label = dataset[number]
            if not hasattr(label, "__index__"):
                raise ValueError(
                    f"{spec}: a class number is expected of each image, {label!r} came"
                )
            path = os.path.abspath(image) if takes_loader else str(folder / f"{number:08d}.png")
            if not takes_loader:
                image.convert("RGB").save(path, compress_level=1)
            row = {"image": os.path.relpath(path, image_root), "label": int(label)}
            file.write(json.dumps(row) + "\n")
    listed = folder / "names.txt"
    listed.write_text("".join(f"{one}\n" for one in names), encoding="utf-8")
    _pack(folder / "list.jsonl", folder, class_names=str(listed), image_root=image_root)


def _torchvision_names(dataset: Any, spec: str, class_names: str) -> tuple[str, ...]:
    """Class names in label order: those asked for, clip-benchmark's, or torchvision's own."""
    own: tuple[str, ...] = ()
    for name in getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or ():
        first = str(name[0] if isinstance(name, (tuple, list)) else name)  # ImageNet's have several
        own += (" ".join(first.replace("_", " ").split()),)
    key = _clip_benchmark_key(spec)
    if class_names:
        return own or read_class_names(class_names)
    if key is not None and spec.split(":")[1] in _WITH_NAMES:
        names = clip_benchmark_list("class names", key)
        if own and len(own) != len(names):
            raise ValueError(
                f"{spec} has {count_of(len(own), 'class')}, clip-benchmark has "
                f"{count_of(len(names), 'name')} for {key}; "
                "give names by --class-names"
            )
        _require_same_order(names, own, spec, where="clip-benchmark")
        return names
    if not own:
        raise ValueError(
            f"torchvision has no class names for {spec}: give --class-names FILE, or pip install "
            "'unicl_fast[evaluation]' for those of clip-benchmark"
        )
    return own
