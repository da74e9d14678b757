"""Weights and optimizer state on disk: safetensors and JSON, never a pickle.

A checkpoint is a folder `step-00001000/` with `model.safetensors`, `optimizer.safetensors` and
`state.json`, which holds the step, the config and the checksums of the other files. It is written
under another name, flushed to the disk and renamed, so that a folder of the right name is whole.
A run folder holds `config.json` and `checkpoints/`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unicl_fast.config import TrainConfig, config_from_dict, config_to_dict
from unicl_fast.models.unicl import UniCL

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})")
_MODEL_FILE = "model.safetensors"
_OPTIMIZER_FILE = "optimizer.safetensors"
_STATE_FILE = "state.json"
_GROUP_STEP = "group_step"


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint is not what was written."""


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """What state.json says."""

    step: int
    """Optimizer steps done; training goes on with the batch of this number."""
    config: TrainConfig
    scaler: dict[str, Any]
    """State of the fp16 loss scaler; empty for the other precisions."""
    data: dict[str, Any]
    """What the run was trained on, as the trainer was told: names, classes, tokenizer."""
    optimizer: str
    """Class name of the optimizer, whose state no other can take over."""
    checksums: dict[str, str]


def save_checkpoint(
    checkpoints_folder: Path,
    *,
    step: int,
    model: UniCL,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    data: dict[str, Any],
    keep: int,
) -> Path:
    """Writes `step-XXXXXXXX` whole or not at all, then removes all but the newest `keep`.

    Raises:
        OSError: it cannot be written (disk full, no permission); those from before are untouched.
    """
    target = checkpoints_folder / f"step-{step:08d}"
    aside = checkpoints_folder / f".{target.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(_contiguous(model.state_dict()), aside / _MODEL_FILE)
        save_file(_optimizer_tensors(model, optimizer), aside / _OPTIMIZER_FILE)
        files = (_MODEL_FILE, _OPTIMIZER_FILE)
        state = {
            "step": step,
            "config": config_to_dict(model.config),
            "scaler": scaler.state_dict(),
            "data": data,
            "optimizer": type(optimizer).__name__,
            "checksums": {name: file_checksum(aside / name) for name in files},
        }
        (aside / _STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in [*aside.iterdir(), aside]:
            _flush_to_disk(path)
        shutil.rmtree(target, ignore_errors=True)  # a step repeated after going back
        aside.rename(target)
        _flush_to_disk(checkpoints_folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{target} cannot be written: {error}") from error
    _remove_old(checkpoints_folder, keep=keep)
    return target


def list_checkpoints(checkpoints_folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not checkpoints_folder.is_dir():
        return []
    found = [path for path in checkpoints_folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step_of)


def read_state(checkpoint: Path) -> CheckpointState:
    """Reads state.json and compares the checksums it names.

    Raises:
        FileNotFoundError: not a checkpoint folder, or a file of it is missing.
        DamagedCheckpointError: a file was changed or is damaged.
        ValueError: a config that this version does not know.
    """
    path = checkpoint / _STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint: it has no {_STATE_FILE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        state = CheckpointState(
            step=int(values["step"]),
            config=config_from_dict(values["config"]),
            scaler=values["scaler"],
            data=values["data"],
            optimizer=values["optimizer"],
            checksums=values["checksums"],
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(
            f"{path} is damaged: {error!r}; use another checkpoint"
        ) from error
    for name, expected in state.checksums.items():
        if not (checkpoint / name).is_file():
            raise FileNotFoundError(f"{checkpoint} lacks {name}; use another checkpoint")
        found = file_checksum(checkpoint / name)
        if found != expected:
            raise DamagedCheckpointError(
                f"{checkpoint / name} is damaged: its xxh3 is {found}, {_STATE_FILE} says "
                f"{expected}; use another checkpoint"
            )
    return state


def restore_checkpoint(
    checkpoint: Path,
    state: CheckpointState,
    *,
    model: UniCL,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Puts weights, optimizer and scaler back as they were after `state.step` steps.

    `state` is what `read_state` said of the checkpoint.

    Raises:
        ValueError: the checkpoint is of another optimizer.
    """
    present = type(optimizer).__name__
    if state.optimizer != present:
        raise ValueError(
            f"the checkpoint holds the state of {state.optimizer}, and optim.name now means "
            f"{present}: set optim.name to what means {state.optimizer} here (it was "
            f"{state.config.optim.name} where it was trained)"
        )
    model.load_state_dict(load_file(checkpoint / _MODEL_FILE))
    _restore_optimizer(model, optimizer, load_file(checkpoint / _OPTIMIZER_FILE))
    scaler.load_state_dict(state.scaler)


def set_later_checkpoints_aside(checkpoints_folder: Path, *, step: int) -> None:
    """Moves away what a run that went back to `step` has left ahead of it; unfinished writes go.

    Damaged ones are among them, perhaps, and somebody may want to look.
    """
    for checkpoint in list_checkpoints(checkpoints_folder):
        if _step_of(checkpoint) > step:
            aside = checkpoint.with_name(f"{checkpoint.name}.aside")
            logger.warning("moved to %s: the run goes on from step %d", aside, step)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
    for unfinished in checkpoints_folder.glob(".step-*.partial"):
        shutil.rmtree(unfinished, ignore_errors=True)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a run folder (its newest) or a checkpoint folder stands for.

    Raises:
        FileNotFoundError: neither.
    """
    path = Path(path)
    if (path / _STATE_FILE).is_file():
        return path
    checkpoints = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not checkpoints:
        raise FileNotFoundError(
            f"{path}: expected a run folder with checkpoints/step-*/ in it, or one of those "
            "folders itself"
        )
    return checkpoints[-1]


def find_sound_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run whose files are what they were; None where there is none.

    Says which newer ones it passed over, and why.

    Raises:
        ValueError: there are some, and all are damaged; or a config this version does not know.
        OSError: the disk cannot be read, which says nothing of what is on it.
    """
    checkpoints = list_checkpoints(run_folder / "checkpoints")
    for checkpoint in reversed(checkpoints):
        try:
            read_state(checkpoint)
        except (DamagedCheckpointError, FileNotFoundError) as error:
            logger.warning("passing over a checkpoint: %s", error)
        else:
            return checkpoint
    if checkpoints:
        raise ValueError(
            f"all {len(checkpoints)} checkpoints of {run_folder} are damaged: start anew with "
            "another --out, or bring one back from a copy"
        )
    return None


def load_model(path: str | Path) -> UniCL:
    """The trained model of a run folder or a checkpoint, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a damaged checkpoint.
    """
    checkpoint = find_checkpoint(path)
    model = UniCL(read_state(checkpoint).config)
    weights = load_file(checkpoint / _MODEL_FILE)
    if next(iter(weights.values())).dtype == torch.float64:
        model.double()
    model.load_state_dict(weights)
    return model.eval()


def file_checksum(path: Path) -> str:
    """xxh3-64 of a file, as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # channels_last weights are stored in their logical order: files do not depend on efficiency
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Averages under the names of their parameters, for example `exp_avg.logit_scale`.

    LAMB and apex count steps for each parameter group, not for each parameter: `group_step.0`.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    for index, group in enumerate(optimizer.param_groups):
        if "step" in group:
            tensors[f"{_GROUP_STEP}.{index}"] = torch.as_tensor(group["step"])
    return _contiguous(tensors)


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        key, name = full_name.split(".", 1)
        if key == _GROUP_STEP:  # a Python int where the optimizer had one
            step = value if value.is_floating_point() else int(value)
            optimizer.param_groups[int(name)]["step"] = step
            continue
        parameter = parameters[name]
        if key == "step":  # on the host, unless a fused kernel counts
            if any(group.get("fused") for group in optimizer.param_groups):
                value = value.to(parameter.device)
        else:  # averages lie like their parameter
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        optimizer.state[parameter][key] = value


def _step_of(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def _remove_old(checkpoints_folder: Path, *, keep: int) -> None:
    if keep:
        for old in list_checkpoints(checkpoints_folder)[:-keep]:
            try:
                shutil.rmtree(old)
            except OSError as error:
                logger.warning("an old checkpoint stays: %s", error)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
