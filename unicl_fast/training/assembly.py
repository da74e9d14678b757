"""A trainer from its parts: the model in its place, and the observers of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unicl_fast.augmentation import check_views
from unicl_fast.batch import Loader, ReadingTime
from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig, config_to_dict
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.ledger.writer import Ledger
from unicl_fast.models.compilation import fuse_window_attention
from unicl_fast.models.freezing import freeze
from unicl_fast.models.precision import Precision, place_module, set_device_arithmetic
from unicl_fast.models.sharding import check_sharding, divides_all
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.machine import choose_device
from unicl_fast.training.limits import NonfiniteSteps, ReplacedSamples
from unicl_fast.training.metrics import DatasetMeter
from unicl_fast.training.micro_batches import check_micro_batches
from unicl_fast.training.observers import (
    Checkpoints,
    DatasetNumbers,
    LedgerKeeper,
    RunLog,
    WeightsAgree,
)
from unicl_fast.training.settle import settle, settle_kernels
from unicl_fast.training.trainer import Evaluation, Observer, Trainer


def make_trainer(
    config: TrainConfig,
    loader: Loader,
    *,
    given: TrainConfig | None = None,
    run_folder: Path | None = None,
    model: UniCL | None = None,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
    evaluations: Mapping[str, Evaluation] | None = None,
    data: Mapping[str, Any] | None = None,
    dataset_meter: DatasetMeter | None = None,
    ledger: Ledger | None = None,
    reading: ReadingTime | None = None,
    check_run_folder: Callable[[], None] | None = None,
    progress: bool = True,
    observers: Sequence[Observer] = (),
) -> Trainer:
    """Builds a trainer for any loader; nothing is trained or written yet.

    Args:
        config: the run's settings.
        loader: gives the local batches of this rank.
        given: the settings before `config` was settled, which are what is stored. None: `config`
            is as it was given, and is settled here.
        run_folder: where metrics and checkpoints go; None writes nothing.
        model: None builds one from the config.
        ranks: None is one process by itself.
        device: None takes the one that `run.device` means.
        evaluations: by name; all ranks call them together.
        data: what the run is trained on, in JSON's types; stored in checkpoints and compared when
            a run is resumed.
        dataset_meter: measures each data set at logging steps.
        ledger: records the samples of every step.
        reading: how long the loader waits for storage, where it says so.
        check_run_folder: is called before rank 0 writes a checkpoint, and raises if another
            process has taken the run folder over (`atomic_files.sole_writer`).
        progress: show a progress bar on rank 0.
        observers: others that follow the run, after the usual ones.

    Raises:
        ValueError: settings that cannot work together, or with this number of ranks.
    """
    ranks = ranks or Ranks()
    check_settings(config, ranks)
    if not config.run.total_steps:
        raise ValueError("the run has no length: set run.samples or run.steps")
    device = device or choose_device(config.run.device, local_rank=ranks.local_rank)
    if given is None:
        given, config = config, settle(config, device=device, ranks=ranks)
    model = model or build_model(config)
    config = settle_kernels(config, model, device, ranks)
    check_sharding(config.efficiency, optimizer=config.optim.name)
    model.config = config
    freeze(model)
    if any(stage.efficiency.micro_batch_size for stage in config.settings_of_stages):
        check_micro_batches(model)
    _place(model, config, device, ranks)
    stored = config_to_dict(given)
    following = _usual_observers(config, stored, ranks, run_folder, reading, progress=progress)
    following += observers
    if dataset_meter is not None:
        following.append(DatasetNumbers(dataset_meter))
    if ledger is not None:
        following.append(LedgerKeeper(ledger))
    if run_folder is not None:
        keep, check = config.checkpoint.keep, check_run_folder
        following.append(
            Checkpoints(run_folder, keep=keep, given=stored, ranks=ranks, check_run_folder=check)
        )
    return Trainer(
        config,
        model,
        loader,
        ranks=ranks,
        evaluations=evaluations or {},
        data=data or {},
        observers=following,
    )


def _usual_observers(
    config: TrainConfig,
    given: Mapping[str, Any],
    ranks: Ranks,
    folder: Path | None,
    reading: ReadingTime | None,
    *,
    progress: bool,
) -> list[Observer]:
    trackers = config.run.trackers
    return [
        RunLog(trackers, folder, given=given, ranks=ranks, reading=reading, progress=progress),
        WeightsAgree(),
        NonfiniteSteps(config.run, sources=config.data.train, ranks=ranks, run_folder=folder),
        ReplacedSamples(config.data.max_bad_fraction, config.run.spans, run_folder=folder),
    ]


def check_settings(config: TrainConfig, ranks: Ranks) -> None:
    """Refuses (ValueError) settings that cannot work together, before anything is built."""
    check_views(config.data.augment, config.objective.num_views, name=config.objective.name)
    for stage in config.settings_of_stages:
        stage.objective.check_local_batch(ranks.local_batch_size(stage.run.global_batch_size))


def _place(model: UniCL, config: TrainConfig, device: torch.device, ranks: Ranks) -> None:
    """Moves the model to the device, in the types and memory formats that it is trained in."""
    efficiency = config.efficiency
    set_device_arithmetic(efficiency, device)
    place_module(model, device=device, precision=Precision(efficiency.precision))
    if not divides_all(efficiency, ranks):  # torch divides tensors in no other order of dimensions
        model.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if efficiency.window_attention == "triton":
        fuse_window_attention(model.image_encoder)
