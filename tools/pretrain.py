"""`unicl-pretrain`: packed data sets to a trained UniCL model.

Starts ranks (`--nproc`, or takes those of torchrun or SLURM), puts data, model and trainer
together, and leaves the loop to `unicl_fast.trainer`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro

from unicl_fast.checkpoint import find_checkpoint
from unicl_fast.config import TrainConfig, config_to_dict
from unicl_fast.dist import Ranks, adopt_slurm_ranks, process_group
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.host_memory import keep_freed_memory
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.presets import PRESETS, build_preset
from unicl_fast.shards import PackedDataset
from unicl_fast.tools.evaluations import evaluate_zero_shot
from unicl_fast.tools.figures import draw_curves
from unicl_fast.tools.launch import configure_logging, start_ranks, stop
from unicl_fast.tools.training_data import (
    build_prompts,
    check_tokenizer,
    describe_sources,
    open_sources,
)
from unicl_fast.trainer import Evaluation, Trainer, choose_device

logger = logging.getLogger("unicl_fast")

_DEFAULT_PRESET = "swin-tiny"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainArguments(TrainConfig):
    """Trains a UniCL model on packed data sets (see unicl-pack).

    Example: unicl-pretrain --preset cifar10-small --data.train packed/cifar10 --out runs/cifar10
    """

    out: Path
    """The run folder: config.json, metrics.jsonl, curves.png, checkpoints/, tensorboard/."""
    preset: str = _DEFAULT_PRESET
    """What all other settings start from."""
    nproc: int = 1
    """Ranks to start on this machine; leave it at 1 under torchrun or SLURM."""
    resume: str = "never"
    """auto goes on from the newest checkpoint in --out if there is one; or a checkpoint's path."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parse_arguments(argv)
    if arguments.nproc > 1 and "WORLD_SIZE" not in os.environ:
        try:
            check_request(arguments)  # here it ends with one sentence and 2; in torchrun with many
        except (ValueError, FileNotFoundError) as error:
            stop("unicl-pretrain", error, code=2)
        start_ranks("unicl_fast.tools.pretrain", nproc=arguments.nproc, argv=argv)
    adopt_slurm_ranks()
    keep_freed_memory()
    try:
        pretrain(split_config(arguments), run_folder=arguments.out, resume=arguments.resume)
    except (ValueError, FileNotFoundError) as error:
        stop("unicl-pretrain", error, code=2)
    except (FloatingPointError, OSError, RuntimeError) as error:
        stop("unicl-pretrain", error, code=1)


def parse_arguments(argv: Sequence[str]) -> PretrainArguments:
    """The preset first, then every other flag on top of it."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", default=_DEFAULT_PRESET)
    name = finder.parse_known_args(argv)[0].preset
    try:
        preset = build_preset(name)
    except ValueError as error:
        stop("unicl-pretrain", error, code=2)
    groups = {field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)}
    default = PretrainArguments(**groups, preset=name, out=tyro.MISSING)
    return tyro.cli(
        PretrainArguments,
        default=default,
        args=argv,
        prog="unicl-pretrain",
        description=f"{PretrainArguments.__doc__}\n\nPresets: {', '.join(PRESETS)}. The defaults "
        f"below are those of {name}.",
    )


def check_request(arguments: PretrainArguments) -> None:
    """Refuses what can be told to be wrong before ranks are started.

    Raises:
        ValueError: no data, shares that do not fit, ranks that cannot share the batch, or a run
            folder in use.
        FileNotFoundError: a data set or checkpoint that is not there.
    """
    Ranks(world_size=arguments.nproc).share_of(arguments.run.global_batch_size)
    choose_checkpoint(arguments.resume, arguments.out)
    datasets, _ = open_sources(arguments.data.train)
    for dataset in datasets:
        check_tokenizer(dataset, context_length=arguments.model.context_length)
        dataset.close()


def split_config(arguments: PretrainArguments) -> TrainConfig:
    """The run's settings without what only the command line knows."""
    groups = {
        field.name: getattr(arguments, field.name) for field in dataclasses.fields(TrainConfig)
    }
    return TrainConfig(**groups)


def pretrain(
    config: TrainConfig, *, run_folder: Path, resume: str = "never", progress: bool = True
) -> None:
    """Runs on this rank from the first step, or a checkpoint's, to the end.

    Args:
        config: the run's settings.
        run_folder: where everything is written.
        resume: "never", "auto" or the path of a checkpoint.
        progress: show a progress bar on rank 0.

    Raises:
        ValueError: settings, data or checkpoint that do not go together; says what to change.
        FileNotFoundError: a data set or checkpoint that is not there.
        FloatingPointError: the loss is not finite.
    """
    device = choose_device(config.run.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(device) as ranks:
        configure_logging(ranks)
        checkpoint = choose_checkpoint(resume, run_folder)
        trainer = build_trainer(
            config, run_folder=run_folder, ranks=ranks, device=device, progress=progress
        )
        if checkpoint is not None:
            trainer.resume(checkpoint)
        if ranks.is_main:
            run_folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(config_to_dict(trainer.config), indent=1)
            (run_folder / "config.json").write_text(text + "\n", encoding="utf-8")
        try:
            trainer.fit()
        finally:
            trainer.loader.close()
        if ranks.is_main:
            draw_curves(run_folder, run_folder / "curves.png")
            logger.info(
                "%d steps done, curves in %s. Next: "
                "unicl-eval zero-shot --checkpoint %s --data DIR",
                trainer.step,
                run_folder / "curves.png",
                run_folder,
            )


def build_trainer(
    config: TrainConfig,
    *,
    run_folder: Path,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
    progress: bool = True,
) -> Trainer:
    """Opens the data, checks that it suits the model, and puts the trainer together."""
    ranks = ranks or Ranks()
    device = device or choose_device(config.run.device)
    datasets, shares = open_sources(config.data.train)
    for dataset in datasets:
        check_tokenizer(dataset, context_length=config.model.context_length)
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
    )
    return Trainer(
        config,
        loader,
        run_folder=run_folder,
        ranks=ranks,
        device=device,
        evaluations=_build_evaluations(config, ranks),
        data=describe_sources(datasets, shares),
        progress=progress,
    )


def choose_checkpoint(resume: str, run_folder: Path) -> Path | None:
    """The checkpoint that `--resume` means, or None for a fresh start.

    Raises:
        ValueError: the run folder already holds a run and `--resume` does not say what to do.
        FileNotFoundError: no checkpoint at the path given.
    """
    if resume not in ("auto", "never"):
        return find_checkpoint(resume)
    try:
        newest = find_checkpoint(run_folder)
    except FileNotFoundError:
        return None
    if resume == "never":
        raise ValueError(
            f"{run_folder} already holds {newest.name}: go on with --resume auto, or choose "
            "another --out"
        )
    return newest


def _with_length(config: TrainConfig, *, num_samples: int) -> TrainConfig:
    """The released recipe's 32 passes where the run has no length of its own."""
    if config.run.total_steps:
        return config
    return dataclasses.replace(
        config, run=dataclasses.replace(config.run, samples=32 * num_samples)
    )


def _build_evaluations(config: TrainConfig, ranks: Ranks) -> dict[str, Evaluation]:
    datasets = [PackedDataset(folder) for folder in config.data.evaluate]
    names = [dataset.folder.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise ValueError(
            f"data.evaluate: folders need different names to be told apart, got {' '.join(names)}"
        )
    for dataset in datasets:
        if not dataset.manifest.class_names:
            raise ValueError(f"data.evaluate: {dataset.folder} has no labels for zero-shot")

    def evaluation_of(index: int) -> Evaluation:
        def evaluate(model: UniCL) -> dict[str, float]:
            result = evaluate_zero_shot(model, datasets[index], ranks=ranks)
            return {"top1": result.top1, "top5": result.top5}

        return evaluate

    return {
        f"zero_shot/{dataset.folder.name}": evaluation_of(index)
        for index, dataset in enumerate(datasets)
    }


if __name__ == "__main__":
    main()
