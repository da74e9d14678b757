"""A training run on this rank: packed data sets, model and trainer put together, and run.

`pretrain` is what `unicl-pretrain` does once its arguments are read. The loop itself is
`unicl_fast.training.trainer`'s.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from unicl_fast.augmentation import augmentations_of, check_views
from unicl_fast.batch import Batch, Loader
from unicl_fast.checkpoints.files import choose_best_metric, list_checkpoints
from unicl_fast.checkpoints.load import find_checkpoint, find_sound_checkpoint, read_state
from unicl_fast.config import TrainConfig, config_to_dict
from unicl_fast.dataset.reader import QUARANTINE_NAME, PackedDataset
from unicl_fast.distributed.launch import configure_logging, is_restarted, refused_together
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_integers
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.distributed.watchdog import Watchdog, group_timeout
from unicl_fast.evaluation.encode import ModelOnRanks
from unicl_fast.evaluation.zero_shot import evaluate_zero_shot
from unicl_fast.ledger.format import LEDGER_FOLDER, LedgerSource
from unicl_fast.ledger.writer import Ledger, has_ledger
from unicl_fast.models.precision import fast_precision, settle_precision
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.system.machine import choose_device
from unicl_fast.system.progress import mark
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.training.data import (
    adapt_objective_to_data,
    build_prompts,
    cache_options,
    check_tokenizer,
    describe_sources,
    describe_traffic,
    names_of,
    open_sources,
    rows_of_class_names,
    traffic_of,
)
from unicl_fast.training.figures import draw_contact_sheet, draw_curves
from unicl_fast.training.memory_check import check_memory
from unicl_fast.training.metrics import SourceMeter
from unicl_fast.training.trainer import Evaluation, Trainer

logger = logging.getLogger("unicl_fast")


def check_request(config: TrainConfig, *, run_folder: Path, nproc: int, resume: str) -> None:
    """Refuses what can be told to be wrong before ranks are started.

    Raises:
        ValueError: no data, shares or augmentations that do not fit, ranks that cannot share the
            batch, or a run folder in use.
        FileNotFoundError: a data set or checkpoint that is not there.
    """
    Ranks(world_size=nproc).local_batch_size(config.run.global_batch_size)
    check_views(config.data.augment, objective=config.objective.name)
    if resume != "auto":  # rank 0 reads checkpoints and says what it passes over; once is enough
        choose_checkpoint(resume, run_folder)
    datasets, _ = open_sources(config.data)
    augmentations_of(config.data.augment, [dataset.place for dataset in datasets])
    adapt_objective_to_data(config, datasets)
    for dataset in datasets:
        check_tokenizer(dataset, context_length=config.model.context_length)
        dataset.close()
    for folder in config.data.evaluate:
        PackedDataset(folder, cache=cache_options(config.data)).close()
    choose_best_metric(
        config.checkpoint.best, [_evaluation_name(config, each) for each in config.data.evaluate]
    )


def pretrain(
    config: TrainConfig,
    *,
    run_folder: Path,
    resume: str = "never",
    ledger: bool = False,
    progress: bool = True,
) -> None:
    """Runs on this rank from the first step, or a checkpoint's, to the end.

    Args:
        config: the run's settings.
        run_folder: where everything is written.
        resume: "never", "auto" or the path of a checkpoint.
        ledger: write down what every step was fed; a run that has a ledger goes on with it.
        progress: show a progress bar on rank 0.

    Raises:
        SharedRefusal: a ValueError that ranks found together.
        ValueError: settings, data or checkpoint that do not go together; says what to change.
        FileNotFoundError: a data set or checkpoint that is not there.
        FloatingPointError: the loss is not finite.
        TooManyBadSamplesError: more of the data is bad than `data.max_bad_fraction`.
    """
    device = choose_device(config.run.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = config.run.timeout_seconds
    with (
        Watchdog(
            limit_seconds=limit,
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
        ) as watchdog,
        process_group(device, timeout_seconds=group_timeout(limit)) as ranks,
    ):
        configure_logging(ranks)
        watchdog.meet(ranks)
        mark("reading checkpoints")
        # agents of torchrun on nodes whose ranks were well do not count it as a restart
        if any(gather_integers(int(is_restarted()), ranks)):
            resume = resume_after_failure(resume, run_folder)
        with refused_together(ranks):
            share = ranks.local_batch_size(config.run.global_batch_size)
            checkpoint = _choose_on_rank_0(ranks, resume, run_folder)
        config = _with_precision(config, device=device, checkpoint=checkpoint, ranks=ranks)
        mark("opening the data and building the model")
        trainer = build_trainer(
            config,
            run_folder=run_folder,
            ranks=ranks,
            device=device,
            ledger=has_ledger(run_folder, ranks) or ledger,
            progress=progress,
        )
        views = 2 if trainer.config.objective.name == "supcon" else 1
        check_memory(trainer.model, trainer.config, images_per_step=views * share, device=device)
        if checkpoint is not None:
            mark("reading the checkpoint")
            with refused_together(ranks):
                trainer.resume(checkpoint)
        if ranks.is_main:
            trainer.loader = _FirstBatchDrawn(trainer.loader, run_folder / "contact-sheet.png")
            run_folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(config_to_dict(trainer.config), indent=1)
            (run_folder / "config.json").write_text(text + "\n", encoding="utf-8")
        try:
            trainer.fit()
        finally:
            mark("closing the data")
            trainer.loader.close()
        if ranks.is_main:
            if trainer.sources is not None and trainer.sources.traffic is not None:
                logger.info(describe_traffic(*trainer.sources.traffic))
            mark("drawing the curves")
            _draw_curves(run_folder)
            logger.info(
                "%d steps done. Next: unicl-eval zero-shot --checkpoint %s --data DIR",
                trainer.step,
                run_folder,
            )


def _with_precision(
    config: TrainConfig, *, device: torch.device, checkpoint: Path | None, ranks: Ranks
) -> TrainConfig:
    """The config with what `efficiency.precision=auto` means: a checkpoint's, or rank 0's best."""
    if config.efficiency.precision != "auto":
        return config
    if checkpoint is None:
        precision = from_rank_0(fast_precision(device), ranks)
        logger.info("precision: %s, the fastest here (efficiency.precision=auto)", precision)
    else:
        with refused_together(ranks):
            precision = read_state(checkpoint).config.efficiency.precision
    return settle_precision(config, device, precision)


def _draw_curves(run_folder: Path) -> None:
    """An image that cannot be drawn or written must not make a trained model look like none."""
    try:
        draw_curves(run_folder, run_folder / "curves.png")
    except (OSError, ValueError) as error:
        logger.error("no curves: %s", error)
    else:
        logger.info("curves in %s", run_folder / "curves.png")


def build_trainer(
    config: TrainConfig,
    *,
    run_folder: Path,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
    ledger: bool = False,
    progress: bool = True,
) -> Trainer:
    """Opens the data, checks that it suits the model, and puts the trainer together."""
    ranks = ranks or Ranks()
    device = device or choose_device(config.run.device)
    datasets, shares = open_sources(config.data)
    for dataset in datasets:
        check_tokenizer(dataset, context_length=config.model.context_length)
    config = adapt_objective_to_data(config, datasets)
    config = _with_length(config, num_samples=sum(len(dataset) for dataset in datasets))
    prompts = build_prompts(datasets, config.data)
    loader = TrainLoader(
        config,
        datasets,
        shares,
        prompts,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=device,
        quarantine=run_folder / QUARANTINE_NAME,
    )
    return Trainer(
        config,
        loader,
        run_folder=run_folder,
        ranks=ranks,
        device=device,
        evaluations=_build_evaluations(config, datasets, prompts, ranks),
        data=describe_sources(datasets, shares),
        sources=SourceMeter(
            names_of(datasets), epochs=loader.plan.epochs, traffic=traffic_of(datasets)
        ),
        ledger=_build_ledger(run_folder, loader, datasets, ranks) if ledger else None,
        progress=progress,
    )


def _build_ledger(
    run_folder: Path, loader: TrainLoader, datasets: Sequence[PackedDataset], ranks: Ranks
) -> Ledger:
    return Ledger(
        run_folder / LEDGER_FOLDER,
        sources=[LedgerSource(dataset.folder.name, len(dataset)) for dataset in datasets],
        global_batch_size=loader.plan.global_batch_size,
        seed=loader.plan.seed,
        shares=loader.plan.weights,
        shuffle_window=loader.plan.shuffle_window,
        ranks=ranks,
    )


class _FirstBatchDrawn:
    """A loader whose first batch of all is drawn on its way: what the model really gets."""

    def __init__(self, loader: Loader, path: Path) -> None:
        self._loader, self._path = loader, path

    def batches(self, start_step: int) -> Iterator[Batch]:
        for batch in self._loader.batches(start_step):
            if batch.step == 0:
                try:
                    draw_contact_sheet(batch, self._path)
                except OSError as error:
                    logger.error("no contact sheet: %s", error)
            yield batch

    def close(self) -> None:
        self._loader.close()


def _choose_on_rank_0(ranks: Ranks, resume: str, run_folder: Path) -> Path | None:
    """`choose_checkpoint` of rank 0 on all ranks: others might see another state of the disk."""
    chosen: Path | Exception | None = None
    if ranks.is_main:
        try:
            chosen = choose_checkpoint(resume, run_folder)
        except (ValueError, OSError) as error:
            chosen = error
    chosen = from_rank_0(chosen, ranks)
    if isinstance(chosen, Exception):
        raise chosen
    return chosen


def choose_checkpoint(resume: str, run_folder: Path) -> Path | None:
    """The checkpoint that `--resume` means, or None for a fresh start.

    Raises:
        ValueError: the run folder already holds a run and `--resume` does not say what to do, or
            all its checkpoints are damaged.
        FileNotFoundError: no checkpoint at the path given.
    """
    if resume == "auto":
        return find_sound_checkpoint(run_folder)
    if resume != "never":
        return find_checkpoint(resume)
    if found := list_checkpoints(run_folder / "checkpoints"):
        raise ValueError(
            f"{run_folder} already holds {found[-1].name}: go on with --resume auto, or choose "
            "another --out"
        )
    return None


def resume_after_failure(resume: str, run_folder: Path) -> str:
    """What `--resume` means for ranks that were started again: the newest checkpoint of this run.

    Where none has been written yet, the run begins as it did at first.
    """
    return "auto" if list_checkpoints(run_folder / "checkpoints") else resume


def _with_length(config: TrainConfig, *, num_samples: int) -> TrainConfig:
    """The released recipe's 32 passes where the run has no length of its own."""
    if config.run.total_steps:
        return config
    return dataclasses.replace(
        config, run=dataclasses.replace(config.run, samples=32 * num_samples)
    )


def _evaluation_name(config: TrainConfig, folder: str | Path) -> str:
    kind = "accuracy" if config.objective.name == "ce" else "zero_shot"
    return f"{kind}/{Path(folder).name}"


def _build_evaluations(
    config: TrainConfig, trained: Sequence[PackedDataset], prompts: ClassPrompts, ranks: Ranks
) -> dict[str, Evaluation]:
    if config.data.evaluate and config.objective.name == "supcon":
        raise ValueError(
            "data.evaluate: a model trained with objective.name=supcon knows neither texts nor "
            "classes; leave it empty, and take unicl-eval linear-probe or knn afterwards"
        )
    cache = cache_options(config.data)
    datasets = [PackedDataset(folder, cache=cache) for folder in config.data.evaluate]
    names = [dataset.folder.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise ValueError(
            f"data.evaluate: folders need different names to be told apart, got {' '.join(names)}"
        )
    for dataset in datasets:
        if not dataset.manifest.class_names:
            raise ValueError(f"data.evaluate: {dataset.place} has no labels for zero-shot")
    rows = [
        rows_of_class_names(trained, dataset.manifest.class_names, prompts=prompts)
        if config.objective.name == "ce"
        else None
        for dataset in datasets
    ]

    def evaluation_of(index: int) -> Evaluation:
        def evaluate(model: UniCL) -> dict[str, float]:
            on_ranks = ModelOnRanks(model=model, ranks=ranks)
            result = evaluate_zero_shot(on_ranks, datasets[index], rows_of_classes=rows[index])
            return {"top1": result.top1, "top5": result.top5}

        return evaluate

    return {
        _evaluation_name(config, dataset.folder): evaluation_of(index)
        for index, dataset in enumerate(datasets)
    }
