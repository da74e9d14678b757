"""A config as JSON: config.json of a run folder, the state of a checkpoint, an export.

Given and settled settings are stored apart, since a run that resumes settles its kernels anew.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unicl_fast.config import TrainConfig
from unicl_fast.objectives.objective import Objective
from unicl_fast.system.checked_fields import from_json_values
from unicl_fast.system.untrusted_files import read_json
from unicl_fast.system.wording import shorten, without_secrets

REMOVED: dict[str, dict[str, Any]] = {
    "data": {"prefetch": 0},
    "objective": {"mixup": 0.0, "cutmix": 0.0},
    "model": {"token_drop": 0.0},
    "optim": {"ema_decay": 0.0},
}
"""Options of earlier versions by group, with the values at which configs still load."""


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Returns plain nested dictionaries, as stored in config.json: URLs without their secrets."""
    values = dataclasses.asdict(config)
    for name in ("train", "evaluate"):
        values["data"][name] = tuple(map(without_secrets, values["data"][name]))
    return values


def settled_values(given: Mapping[str, Any], settled: TrainConfig) -> dict[str, dict[str, Any]]:
    """Settings that settling changed, by group and name; `given` is of `config_to_dict`.

    Threads are left out: they depend on one rank's machine.
    """
    after = config_to_dict(settled)
    after["data"]["threads"] = given["data"]["threads"]
    changes = {
        group: {name: one for name, one in after[group].items() if given[group].get(name) != one}
        for group in after
    }
    return {group: values for group, values in changes.items() if values}


def with_settled(given: Any, changes: Any) -> TrainConfig:
    """A settled config, from `config_to_dict` of the given one and `settled_values`.

    Raises ValueError: as `config_from_dict`.
    """
    if not isinstance(changes, dict) or not all(isinstance(one, dict) for one in changes.values()):
        raise ValueError(f"settled must hold groups of settings, not {changes!r:.100}")
    values = config_to_dict(config_from_dict(given))
    return config_from_dict(values | {name: values.get(name, {}) | one
                                      for name, one in changes.items()})  # fmt: skip


def config_from_dict(values: Any) -> TrainConfig:
    """Rebuilds a config from `config_to_dict`'s result or its JSON.

    Raises ValueError: a group or field that this version does not know, a removed option that was
    in use, or a value out of range.
    """
    try:
        return from_json_values(TrainConfig, without_removed(values))
    except ValueError as error:
        is_of_another = "not a field of this version" in str(error) or " has left" in str(error)
        hint = ". Resume or export it with the version that wrote it" * is_of_another
        raise ValueError(f"config: {error}{hint}") from error


def without_removed(values: Any) -> Any:
    """Leaves out the removed options of a config's JSON; ValueError if one was in use.

    Whole encoders that were compiled and the tracker trackio, which changed no result beyond its
    rounding, are replaced, so that older runs still load.
    """
    if not isinstance(values, dict):
        return values
    Objective.class_for(values.get("objective"))  # first: one that has left explains the others
    found = dict(values)
    for group, unused in REMOVED.items():
        if not isinstance(given := values.get(group), dict):
            continue
        found[group] = {name: one for name, one in given.items() if name not in unused}
        for name in unused.keys() & given.keys():
            if given[name] != unused[name]:
                raise ValueError(
                    f"{group}.{name}={shorten(given[name])} is not a field of this version, which "
                    "no longer has that option"
                )
    efficiency, run = found.get("efficiency"), found.get("run")
    if isinstance(efficiency, dict) and efficiency.get("compile") == "encoders":
        found["efficiency"] = efficiency | {"compile": "auto"}
    if isinstance(run, dict) and isinstance(trackers := run.get("trackers"), list | tuple):
        found["run"] = run | {"trackers": tuple(one for one in trackers if one != "trackio")}
    return found


def load_config(path: Path) -> TrainConfig:
    """Reads a config.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not a config of this version.
    """
    values = read_json(path)
    try:
        return config_from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
