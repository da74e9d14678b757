"""A training run on this rank, from its ranks and its checkpoint to its report."""

import contextlib
import json
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from unicl_fast.augmentation import augmentations_of
from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.checkpoints.load import find_checkpoint, find_sound_checkpoint
from unicl_fast.config import TrainConfig
from unicl_fast.config_json import config_to_dict
from unicl_fast.distributed.launch import (
    configure_logging,
    is_restarted,
    keeping_log,
    refused_together,
)
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_integers
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.distributed.watchdog import Watchdog, group_timeout
from unicl_fast.ledger.format import LEDGER_FOLDER
from unicl_fast.system.atomic_files import make_folder, sole_writer, write_text_atomically
from unicl_fast.system.installation import INSTALL_TRIED, untried_versions
from unicl_fast.system.machine import choose_device
from unicl_fast.system.phases import START_PATIENCE, mark
from unicl_fast.system.wording import count_of, without_secrets
from unicl_fast.training.build import (
    BuildLoader,
    Evaluate,
    Initialise,
    build_trainer,
    named_evaluations,
    open_checked,
    open_evaluated,
)
from unicl_fast.training.data import folder_and_weight, held_out_beside
from unicl_fast.training.figures import draw_curves, drawing
from unicl_fast.training.metrics import choose_best_metric
from unicl_fast.training.settle import check_settings, settle_objective
from unicl_fast.training.summary import describe_run
from unicl_fast.training.trainer import Trainer

logger = logging.getLogger("unicl_fast")

LOG_NAME = "log.txt"
Compare = Callable[[Trainer, Path], Sequence[str]]
"""Lines about a finished run, called with its folder on rank 0."""
_OF_THIS_RANK = (("RANK", "0"), ("WORLD_SIZE", "1"))


def check_request(config: TrainConfig, *, run_folder: Path, nproc: int, resume: str) -> None:
    """Checks the request before ranks are started.

    Raises:
        ValueError: no data, unsuitable weights or augmentations, ranks that cannot divide the
            batch, an impossible division of the training state, or a run folder in use.
        FileNotFoundError: a data set or checkpoint that is not there.
    """
    check_settings(config, Ranks(world_size=nproc))
    if resume != "auto":  # rank 0 reports the checkpoints that it skips; once is enough
        _choose_checkpoint(resume, run_folder)
    datasets, _ = open_checked(config)
    settle_objective(config, datasets)
    augmentations_of(config.data.augment, [dataset.location for dataset in datasets])
    evaluated = open_evaluated(config)
    named = named_evaluations(config, evaluated)
    for dataset in (*datasets, *evaluated):
        dataset.close()
    choose_best_metric(config.checkpoint.best, [one for one, _ in named])


def pretrain(
    config: TrainConfig,
    *,
    run_folder: Path,
    build_loader: BuildLoader,
    evaluate: Evaluate,
    initialise: Initialise | None = None,
    compare: Compare | None = None,
    resume: str = "never",
    origin: str = "",
    ledger: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> None:
    """Trains on this rank from the first step, or a checkpoint's, to the end.

    `resume` is "never", "auto" or the path of a checkpoint; `initialise` then reads only weights
    that the checkpoint leaves out. `compare` returns baselines of the run's last evaluations, for
    the log. `origin` says in the log where the settings come from. `ledger`
    starts a ledger; a run that has one continues it anyway. A `dry_run` ends before the first step
    and writes nothing. `quiet` shows only warnings and errors; log.txt has all lines.

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
            "set data.decode_device=auto"
        )
    limit = config.run.timeout_seconds
    rank, world_size = (int(os.environ.get(name, one)) for name, one in _OF_THIS_RANK)
    with (
        Watchdog(limit_seconds=limit, rank=rank, world_size=world_size),
        process_group(device, timeout_seconds=group_timeout(limit)) as ranks,
        contextlib.ExitStack() as stack,
    ):
        configure_logging(ranks, quiet=quiet and not dry_run)
        write_log_to = stack.enter_context(keeping_log())
        if device.type == "cuda" and (untried := untried_versions()):
            logger.warning("%s; %s", untried, INSTALL_TRIED)
        mark("reading checkpoints", patience=START_PATIENCE)
        with refused_together(ranks):
            check_settings(config, ranks)
            check_run_folder: Callable[[], None] | None = None
            if ranks.is_main and not dry_run:
                check_run_folder = stack.enter_context(sole_writer(run_folder))
        checkpoint = _choose_on_rank_0(ranks, resume, run_folder)
        mark("opening the data", patience=START_PATIENCE)
        has_ledger = bool(from_rank_0((run_folder / LEDGER_FOLDER).is_dir(), ranks))
        trainer = build_trainer(
            config, run_folder=run_folder, build_loader=build_loader, evaluate=evaluate,
            initialise=initialise, ranks=ranks, device=device, checkpoint=checkpoint,
            keeps_ledger=has_ledger or ledger, progress=not quiet,
            check_run_folder=check_run_folder, encodes_features=not dry_run,
        )  # fmt: skip
        for line in describe_run(trainer, run_folder, origin=origin):
            logger.info("%s", line)
        if ranks.is_main and not dry_run:
            make_folder(run_folder)
            text = json.dumps(config_to_dict(config), indent=1)
            write_text_atomically(run_folder / "config.json", text + "\n")
            write_log_to(run_folder / LOG_NAME)
        _train_and_report(trainer, run_folder, dry_run=dry_run, compare=compare)


def _train_and_report(
    trainer: Trainer, run_folder: Path, *, dry_run: bool, compare: Compare | None
) -> None:
    try:
        if not dry_run:
            trainer.fit()
    finally:
        mark("closing the data")
        trainer.loader.close()
    if dry_run:
        logger.info("dry run: all is ready, and nothing was trained or written")
    elif trainer.ranks.is_main:
        _report(trainer, run_folder, compare)


def _report(trainer: Trainer, run_folder: Path, compare: Compare | None) -> None:
    mark("drawing the curves")
    curves = run_folder / "curves.png"
    with drawing(curves):
        draw_curves(run_folder, curves)
        logger.info("curves in %s", curves)
    # only from features that are stored already: others would take longer than a report may
    if compare is not None and trainer.config.efficiency.stored_features:
        mark("computing baselines", patience=START_PATIENCE)
        for line in compare(trainer, run_folder):
            logger.info("%s", line)
    logger.info("%s done. Next: %s", count_of(trainer.step, "step"), _next(trainer, run_folder))


def _next(trainer: Trainer, run_folder: Path) -> str:
    """The command of a suitable evaluation, on held-out data if they are known."""
    data = trainer.config.data
    given = [*data.evaluate, *map(held_out_beside, data.train)]
    has_best = (run_folder / "checkpoints" / "best.json").exists()
    takes_best = trainer.config.run.patience and has_best
    checkpoint = shlex.quote(str(run_folder / "best" if takes_best else run_folder))
    held_out = shlex.quote(without_secrets(next(filter(None, given), "DIR")))
    if not trainer.config.objective.uses_texts:
        train = shlex.quote(without_secrets(folder_and_weight(data.train[0])[0]))
        return f"unicl-eval knn --checkpoint {checkpoint} --train {train} --data {held_out}"
    has_classes = any(source["num_classes"] for source in trainer.data.get("sources", []))
    kinds = [name.partition("/")[0].replace("_", "-") for name in trainer.evaluations]
    kind = next(iter(kinds), "zero-shot" if has_classes else "retrieval")
    return f"unicl-eval {kind} --checkpoint {checkpoint} --data {held_out}"


def _choose_on_rank_0(ranks: Ranks, resume: str, run_folder: Path) -> Path | None:
    """Returns rank 0's `_choose_checkpoint` on all ranks, since others might see other files.

    Ranks that were restarted after a failure resume from the newest checkpoint of this run, if any.
    """
    # torchrun's agents count no restart on nodes whose ranks did not fail
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
