"""What `unicl-eval` does once its arguments are read: check, evaluate, report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from unicl_fast.checkpoints.load import find_model
from unicl_fast.evaluation.classification import ClassificationResult, Metric
from unicl_fast.evaluation.data import EvaluationData, check_data, open_data, short_names
from unicl_fast.evaluation.encode import device_of
from unicl_fast.evaluation.figures import (
    draw_captions_found,
    draw_confusion,
    draw_images_found,
)
from unicl_fast.evaluation.model import model_on_ranks, shows_progress
from unicl_fast.evaluation.report import classification_table, write_results
from unicl_fast.evaluation.requests import (
    Detect,
    EncodingEvaluation,
    Evaluation,
    Finetune,
    FrozenFeatures,
    Knn,
    LinearProbe,
    MetricChoice,
    Retrieval,
    ZeroShot,
)
from unicl_fast.evaluation.run_detection import check_detect, run_detect
from unicl_fast.evaluation.run_finetune import check_finetune, run_finetune
from unicl_fast.evaluation.run_on_dataset import encode_captioned, evaluate_zero_shot
from unicl_fast.evaluation.run_probe import check_probe, run_knn, run_linear_probe

_T = TypeVar("_T")


def check_request(command: Evaluation) -> None:
    """Refuses what can be told to be wrong before ranks are started or a model is loaded.

    Raises:
        ValueError: a number out of range.
        FileNotFoundError: no checkpoint, or no data.
    """
    if isinstance(command, EncodingEvaluation) and command.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {command.batch_size}")
    if command.nproc < 1:
        raise ValueError(f"--nproc must be at least 1, not {command.nproc}")
    find_model(command.checkpoint)
    if isinstance(command, ZeroShot):
        for option in ("class_names", "templates", "metric"):
            _one_for_each(getattr(command, option), command.data, option)
        for spec in command.data:
            check_data(spec)
    elif isinstance(command, Retrieval):
        check_data(command.data)
    elif isinstance(command, FrozenFeatures):
        check_probe(command)
    elif isinstance(command, Finetune):
        check_finetune(command)
    elif isinstance(command, Detect):
        check_detect(command)


def run(command: Evaluation) -> None:
    """Evaluates on all ranks; rank 0 reports."""
    if isinstance(command, ZeroShot):
        run_zero_shot(command)
    elif isinstance(command, LinearProbe):
        run_linear_probe(command)
    elif isinstance(command, Knn):
        run_knn(command)
    elif isinstance(command, Finetune):
        run_finetune(command)
    elif isinstance(command, Detect):
        run_detect(command)
    elif isinstance(command, Retrieval):
        run_retrieval(command)
    else:
        raise AssertionError(command)


def run_zero_shot(command: ZeroShot) -> None:
    """Evaluates one data set after the other, each reported as soon as it is there."""
    names = short_names(command.data)
    class_names = _one_for_each(command.class_names, command.data, "class_names") or [""] * len(
        names
    )
    templates = _one_for_each(command.templates, command.data, "templates") or [""] * len(names)
    metrics = _one_for_each(command.metric, command.data, "metric")
    rows: list[tuple[str, Metric, ClassificationResult]] = []
    values: list[dict[str, Any]] = []
    with model_on_ranks(command) as (model, ranks):
        for number, spec in enumerate(command.data):
            opened = open_data(
                spec,
                class_names=_unless_own(class_names[number]),
                templates=_unless_own(templates[number]),
                name=names[number],
                ranks=ranks,
            )
            with opened as data:
                result = evaluate_zero_shot(
                    model,
                    data.dataset,
                    class_names=data.class_names,
                    templates=data.templates,
                    ranks=ranks,
                    batch_size=command.batch_size,
                    progress=shows_progress(ranks),
                    confusion=command.figures is not None,
                )
                metric = _metric_of(metrics[number], data)
                num_quarantined = data.dataset.manifest.num_quarantined
                values.append(
                    {"data": spec, "metric": metric, "num_templates": len(data.templates)}
                    | result.to_json()
                    | {"num_quarantined": num_quarantined}
                )
            rows.append((names[number], metric, result))
            if not ranks.is_main:
                continue
            if len(names) > 1:
                print(f"\n{names[number]}")
            print(result.to_table())
            if num_quarantined:
                print(f"{num_quarantined} files were refused when packing; not counted above")
            if command.figures is not None:
                assert result.confusion is not None
                path = command.figures / f"confusion-{names[number]}.png"
                draw_confusion(
                    result.confusion, data.class_names, path, title=f"{names[number]}, zero-shot"
                )
                print(f"written to {path}")
        if ranks.is_main:
            table = classification_table(rows)
            if len(rows) > 1:
                print(f"\n{table}")
            shared: dict[str, Any] = {
                "checkpoint": str(command.checkpoint),
                "weights": command.weights,
            }
            if len(values) > 1:
                shared["mean"] = sum(result.value(by) for _, by, result in rows) / len(rows)
                shared["data_sets"] = values
            else:  # one data set is told without a list around it
                shared |= values[0]
            write_results(shared, table, json_path=command.json, markdown_path=command.markdown)


def run_retrieval(command: Retrieval) -> None:
    """Encodes on all ranks and compares on rank 0."""
    with (
        model_on_ranks(command) as (model, ranks),
        open_data(command.data, ranks=ranks) as data,
    ):
        found = encode_captioned(
            model,
            data.dataset,
            ranks=ranks,
            batch_size=command.batch_size,
            progress=shows_progress(ranks),
        )
        if found is None:
            return
        result = found.rank(device_of(model))
        print(result.to_table())
        values = {
            "checkpoint": str(command.checkpoint),
            "weights": command.weights,
            "data": command.data,
        }
        write_results(
            values | result.to_json(),
            result.to_markdown(),
            json_path=command.json,
            markdown_path=command.markdown,
        )
        if command.figures is not None:
            for draw, name in (
                (draw_captions_found, "captions-found.png"),
                (draw_images_found, "images-found.png"),
            ):
                draw(found, data.dataset, command.figures / name)
                print(f"written to {command.figures / name}")


def _one_for_each(given: Sequence[_T], data: Sequence[str], option: str) -> list[_T]:
    """An option's values, one for each data set; none stays none.

    Raises:
        ValueError: neither one nor one for each.
    """
    if len(given) in (0, len(data)):
        return list(given)
    if len(given) == 1:
        return list(given) * len(data)
    flag = f"--{option.replace('_', '-')}"
    raise ValueError(
        f"{flag} takes one value for all data sets or one for each of the {len(data)}, not "
        f"{len(given)}"
    )


def _unless_own(source: str) -> str:
    return "" if source == "own" else source


def _metric_of(choice: MetricChoice, data: EvaluationData) -> Metric:
    return data.metric if choice == "auto" else choice
