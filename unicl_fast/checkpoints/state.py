"""Collects and restores a run's state: weights, optimizer and loss scaler.

Nothing else has state: batch, drop path and learning rate are functions of the step.
"""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unicl_fast.checkpoints.load import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    CheckpointState,
    DamagedCheckpointError,
    load_weights,
    read_tensors,
    refuse_another_base,
)
from unicl_fast.config import INITIAL_WEIGHTS, MUST_NOT_CHANGE
from unicl_fast.config_json import config_to_dict, settled_values
from unicl_fast.distributed.ranks import Ranks, tensors_to_rank_0
from unicl_fast.models.sharding import ParameterOwners, divided_like, divides_optimizer, whole
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.wording import count_of, refuse_differences

logger = logging.getLogger(__name__)

_ALONE = Ranks()
_GROUP_STEP = "group_step"


def collect_tensors(
    *, model: UniCL, optimizer: torch.optim.Optimizer, ranks: Ranks = _ALONE
) -> dict[str, dict[str, Tensor]]:
    """Collects the tensors of each file of a checkpoint, without copying them.

    Tensors that `efficiency.shard` divides are gathered on rank 0's host: all ranks must call it
    together, and only rank 0's result is complete.
    """
    # adapters: without the weights that `model.init` provides again
    in_base = model.frozen.in_base
    files = {
        MODEL_FILE: {name: one for name, one in model.state_dict().items() if name not in in_base},
        OPTIMIZER_FILE: _optimizer_tensors(model, optimizer),
    }
    if divides_optimizer(model.config.efficiency, ranks):
        files[OPTIMIZER_FILE] = tensors_to_rank_0(files[OPTIMIZER_FILE], ranks)
    for tensors in files.values():
        for name, tensor in tensors.items():  # a device holds only one whole tensor at a time
            if (found := whole(tensor)) is not tensor and ranks.is_main:
                tensors[name] = found.cpu()
            del found
    return files


def describe_state(
    model: UniCL,
    *,
    given: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    data: Mapping[str, Any],
    run_id: str,
) -> dict[str, Any]:
    """The content of state.json, except the step and the checksums.

    `given` is the config as `config_to_dict` gives it before it is settled.
    """
    base = model.frozen.base_digest
    return {
        "run_id": run_id,
        "config": given,
        "settled": settled_values(given, model.config),
        "scaler": scaler.state_dict(),
        "data": dict(data),
        "optimizer": type(optimizer).__name__,
        **({"base": base} if base else {}),
    }


def refuse_another_run(state: CheckpointState, model: UniCL, data: Mapping[str, Any]) -> None:
    """Compares a run with the checkpoint it resumes from, and logs changed settings.

    They include kernels that `auto` chose for another device. Raises ValueError if the model, the
    objective, the data or a setting on which the next samples depend has changed.
    """
    stored, present = config_to_dict(state.config), config_to_dict(model.config)
    for name in INITIAL_WEIGHTS:  # a resumed run does not read them
        del stored["model"][name], present["model"][name]
    for one in (stored, present):
        one["objective"].pop("logit_scale_init", None)  # the learnt value counts
        del one["data"]["threads"]
    for group in ("model", "objective"):
        refuse_differences(group, stored[group], present[group])
    refuse_differences("data", state.data, data)
    for group, names in MUST_NOT_CHANGE.items():
        before, now = ({name: one[group][name] for name in names} for one in (stored, present))
        refuse_differences(group, before, now)
    seen, meant = (one.run.draws_before(state.step) for one in (state.config, model.config))
    if seen != meant:
        raise ValueError(
            f"run.stages shows {meant:,} samples before step {state.step}, but the checkpoint was "
            f"written after {seen:,}: stages that are over cannot change, only those to come"
        )
    for group in ("data", "optim", "efficiency", "run"):
        for name, value in stored[group].items():
            if value != present[group][name]:
                logger.warning(
                    "resuming with %s.%s = %r; the checkpoint was written with %r",
                    group, name, present[group][name], value,
                )  # fmt: skip


def restore_checkpoint(
    checkpoint: Path,
    state: CheckpointState,
    *,
    model: UniCL,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ranks: Ranks = _ALONE,
) -> None:
    """Restores weights, optimizer and scaler; `state` comes from `read_state`.

    All ranks call it together, and only rank 0 reads. Raises ValueError if the checkpoint is of
    another optimizer, or its tensors do not fit the model.
    """
    if state.optimizer != (present := type(optimizer).__name__):
        raise ValueError(
            f"the checkpoint holds the state of {state.optimizer}, but optim.name now means "
            f"{present}: set optim.name to the name of {state.optimizer} here (the run had "
            f"{state.config.optim.name})"
        )
    refuse_another_base(model, state.base, checkpoint)
    load_weights(model, checkpoint / MODEL_FILE, ranks)
    tensors = read_tensors(checkpoint / OPTIMIZER_FILE, ranks)
    try:
        _check_optimizer_tensors(model, optimizer, tensors)
        if scaler.is_enabled() and set(state.scaler) != set(scaler.state_dict()):
            raise ValueError(f"the loss scaler's state has {sorted(state.scaler)}")
        scaler.load_state_dict(state.scaler)
    except (ValueError, OverflowError, RuntimeError) as error:  # torch's, for too large numbers
        raise DamagedCheckpointError(
            f"{checkpoint} does not hold the optimizer's state of this model: {error}; use another "
            "checkpoint"
        ) from error
    is_divided = divides_optimizer(model.config.efficiency, ranks)
    own = ParameterOwners(model, ranks).own if is_divided else None
    _restore_optimizer(model, optimizer, tensors, own=own)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Names an optimizer's state by parameter (`exp_avg.logit_scale`) or group (`group_step.0`)."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    for index, group in enumerate(optimizer.param_groups):
        if "step" in group:  # LAMB and apex count per group
            tensors[f"{_GROUP_STEP}.{index}"] = torch.as_tensor(group["step"])
    return tensors


def _check_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Refuses tensors that `_optimizer_tensors` cannot have written: copying would broadcast."""
    parameters = dict(model.named_parameters())
    keys_of: dict[str, set[str]] = {}
    num_groups = len(optimizer.param_groups)
    stored = [name for name in tensors if name.partition(".")[0] == _GROUP_STEP]
    if len(stored) > num_groups:
        raise ValueError(
            f"it counts steps by {count_of(len(stored), 'group')} of parameters, but optim.freeze "
            f"and layer_decay make {num_groups} here: set them as they were"
        )
    for full_name, value in tensors.items():
        key, _, name = full_name.partition(".")
        if key == _GROUP_STEP:
            known = name.isdecimal() and int(name) < num_groups
            shape = torch.Size()
        else:
            known = name in parameters
            shape = parameters[name].shape if known and key != "step" else torch.Size()
            keys_of.setdefault(name, set()).add(key)
        if not known:
            raise ValueError(f"there is no {full_name} here")
        if value.shape != shape:
            raise ValueError(f"{full_name} is {list(value.shape)}, expected {list(shape)}")
        counts = key in ("step", _GROUP_STEP)
        if counts and not 0 <= float(value) < 2**53:
            raise ValueError(f"{full_name} is no count")
        if not counts and not value.is_floating_point():
            raise ValueError(f"{full_name} holds {value.dtype}")
    for_muon = {
        parameter: group.get("use_muon", False)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    kinds = {
        (for_muon[parameters[name]], frozenset(keys))
        for name, keys in keys_of.items()
        if parameters[name] in for_muon  # the others are frozen
    }
    if len({kind for kind, _ in kinds}) < len(kinds):
        raise ValueError("some parameters have more of it than others")


def _restore_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    *,
    own: Collection[nn.Parameter] | None,
) -> None:
    """Restores the state of the `own` parameters (None: of all)."""
    parameters = dict(model.named_parameters())
    num_counted = sum(name.startswith(f"{_GROUP_STEP}.") for name in tensors)
    new_groups = optimizer.param_groups[num_counted:]  # else corrected as at step 1
    for full_name, value in tensors.items():
        key, name = full_name.split(".", 1)
        if key == _GROUP_STEP:  # a Python int if the optimizer had one
            step = value if value.is_floating_point() else int(value)
            for group in (optimizer.param_groups[int(name)], *new_groups):
                group["step"] = step
            continue
        parameter = parameters[name]
        if not parameter.requires_grad or (own is not None and parameter not in own):
            continue
        if key == "step":  # on the host, unless a fused kernel counts
            if any(group.get("fused") for group in optimizer.param_groups):
                value = value.to(parameter.device)
        else:  # averages have the memory format of their parameter
            averages = torch.empty_like(parameter, dtype=value.dtype)
            value = averages.copy_(divided_like(value, parameter))
        optimizer.state[parameter][key] = value
