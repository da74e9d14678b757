"""The model card of an export, and the facts that it states.

The facts of a run (recipe, data, the ledger's proof, figures of evaluations) are collected once,
kept in the export's config.json, and taken over when that is exported again. The card states
nothing else: what is not known is called so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from unicl_fast import __version__
from unicl_fast.checkpoints.export import CONFIG_FILE, LIBRARY, Preprocessing, is_export
from unicl_fast.checkpoints.load import (
    CheckpointState,
    Weights,
    find_model,
    read_state,
    weights_checksum,
)
from unicl_fast.config import INITIAL_WEIGHTS, TrainConfig, config_to_dict
from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.object_store import is_url
from unicl_fast.ledger.format import LEDGER_FOLDER
from unicl_fast.ledger.proof import LedgerProof, Run, prove
from unicl_fast.models.unicl import UniCL
from unicl_fast.presets import PRESETS
from unicl_fast.system.checked_fields import Count, Fraction, from_json_values, parse_json
from unicl_fast.system.wording import config_diff, count_of, markdown_table, markdown_text
from unicl_fast.training.data import distinct_names, folder_and_weight
from unicl_fast.training.optim import scaled_lr

_INTERVAL = "_interval_95"
_PUBLIC = ("open-clip:", "hf-hub:", "timm:")
_RECIPE = ("data", "objective", "model", "optim")
# of this machine and of the user's data, or without influence on what is learnt
_NO_RECIPE = {
    *("train", "evaluate", "threads", "prefetch", "decode_device", "resample", "hw_decoder_load"),
    *("decoder_hint", "cache_folder", "cache_bytes", "block_bytes", "read_ahead", "max_pixels"),
    "balance_concepts",
    *INITIAL_WEIGHTS,
}
_MOST_CHANGES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedOn:
    """One data set of a training."""

    name: str
    num_samples: Count
    num_classes: Count
    weight: Annotated[float, Meta(ge=0)] | None = None
    """Its part of each batch; None where it is its part of all samples."""
    num_captions: Count | None = None
    """None where it is not known: the data set was not there any more, or a part of it was used."""
    license: str | None = None
    """Empty where its manifest states none, None where that is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One result of an evaluation, with its 95 % interval; in 0 to 1."""

    data: str
    protocol: str
    metric: str
    value: Fraction
    low: Fraction
    high: Fraction
    num_samples: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that is known about a model's training and quality."""

    origin: dict[str, Any] = field(default_factory=dict)
    """The origin of the weights, as rows of the card's first table."""
    recipe: dict[str, str] = field(default_factory=dict)
    data: tuple[TrainedOn, ...] = ()
    ledger: str = ""
    """The ledger's proof, in a sentence; empty without a run."""
    figures: tuple[Figure, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def collect_facts(
    path: str | Path, *, weights: Weights, evaluations: Sequence[Path]
) -> tuple[Facts, list[str]]:
    """The facts of a model, with the figures of all evaluations of these very weights.

    Returns them, and a sentence for each evaluation in the run's folder that is of other weights.

    Args:
        path: stands for the model, as `load_model` takes it. Evaluations in its run's folder are
            found.
        weights: those that are exported.
        evaluations: more files of evaluations, which must be about these weights.

    Raises:
        ValueError: a damaged file, or an evaluation of other weights.
        FileNotFoundError: no model or no such file.
        OSError: a disk that failed.
    """
    model = find_model(path)
    checksum = weights_checksum(path, weights=weights)
    facts = facts_of(model)
    figures, left_out = list(facts.figures), []
    for file in evaluations:
        figures += read_figures(file, weights=checksum)
    run_folder = model.parent.parent
    if model.parent.name == "checkpoints":
        given = {file.resolve() for file in evaluations}
        for file in sorted([*run_folder.glob("*.json"), *run_folder.glob("*/*.json")]):
            if file.resolve() in given:
                continue
            try:
                figures += read_figures(file, weights=checksum)
            except NoEvaluationError:
                continue
            except ValueError as error:
                left_out.append(str(error))
    return dataclasses.replace(facts, figures=tuple(dict.fromkeys(figures))), left_out


def facts_of(model: Path) -> Facts:
    """The facts of a checkpoint's run, or those that an export holds.

    Raises:
        ValueError: a damaged file.
        OSError: a disk that failed.
    """
    if is_export(model):
        path = model / CONFIG_FILE
        values = parse_json(path.read_bytes(), where=str(path))
        kept = values.get("facts", {"origin": values.get("origin", {})})
        return from_json_values(Facts, kept, name=f"{path}: facts")
    state = read_state(model)
    in_run = model.parent.name == "checkpoints"
    folder = model.parent.parent / LEDGER_FOLDER
    return Facts(
        origin={
            "steps": state.step,
            "samples seen in training": state.config.run.draws_before(state.step),
        },
        recipe=_recipe(state),
        data=tuple(_data_of(state)),
        ledger=_proven(folder, state) if in_run and folder.is_dir() else _without_ledger(in_run),
    )


def read_figures(path: Path, *, weights: str) -> list[Figure]:
    """The figures with intervals in what `unicl-eval --json` wrote about a model.

    `weights` is the checksum of the model's file.

    Raises:
        NoEvaluationError: it is something else.
        ValueError: it is about other weights, or damaged.
    """
    wanted = f"{path} is no result of an evaluation: expected a file that unicl-eval --json wrote"
    try:
        values = parse_json(path.read_bytes(), where=str(path))
    except ValueError as error:
        raise NoEvaluationError(f"{wanted} ({error})") from error
    if not isinstance(values, dict) or "protocol" not in values:
        raise NoEvaluationError(wanted)
    if "average_with" in values:
        raise ValueError(f"{path} is about averages of two models: evaluate the one exported")
    if values.get("weights_xxh3") != weights:
        raise ValueError(
            f"{path} is about other weights (xxh3 {values.get('weights_xxh3')}) than those that "
            f"are exported ({weights}): evaluate these, with the same --weights"
        )
    try:
        return list(_figures_in(values, protocol=str(values["protocol"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; evaluate the model again") from error


class NoEvaluationError(ValueError):
    """A file holds no result of an evaluation."""


def _figures_in(
    values: Mapping[str, Any], *, protocol: str, name: str = "", metric: str = "", samples: int = 0
) -> Iterator[Figure]:
    """Figures of a report and of those inside it; the reported metric alone where one is named."""
    name, metric = values.get("name", name), values.get("metric", metric)
    for count in ("num_test", "num_images", "num_samples"):
        samples = values.get(count, samples)
    how = f", k = {values['k']}" if "k" in values else ""
    if "num_templates" in values:
        how = f", {count_of(values['num_templates'], 'prompt')} a class"
    for key, bounds in values.items():
        what = key.removesuffix(_INTERVAL)
        if what == key or metric not in ("", what):
            continue
        low, high = bounds
        figure = {
            "data": name, "protocol": protocol + how, "metric": what.replace("_", " "),
            "value": values[what], "low": low, "high": high, "num_samples": samples,
        }  # fmt: skip
        yield from_json_values(Figure, figure)
    for inner in [*values.get("data_sets", ()), *values.get("results", ())]:
        yield from _figures_in(inner, protocol=protocol, name=name, metric=metric, samples=samples)


def _recipe(state: CheckpointState) -> dict[str, str]:
    config = state.config
    optim, batch = config.optim, config.run.global_batch_size
    started = {name: getattr(config.model, name) for name in INITIAL_WEIGHTS}
    given = [
        f"{value if value.startswith(_PUBLIC) else 'weights in a file'} (model.{name})"
        for name, value in started.items()
        if value
    ]
    drawn = " and ".join(config.data.drawn) or "none"
    rates = f"{scaled_lr(optim.lr, config):.4g}, falling to {scaled_lr(optim.lr_min, config):.4g}"
    return {
        "objective": config.objective.name,
        "preset": _nearest_preset(config),
        "started from": ", ".join(given) or "fresh weights",
        "schedule": count_of(config.run.total_steps, "step"),
        **({"stages": "; ".join(config.run.stages)} if config.run.stages else {}),
        "global batch": f"{batch:,} samples",
        "optimizer": state.optimizer,
        "learning rate": f"{rates} by a cosine, after a linear warm-up over the first "
        f"{100 * optim.warmup_fraction:.3g} % of the run",
        "weight decay": f"{optim.weight_decay:g}",
        "augmentation": ", ".join(_without_names(config.data.augment)) or drawn,
        "precision": config.efficiency.precision,
        "seed": str(config.run.seed),
        "program": f"{LIBRARY} {__version__}",
    }


def _without_names(augment: tuple[str, ...]) -> list[str]:
    """Entries of data.augment for all data sets."""
    return [entry for entry in augment if ":" not in entry]


def _nearest_preset(config: TrainConfig) -> str:
    """The preset that a run differs from least, and all that differs."""
    changes = {
        name: list(config_diff(_settings(preset.config), _settings(config)))
        for name, preset in PRESETS.items()
    }
    name = min(changes, key=lambda one: len(changes[one]))
    if len(changes[name]) > _MOST_CHANGES:
        return f"none; {CONFIG_FILE} has all settings"
    return "; ".join([name, *changes[name]])


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what is learnt, in JSON's types, without names of data sets."""
    values = config_to_dict(config)
    values["data"]["augment"] = _without_names(config.data.augment)
    found = {
        f"{group}.{name}": value
        for group in _RECIPE
        for name, value in values[group].items()
        if name not in _NO_RECIPE
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _data_of(state: CheckpointState) -> Iterator[TrainedOn]:
    """The data sets of a run: counts of its checkpoint, and what manifests that are there add."""
    sources = state.data.get("sources", [])
    folders = [folder_and_weight(spec)[0] for spec in state.config.data.train]
    weights = state.data.get("shares") or [None] * len(sources)
    if len(folders) != len(sources):
        return
    names = distinct_names(folders, may_repeat=True)
    for name, folder, source, weight in zip(names, folders, sources, weights, strict=True):
        manifest = _manifest_of(folder, source)
        captions = None
        if manifest is not None and manifest.num_samples == source["num_samples"]:
            captions = manifest.num_captions
        yield TrainedOn(
            name=name,
            num_samples=source["num_samples"],
            num_classes=source["num_classes"],
            weight=weight,
            num_captions=captions,
            license=None if manifest is None else manifest.license,
        )


def _manifest_of(folder: str, source: Mapping[str, Any]) -> Manifest | None:
    """The manifest of a data set, if it is on the disk and still the one that was trained on."""
    if is_url(folder):
        return None
    try:
        manifest = Manifest.load(folder)
    except (OSError, ValueError):
        return None
    pixels = [] if manifest.pixels is None else [manifest.pixels.xxh3]
    same = [shard.xxh3 for shard in manifest.shards] + pixels == source["shards"]
    return manifest if same else None


_NO_LEDGER = "The run kept no ledger, so there is no proof of which samples it saw."


def _without_ledger(in_run: bool) -> str:
    return _NO_LEDGER if in_run else "Whether the run kept a ledger is not known here."


def _proven(folder: Path, state: CheckpointState) -> str:
    """The proof of a ledger about the steps up to a checkpoint and after it, in a sentence."""
    run = Run(
        run_id=state.run_id,
        seed=state.config.run.seed,
        global_batch_size=state.config.run.global_batch_size,
        sizes=[source["num_samples"] for source in state.data["sources"]],
        balance=state.config.data.balance,
    )
    proof = prove(folder, steps_done=state.step, run=run)
    if not proof.holds:
        return f"The run's ledger is no proof of which samples it saw: {_why_not(proof)}."
    scheduled = "every epoch schedules each sample once"
    if state.config.data.balance:
        scheduled = "no epoch schedules a sample twice (data.balance limits classes)"
    steps, batch = count_of(proof.steps, "step"), count_of(proof.global_batch_size, "sample")
    steps += f", {proof.num_draws:,} samples in all," if proof.has_stages else f" of {batch}"
    epochs = ", ".join(
        f"{count_of(one.complete_epochs, 'complete epoch')} of {markdown_text(one.name)}"
        for one in proof.sources
    )
    return (
        f"The run's ledger proves it (`unicl-ledger`): each of its {steps} has a record, and "
        f"{scheduled}; "
        f"{epochs}. For {count_of(proof.num_substituted, 'draw')} another sample "
        "was shown, since the scheduled one could not be read. The run was started "
        f"{count_of(len(proof.starts), 'time')}."
    )


def _why_not(proof: LedgerProof) -> str:
    if proof.faults:
        return markdown_text(proof.faults[0])
    if proof.holes:
        return f"it lacks steps {proof.holes[0][0]} to {proof.holes[0][1] - 1}"
    wrong = next(source for source in proof.sources if not source.holds)
    return f"an epoch of {markdown_text(wrong.name)} lost samples or scheduled some twice"


_CARD = """\
---
library_name: {library}
pipeline_tag: zero-shot-image-classification
{license}tags:
- unicl
- clip
- image-text-label
- contrastive-learning
---

# UniCL, {encoder}

An image encoder and a text encoder that meet in one space, trained with unified
contrastive learning in image-text-label space (Yang et al., CVPR 2022, arXiv
2204.03610).

{model}

## Use

```python
import unicl_fast

model = unicl_fast.load_model("{name}")
print(model.classify(["photo.jpg"], ["cat", "dog"]))
similarities = model.embed_images(["photo.jpg"]) @ model.embed_texts(["a photo of a cat"]).T
```

Or: `unicl-eval zero-shot --checkpoint {name} --data DIR`.

## Training

{training}

## Figures

{figures}

## Limits

{limits}

## Preprocessing

RGB; the shorter side scaled to {of.resize} pixels ({of.interpolation}, antialiased);
the central {of.image_size} x {of.image_size}; values in 0 to 1; minus the mean
{of.mean}, divided by the standard deviation {of.std}.
Texts: CLIP's byte-pair encoding, {of.context_length} tokens, padded with 0.
"""


def model_card(model: UniCL, facts: Facts, *, name: str, license: str) -> str:
    """The README.md of an exported model, which the hub shows.

    `name` is what `load_model` takes, `license` an identifier of the hub; empty leaves it open.
    """
    config, of = model.config.model, Preprocessing.of(model.config)
    causal = "causal " if config.text_causal else ""
    text = f"{config.text_layers} {causal}blocks, width {config.text_width}"
    scales = model.logit_scale.detach().exp().reshape(-1).tolist()
    rows = {
        "image encoder": f"{config.image_encoder} (timm)",
        "text encoder": f"{text}, {config.text_heads} heads",
        "dimensions of the common space": config.embed_dim,
        "parameters": f"{sum(one.numel() for one in model.parameters()):,}",
        "scale of the logits": ", ".join(f"{one:.4g}" for one in scales),
        "license": license or "not stated",
        **facts.origin,
    }
    if model.config.tells_kinds:
        rows["texts"] = "prompts of labels and captions are told apart: load_model(..., kind=...)"
    if model.logit_bias is not None:
        rows["bias of the logits, for the sigmoid"] = f"{model.logit_bias.item():.4g}"
    return _CARD.format(
        library=LIBRARY,
        license=f"license: {license}\n" if license else "",
        encoder=config.image_encoder,
        model=_two_columns(rows),
        name=name,
        training=_training(facts),
        figures=_figures(facts),
        limits="\n".join(f"- {one}" for one in _limits(model.config, facts)),
        of=of,
    )


def _two_columns(rows: Mapping[str, Any]) -> str:
    shown = {key: one if isinstance(one, str) else json.dumps(one) for key, one in rows.items()}
    return markdown_table(["", ""], list(map(list, shown.items())))


def _training(facts: Facts) -> str:
    if not facts.recipe:
        return "These weights were converted. How and on what they were trained is not recorded."
    data = [
        [
            *(one.name, f"{one.num_samples:,}", f"{one.num_classes:,}"),
            "not known" if one.num_captions is None else f"{one.num_captions:,}",
            "by its size" if one.weight is None else f"{one.weight:g}",
            "not known" if one.license is None else one.license or "not stated by the data set",
        ]
        for one in facts.data
    ]
    header = ["data set", "samples", "classes", "captions", "part of a batch", "license"]
    table = markdown_table(header, data) if data else "Its data sets are not recorded."
    return "\n\n".join([table, facts.ledger, _two_columns(facts.recipe)])


def _figures(facts: Facts) -> str:
    if not facts.figures:
        return "No evaluation of these weights is recorded here."
    rows = [
        [
            *(one.data, one.protocol, one.metric, f"{100 * one.value:.2f}"),
            f"{100 * one.low:.2f} to {100 * one.high:.2f}",
            f"{one.num_samples:,}",
        ]
        for one in facts.figures
    ]
    return markdown_table(["data set", "protocol", "metric", "%", "95 % interval", "samples"], rows)


def _limits(config: TrainConfig, facts: Facts) -> Iterator[str]:
    """Sentences that follow from how the model is built, trained and measured."""
    side, length = config.data.image_size, config.model.context_length
    yield f"It sees {side} x {side} pixels of an image, from its centre, and no more."
    yield f"Texts are cut after {length} tokens, and CLIP's tokenizer is one of English texts."
    yield (
        "`classify` divides probabilities among the classes that it is given: an image of none of "
        "them gets one all the same."
    )
    yield (
        "It knows what the images and texts of its training show, with their errors and "
        "prejudices, and less of what they leave out."
    )
    measured = "the data sets above alone" if facts.figures else "no data set"
    yield (
        f"Its quality was measured on {measured}; bias, safety and resistance to attacks were not "
        "measured."
    )
