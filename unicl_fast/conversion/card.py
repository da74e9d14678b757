"""Collects facts about a model's run and formats the model card of an export.

huggingface_hub fills in card.md and adds metadata for the hub. Facts are stored in the export's
config.json, so an export of an export keeps them.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from unicl_fast.checkpoints.export import LIBRARY, is_export, read_description
from unicl_fast.checkpoints.load import CheckpointState, read_state
from unicl_fast.config import INITIAL_WEIGHTS
from unicl_fast.conversion.figures import figures_of
from unicl_fast.conversion.hugging_face import Layout
from unicl_fast.conversion.libraries import module_of_encoder
from unicl_fast.conversion.output import num_parameters
from unicl_fast.conversion.sources import find_source, weights_checksum
from unicl_fast.dataset.manifest import Manifest, describe_columns
from unicl_fast.dataset.object_store import is_url
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.wording import markdown_text
from unicl_fast.training.data import distinct_names, folder_and_weight

_TEMPLATE = Path(__file__).with_name("card.md")
_TASK = "zero-shot-image-classification"
_TAGS = ["unicl", "clip", "image-text-label", "contrastive-learning"]
_PUBLIC = ("open-clip:", "hf-hub:", "timm:", "pypi:")


class Facts(NamedTuple):
    """The known facts about a model, in JSON's types, by the names in card.md."""

    origin: Mapping[str, Any] = {}
    """The origin of the weights."""
    data: Sequence[Mapping[str, Any]] = ()
    """The training data sets; unknown values are None."""
    figures: Sequence[Mapping[str, Any]] = ()
    """Results of evaluations, with 95 % intervals, as fractions of 1."""


def model_card(model: UniCL, facts: Facts, *, layout: Layout, name: str, license: str) -> str:
    """Formats the README.md of an exported model, which the hub shows.

    `name` is its OWNER/NAME on the hub, `license` the hub's identifier or empty, `layout` the class
    of transformers that loads the model.
    """
    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type=one["data"],
            dataset_name=one["data"],
            metric_type=one["metric"],
            metric_name=f"{one['metric']}, {one['protocol']}",
            metric_value=one["value"],
            metric_args={"interval_95": [one["low"], one["high"]]},
        )
        for one in facts.figures
    ]
    metadata = ModelCardData(
        library_name=LIBRARY if layout == "unicl" else "transformers",
        license=license or None,
        pipeline_tag=_TASK,
        tags=_TAGS,
        model_name=name,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        facts=facts,
        model=model.config.model,
        data=model.config.data,
        model_name=name,
        layout=layout,
        encoder_module=module_of_encoder(model.config.model.image_encoder),
        num_parameters=num_parameters(model),
        text=lambda value: markdown_text(str(value)),
    )
    return f"{card}\n"


def collect_facts(path: str | Path, *, evaluations: Sequence[Path]) -> tuple[Facts, list[str]]:
    """Collects the facts about a model, including all evaluations of exactly these weights.

    Evaluations come from the run's folder, with a sentence for each that is left out, and from
    `evaluations`; there, a file that is damaged or of other weights is a ValueError.
    """
    checksum, source = weights_checksum(path), find_source(str(path))
    if source.own is None or source.file is None:
        name = str(path) if str(path).startswith(_PUBLIC) else "a model in a file"
        origin = {"converted from": name, "xxh3 of its weights": checksum}
        facts, run = Facts(origin=origin), None
    elif is_export(model := source.file.parent):
        kept, run = read_description(model).get("facts", {}), None
        facts = Facts(**{name: kept[name] for name in Facts._fields if name in kept})
    else:
        facts = _facts_of(read_state(model))
        run = model.parent.parent if model.parent.name == "checkpoints" else None
    figures, left_out = figures_of(checksum, evaluations, run=run)
    return facts._replace(figures=[*facts.figures, *figures]), left_out


def _facts_of(state: CheckpointState) -> Facts:
    """Reads the facts that a checkpoint stores about its run, and the manifests of its data."""
    config = state.config
    given = [getattr(config.model, name) for name in INITIAL_WEIGHTS]
    started = [one if one.startswith(_PUBLIC) else "weights in a file" for one in given if one]
    origin = {
        "steps": state.step,
        "samples seen": config.run.draws_before(state.step),
        "global batch": config.run.global_batch_size,
        "objective": config.objective.name,
        "optimizer": state.optimizer,
        "started from": ", ".join(started) or "fresh weights",
    }
    return Facts(origin, list(_data_of(state)))


def _data_of(state: CheckpointState) -> Iterator[dict[str, Any]]:
    """Yields a run's data sets, with captions and license if they are still on the disk."""
    folders = [folder_and_weight(spec)[0] for spec in state.config.data.train]
    sources = state.data.get("sources", [])
    weights = state.data.get("shares") or [None] * len(sources)
    if len(folders) != len(sources):  # somebody's own loader
        return
    names = distinct_names(folders, may_repeat=True)
    columns = state.data.get("label_columns") or [{}] * len(sources)
    every = zip(names, folders, sources, weights, columns, strict=True)
    for name, folder, source, weight, of_classes in every:
        manifest = None if is_url(folder) else _manifest_of(folder, checksums=source["shards"])
        is_whole = manifest is not None and manifest.num_samples == source["num_samples"]
        yield {
            "name": name,
            "num_samples": source["num_samples"],
            "num_classes": source["num_classes"],
            "label_columns": describe_columns(of_classes),
            "weight": weight,
            "num_captions": manifest.num_captions if manifest and is_whole else None,
            "license": manifest.license if manifest else None,
        }


def _manifest_of(folder: str, *, checksums: list[str]) -> Manifest | None:
    """Reads a data set's manifest; None unless its images are still those of the training."""
    try:
        manifest = Manifest.load(folder)
    except (OSError, ValueError):
        return None
    pixels = [one.xxh3 for one in (manifest.pixels, manifest.in_place) if one is not None]
    found = [shard.xxh3 for shard in manifest.shards] + pixels
    return manifest if found == checksums else None
