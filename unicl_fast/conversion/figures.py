"""Reads a model's figures from files of `unicl-eval --json`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unicl_fast.system.checked_fields import Fraction, convert
from unicl_fast.system.untrusted_files import read_json
from unicl_fast.system.wording import count_of

_INTERVAL = "_interval_95"
_COUNTS = ("num_samples", "num_images", "num_test")
_SHARED = ("name", "metric", "protocol", "num_templates", *_COUNTS)


def figures_of(
    checksum: str, evaluations: Sequence[Path], *, run: Path | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Collects the figures of all evaluations of the weights with a checksum.

    A file in the folder `run` that is damaged or of other weights is left out, with a sentence; one
    of `evaluations` is a ValueError.
    """
    figures, left_out = [], []
    for path in evaluations:
        if (values := _evaluation(path)) is None:
            text = f"{path} is no result of an evaluation: expected a file of unicl-eval --json"
            raise ValueError(text)
        figures += _figures_of(values, path, checksum)
    for path in sorted([*run.glob("*.json"), *run.glob("*/*.json")]) if run else []:
        try:
            figures += _figures_of(values, path, checksum) if (values := _evaluation(path)) else []
        except ValueError as error:
            left_out.append(str(error))
    return [one for number, one in enumerate(figures) if one not in figures[:number]], left_out


def _evaluation(path: Path) -> dict[str, Any] | None:
    """Reads the result of an evaluation; None for any other file."""
    try:
        values = read_json(path)
    except ValueError:
        return None
    return values if isinstance(values, dict) and "weights_xxh3" in values else None


def _figures_of(values: dict[str, Any], path: Path, checksum: str) -> list[dict[str, Any]]:
    if values["weights_xxh3"] != checksum:
        raise ValueError(
            f"{path} is about other weights (xxh3 {values['weights_xxh3']}) than the exported "
            f"ones ({checksum}): evaluate these"
        )
    try:
        return [one | {"file": path.name} for one in _figures_in(values, {})]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; evaluate the model again") from error


def _figures_in(values: Mapping[str, Any], above: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the rates with an interval of a report, and of its parts, which inherit `above`."""
    facts = {**above, **{name: values[name] for name in _SHARED if name in values}}
    if "column" in values:
        facts["name"] = f"{facts['name']}, {values['column']}"
    how = f", k = {values['k']}" if "k" in values else ""
    if "num_templates" in facts:
        how = f", {count_of(facts['num_templates'], 'prompt')} a class"
    for key in values:
        metric = key.removesuffix(_INTERVAL)
        if metric == key or facts.get("metric", metric) != metric:
            continue  # not an interval, or not of the protocol's metric
        rates = (values[metric], *values[key])
        value, low, high = (convert(one, Fraction, name=metric) for one in rates)
        yield {
            "data": facts.get("name", ""),
            "protocol": facts["protocol"] + how,
            "metric": metric.replace("_", " "),
            "value": value,
            "low": low,
            "high": high,
            "num_samples": next((facts[name] for name in _COUNTS if name in facts), 0),
        }
    for key in ("data_sets", "columns", "results"):
        for part in values.get(key, ()):
            yield from _figures_in(part, facts)
