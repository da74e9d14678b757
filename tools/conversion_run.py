"""What `unicl-convert` does once its arguments are read: open, convert, say what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from unicl_fast.checkpoints.export import is_export
from unicl_fast.checkpoints.load import find_model, load_model, read_state
from unicl_fast.conversion.exported_program import write_exported_programs
from unicl_fast.conversion.hub import num_parameters, write_export
from unicl_fast.conversion.new_files import new_file, require_new
from unicl_fast.conversion.official import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    model_of,
    official_entries,
)
from unicl_fast.conversion.official import num_parameters as num_official_parameters
from unicl_fast.conversion.official_file import read_official_file, write_official_file
from unicl_fast.conversion.onnx_files import require_packages, write_onnx
from unicl_fast.conversion.open_clip_folder import require_convertible, write_open_clip
from unicl_fast.conversion.timm_folder import arguments_of, write_timm
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.checksums import file_checksum

from .convert import (
    Command,
    FromOfficial,
    ToExport,
    ToHub,
    ToOfficial,
    ToOnnx,
    ToOpenClip,
    ToTimm,
    Weights,
)


def run_conversion(command: Command) -> None:
    """Converts, and prints what was read, what was written and what to do with it.

    Raises:
        ValueError: a damaged or foreign file, a model that the format cannot hold, an output that
            is there already, or a package that is not installed.
        FileNotFoundError: no model there.
        RuntimeError: the converted model does not give our features.
        OSError: a disk that failed.
    """
    require_new(command.out)  # before minutes are spent
    if isinstance(command, FromOfficial):
        _from_official(command)
    elif isinstance(command, ToOfficial):
        _to_official(command)
    elif isinstance(command, ToHub):
        _to_hub(command)
    elif isinstance(command, ToOpenClip):
        _to_open_clip(command)
    elif isinstance(command, ToTimm):
        _to_timm(command)
    elif isinstance(command, ToOnnx):
        _to_onnx(command)
    else:
        _to_export(command)


def _from_official(command: FromOfficial) -> None:
    entries = read_official_file(command.file)
    print(
        f"read {command.file}: {len(entries):,} entries, "
        f"{num_official_parameters(entries):,} parameters"
    )
    model = model_of(entries, source=command.file)
    origin = {
        "converted from": f"{command.file.name}, a checkpoint in the layout of microsoft/UniCL",
        "xxh3 of that file": file_checksum(command.file),
    }
    write_export(model, command.out, origin=origin)
    _print_written(command.out)
    print(
        f"every entry has its place: {model.config.model.image_encoder}, {_view(model)}, "
        "normalised as ImageNet's"
    )
    print(f"next: unicl-eval zero-shot --checkpoint {command.out} --data DIR")


def _to_official(command: ToOfficial) -> None:
    model = _load(command.model, command.weights)
    entries = official_entries(model)
    with new_file(command.out) as aside:
        write_official_file(aside, entries)
        assert _are_equal(read_official_file(aside), entries), "torch.save lost something"
    _print_written(command.out)
    print(f"{len(entries):,} entries, {num_official_parameters(entries):,} parameters")
    print(f"the file has no place for it: this model wants {_view(model)}; set that in the config")
    data = model.config.data
    if not (np.allclose(data.mean, IMAGENET_MEAN) and np.allclose(data.std, IMAGENET_STD)):
        print(
            f"note: this model wants images normalised with mean {data.mean} and deviation "
            f"{data.std}; microsoft/UniCL's code takes ImageNet's: change them in its data/build.py"
        )
    print(
        "next, with a config of microsoft/UniCL of the same sizes: "
        f"python -m torch.distributed.launch main.py --eval --cfg CONFIG --resume {command.out}"
    )


def _to_hub(command: ToHub) -> None:
    model = _load(command.model, command.weights)
    write_export(model, command.out, origin=_origin(command.model, model), license=command.license)
    _print_written(command.out)
    print(f"next: unicl-eval zero-shot --checkpoint {command.out} --data DIR")
    print(
        f"to publish it: say in {command.out / 'README.md'} what it was trained on and what it is "
        f"good for{'' if command.license else ', add a license'}; hf upload NAME {command.out}"
    )


def _to_open_clip(command: ToOpenClip) -> None:
    model = _load(command.model, command.weights)
    require_convertible(model)
    _print_checked(write_open_clip(model, command.out))
    _print_written(command.out)
    data = model.config.data
    if data.evaluation_resize != data.image_size:
        print(
            f"note: open_clip scales the shorter side to {data.image_size} pixels, unicl-eval to "
            f"{data.evaluation_resize} and then cuts {data.image_size}: accuracies differ a little"
        )
    _print_registration(model)
    print(f'next: open_clip.create_model_and_transforms("local-dir:{command.out}")')
    print(f"  or: clip_benchmark eval --model local-dir:{command.out} --dataset ...")


def _to_timm(command: ToTimm) -> None:
    model = _load(command.model, command.weights, needs_texts=False)
    _print_checked(write_timm(model, command.out))
    _print_written(command.out)
    _print_registration(model)
    more = "".join(f", {name}={value}" for name, value in arguments_of(model).items())
    print(
        f'next: timm.create_model("{model.config.model.image_encoder}", num_classes=0, '
        f'checkpoint_path="{command.out / "model.safetensors"}"{more})'
    )
    if timm.get_pretrained_cfg(model.config.model.image_encoder) is not None:
        print(
            "  or, from timm 1.0.16 on: "
            f'timm.create_model("local-dir:{command.out}", pretrained=True)'
        )


def _to_onnx(command: ToOnnx) -> None:
    require_packages()  # before a model is loaded for nothing
    model = _load(command.model, command.weights)
    _print_checked(write_onnx(model, command.out), where=", at batches of 1 and more")
    _print_written(command.out)
    print(f'next: onnxruntime.InferenceSession("{command.out / "image.onnx"}")')


def _to_export(command: ToExport) -> None:
    model = _load(command.model, command.weights)
    _print_checked(write_exported_programs(model, command.out), where=", at batches of 1 and more")
    _print_written(command.out)
    print(f'next: torch.export.load("{command.out / "image.pt2"}").module()(images)')


def _load(path: Path, weights: Weights, *, needs_texts: bool = True) -> UniCL:
    model = load_model(path, weights=weights).float()
    if needs_texts and model.text_encoder is None:
        raise ValueError(
            f"{path} was trained with objective.name={model.config.objective.name} and has no text "
            "encoder; unicl-convert timm takes its image encoder"
        )
    print(
        f"read {find_model(path)}: {model.config.model.image_encoder}, "
        f"{len(model.state_dict()):,} entries, {num_parameters(model):,} parameters"
    )
    return model


def _origin(path: Path, model: UniCL) -> dict[str, Any]:
    """Where weights come from, as far as it is known and may be published."""
    found = find_model(path)
    if is_export(found):
        return {}
    step = read_state(found).step
    return {
        "steps": step,
        "samples seen in training": step * model.config.run.global_batch_size,
    }


def _are_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def _print_checked(difference: float, *, where: str = "") -> None:
    print(f"checked: features differ from ours by at most {difference:.1e}{where}")


def _print_registration(model: UniCL) -> None:
    if model.config.model.image_encoder.startswith("unicl_"):
        print("note: this encoder is registered with timm by: import unicl_fast.models.small")


def _print_written(path: Path) -> None:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    print(f"written to {path}:")
    for file in files:
        print(f"  {file.name:28} {_size(file.stat().st_size)}")


def _view(model: UniCL) -> str:
    """How an evaluation shows images to a model, in words."""
    data = model.config.data
    return (
        f"images scaled to {data.evaluation_resize} ({data.interpolation}), {data.image_size} in "
        "the centre"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes:,} bytes"
