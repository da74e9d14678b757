"""The parts of a run from its data: loader, ledger, evaluations, trainer.

Loader, evaluation and weight loading are passed in: no need for DALI, evaluation/, conversion/.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unicl_fast.checkpoints.load import build_model, read_state
from unicl_fast.config import INITIAL_WEIGHTS, TrainConfig
from unicl_fast.config_json import config_to_dict
from unicl_fast.dataset.manifest import QUARANTINE_NAME
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_integers
from unicl_fast.ledger.format import LEDGER_FOLDER, LedgerSource, SegmentHeader
from unicl_fast.ledger.writer import Ledger
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.plan.plan import TrainPlan
from unicl_fast.system.machine import free_memory
from unicl_fast.system.phases import START_PATIENCE, mark
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.training.agreement import check_ranks_agree, describe_rank
from unicl_fast.training.assembly import assemble
from unicl_fast.training.data import (
    build_prompts,
    cache_options,
    check_end_of_texts,
    check_tokenizer,
    describe_datasets,
    distinct_names,
    log_cut_captions,
    longest_text,
    open_datasets,
    rows_of_class_names,
    tokenizer_of,
    warn_of_shared_images,
)
from unicl_fast.training.feature_run import feed_features
from unicl_fast.training.memory_plan import build_on_meta, check_memory, check_sizes
from unicl_fast.training.observers import ContactSheet, DatasetNumbers, LedgerKeeper, SoleWriter
from unicl_fast.training.settle import Setup, set_up, with_kernels
from unicl_fast.training.stages import PlannedLoader, in_stages
from unicl_fast.training.trainer import Evaluation, Observer, Trainer

logger = logging.getLogger("unicl_fast")

BuildLoader = Callable[..., PlannedLoader]
"""Builds the loader of a rank; called as `TrainLoader` is."""
Initialise = Callable[[UniCL, Ranks], None]
"""Replaces a model's fresh weights by those of `model.init`; all ranks call it together."""
Evaluate = Callable[..., Mapping[str, float]]
"""Evaluates a model on a data set; also called with dataset, rows_of_classes and ranks."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """The data of a run, opened on this rank."""

    config: TrainConfig  # settled, with the length of the run and the number of classes
    datasets: list[PackedDataset]
    weights: list[float] | None
    description: dict[str, Any]  # as checkpoints store it, to recognise the data
    prompts: ClassPrompts


def build_trainer(
    config: TrainConfig,
    *,
    run_folder: Path,
    build_loader: BuildLoader,
    evaluate: Evaluate,
    initialise: Initialise | None = None,
    ranks: Ranks,
    device: torch.device,
    keeps_ledger: bool = False,
    check_run_folder: Callable[[], None] | None = None,
    checkpoint: Path | None = None,
    encodes_features: bool = True,
    progress: bool = True,
) -> Trainer:
    """Opens the data, checks that it suits the model, and puts the trainer together.

    Open settings are settled for all ranks. Without `initialise` the weights are fresh; with a
    `checkpoint` the trainer resumes from it, and `initialise` reads weights that it lacks. Without
    `encodes_features`, stored features (efficiency.stored_features) are neither looked for nor
    encoded. Other arguments and errors are those of `run.pretrain` and `make_trainer`.
    """
    state = None if checkpoint is None else read_state(checkpoint, ranks)
    datasets, weights = open_checked(config)
    stored = None if state is None else state.config
    setup = set_up(config, ranks=ranks, device=device, datasets=datasets, stored=stored)
    data = _check_data(setup, datasets, weights)
    mark("trying kernels", patience=START_PATIENCE)
    plain = setup.config.changed(efficiency={"window_attention": "timm"})  # imports no triton
    setup = with_kernels(setup, build_on_meta(plain, device.type))
    config = setup.config
    mark("planning memory", patience=START_PATIENCE)
    _check_memory_of_stages(setup, longest_text(data.datasets, data.prompts))
    mark("building the model", patience=START_PATIENCE)
    model = build_model(config)
    has_all = state is not None and not state.base
    named = any(getattr(config.model, name) for name in INITIAL_WEIGHTS)
    if initialise is not None and named and not has_all:
        mark("reading the initial weights", patience=START_PATIENCE)
        initialise(model, ranks)
        if checkpoint is None and ranks.is_main:
            for warning in config.objective.warn_of_limits(model.learnt):
                logger.warning("the initial weights have %s", warning)
    mark("planning batches; a machine's first run compiles kernels", patience=START_PATIENCE)
    build = functools.partial(
        build_loader, datasets=data.datasets, rank=ranks.rank, world_size=ranks.world_size,
        device=device, quarantine=run_folder / QUARANTINE_NAME,
    )  # fmt: skip
    with refused_together(ranks):
        loaders = _build_loaders(data, functools.partial(build, weights=data.weights))
    loader = in_stages(loaders, config.run)
    sheet = ContactSheet(
        run_folder / "contact-sheet.png" if ranks.is_main else None,
        class_names=[dataset.manifest.class_names for dataset in datasets],
        tokenizer=functools.partial(tokenizer_of, config),
    )
    evaluations = _build_evaluations(data, ranks, evaluate)
    names = distinct_names([dataset.location for dataset in datasets], may_repeat=True)
    numbers = DatasetNumbers(names, epochs=loader.plan.epochs, datasets=datasets)
    observers: list[Observer] = [sheet, numbers]
    if keeps_ledger:
        observers.append(LedgerKeeper(_build_ledger(run_folder, data, loader.plan, ranks)))
    if check_run_folder is not None:
        observers.append(SoleWriter(check_run_folder))
    trainer = assemble(
        setup, model, loader, run_folder=run_folder, evaluations=evaluations, data=data.description,
        observers=observers, progress=progress,
    )  # fmt: skip
    if checkpoint is not None:
        mark("reading the checkpoint", patience=START_PATIENCE)
        with refused_together(ranks):
            trainer.resume(checkpoint)
    if config.efficiency.stored_features and encodes_features:
        feed_features(
            trainer, loaders, datasets=data.datasets, weights=data.weights, prompts=data.prompts,
            build_loader=build, on_first_batch=sheet.draw, is_fresh=state is None,
            progress=progress,
        )  # fmt: skip
    return trainer


def open_checked(config: TrainConfig) -> tuple[list[PackedDataset], list[float] | None]:
    """Opens the data and refuses captions of another tokenizer."""
    check_end_of_texts(config)
    datasets, weights = open_datasets(config.data)
    for dataset in datasets:
        check_tokenizer(dataset, config)
    return datasets, weights


def _check_data(
    setup: Setup, datasets: list[PackedDataset], weights: list[float] | None
) -> RunData:
    """Describes the data and makes prompts; all ranks must have the same data and settings."""
    config, ranks = setup.config, setup.ranks
    if config.objective.uses_texts:
        for dataset in datasets:
            log_cut_captions(dataset, config.model.context_length)
    description = describe_datasets(datasets, weights)
    if ranks.world_size > 1:
        mark("comparing ranks", patience=START_PATIENCE, waits_for_ranks=True)
        with refused_together(ranks):
            check_ranks_agree(describe_rank(config_to_dict(config), description), ranks)
    mark("making prompts of the class names", patience=START_PATIENCE)
    prompts = build_prompts(datasets, config)
    return RunData(
        config=config, datasets=datasets, weights=weights, description=description, prompts=prompts
    )


def _build_ledger(run_folder: Path, data: RunData, plan: TrainPlan, ranks: Ranks) -> Ledger:
    # folders can have other names on other ranks
    names = from_rank_0([dataset.folder.name for dataset in data.datasets], ranks)
    header = SegmentHeader(
        segment=0, start_step=0, rank=ranks.rank, world_size=ranks.world_size,
        sources=tuple(map(LedgerSource, names, map(len, data.datasets))),
        global_batch_size=plan.global_batch_size, seed=plan.seed, shares=plan.weights,
        shuffle_window=plan.shuffle_window, shuffle_groups=plan.shuffle_groups,
    )  # fmt: skip
    return Ledger(
        run_folder / LEDGER_FOLDER, header, spans=data.config.run.spans, ranks=ranks,
        weights={number: one.weights for number, one in plan.weighted.items()},
    )  # fmt: skip


def _check_memory_of_stages(setup: Setup, longest: int) -> None:
    """Refuses, on all ranks, unsupported image sizes and stages that exceed the memory."""
    config, ranks, device = setup.config, setup.ranks, setup.device
    free = min(gather_integers(free_memory(device), ranks))
    with refused_together(ranks):
        if config.run.stages:
            check_sizes(config, device.type)
        if config.efficiency.stored_features and {"image", "text"} <= set(config.optim.freeze):
            return  # a step runs no encoder
        for number, stage in enumerate(config.settings_of_stages):
            check_memory(
                stage, ranks=ranks, device=device, longest_text=longest, free_bytes=free,
                stage=number if config.run.stages else None,
            )  # fmt: skip


def _build_loaders(data: RunData, build: Callable[..., PlannedLoader]) -> list[PlannedLoader]:
    """Builds the run's loader, or one for each of its stages."""
    config = data.config
    if not config.run.stages:
        return [build(config, prompts=data.prompts)]
    by_length = {config.model.context_length: data.prompts}
    loaders: list[PlannedLoader] = []
    for number, stage in enumerate(config.settings_of_stages):
        if (length := stage.model.context_length) not in by_length:
            by_length[length] = build_prompts(data.datasets, stage)
        prompts = by_length[length]
        loaders.append(build(stage, prompts=prompts, spans=config.run.spans, stage=number))
    return loaders


def open_evaluated(config: TrainConfig) -> list[PackedDataset]:
    """Opens `data.evaluate`; ValueError if a data set has nothing to evaluate."""
    objective = config.objective
    cache = cache_options(config.data)
    datasets = [PackedDataset(each, cache=cache) for each in config.data.evaluate]
    for dataset in datasets:
        if not dataset.manifest.class_names and not objective.uses_texts:
            raise ValueError(
                f"data.evaluate: {dataset.location} has no labels, and a model trained with "
                f"objective.name={objective.name} knows no texts: name data sets with labels"
            )
    return datasets


def named_evaluations(
    config: TrainConfig, datasets: Sequence[PackedDataset]
) -> list[tuple[str, PackedDataset]]:
    """The evaluations of `data.evaluate`, by their names in metrics; ValueError for equal ones."""
    try:
        names = distinct_names(config.data.evaluate)
    except ValueError as error:
        raise ValueError(f"data.evaluate: {error}") from error
    pairs = zip(names, datasets, strict=True)
    return [(f"{kind}/{name}", one) for name, one in pairs for kind in _kinds_of(config, one)]


def _kinds_of(config: TrainConfig, dataset: PackedDataset) -> list[str]:
    """All that can be measured on a data set: its labels, its captions."""
    kinds = [config.objective.evaluation] if dataset.manifest.class_names else []
    has_captions = config.objective.uses_texts and len(dataset.captions)
    return [*kinds, *["retrieval"] * bool(has_captions or not kinds)]


def _build_evaluations(data: RunData, ranks: Ranks, evaluate: Evaluate) -> dict[str, Evaluation]:
    config = data.config
    evaluations: dict[str, Evaluation] = {}
    with refused_together(ranks):
        datasets = open_evaluated(config)
        named = named_evaluations(config, datasets)
    # links can lead to other names on other ranks
    names = from_rank_0([name for name, _ in named], ranks)
    if ranks.is_main:
        warn_of_shared_images(data.datasets, datasets)
    for (_, dataset), name in zip(named, names, strict=True):
        if config.objective.uses_texts and name.startswith("retrieval/"):
            log_cut_captions(dataset, config.model.context_length)
        rows = None
        if config.objective.evaluation == "accuracy":
            class_names = dataset.manifest.class_names
            rows = rows_of_class_names(data.datasets, class_names, prompts=data.prompts)
        kind = name.partition("/")[0]
        evaluations[name] = functools.partial(
            evaluate, dataset=dataset, rows_of_classes=rows, ranks=ranks, kind=kind
        )
    return evaluations
