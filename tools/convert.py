"""`unicl-convert`: trained models in the formats of others, and microsoft/UniCL's files in ours.

Reads the command line; what is done is `conversion_run`'s and `unicl_fast.conversion`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from unicl_fast.distributed.launch import stop

Weights = Literal["auto", "ema", "model"]


@dataclass(frozen=True, kw_only=True)
class FromOfficial:
    """A released checkpoint of microsoft/UniCL (Swin-T or Swin-B) to a model of ours.

    FILE holds {'model': {name: tensor}}, as in1k.pth and its fellows do; files with the older names
    visual, text, lang_encoder and vision_projection are read too. Only tensors are read: a file
    with Python objects in it is refused, and nothing of it is run. Every entry must find its place,
    and every place its entry. OUT is a folder that unicl-eval and unicl_fast.load_model take, in
    fp32, with the preprocessing of the released models: bicubic to 256, 224 in the centre,
    ImageNet's mean and deviation.

    Example:
      unicl-convert official in21k_yfcc14m.pth models/in21k_yfcc14m
      unicl-eval zero-shot --checkpoint models/in21k_yfcc14m --data packed/imagenet-val
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The downloaded file."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A new folder."""


@dataclass(frozen=True, kw_only=True)
class _OfModel:
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder (its newest checkpoint is taken), RUN/best, a checkpoint, or an export."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A new folder."""
    weights: Weights = "auto"
    """The moving average of the weights, those of the last step, or the average if there is one."""


@dataclass(frozen=True, kw_only=True)
class ToOfficial:
    """A model of ours (Swin-T or Swin-B) to a file that microsoft/UniCL's code loads.

    The other way round of official, entry for entry. Their code normalises images with ImageNet's
    mean and deviation, ours with CLIP's unless data.mean and data.std say otherwise: the difference
    is named when it matters.

    Example:
      unicl-convert to-official runs/first first.pth
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder (its newest checkpoint is taken), RUN/best, a checkpoint, or an export."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A new file, ending in .pth."""
    weights: Weights = "auto"
    """The moving average of the weights, those of the last step, or the average if there is one."""


@dataclass(frozen=True, kw_only=True)
class ToOpenClip(_OfModel):
    """A folder for open_clip, and what builds on it, CLIP_benchmark for example.

    open_clip.create_model_and_transforms("local-dir:OUT") gives equal features for equal tensors;
    that is tried before OUT appears. It scales the shorter side to the very size it cuts, so
    images differ where data.evaluation_resize is larger than data.image_size; that is said.

    Example:
      unicl-convert open-clip runs/first models/first-open-clip
    """


@dataclass(frozen=True, kw_only=True)
class ToTimm(_OfModel):
    """The image encoder alone, for timm: fine-tuning, detection, anything that takes a backbone.

    Features are those before the projection into the common space.

    Example:
      unicl-convert timm runs/first models/first-timm
    """


@dataclass(frozen=True, kw_only=True)
class ToHub(_OfModel):
    """A folder in the layout of the Hugging Face hub: safetensors, config, preprocessing, card.

    unicl-eval and unicl_fast.load_model take it. It holds no path of this machine and no names of
    data sets. Read README.md before you publish it: only you can say what the model is good for.

    Example:
      unicl-convert hf runs/first/best models/first --license apache-2.0
      hf upload YOU/first models/first
    """

    license: str = ""
    """An identifier of the hub, for example apache-2.0; left out, the card names none."""


@dataclass(frozen=True, kw_only=True)
class ToOnnx(_OfModel):
    """Both encoders as ONNX files for any batch size, image.onnx and text.onnx.

    They are run with onnxruntime at three batch sizes and compared before OUT appears. Takes
    pip install 'unicl_fast[convert]'.

    Example:
      unicl-convert onnx runs/first models/first-onnx
    """


@dataclass(frozen=True, kw_only=True)
class ToExport(_OfModel):
    """Both encoders as programs of torch.export for any batch size, image.pt2 and text.pt2.

    torch.export.load("image.pt2").module()(images) runs without this package or timm.

    Example:
      unicl-convert export runs/first models/first-pt2
    """


COMMANDS = {
    "official": FromOfficial,
    "to-official": ToOfficial,
    "open-clip": ToOpenClip,
    "timm": ToTimm,
    "hf": ToHub,
    "onnx": ToOnnx,
    "export": ToExport,
}

Command = FromOfficial | ToOfficial | ToOpenClip | ToTimm | ToHub | ToOnnx | ToExport


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] == "open_clip":  # as the package is spelt
        argv = ["open-clip", *argv[1:]]
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        args=argv,
        prog="unicl-convert",
        description=(
            "Trained models in the formats of others, and microsoft/UniCL's checkpoints in ours. "
            "What is written is read again and compared before OUT appears. docs/checkpoints.md "
            "has a table of the formats."
        ),
    )
    # torch and timm take seconds to import: --help and a mistyped flag need not wait for them
    from .conversion_run import run_conversion

    try:
        run_conversion(command)
    except (ValueError, FileNotFoundError) as error:
        stop("unicl-convert", error, code=2)
    except (OSError, RuntimeError) as error:
        stop("unicl-convert", error, code=1)


if __name__ == "__main__":
    # by its name, so that the commands are the same classes for all modules
    from .convert import main as main_by_name

    main_by_name()
