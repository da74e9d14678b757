"""Puts a trainer together: settings settled, model placed, observers in order."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unicl_fast.batch import Loader
from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.compilation import fuse_window_attention
from unicl_fast.models.freezing import freeze
from unicl_fast.models.precision import Precision, place_module, set_device_arithmetic
from unicl_fast.models.sharding import divides_all
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.machine import choose_device
from unicl_fast.training.limits import NonfiniteSteps, Patience, ReplacedSamples
from unicl_fast.training.micro_batches import check_micro_batches
from unicl_fast.training.observers import Checkpoints, RunLog, WeightsAgree
from unicl_fast.training.settle import Setup, set_up, with_kernels
from unicl_fast.training.trainer import Evaluation, Observer, Trainer


def make_trainer(
    config: TrainConfig,
    loader: Loader,
    *,
    run_folder: Path | None = None,
    model: UniCL | None = None,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
    evaluations: Mapping[str, Evaluation] | None = None,
    data: Mapping[str, Any] | None = None,
    observers: Sequence[Observer] = (),
    progress: bool = True,
) -> Trainer:
    """Builds a trainer for any loader; nothing is trained or written yet.

    Args:
        config: the run's settings.
        loader: yields the local batches of this rank.
        run_folder: for metrics and checkpoints; None writes nothing.
        model: None builds one from the config.
        ranks: None is a single process.
        device: None means `run.device`.
        evaluations: by name; all ranks call them together.
        data: describes the training data, in JSON's types, for checkpoints; compared on a resume.
        observers: called after the usual ones and before checkpoints are written.
        progress: show a progress bar on rank 0.

    Raises:
        ValueError: settings that cannot work together, or with this number of ranks.
    """
    ranks = ranks or Ranks()
    device = device or choose_device(config.run.device, local_rank=ranks.local_rank)
    setup = set_up(config, ranks=ranks, device=device)
    model = model or build_model(setup.config)
    setup = with_kernels(setup, model)
    return assemble(
        setup, model, loader, run_folder=run_folder,
        evaluations=evaluations or {}, data=data or {}, observers=observers, progress=progress,
    )  # fmt: skip


def assemble(
    setup: Setup,
    model: UniCL,
    loader: Loader,
    *,
    run_folder: Path | None,
    evaluations: Mapping[str, Evaluation],
    data: Mapping[str, Any],
    observers: Sequence[Observer],
    progress: bool,
) -> Trainer:
    """As `make_trainer`, for settled settings and a model with its first weights."""
    config, ranks, device = setup.config, setup.ranks, setup.device
    model.config = config
    freeze(model)
    if any(stage.efficiency.micro_batch_size for stage in config.settings_of_stages):
        check_micro_batches(model)
    place(model, config, device, ranks)
    usual = [
        RunLog(config.run.trackers, run_folder, ranks=ranks, progress=progress),
        WeightsAgree(),
        NonfiniteSteps(config.run, sources=config.data.train, ranks=ranks, run_folder=run_folder),
        Patience(config.run.patience, run_folder),
        ReplacedSamples(config.data.max_bad_fraction, config.run.spans, run_folder=run_folder),
    ]
    keep = config.checkpoint.keep
    last = [Checkpoints(run_folder, keep=keep, ranks=ranks)] if run_folder is not None else []
    return Trainer(
        setup, model, loader, evaluations=evaluations, data=data,
        observers=[*usual, *observers, *last],
    )  # fmt: skip


def place(model: UniCL, config: TrainConfig, device: torch.device, ranks: Ranks) -> None:
    """Moves the model to the device, in its types and memory formats for training."""
    efficiency = config.efficiency
    set_device_arithmetic(efficiency, device)
    place_module(model, device=device, precision=Precision(efficiency.precision))
    if not divides_all(efficiency, ranks):  # torch divides no other memory format
        model.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if efficiency.window_attention == "triton":
        fuse_window_attention(model.image_encoder)
