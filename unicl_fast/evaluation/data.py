"""Opens the data sets that `--data` and `--train` name, each as one packed data set.

Any other source of `unicl-pack build` is first packed into a temporary folder, so that images reach
the model in one way only, and undecodable ones are counted and named.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from PIL import Image

from unicl_fast.dataset.manifest import MANIFEST_NAME
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import Description, SampleReader
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import Ranks, from_rank_0, rank_0_alone
from unicl_fast.evaluation.choices import Metric, MetricChoice
from unicl_fast.packing.build import build_dataset
from unicl_fast.packing.label_space import read_label_space
from unicl_fast.system.atomic_files import temporary_folder
from unicl_fast.system.wording import count_of, without_secrets
from unicl_fast.text.class_lists import read_templates

# CLIP's protocol (arXiv 2103.00020, table 9) reports the mean over classes for these.
_MEAN_PER_CLASS = re.compile(
    r"(oxford(iiit)?)?pets?|(oxford)?flowers(102)?|(fgvc)?aircraft|caltech101"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationData:
    """An opened data set and how to evaluate it."""

    name: str  # short, for tables and file names
    dataset: PackedDataset
    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    def labels_among(self, other: EvaluationData) -> list[list[int]]:
        """The labels of each sample, as numbers of another data set's classes of the same name."""
        if self.class_names == other.class_names:
            return all_labels(self.dataset)
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
        return [[table[label] for label in own] for own in all_labels(self.dataset)]


def all_labels(dataset: PackedDataset) -> list[list[int]]:
    return [dataset.labels_of(sample).tolist() for sample in range(len(dataset))]


def all_descriptions(dataset: PackedDataset) -> list[Description]:
    with contextlib.closing(SampleReader(dataset)) as reader:
        return [reader.read_description(sample) for sample in range(len(dataset))]


def short_name(spec: str) -> str:
    """A data set's name in tables: the name of its folder."""
    if is_url(spec):
        return without_secrets(spec).removesuffix("?...").rstrip("/").rpartition("/")[2]
    return Path(spec).resolve().name


def protocol_metric(name: str) -> Metric:
    """The metric that CLIP's protocol reports for a data set of this name."""
    plain = re.sub(r"(test|train|val|trainval)$", "", _plain(name))
    return "mean_per_class" if _MEAN_PER_CLASS.fullmatch(plain) else "top1"


def choose_metric(metric: MetricChoice, spec: str) -> Metric:
    """The chosen metric; auto is the protocol's for this data set's name."""
    return protocol_metric(short_name(spec)) if metric == "auto" else metric


def check_data(spec: str) -> None:
    """Raises for a data set that is missing or visibly wrong, without packing anything."""
    if _is_packed(spec):
        PackedDataset(spec, verify=False).close()
    elif within := sorted(one.parent for one in Path(spec).glob(f"*/{MANIFEST_NAME}")):
        raise ValueError(f"{spec} holds packed data sets: name one: {' '.join(map(str, within))}")
    elif not (Path(spec).exists() or Path(spec).parent.is_file() or "{" in spec):
        raise FileNotFoundError(
            f"nothing is at {spec}: give a packed data set or a source of unicl-pack build"
        )


def _is_packed(spec: str) -> bool:
    return is_url(spec) or (Path(spec) / MANIFEST_NAME).is_file()


def is_image_file(path: Path) -> bool:
    """Whether Pillow knows the ending of a file's name as that of images."""
    return path.is_file() and path.suffix.lower() in Image.registered_extensions()


@contextlib.contextmanager
def open_data(
    spec: str,
    *,
    ranks: Ranks,
    class_names: str = "",
    templates: str = "",
    name: str = "",
    takes_loose: bool = False,
    most_images: int | None = None,
) -> Iterator[EvaluationData]:
    """Opens the data set that a spec names, on all ranks; leaves nothing behind.

    Specs, class names and templates are written as for `unicl-eval zero-shot`; by default they are
    the data's own. Rank 0 packs unpacked sources while the others wait, including images outside
    class folders if `takes_loose`. `name` is for tables, by default `short_name`. At most
    `most_images` are used, as a `fraction` of the data set.

    Raises:
        ValueError: not such a data set, or class names that differ from its own in number or order.
    """
    with contextlib.ExitStack() as stack:
        packed = spec
        if not (is_packed := _is_packed(spec)):
            with refused_together(ranks), rank_0_alone(ranks):
                if ranks.is_main:
                    folder = stack.enter_context(temporary_folder("unicl-eval-"))
                    packed, source = str(folder / "packed"), spec
                    if takes_loose and is_image_file(Path(spec)):  # packing reads folders of them
                        (folder / "images").mkdir()
                        source = str(folder / "images")
                        shutil.copyfile(spec, folder / "images" / Path(spec).name)
                    build_dataset(
                        [source], packed, class_names=class_names, takes_loose=takes_loose,
                        progress=sys.stderr.isatty(),
                    )  # fmt: skip
            packed = from_rank_0(packed, ranks)
        dataset = stack.enter_context(PackedDataset(packed))
        if most_images is not None and len(dataset) > most_images:
            fraction = most_images / len(dataset)
            dataset = stack.enter_context(PackedDataset(packed, fraction=fraction))
        if not is_packed:
            dataset.location = spec  # messages name the given path, not the temporary folder
        yield EvaluationData(
            name=name or short_name(spec),
            dataset=dataset,
            class_names=_choose_names(class_names, dataset),
            templates=read_templates(templates) if templates else dataset.manifest.templates,
        )
        if not is_packed and ranks.world_size > 1:
            dist.barrier(group=ranks.host_group)  # rank 0 removes files that the others still read


def _choose_names(class_names: str, dataset: PackedDataset) -> tuple[str, ...]:
    """The data's own names, or the given ones, which must match in number and order."""
    own = dataset.manifest.class_names
    if not class_names:
        return own
    given = read_label_space(class_names).names
    if len(given) != len(own):
        raise ValueError(
            f"{dataset.location} has {count_of(len(own), 'class')}, {class_names} has "
            f"{count_of(len(given), 'name')}"
        )
    number_of = {_plain(name): number for number, name in enumerate(own)}
    for number, name in enumerate(given):
        other = number_of.get(_plain(name), number)
        if other != number and _plain(given[other]) != _plain(own[other]):
            raise ValueError(
                f"class {number} of {dataset.location} is {own[number]!r}, {class_names} calls it "
                f"{name!r}, which the data has as class {other}: the two number classes "
                "differently; give the names in the data's order, in a file by --class-names"
            )
    return given


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
