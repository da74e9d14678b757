"""The commands of `unicl-convert`: a field is an argument or option, its docstring the help.

`run` imports torch and timm, which take seconds: `--help` and mistyped options need not wait.
"""

from __future__ import annotations

import abc
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unicl_fast.config import DataConfig
from unicl_fast.system.wording import count_of

if TYPE_CHECKING:
    from torch import Tensor

    from unicl_fast.models.unicl import UniCL


@dataclass(frozen=True, kw_only=True)
class Conversion(abc.ABC):
    """A command of `unicl-convert`."""

    model: Path
    """MODEL: a run folder (its newest checkpoint), RUN/best, a checkpoint, an export; a folder of
    open_clip, transformers or timm; or open-clip:NAME/TAG, hf-hub:OWNER/NAME, official:FILE,
    timm:NAME, pypi:NAME."""
    out: Path
    """OUT: a new folder."""

    @abc.abstractmethod
    def run(self) -> None:
        """Converts a model, and prints its source, the files and how to use them.

        Raises:
            ValueError: the model is damaged or foreign, the format cannot hold it, the output
                exists, or a package is not installed.
            FileNotFoundError: no model there.
            RuntimeError: the converted model does not give our features.
            OSError: a disk failed.
        """

    def load(self, *, needs_texts: bool = True) -> UniCL:
        """Loads the model in fp32 and evaluation mode, and prints its name and size.

        Raises ValueError if OUT exists or the command `needs_texts` and the model has no text
        encoder, FileNotFoundError if there is no model.
        """
        from unicl_fast.conversion.initial import load_encoders
        from unicl_fast.conversion.output import require_new
        from unicl_fast.conversion.sources import find_own
        from unicl_fast.models.unicl import fold_statistics
        from unicl_fast.system.line import line

        require_new(self.out)  # before minutes are spent
        with line(f"reading {self.model}"):
            model = load_encoders(self.model).float()
            fold_statistics(model)
        if needs_texts and model.text_encoder is None:
            raise ValueError(
                f"{self.model} was trained with objective.name={model.config.objective.name} and "
                "has no text encoder; unicl-convert timm converts its image encoder"
            )
        found, name = find_own(str(self.model)) or self.model, model.config.model.image_encoder
        print(f"read {found}: {name}, {_size(model, model.state_dict())}")
        return model


@dataclass(frozen=True, kw_only=True)
class ToOpenClip(Conversion):
    """A folder for open_clip and programs built on it, such as CLIP_benchmark.

    open_clip.create_model_and_transforms("local-dir:OUT") gives equal features for equal tensors,
    which is checked before OUT appears. It has the views longest, squash, and a shorter side of
    data.image_size: with another data.evaluation_resize, features of images differ; the cosine is
    printed.

    Example:
      unicl-convert open-clip runs/first models/first-open-clip
    """

    def run(self) -> None:
        from unicl_fast.conversion.open_clip import write_open_clip

        from .open_clip_view import least_cosine

        model = self.load()
        _print_written(self.out, difference=write_open_clip(model, self.out))
        data, (cosine, images) = model.config.data, least_cosine(model)
        print(f"checked: {images} prepared by open_clip: cosine with ours {cosine:.4f} or more")
        if data.evaluation_resize not in (data.image_size, "longest", "squash"):
            print(
                f"note: unicl-eval shows {_view(data)}, which open_clip cannot: do not mix its "
                f"image features with ours in one index. data.evaluation_resize={data.image_size}, "
                "longest and squash are equal in both"
            )
        if model.config.model.text_kind:
            print(
                "note: hf_model_name in open_clip_config.json is this folder's place: correct it "
                "if the folder moves, to OWNER/NAME if you publish it"
            )
        first, name = _registration(model), f"local-dir:{self.out}"
        load = f"model, _, preprocess = open_clip.create_model_and_transforms({name!r})"
        print(f"next: {first}import open_clip; {load}; model.eval()")
        code = f"{first}from clip_benchmark import cli; cli.main()"
        program = f"python -c {shlex.quote(code)}" if first else "clip_benchmark"
        options = shlex.join(["--model", name, "--pretrained", ""])
        print(f"  or: {program} eval {options} --dataset wds/NAME --dataset_root DIR --no_amp")


@dataclass(frozen=True, kw_only=True)
class ToTimm(Conversion):
    """Only the image encoder, for timm: fine-tuning, detection, any use of a backbone.

    Its features are not projected into the common space.

    Example:
      unicl-convert timm runs/first models/first-timm
    """

    def run(self) -> None:
        from unicl_fast.conversion.libraries import timm_arguments, write_timm

        model = self.load(needs_texts=False)
        _print_written(self.out, difference=write_timm(model, self.out))
        name, first = model.config.model.image_encoder, _registration(model)
        more = "".join(f", {key}={value}" for key, value in timm_arguments(model).items())
        more = f"num_classes=0, checkpoint_path={str(self.out / 'model.safetensors')!r}{more}"
        print(f"next: {first}import timm; timm.create_model({name!r}, {more})")
        if not first:
            again = f"timm.create_model({f'local-dir:{self.out}'!r}, pretrained=True)"
            print(f"  or, from timm 1.0.16 on: import timm; {again}")


@dataclass(frozen=True, kw_only=True)
class ToHub(Conversion):
    """A folder in the layout of the Hugging Face hub, with a model card.

    transformers.AutoModel loads it without this package if the encoders are timm's or CLIP's. The
    card lists the run's data sets (names of folders, counts, licenses) and the figures, with
    intervals, of all evaluations of these weights with a --json file in the run's folder. OUT has
    no path of this machine. unicl-eval, unicl-pretrain --init and unicl_fast.load_model read it, or
    hf-hub:OWNER/NAME once hf upload OWNER/NAME OUT has published it.

    Example:
      unicl-eval zero-shot --checkpoint runs/first --data DIR --json runs/first/zero-shot.json
      unicl-convert hf runs/first models/first --license apache-2.0
    """

    license: str = ""
    """The license of the model by the hub's identifier, for example apache-2.0. Default: none."""
    evaluations: tuple[Path, ...] = ()
    """Files of unicl-eval --json about these weights outside the run's folder."""

    def run(self) -> None:
        from unicl_fast.conversion import hugging_face
        from unicl_fast.conversion.card import collect_facts
        from unicl_fast.conversion.export import write_export

        model = self.load()
        facts, left_out = collect_facts(self.model, evaluations=self.evaluations)
        for reason in left_out:
            print(f"left out of the card: {reason}")
        print(f"figures of evaluations on the card: {len(facts.figures)}")
        difference = write_export(model, self.out, facts=facts, license=self.license)
        _print_written(self.out, difference=difference)
        layout = hugging_face.layout_of(model)
        if layout != "unicl" and difference is None:
            print("not checked with transformers, which is not installed: pip install transformers")
        print(f"next: unicl-eval zero-shot --checkpoint {shlex.quote(str(self.out))} --data DIR")
        if layout != "unicl":
            load = f"transformers.AutoModel.from_pretrained({str(self.out)!r})"
            print(f"  or: import transformers; {load}")
        place = f"OWNER/{self.out.absolute().name} {shlex.quote(str(self.out))}"
        print(f"to publish it: write your name for OWNER in its README.md, then hf upload {place}")


@dataclass(frozen=True, kw_only=True)
class ToPeft(Conversion):
    """The adapters of a run with optim.lora as peft's folder, for a base of transformers.

    PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), OUT) gives the run's features, which
    is checked before OUT appears. Projections are stored whole. unicl-eval, unicl-pretrain --init
    and unicl_fast.load_model read OUT too, and BASE from its place.

    Example:
      unicl-convert peft runs/lora models/lora-adapter
    """

    base: str = ""
    """The model that the run started from, in transformers' format: a folder or hf-hub:OWNER/NAME;
    unicl-convert hf converts others. Default: the run's model.init."""

    def run(self) -> None:
        from unicl_fast.conversion.adapter_folders import write_adapter
        from unicl_fast.conversion.initial import load_adapted

        model = load_adapted(self.model).float()
        base = self.base or model.config.model.init
        _print_written(self.out, difference=write_adapter(model, self.out, base=base))
        place = base.removeprefix("hf-hub:").partition("@")[0]
        print(
            "next: import peft, transformers; peft.PeftModel.from_pretrained("
            f"transformers.AutoModel.from_pretrained({place!r}), {str(self.out)!r})"
        )


@dataclass(frozen=True, kw_only=True)
class ToOnnx(Conversion):
    """Both encoders as ONNX files for any batch size, image.onnx and text.onnx.

    onnxruntime runs them at three batch sizes for comparison before OUT appears. Needs the extra
    `convert`.

    Example:
      unicl-convert onnx runs/first models/first-onnx
    """

    def run(self) -> None:
        from unicl_fast.conversion.libraries import require_packages, write_onnx

        require_packages()  # before loading a model in vain
        _print_written(self.out, difference=write_onnx(self.load(), self.out), sizes=_ANY_BATCH)
        print(f'next: onnxruntime.InferenceSession("{self.out / "image.onnx"}")')


COMMANDS: dict[str, type[Conversion]] = {
    "open-clip": ToOpenClip,
    "timm": ToTimm,
    "hf": ToHub,
    "peft": ToPeft,
    "onnx": ToOnnx,
}


_ANY_BATCH = ", at batches of 1 and more"


def _print_written(path: Path, *, difference: float | None = None, sizes: str = "") -> None:
    """Prints the files of an output, and how much its features differ from ours."""
    if difference is not None:
        about = "checked: features of equal pixels differ from ours"
        print(f"{about} by at most {difference:.1e}{sizes}")
    print(f"written to {path}:")
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        size = file.stat().st_size
        print(f"  {file.name:28} {f'{size / 1e6:,.1f} MB' if size >= 1e5 else f'{size:,} bytes'}")


def _registration(model: UniCL) -> str:
    """Python code that registers the image encoder with timm; empty for timm's own."""
    from unicl_fast.conversion.libraries import is_of_timm, module_of_encoder
    from unicl_fast.models import vits

    name = model.config.model.image_encoder
    if is_of_timm(name):
        return ""
    module = module_of_encoder(name)
    if module == vits.__name__:
        return f"from {module} import register; register({name!r}); "
    return f"import {module}; "


def _view(data: DataConfig) -> str:
    """An evaluation's view of images, in words."""
    resize, filter = data.evaluation_resize, data.interpolation
    if isinstance(resize, str):
        return f"whole images, {resize} ({filter})"
    return f"images scaled to {resize} ({filter}), {data.image_size} in the centre"


def _size(model: UniCL, entries: Mapping[str, Tensor]) -> str:
    from unicl_fast.conversion.output import num_parameters

    return f"{count_of(len(entries), 'entry')}, {count_of(num_parameters(model), 'parameter')}"
