"""A training run on this rank: data, model and trainer are put together from a config, and run.

What builds the loader, what evaluates a model and what reads its first weights are arguments, so
that this room needs neither DALI nor the protocols of evaluation, nor the formats of others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unicl_fast.augmentation import augmentations_of, check_views
from unicl_fast.batch import Batch
from unicl_fast.checkpoints.files import choose_best_metric, list_checkpoints
from unicl_fast.checkpoints.load import find_checkpoint, find_sound_checkpoint, read_state
from unicl_fast.config import INITIAL_WEIGHTS, TrainConfig, config_to_dict
from unicl_fast.dataset.reader import QUARANTINE_NAME, PackedDataset
from unicl_fast.distributed.launch import (
    configure_logging,
    is_restarted,
    keeping_log,
    refused_together,
)
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_integers
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.distributed.watchdog import Watchdog, group_timeout
from unicl_fast.ledger.format import LEDGER_FOLDER, LedgerSource
from unicl_fast.ledger.writer import Ledger, has_ledger
from unicl_fast.models.precision import resolve_precision
from unicl_fast.models.sharding import check_sharding
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.plan.plan import TrainPlan
from unicl_fast.system.atomic_files import make_folder, sole_writer, write_text_atomically
from unicl_fast.system.machine import choose_device, free_memory
from unicl_fast.system.progress import START_PATIENCE, mark
from unicl_fast.system.wording import count_of
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.training.agreement import check_ranks_agree, describe_rank
from unicl_fast.training.data import (
    adapt_objective_to_data,
    build_prompts,
    cache_options,
    check_tokenizer,
    describe_datasets,
    distinct_names,
    longest_text,
    open_datasets,
    resolve_decode_device,
    rows_of_class_names,
    with_threads,
)
from unicl_fast.training.figures import draw_contact_sheet, draw_curves, drawing
from unicl_fast.training.memory_plan import check_memory, check_sizes
from unicl_fast.training.metrics import DatasetMeter
from unicl_fast.training.stages import PlannedLoader, StagedLoader
from unicl_fast.training.stored_features import check_stored_features, stored_features
from unicl_fast.training.summary import describe_run
from unicl_fast.training.trainer import Evaluation, Trainer

logger = logging.getLogger("unicl_fast")

LOG_NAME = "log.txt"


BuildLoader = Callable[..., PlannedLoader]
"""Builds the loader of a rank; takes the arguments of `TrainLoader`."""
Evaluate = Callable[..., Mapping[str, float]]
"""Evaluates a model on a data set; called with the model, and by keyword dataset, rows_of_classes
and ranks."""
Initialise = Callable[[UniCL, Ranks], None]
"""Replaces a model's fresh weights by those that its config names (`model.init`); all ranks call it
together."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _RunData:
    """The data of a run, opened on this rank."""

    config: TrainConfig
    """With what it takes from the data: the length of the run, the number of classes."""
    datasets: list[PackedDataset]
    weights: list[float] | None
    description: dict[str, Any]
    """As checkpoints store it, to know the data again."""
    prompts: ClassPrompts


def check_request(config: TrainConfig, *, run_folder: Path, nproc: int, resume: str) -> None:
    """Refuses what can be seen to be wrong before ranks are started.

    Raises:
        ValueError: no data, weights or augmentations that do not fit, ranks that cannot divide the
            batch, a division of the training state that cannot be made, or a run folder in use.
        FileNotFoundError: a data set or checkpoint that is not there.
    """
    _check_batch_sizes(config, Ranks(world_size=nproc))
    check_views(config.data.augment, objective=config.objective.name)
    if resume != "auto":  # rank 0 reads checkpoints and reports those it skips; once is enough
        _choose_checkpoint(resume, run_folder)
    _, datasets, _ = _open_checked(config)
    augmentations_of(config.data.augment, [dataset.location for dataset in datasets])
    evaluated = _open_evaluated(config)
    for dataset in (*datasets, *evaluated):
        dataset.close()
    choose_best_metric(config.checkpoint.best, _evaluation_names(config, evaluated))


def _check_batch_sizes(config: TrainConfig, ranks: Ranks) -> None:
    for stage in config.settings_of_stages:
        ranks.local_batch_size(stage.run.global_batch_size)


def _open_checked(
    config: TrainConfig,
) -> tuple[TrainConfig, list[PackedDataset], list[float] | None]:
    """Opens the data and refuses what the model cannot take; adapts the objective to the data."""
    check_sharding(config)
    datasets, weights = open_datasets(config.data)
    for dataset in datasets:
        check_tokenizer(dataset, context_length=config.model.context_length)
    check_stored_features(config, datasets)
    return adapt_objective_to_data(config, datasets), datasets, weights


def pretrain(
    config: TrainConfig,
    *,
    run_folder: Path,
    build_loader: BuildLoader,
    evaluate: Evaluate,
    initialise: Initialise | None = None,
    resume: str = "never",
    origin: str = "",
    ledger: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> None:
    """Trains on this rank from the first step, or a checkpoint's, to the end.

    `resume` is "never", "auto" or the path of a checkpoint, whose weights are taken in place of
    those that `initialise` reads. `origin` says where the settings come from, for the log. `ledger`
    asks for a ledger; a run that has one continues it anyway. A `dry_run` ends before the first
    step and writes nothing. Where it is `quiet`, only warnings and errors are shown; log.txt in the
    run folder has all lines in any case.

    Raises:
        SharedRefusal: a ValueError that ranks found together.
        ValueError: settings, data or checkpoint that do not fit together; says what to change.
        FileNotFoundError: a data set or checkpoint that is not there.
        FloatingPointError: the loss is not finite.
        TooManyBadSamplesError: more of the data is bad than `data.max_bad_fraction`.
    """
    device = choose_device(config.run.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif config.data.decode_device == "gpu":
        raise ValueError(
            "data.decode_device=gpu decodes on the GPU that trains, and this run is on the CPU: "
            "take data.decode_device=auto"
        )
    limit = config.run.timeout_seconds
    with (
        Watchdog(
            limit_seconds=limit,
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
        ) as watchdog,
        process_group(device, timeout_seconds=group_timeout(limit)) as ranks,
        contextlib.ExitStack() as stack,
    ):
        configure_logging(ranks, quiet=quiet and not dry_run)
        write_log_to = stack.enter_context(keeping_log())
        watchdog.meet(ranks)
        mark("reading checkpoints", patience=START_PATIENCE)
        with refused_together(ranks):
            _check_batch_sizes(config, ranks)
            check_run_folder: Callable[[], None] | None = None
            if ranks.is_main and not dry_run:
                check_run_folder = stack.enter_context(sole_writer(run_folder))
        checkpoint = _choose_on_rank_0(ranks, resume, run_folder)
        config = _with_precision(config, device=device, checkpoint=checkpoint, ranks=ranks)
        config = _with_first_weights(config, checkpoint=checkpoint, ranks=ranks)
        config = resolve_decode_device(config, device, ranks)
        mark("opening the data and building the model", patience=START_PATIENCE)
        trainer = build_trainer(
            config,
            run_folder=run_folder,
            build_loader=build_loader,
            evaluate=evaluate,
            initialise=None if checkpoint is not None else initialise,
            ranks=ranks,
            device=device,
            keeps_ledger=has_ledger(run_folder, ranks) or ledger,
            check_run_folder=check_run_folder,
            progress=not quiet,
            checkpoint=checkpoint,
            encodes_features=not dry_run,
        )
        if origin:
            logger.info("settings: %s", origin)
        for line in describe_run(trainer, run_folder):
            logger.info("%s", line)
        if ranks.is_main and not dry_run:
            _write_settings(trainer, run_folder, given=config)
            write_log_to(run_folder / LOG_NAME)
        _train_and_report(trainer, run_folder, dry_run=dry_run)


def _write_settings(trainer: Trainer, run_folder: Path, *, given: TrainConfig) -> None:
    """Writes config.json; what `auto` chose for this machine's kernels is chosen anew elsewhere."""
    make_folder(run_folder)
    efficiency = dataclasses.replace(
        trainer.config.efficiency,
        compile=given.efficiency.compile,
        window_attention=given.efficiency.window_attention,
    )
    kept = dataclasses.replace(trainer.config, efficiency=efficiency)
    text = json.dumps(config_to_dict(kept), indent=1)
    write_text_atomically(run_folder / "config.json", text + "\n")


def _train_and_report(trainer: Trainer, run_folder: Path, *, dry_run: bool) -> None:
    try:
        if not dry_run:
            trainer.fit()
    finally:
        mark("closing the data")
        trainer.loader.close()
    if dry_run:
        logger.info("dry run: all is ready, and nothing was trained or written")
    elif trainer.ranks.is_main:
        _report(trainer, run_folder)


def _report(trainer: Trainer, run_folder: Path) -> None:
    if trainer.dataset_meter is not None and trainer.dataset_meter.traffic is not None:
        read, needed = trainer.dataset_meter.traffic
        logger.info(
            f"read from stores: {read / 1e6:,.1f} MB, arrays included; needed: "
            f"{needed / 1e6:,.1f} MB of images"
            + (f", {read / needed:.2f} times as much" if needed else "")
        )
    mark("drawing the curves")
    curves = run_folder / "curves.png"
    with drawing(curves):
        draw_curves(run_folder, curves)
        logger.info("curves in %s", curves)
    logger.info("%s done. Next: %s", count_of(trainer.step, "step"), _next(trainer, run_folder))


def _next(trainer: Trainer, run_folder: Path) -> str:
    """The evaluation that the model and its data suit."""
    if not trainer.config.objective.has_texts:  # SupCon's and cross-entropy's models know no texts
        return f"unicl-eval knn --checkpoint {run_folder} --train DIR --data DIR"
    has_classes = any(source["num_classes"] for source in trainer.data.get("sources", []))
    kind = "zero-shot" if has_classes else "retrieval"
    return f"unicl-eval {kind} --checkpoint {run_folder} --data DIR"


def _with_precision(
    config: TrainConfig, *, device: torch.device, checkpoint: Path | None, ranks: Ranks
) -> TrainConfig:
    """Replaces `efficiency.precision=auto` by the checkpoint's precision, or rank 0's fastest."""
    precision = None
    if checkpoint is not None and config.efficiency.precision == "auto":
        precision = read_state(checkpoint, ranks).config.efficiency.precision
    return resolve_precision(config, device, precision=precision, ranks=ranks)


def _with_first_weights(
    config: TrainConfig, *, checkpoint: Path | None, ranks: Ranks
) -> TrainConfig:
    """Replaces `model.init` of a run that resumes by what it started from, which stays stored."""
    if checkpoint is None:
        return config
    stored = read_state(checkpoint, ranks).config.model
    first = {name: getattr(stored, name) for name in INITIAL_WEIGHTS}
    for name, value in first.items():
        if (given := getattr(config.model, name)) not in ("", value):
            logger.warning(
                "model.%s=%s is not read: the run resumes, and started from %s",
                name, given, value or "fresh weights",
            )  # fmt: skip
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **first))


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

    `efficiency.precision` and `data.decode_device` are those of all ranks, no longer auto. Without
    `initialise` the weights are fresh; with a `checkpoint` the trainer resumes from it. Without
    `encodes_features` those of efficiency.image_features are neither looked for nor encoded. The
    other arguments are those of `pretrain` and of `Trainer`. Raises as `pretrain` does.
    """
    data = _open_data(config, ranks)
    config = data.config
    mark("planning memory", patience=START_PATIENCE)
    _check_memory_of_stages(config, longest_text(data.datasets, data.prompts), ranks, device)
    model = None
    if initialise is not None and any(getattr(config.model, name) for name in INITIAL_WEIGHTS):
        mark("reading the initial weights", patience=START_PATIENCE)
        model = UniCL(config)
        initialise(model, ranks)
    mark("opening the data and building the model", patience=START_PATIENCE)
    build = functools.partial(
        build_loader,
        datasets=data.datasets,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=device,
        quarantine=run_folder / QUARANTINE_NAME,
    )
    data = dataclasses.replace(
        data, config=dataclasses.replace(config, data=with_threads(config.data, ranks))
    )
    loader = _build_stages(data, functools.partial(build, weights=data.weights))
    sheet = run_folder / "contact-sheet.png" if ranks.is_main else None
    trainer = Trainer(
        config,
        _DrawsFirstBatch(loader, sheet),
        run_folder=run_folder,
        model=model,
        ranks=ranks,
        device=device,
        evaluations=_build_evaluations(data, ranks, evaluate),
        data=data.description,
        dataset_meter=DatasetMeter(
            distinct_names([dataset.location for dataset in data.datasets], may_repeat=True),
            epochs=loader.plan.epochs,
            datasets=data.datasets,
        ),
        ledger=_build_ledger(run_folder, data, loader.plan, ranks) if keeps_ledger else None,
        reading=loader.reading,
        check_run_folder=check_run_folder,
        progress=progress,
    )
    if checkpoint is not None:
        mark("reading the checkpoint", patience=START_PATIENCE)
        with refused_together(ranks):
            trainer.resume(checkpoint)
    if config.efficiency.image_features and encodes_features:
        last = data.config.settings_of_stages[-1]
        whole = dataclasses.replace(last.data, shuffle_window=0)
        of_epoch = dataclasses.replace(last, data=whole)
        features = stored_features(
            trainer.model,
            data.datasets,
            build_loader=lambda: _DrawsFirstBatch(
                build(of_epoch, prompts=data.prompts, weights=None), sheet
            ),
            ranks=ranks,
            device=device,
        )
        loader.feed_features(features)
    return trainer


def _open_data(config: TrainConfig, ranks: Ranks) -> _RunData:
    """Opens the data on all ranks, and fills in what the config needs to know of it."""
    config, datasets, weights = _open_checked(config)
    if not config.run.total_steps:
        samples = 32 * sum(len(dataset) for dataset in datasets)  # the released recipe's epochs
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, samples=samples))
    description = describe_datasets(datasets, weights)
    if ranks.world_size > 1:
        mark("comparing ranks", patience=START_PATIENCE, waits_for_ranks=True)
        with refused_together(ranks):
            check_ranks_agree(describe_rank(config, description), ranks)
        mark("opening the data and building the model", patience=START_PATIENCE)
    return _RunData(
        config=config,
        datasets=datasets,
        weights=weights,
        description=description,
        prompts=build_prompts(datasets, config),
    )


def _build_ledger(run_folder: Path, data: _RunData, plan: TrainPlan, ranks: Ranks) -> Ledger:
    # others may have them in folders of other names
    names = from_rank_0([dataset.folder.name for dataset in data.datasets], ranks)
    return Ledger(
        run_folder / LEDGER_FOLDER,
        sources=[
            LedgerSource(name, len(dataset))
            for name, dataset in zip(names, data.datasets, strict=True)
        ],
        global_batch_size=plan.global_batch_size,
        spans=data.config.run.spans,
        seed=plan.seed,
        shares=plan.weights,
        shuffle_window=plan.shuffle_window,
        shuffle_groups=plan.shuffle_groups,
        ranks=ranks,
    )


def _check_memory_of_stages(
    config: TrainConfig, longest: int, ranks: Ranks, device: torch.device
) -> None:
    """Refuses sizes that the encoder cannot take, and stages that cannot fit, on all ranks."""
    free = min(gather_integers(free_memory(device), ranks))
    with refused_together(ranks):
        if config.run.stages:
            check_sizes(config, device.type)
        for number, stage in enumerate(config.settings_of_stages):
            check_memory(
                stage,
                ranks=ranks,
                device=device,
                longest_text=longest,
                free_bytes=free,
                stage=number if config.run.stages else None,
            )


def _build_stages(data: _RunData, build: Callable[..., PlannedLoader]) -> PlannedLoader:
    """Builds the run's loader, or one for each of its stages."""
    config = data.config
    if not config.run.stages:
        return build(config, prompts=data.prompts)
    by_length = {config.model.context_length: data.prompts}
    loaders: list[PlannedLoader] = []
    for number, stage in enumerate(config.settings_of_stages):
        if (length := stage.model.context_length) not in by_length:
            by_length[length] = build_prompts(data.datasets, stage)
        of_stage = {"spans": config.run.spans, "stage": number}
        loaders.append(build(stage, prompts=by_length[length], **of_stage))
    return StagedLoader(loaders, config.run.spans)


class _DrawsFirstBatch:
    """A loader that draws the first batch of the run, which shows what the model really gets.

    It draws nothing where there is no path.
    """

    def __init__(self, loader: PlannedLoader, path: Path | None) -> None:
        self._loader, self._path = loader, path
        self.plan = loader.plan

    def batches(self, start_step: int) -> Iterator[Batch]:
        for batch in self._loader.batches(start_step):
            is_images = batch.images.ndim == 4  # features are nothing to look at
            if self._path is not None and batch.step == 0 and is_images:
                with drawing(self._path):
                    draw_contact_sheet(batch, self._path)
            yield batch
            del batch  # before the next one is requested

    def close(self) -> None:
        self._loader.close()


def _choose_on_rank_0(ranks: Ranks, resume: str, run_folder: Path) -> Path | None:
    """Returns rank 0's `_choose_checkpoint` on all ranks, since others might see other files.

    Ranks that were started again after a failure resume from the newest checkpoint of this run; if
    none has been written yet, they start as at first.
    """
    # agents of torchrun on nodes whose ranks did not fail do not count it as a restart
    restarted = any(gather_integers(int(is_restarted()), ranks))
    chosen = None
    with refused_together(ranks):
        if ranks.is_main:
            if restarted and list_checkpoints(run_folder / "checkpoints"):
                resume = "auto"
            chosen = _choose_checkpoint(resume, run_folder)
    path = from_rank_0(str(chosen or ""), ranks)
    return Path(path) if path else None


def _choose_checkpoint(resume: str, run_folder: Path) -> Path | None:
    """Returns the checkpoint that `--resume` means, or None for a fresh start."""
    if resume == "auto":
        return find_sound_checkpoint(run_folder)
    if resume != "never":
        return find_checkpoint(resume)
    if found := list_checkpoints(run_folder / "checkpoints"):
        raise ValueError(
            f"{run_folder} already holds {found[-1].name}: resume with --resume auto, or choose "
            "another --out"
        )
    return None


def _open_evaluated(config: TrainConfig) -> list[PackedDataset]:
    """Opens `data.evaluate`; ValueError where a data set has nothing that could be evaluated."""
    datasets = [PackedDataset(each, cache=cache_options(config.data))
                for each in config.data.evaluate]  # fmt: skip
    for dataset in datasets:
        if not dataset.manifest.class_names and config.objective.name == "ce":
            raise ValueError(
                f"data.evaluate: {dataset.location} has no labels, and a model trained with "
                "objective.name=ce knows no texts: name data sets with labels"
            )
    return datasets


def _evaluation_names(config: TrainConfig, datasets: Sequence[PackedDataset]) -> list[str]:
    """The names of `data.evaluate` in metrics; ValueError where one is there twice."""
    with_labels = "accuracy" if config.objective.name == "ce" else "zero_shot"
    kinds = [with_labels if one.manifest.class_names else "retrieval" for one in datasets]
    try:
        names = distinct_names(config.data.evaluate)
    except ValueError as error:
        raise ValueError(f"data.evaluate: {error}") from error
    return [f"{kind}/{name}" for kind, name in zip(kinds, names, strict=True)]


def _build_evaluations(data: _RunData, ranks: Ranks, evaluate: Evaluate) -> dict[str, Evaluation]:
    config = data.config
    if config.data.evaluate and config.objective.name == "supcon":
        raise ValueError(
            "data.evaluate: a model trained with objective.name=supcon knows neither texts nor "
            "classes; leave it empty, and take unicl-eval linear-probe or knn afterwards"
        )
    evaluations: dict[str, Evaluation] = {}
    with refused_together(ranks):
        datasets = _open_evaluated(config)
        names = _evaluation_names(config, datasets)
    names = from_rank_0(names, ranks)  # others would have other names for links to other folders
    for dataset, name in zip(datasets, names, strict=True):
        rows = None
        if config.objective.name == "ce":
            names_of_classes = dataset.manifest.class_names
            rows = rows_of_class_names(data.datasets, names_of_classes, prompts=data.prompts)
        evaluations[name] = functools.partial(
            evaluate, dataset=dataset, rows_of_classes=rows, ranks=ranks
        )
    return evaluations
