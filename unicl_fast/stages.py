"""The entries of `run.stages`, and the steps, samples and settings of each stage.

A stage is a part of a run with other settings, such as smaller images in larger batches.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unicl_fast.system.checked_fields import plain_number, plain_value, require

STAGE_SETTINGS = {
    "image_size": "data",
    "crop_scale": "data",
    "context_length": "model",
    "global_batch_size": "run",
    "micro_batch_size": "efficiency",
}
"""The settings that a stage can replace, and their groups in the config."""
_KINDS = {"crop_scale": tuple[float, float]}  # others are whole numbers


@dataclass(frozen=True, slots=True)
class StageEntry:
    """One entry of `run.stages`."""

    length: float
    """Below 1 a fraction of the run, otherwise samples."""
    settings: dict[str, Any]
    """Values by the names in `STAGE_SETTINGS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """The steps of a stage; its draws follow the previous stage's."""

    number: int
    """Counted from 0."""
    first_step: int
    end_step: int
    """The step after the last."""
    first_draw: int
    """Draws of all earlier stages."""
    global_batch_size: int

    def draws_before(self, step: int) -> int:
        """Draws of the run before a step of this stage."""
        return self.first_draw + (step - self.first_step) * self.global_batch_size


def parse_stage(text: str) -> StageEntry:
    """Reads LENGTH:NAME=VALUE,NAME=VALUE; ValueError for another form. The config checks ranges."""
    length_text, _, settings_text = text.partition(":")
    try:
        length = plain_number(length_text, float)
        require(length > 0 and (length < 1 or length.is_integer()), "")
    except (ValueError, OverflowError):
        raise ValueError(
            f"run.stages: {text!r} must begin with the stage's part of the run (0.8:) or its "
            "number of samples (1000000:)"
        ) from None
    settings: dict[str, Any] = {}
    for change in settings_text.split(","):
        name, separator, value = (part.strip() for part in change.partition("="))
        require(
            bool(separator) and name in STAGE_SETTINGS and name not in settings,
            f"run.stages: {text!r}: expected NAME=VALUE, each NAME once and one of "
            f"{', '.join(STAGE_SETTINGS)}, not {change.strip()!r}",
        )
        try:
            settings[name] = plain_value(value, _KINDS.get(name, int), name=name)
            least = int(name != "micro_batch_size")
            require(
                name in _KINDS or settings[name] >= least,
                f"{name} must be a whole number of at least {least}, not {value!r}",
            )
        except ValueError as error:
            raise ValueError(f"run.stages: {text!r}: {error}") from None
    return StageEntry(length, settings)


@functools.lru_cache(maxsize=64)
def lay_out(entries: tuple[str, ...], *, samples: int, global_batch_size: int) -> tuple[Span, ...]:
    """The spans of all stages of a run of `samples`; the last has the run's own batch size.

    A stage ends at the whole step nearest to the sum of the lengths so far. Raises ValueError if
    the entries leave nothing for the last stage.
    """
    spans: list[Span] = []
    planned, draws, step = 0.0, 0, 0
    for text in entries:
        entry = parse_stage(text)
        planned += entry.length * samples if entry.length < 1 else entry.length
        size = entry.settings.get("global_batch_size", global_batch_size)
        end = step + max(1, round((planned - draws) / size))
        spans.append(
            Span(number=len(spans), first_step=step, end_step=end, first_draw=draws,
                 global_batch_size=size)
        )  # fmt: skip
        draws, step = draws + (end - step) * size, end
    require(
        draws < samples or not entries,
        f"run.stages takes {draws:,} of the run's {samples:,} samples, and the last stage, with "
        "the run's own settings, needs some: make the others shorter or the run longer",
    )
    end = step - (draws - samples) // global_batch_size
    last = Span(number=len(spans), first_step=step, end_step=end, first_draw=draws,
                global_batch_size=global_batch_size)  # fmt: skip
    return (*spans, last)


def span_at(spans: Sequence[Span], step: int) -> Span:
    """The span of a step; the last one also has all steps beyond its end."""
    return next(span for span in reversed(spans) if span.first_step <= step)


def configs_of_stages(config: Any) -> tuple[Any, ...]:
    """The `TrainConfig` of each stage of a run; the last one has the run's own settings.

    Raises ValueError: a stage that the run's last one could not follow; names it.
    """
    configs = []
    for text in config.run.stages:
        settings = parse_stage(text).settings
        try:
            _check_stage(config, settings)
            configs.append(_with_settings(config, settings))
        except ValueError as error:
            raise ValueError(f"run.stages: {text!r}: {error}") from error
    return (*configs, _with_settings(config, {}) if configs else config)


def _with_settings(config: Any, settings: dict[str, Any]) -> Any:
    """The config of one stage, which has no stages itself."""
    changes: dict[str, dict[str, Any]] = {"run": {"stages": ()}}
    for name, value in settings.items():
        changes.setdefault(STAGE_SETTINGS[name], {})[name] = value
    return config.changed(**changes)


def _check_stage(config: Any, settings: dict[str, Any]) -> None:
    """Refuses a stage that the run's last one could not follow."""
    own = {name: getattr(getattr(config, group), name) for name, group in STAGE_SETTINGS.items()}
    stage = own | settings
    for name in ("image_size", "context_length"):
        require(
            stage[name] <= own[name],
            f"{name} must not be larger than the run's own, {own[name]}, for which the model is",
        )
    objective, data = config.objective, config.data
    require(
        stage["context_length"] == own["context_length"] or objective.uses_texts,
        "context_length is for objectives with texts",
    )
    encoded = ["image_size", "crop_scale", *["context_length"] * ("text" in config.optim.freeze)]
    require(
        not config.efficiency.stored_features or all(stage[name] == own[name] for name in encoded),
        "efficiency.stored_features needs images and texts that are the same in every step: leave "
        f"out {', '.join(encoded)}, or stored_features",
    )
    require(
        stage["global_batch_size"] == own["global_batch_size"]
        or not data.shuffle_window
        or data.shuffle_groups == 1,
        "with data.shuffle_window, global batches of other sizes need data.shuffle_groups=1",
    )
