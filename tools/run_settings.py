"""The settings that a command line of `unicl-pretrain` starts from, and settings as a file.

First comes a preset or, with `--resume auto`, the run's config.json; then the file of `--config`,
YAML or JSON with any settings; then the command line. The preset auto depends on the data and the
machine; it is chosen once, and config.json keeps it.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unicl_fast.config import INITIAL_WEIGHTS, DataConfig, TrainConfig
from unicl_fast.config_json import config_to_dict, load_config, without_removed
from unicl_fast.presets import ABOUT_AUTO, AUTO, PRESETS, build_preset
from unicl_fast.system.checked_fields import with_values
from unicl_fast.system.machine import choose_environment
from unicl_fast.system.program import quick_imports
from unicl_fast.system.untrusted_files import YAML_FLOAT, parse_json, parse_yaml, read_file
from unicl_fast.system.wording import shorten

from .auto import choose

DEFAULT_PRESET = "swin-tiny"
FOR_AUTO = ("train", "fraction", "cache_folder")
"""Fields of the data group that the preset auto needs to read the data."""


def first_settings(
    *,
    preset: str | None,
    file: Path | None,
    run_folder: Path | None,
    resume: str | None,
    data: Mapping[str, Any] | None = None,
    device: str | None = None,
    initial: Mapping[str, str] = {},
    keeps: bool = True,
) -> tuple[str, TrainConfig]:
    """Returns a phrase for the source of the settings, and the settings before any option.

    A preset named on the command line or in the file is always used, except that auto is only for a
    new run. Combinations of fields are not checked yet, since options can still change them.

    All arguments are options of the command line: `data` and `device` (`FOR_AUTO`, run.device) are
    for auto; the settings of the sources `initial` (model.init, init_image, init_text) come between
    preset and file. If it `keeps` them, auto's measurements go into `run_folder`.

    Raises:
        ValueError: no such preset, a file without settings, or auto without data.
        FileNotFoundError: no such file, or no such data set.
    """
    values = {} if file is None else _read_file(file)
    named = values.pop("preset", None)
    preset = named if preset is None else preset
    model = values.get("model")
    in_file = model if isinstance(model, dict) else {}
    initial = {one: str(in_file[one]) for one in INITIAL_WEIGHTS if one in in_file} | {**initial}
    own = None if run_folder is None else run_folder / "config.json"
    resumes = resume == "auto" or (preset == AUTO and resume not in (None, "never"))
    if resumes and preset in (None, AUTO) and own is not None and own.is_file():
        origin, config = str(own), load_config(own)
    elif preset == AUTO:
        of_file, run = values.get("data"), values.get("run")
        chosen = DataConfig()
        if isinstance(of_file, dict):
            of_file = {name: of_file[name] for name in FOR_AUTO if name in of_file}
            with _naming(file):
                chosen = with_values(chosen, of_file, name="data")
        chosen = with_values(chosen, data or {}, name="data")
        device = device or (isinstance(run, dict) and run.get("device")) or "auto"
        # `replace` checks combinations of fields
        origin, config = choose(
            dataclasses.replace(chosen), device, run_folder, keeps=keeps,
            compares=not any(initial.values()),
        )  # fmt: skip
    else:
        preset = DEFAULT_PRESET if preset is None else preset
        origin, config = f"the preset {preset}", build_preset(preset)
    text = config.model.init_text
    if text and origin != str(own) and not {"init", "init_text"} & initial.keys():
        choose_environment(device or "auto")
        brought = _brought(config, {"init_text": text}, None if resume in (None, "never") else own)
        config = with_values(config, {"model": brought["model"]})
    if any(initial.values()) and origin != str(own):
        choose_environment(device or "auto")
        own = None if resume in (None, "never") else own
        config = with_values(config, _brought(config, initial, own))
        origin = f"{origin}, with those of {' and '.join(filter(None, initial.values()))}"
    if file is None:
        return origin, config
    of_data = values.get("data")
    with _naming(file):
        config = with_size(config, of_data if isinstance(of_data, dict) else {})
        return f"{origin}, with those in {file}", with_values(config, values)


def with_size(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """Scales `evaluation_resize` with a given `image_size`, unless it is given too.

    So an evaluation shows the same part of an image as before.
    """
    size, resize = given.get("image_size"), config.data.evaluation_resize
    if not isinstance(size, int) or isinstance(resize, str) or given.get("evaluation_resize"):
        return config
    scaled = round(resize * size / config.data.image_size)
    return with_values(config, {"data": {"image_size": size, "evaluation_resize": scaled}})


def _brought(
    config: TrainConfig, initial: Mapping[str, str], own: Path | None
) -> dict[str, dict[str, Any]]:
    """Returns the settings of sources, or of the run's own config if it started from them.

    With init, a preset's sources of encoders are ignored. A config that shows whole images still
    does at the source's size.
    """
    named = {**(dict.fromkeys(INITIAL_WEIGHTS, "") if initial.get("init") else {}), **initial}
    if own is not None and own.is_file():
        from unicl_fast.checkpoints.export import PIXELS

        stored = load_config(own)
        if all(getattr(stored.model, name) == value for name, value in named.items()):
            values = dataclasses.asdict(stored)
            return {"model": values["model"],
                    "data": {name: values["data"][name] for name in PIXELS}}  # fmt: skip
    with quick_imports():
        from unicl_fast.conversion.sources import settings_of

    brought = settings_of(named)
    data, model = brought["data"], brought["model"] | named
    if "image_size" in data and config.data.part_shown == 1 and not config.data.drawn:
        data |= {"evaluation_resize": data["image_size"]}
    return {"model": model, "data": data}


@contextlib.contextmanager
def _naming(file: Path | None) -> Iterator[None]:
    """Adds the file's name to errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def as_yaml(config: TrainConfig) -> str:
    """Returns all settings as YAML for `--config`, with URLs without their secrets."""
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
        """Quotes a text that YAML 1.1 or 1.2 would read as something else."""

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", YAML_FLOAT, list("-+.0123456789"))
    values = json.loads(json.dumps(config_to_dict(config)))  # lists for tuples
    text: str = yaml.dump(
        values, Dumper=Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True
    )
    return text


def list_presets() -> str:
    """Returns a line for each preset: its name and purpose."""
    abouts = {name: preset.about for name, preset in PRESETS.items()} | {AUTO: ABOUT_AUTO}
    return "\n".join(f"{name:22}{about}" for name, about in abouts.items())


def _read_file(path: Path) -> dict[str, Any]:
    """Reads a file of settings: groups with fields, and optionally `preset`."""
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"--config: there is no file {path}")
    parse = parse_json if path.suffix == ".json" else parse_yaml
    values = parse(read_file(path, piped=True), where=str(path))
    values = {} if values is None else values  # an empty file
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold groups of settings such as run:, not {shorten(values)}")
    if not isinstance(values.get("preset", ""), str):
        raise ValueError(f"{path}: preset must be a text, not {shorten(values['preset'])}")
    with _naming(path):
        found: dict[str, Any] = without_removed(values)
    return found
