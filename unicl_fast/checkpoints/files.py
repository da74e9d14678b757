"""The folder of a run's checkpoints: writes, lists and removes them, and names the best.

`checkpoints/best.json` names the best step, whose checkpoint is kept: a file survives a copy to
another file system. The link `RUN/best` follows it, for people and programs other than ours.
"""

import json
import logging
import math
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from unicl_fast.system.atomic_files import flush_to_disk, write_text_atomically
from unicl_fast.system.checked_fields import from_json_values
from unicl_fast.system.checksums import dump_checksummed_json, file_checksum
from unicl_fast.system.untrusted_files import NotRegularError, read_json

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
BEST_FILE = "best.json"
BEST = "best"
"""RUN/best: a relative link to the best checkpoint."""
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """The name of a step's folder, for example step-00001000."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def list_checkpoints(checkpoints_folder: Path) -> list[Path]:
    """Lists complete checkpoints, oldest first."""
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
    """Writes `step-XXXXXXXX`, whole or not at all; returns its path.

    `files` has tensors by file name, contiguous and on the host; `state` is from `describe_state`.
    Raises OSError if the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = checkpoints_folder / checkpoint_name(step)
    # a unique name: two runs that share a folder by mistake must not mix their files
    partial = checkpoints_folder / f".{target.name}.{secrets.token_hex(4)}.partial"
    replaced = checkpoints_folder / f".{target.name}.replaced"
    try:
        partial.mkdir(parents=True)
        for name, tensors in files.items():  # safetensors 0.8.0 and xxhash release the GIL
            save_tensors(tensors, partial / name)
        checksums = {name: file_checksum(partial / name) for name in files}
        text = dump_checksummed_json({"step": step, **state, "checksums": checksums})
        (partial / STATE_FILE).write_text(text, encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            flush_to_disk(path)
        if target.exists():  # the step is written again: keep the old one until now
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        partial.rename(target)
        flush_to_disk(checkpoints_folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise OSError(f"{target} cannot be written: {error}") from error
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def save_tensors(
    tensors: dict[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file with the default permissions; safetensors' own are 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def remove_old(checkpoints_folder: Path, *, keep: int, pinned: Collection[int]) -> None:
    """Removes all but the newest `keep` (0: keeps all) and the pinned steps."""
    for old in list_checkpoints(checkpoints_folder)[:-keep] if keep else []:
        if step_of(old) not in pinned:
            try:
                shutil.rmtree(old)
            except OSError as error:
                logger.warning("an old checkpoint could not be removed: %s", error)


def set_later_checkpoints_aside(checkpoints_folder: Path, *, step: int) -> None:
    """Renames checkpoints of steps after `step`, for inspection; cleans up interrupted writes."""
    for replaced in checkpoints_folder.glob(".step-*.replaced"):  # interrupted between two renames
        target = replaced.with_name(replaced.name[1:].removesuffix(".replaced"))
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(target)
    for checkpoint in list_checkpoints(checkpoints_folder):
        if step_of(checkpoint) > step:
            aside = checkpoint.with_name(f"{checkpoint.name}.aside")
            logger.warning("moved to %s: the run resumes from step %d", aside, step)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
    for partial in checkpoints_folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Best:
    """The best step and its evaluation result."""

    step: Annotated[int, Meta(ge=0, lt=1 << 53)]
    metric: str
    """Key of metrics.jsonl."""
    value: float


def read_best(checkpoints_folder: Path) -> Best | None:
    """Reads best.json; None if there is none. Raises ValueError if it is damaged."""
    path = checkpoints_folder / BEST_FILE
    try:
        return from_json_values(Best, read_json(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, NotRegularError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it, and name a checkpoint by its own folder"
        ) from error


def write_best(checkpoints_folder: Path, best: Best | None) -> None:
    """Replaces best.json, which is intact after an OSError, and RUN/best; None removes both."""
    path, link = checkpoints_folder / BEST_FILE, checkpoints_folder.parent / BEST
    if best is None:
        path.unlink(missing_ok=True)
        if link.is_symlink():
            link.unlink()
        return
    write_text_atomically(path, json.dumps(asdict(best)) + "\n")
    new = link.with_name(f".{BEST}.partial")
    try:
        new.unlink(missing_ok=True)  # of an interrupted write
        new.symlink_to(Path(checkpoints_folder.name) / checkpoint_name(best.step))
        new.replace(link)
    except OSError as error:  # no links on this disk, or a folder is there
        new.unlink(missing_ok=True)
        logger.warning("%s is no link (%s); our programs find the best all the same", link, error)


def find_best(
    checkpoints_folder: Path, *, metric: str | None, lines: Iterable[Mapping[str, float]]
) -> Best | None:
    """Finds the best of the existing checkpoints, the earliest if several are equal.

    Reads both best.json (of any metric if `metric` is None) and the run's metrics (`lines`): a run
    can be killed between an evaluation and best.json, and metrics can be truncated.
    """
    found = [
        Best(int(line["step"]), metric, float(line[metric]))
        for line in lines
        if metric is not None and metric in line
    ]
    try:
        stored = read_best(checkpoints_folder)
        if stored is not None and metric in (None, stored.metric):
            found.append(stored)
    except ValueError as error:
        logger.warning("%s; the best is found from the run's metrics", error)
    steps = {step_of(checkpoint) for checkpoint in list_checkpoints(checkpoints_folder)}
    there = [best for best in found if best.step in steps and math.isfinite(best.value)]
    return max(there, key=lambda best: (best.value, -best.step), default=None)
