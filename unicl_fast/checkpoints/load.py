"""Builds models; finds, checks and reads checkpoints and exports: safetensors and JSON, no pickle.

A checkpoint `step-00001000/` holds `model.safetensors`, `optimizer.safetensors` and `state.json`:
the step, the config and the checksums of the other files.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from unicl_fast.checkpoints.export import is_export, read_export
from unicl_fast.checkpoints.files import (
    BEST,
    BEST_FILE,
    STATE_FILE,
    checkpoint_name,
    list_checkpoints,
    read_best,
)
from unicl_fast.checkpoints.transformers_names import from_transformers
from unicl_fast.config import INITIAL_WEIGHTS, ModelConfig, TrainConfig
from unicl_fast.config_json import with_settled
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import Ranks, from_rank_0, tensors_from_rank_0
from unicl_fast.models.blocks import checkpoint_blocks
from unicl_fast.models.sharding import divided_like
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.objective import Objective
from unicl_fast.system.checked_fields import NonNegative, convert, from_json_values
from unicl_fast.system.checksums import file_checksum, parse_checksummed_json
from unicl_fast.system.machine import free_memory
from unicl_fast.system.paths import nearest_name
from unicl_fast.system.untrusted_files import open_file, read_file
from unicl_fast.system.wording import shorten

logger = logging.getLogger(__name__)

_ALONE = Ranks()

_MOST_HEADER_BYTES = 8 << 20  # 80,000 tensors; safetensors reads 100 MB, for half a minute
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint has changed since it was written."""


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointState:
    """The content of state.json."""

    step: Annotated[int, Meta(ge=0, lt=1 << 53)]
    """Number of optimizer steps done, and of the batch that training resumes with."""
    config: TrainConfig
    """As it was settled."""
    scaler: dict[str, Any]
    """State of the fp16 loss scaler; empty for the other precisions."""
    data: dict[str, Any]
    """The trainer's description of the data: names, classes, tokenizer."""
    optimizer: str
    """Class name of the optimizer; no other class can load its state."""
    checksums: dict[str, str]
    """File names to their xxh3."""
    run_id: str
    """Stays the same when a run resumes."""
    base: str = ""
    """xxh3 of weights that it leaves out and `model.init` names; empty if it has all weights."""


def read_state(checkpoint: Path, ranks: Ranks = _ALONE) -> CheckpointState:
    """Reads state.json and compares the checksums of all files.

    All ranks call it together. Rank 0 reads, and its errors are raised on all ranks as a
    SharedRefusal.

    Raises:
        FileNotFoundError: not a checkpoint folder, or one of its files is missing.
        DamagedCheckpointError: a file was changed or is damaged.
        ValueError: the config is not valid in this version.
    """
    if ranks.world_size > 1:
        content = None
        with refused_together(ranks):
            if ranks.is_main:
                content = dataclasses.asdict(read_state(checkpoint))
        content = from_rank_0(content, ranks)
        assert content is not None
        return from_json_values(CheckpointState, content)
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint: it has no {STATE_FILE}")
    state = _parse_state(path)
    for name, expected in state.checksums.items():
        if not (checkpoint / name).is_file():
            raise FileNotFoundError(f"{checkpoint} lacks {name}; use another checkpoint")
        if (found := checksum_read_once(checkpoint / name)) != expected:
            raise DamagedCheckpointError(
                f"{checkpoint / name} is damaged: its xxh3 is {found}, {STATE_FILE} says "
                f"{expected}; use another checkpoint"
            )
    return state


def _parse_state(path: Path) -> CheckpointState:
    """Reads state.json but none of the other files; raises as `read_state`."""
    names = [field.name for field in dataclasses.fields(CheckpointState)]
    try:
        values = parse_checksummed_json(read_file(path))
        known = {name: values[name] for name in names if name in values}
        config = known.get("config")
        if not isinstance(config, dict):
            raise ValueError(f"config must be an object, not {shorten(config)}")
        # the config is checked below: one of another version is not damaged
        others = from_json_values(CheckpointState, known | {"config": {}})
        for name, value in others.scaler.items():
            convert(value, NonNegative, name=f"the loss scaler's {name}")
        files = others.checksums.keys()
        # earlier versions also stored an average of the weights
        if files - {"ema.safetensors"} != {MODEL_FILE, OPTIMIZER_FILE}:
            raise ValueError(f"checksums are of {', '.join(map(repr, files)) or 'no file'}")
    except ValueError as error:
        raise DamagedCheckpointError(
            f"{path} is damaged: {error}; use another checkpoint"
        ) from error
    try:
        settled = with_settled(config, values.get("settled", {}))
        return dataclasses.replace(others, config=settled)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_checkpoint(path: str | Path) -> Path:
    """Finds a checkpoint: the newest of RUN, RUN/best, or the checkpoint at the path itself.

    Raises FileNotFoundError if there is none, ValueError if best.json is damaged.
    """
    path = Path(path)
    is_best = path.name == BEST and (path.parent / "checkpoints" / BEST_FILE).is_file()
    if is_best or (path.name == BEST and not path.exists()):  # the link can change meanwhile
        return _find_best(path.parent)
    if (path / STATE_FILE).is_file():
        return path
    checkpoints = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not checkpoints:
        missing = "" if path.exists() else f"there is no such folder{nearest_name(path)}; "
        raise FileNotFoundError(
            f"{path}: {missing}expected a run folder with checkpoints/step-*/ in it, or one of "
            "those folders itself"
        )
    return checkpoints[-1]


def _find_best(run_folder: Path) -> Path:
    problem = "has no best checkpoint: a run has one if it evaluates (data.evaluate)"
    for folder in (run_folder / "checkpoints", run_folder):
        if (best := read_best(folder)) is not None:
            checkpoint = folder / checkpoint_name(best.step)
            if checkpoint.is_dir():
                return checkpoint
            problem = f"names {checkpoint.name} as its best, which is not there"
            break
    raise FileNotFoundError(f"{run_folder} {problem}; {run_folder} itself stands for the newest")


def find_sound_checkpoint(run_folder: Path) -> Path | None:
    """Finds the newest undamaged checkpoint of a run; None if there are no checkpoints.

    Raises:
        ValueError: all are damaged, or a config is not valid in this version.
        OSError: the disk cannot be read; its checkpoints can still be sound.
    """
    checkpoints = list_checkpoints(run_folder / "checkpoints")
    for checkpoint in reversed(checkpoints):
        try:
            read_state(checkpoint)
        except (DamagedCheckpointError, FileNotFoundError) as error:
            logger.warning("skipping a checkpoint: %s", error)
        else:
            return checkpoint
    if checkpoints:
        raise ValueError(
            f"all {len(checkpoints)} checkpoints of {run_folder} are damaged: start anew with "
            "another --out, or restore one from a copy"
        )
    return None


def find_model(path: str | Path) -> Path:
    """Finds the export or checkpoint at a path; raises as `find_checkpoint`."""
    return path if is_export(path := Path(path)) else find_checkpoint(path)


def build_model(config: TrainConfig) -> UniCL:
    """Builds a run's model, with fresh weights drawn from `run.seed`; raises as `UniCL`."""
    model = UniCL(
        config.model,
        config.objective,
        image_size=config.data.image_size,
        other_sizes=[stage.data.image_size for stage in config.settings_of_stages],
        seed=config.run.seed,
    )
    model.config = config
    if config.efficiency.activation_checkpointing:
        for encoder in model.encoders:
            checkpoint_blocks(encoder)
    model.set_stage(config.data, config.model)
    return model


def refuse_another_base(model: UniCL, base: str, path: Path) -> None:
    """Raises ValueError if the model's frozen weights are not the ones that a file leaves out."""
    if not base or base == model.frozen.base_digest:
        return
    given = model.config.model
    names = [f"model.{name}={one}" for name in INITIAL_WEIGHTS if (one := getattr(given, name))]
    raise ValueError(
        f"{path} holds adapters on weights of xxh3 {base}, but the xxh3 of "
        f"{', '.join(names) or 'fresh weights'} is {model.frozen.base_digest or 'none'}: give the "
        "weights that the run started from, unchanged, as model.init, init_image or init_text"
    )


def find_weights(path: str | Path) -> tuple[TrainConfig, Path, str]:
    """Returns a model's config and file, checked, and the checksum of weights below its adapters.

    The checksum is "" if the file has all weights. Raises FileNotFoundError if there is no model,
    ValueError if it is damaged.
    """
    found, base = find_model(path), ""
    if is_export(found):
        config, file = read_export(found)
    else:
        state = read_state(found)
        config, base = state.config.settings_of_stages[-1], state.base
        file = found / MODEL_FILE
    if base:
        _require_room(found, config)
    else:
        require_sizes(file, config, read_shapes(file).values())
    return config, file, base


_checksums_read: dict[tuple[int, ...], str] = {}


def checksum_read_once(path: Path) -> str:
    """Returns `file_checksum`, cached until a file's identity, times or size change."""
    status = path.stat()
    # a copy that keeps the modification time can get the inode of a removed file, but not its ctime
    times = status.st_mtime_ns, status.st_ctime_ns
    identity = (status.st_dev, status.st_ino, status.st_size, *times)
    if identity not in _checksums_read:
        _checksums_read[identity] = file_checksum(path)
    return _checksums_read[identity]


def read_tensors(path: Path, ranks: Ranks = _ALONE) -> dict[str, Tensor]:
    """Reads a safetensors file, by our names; raises DamagedCheckpointError if it is damaged.

    All ranks call it together; rank 0 reads, and the others get its tensors.
    """
    if ranks.world_size > 1:
        tensors: dict[str, Tensor] = {}
        with refused_together(ranks):
            if ranks.is_main:
                tensors = read_tensors(path)
        return tensors_from_rank_0(tensors, ranks)
    return from_transformers(read_stored(path))


def read_stored(path: Path) -> dict[str, Tensor]:
    """As `read_tensors`, by the file's names and on one rank."""
    with _refusing_other_files(path):
        tensors: dict[str, Tensor] = load_file(path)
        return tensors


def read_shapes(path: Path) -> dict[str, Tensor]:
    """As `read_stored`, on the device meta: no tensor is read."""
    with _refusing_other_files(path), safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@contextlib.contextmanager
def _refusing_other_files(path: Path) -> Iterator[None]:
    with open_file(path) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if _MOST_HEADER_BYTES < header_bytes < path.stat().st_size:
        raise DamagedCheckpointError(
            f"{path} lists its tensors in {header_bytes:,} bytes, and at most "
            f"{_MOST_HEADER_BYTES:,} are read; use another checkpoint"
        )
    try:
        yield
    except (OSError, DamagedCheckpointError):
        raise
    except Exception as error:  # SafetensorError, or a KeyError for an unknown dtype
        text = f"{path} is no safetensors file: {error!r}; use another checkpoint"
        raise DamagedCheckpointError(text) from error


@functools.lru_cache(maxsize=32)  # building a model without content takes 0.1 s
def _size_of(model: ModelConfig, objective: Objective, image_size: int) -> tuple[int, int]:
    """Numbers and bytes of a model's tensors."""
    with torch.device("meta"):
        tensors = UniCL(model, objective, image_size=image_size).state_dict().values()
    return sum(one.numel() for one in tensors), sum(one.nbytes for one in tensors)


def _require_room(path: Path, config: TrainConfig) -> None:
    """Refuses a model larger than memory, if no file here shows whether its sizes are right."""
    _, size = _size_of(config.model, config.objective, config.data.image_size)
    if size > (free := free_memory(torch.device("cpu"))):
        raise ValueError(
            f"{path} describes a model of {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free: "
            "use a larger machine, or another checkpoint if you meant another model"
        )


def require_sizes(file: Path, config: TrainConfig, stored: Iterable[Tensor]) -> None:
    """Raises ValueError if a config needs more numbers than are stored, and maybe than fit."""
    described, _ = _size_of(config.model, config.objective, config.data.image_size)
    found = sum(map(torch.numel, stored))
    if described > found:
        raise ValueError(
            f"{file} has {found:,} of {described:,} numbers, and so is not the model that its "
            "config describes: use another checkpoint, or copy or convert it again"
        )


def load_weights(model: UniCL, path: Path, ranks: Ranks = _ALONE) -> None:
    """Loads weights in the model's type and layout; raises ValueError if they do not fit.

    All ranks call it together, as `read_tensors`.
    """
    tensors, own = read_tensors(path, ranks), model.state_dict()
    try:
        for name, value in own.items():
            if name not in tensors:
                if name in model.frozen.in_base:
                    tensors[name] = value
                continue
            if tensors[name].is_floating_point() != value.is_floating_point():
                raise RuntimeError(f"{name} holds {tensors[name].dtype}")
            tensors[name] = divided_like(tensors[name], value)
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {path} do not fit the model that its config describes: {error}; use "
            "another checkpoint, or the versions of unicl_fast and timm it was written with"
        ) from error
