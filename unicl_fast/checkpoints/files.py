"""How checkpoints lie on the disk: written whole or not at all, listed, removed.

Knows tensors by their names in files and nothing of models; what is stored, and how it comes back,
is `unicl_fast.checkpoints.load`'s, when it is written `unicl_fast.checkpoints.writer`'s.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from unicl_fast.system.atomic_files import flush_to_disk
from unicl_fast.system.checksums import dump_checksummed_json, file_checksum

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint, for example step-00001000."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def list_checkpoints(checkpoints_folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not checkpoints_folder.is_dir():
        return []
    found = [path for path in checkpoints_folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def write_checkpoint(
    checkpoints_folder: Path,
    *,
    step: int,
    files: Mapping[str, dict[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Writes `step-XXXXXXXX` whole or not at all.

    safetensors and xxhash let other threads of Python run meanwhile (tried with safetensors 0.8.0).

    Args:
        checkpoints_folder: made if it is not there.
        step: names the folder, and is part of its state.
        files: name of a safetensors file -> its tensors, contiguous and on the host.
        state: more of state.json, in JSON's types.

    Raises:
        OSError: it cannot be written (disk full, no permission); those from before are untouched.
    """
    target = checkpoints_folder / checkpoint_name(step)
    aside = checkpoints_folder / f".{target.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    replaced = None
    try:
        aside.mkdir(parents=True)
        for name, tensors in files.items():
            save_file(tensors, aside / name)
        checksums = {name: file_checksum(aside / name) for name in files}
        text = dump_checksummed_json({"step": step, **state, "checksums": checksums})
        (aside / STATE_FILE).write_text(text, encoding="utf-8")
        for path in [*aside.iterdir(), aside]:
            flush_to_disk(path)
        replaced = _move_out_of_the_way(target)
        aside.rename(target)
        flush_to_disk(checkpoints_folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        if replaced is not None and not target.exists():
            replaced.rename(target)
        raise OSError(f"{target} cannot be written: {error}") from error
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return target


def remove_old(checkpoints_folder: Path, *, keep: int, pinned: Collection[int]) -> None:
    """Removes all but the newest `keep` (0: none is removed) and those of the pinned steps."""
    for old in list_checkpoints(checkpoints_folder)[:-keep] if keep else []:
        if step_of(old) not in pinned:
            try:
                shutil.rmtree(old)
            except OSError as error:
                logger.warning("an old checkpoint stays: %s", error)


def set_later_checkpoints_aside(checkpoints_folder: Path, *, step: int) -> None:
    """Moves away what a run that went back to `step` has left ahead of it; unfinished writes go.

    Damaged ones are among them, perhaps, and somebody may want to look.
    """
    for replaced in checkpoints_folder.glob(".step-*.replaced"):  # cut off between two renames
        target = replaced.with_name(replaced.name[1:].removesuffix(".replaced"))
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(target)
    for checkpoint in list_checkpoints(checkpoints_folder):
        if step_of(checkpoint) > step:
            aside = checkpoint.with_name(f"{checkpoint.name}.aside")
            logger.warning("moved to %s: the run goes on from step %d", aside, step)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
    for unfinished in checkpoints_folder.glob(".step-*.partial"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _move_out_of_the_way(target: Path) -> Path | None:
    """Of a step that is written again, the checkpoint from before, which is needed until then."""
    if not target.exists():
        return None
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    target.rename(replaced)
    return replaced
