"""`unicl-pretrain`: packed data sets to a trained UniCL model.

Reads the arguments, prints the help, starts ranks (`--nproc`, or those of torchrun or SLURM) and
turns errors into exit codes; `unicl_fast.training.run` does the rest. Importing torch, timm and
tyro is slow, so it comes after the help, and after signals are handled.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from unicl_fast.config import INITIAL_WEIGHTS, TrainConfig
from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.object_store import is_url
from unicl_fast.distributed.launch import end_with_torchrun, explain, is_own_rank, start_ranks, stop
from unicl_fast.distributed.signals import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_WRONG_INPUT,
    Interrupted,
    exit_immediately_on_signals,
)
from unicl_fast.objectives.registry import list_objectives
from unicl_fast.presets import AUTO, PRESETS
from unicl_fast.system.checked_fields import plain_number, require, with_values
from unicl_fast.system.line import line
from unicl_fast.system.machine import check_current_folder, choose_environment, keep_freed_memory
from unicl_fast.system.phases import current_phase
from unicl_fast.system.program import EXIT_ABORTED, begin_program, quick_imports

from .run_settings import DEFAULT_PRESET, FOR_AUTO, as_yaml, first_settings, list_presets, with_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from unicl_fast.dataset.reader import PackedDataset
    from unicl_fast.distributed.ranks import Ranks
    from unicl_fast.evaluation.baselines import Kind
    from unicl_fast.evaluation.features import ModelOnRanks
    from unicl_fast.models.unicl import UniCL
    from unicl_fast.training.trainer import Trainer

_PROGRAM = "unicl-pretrain"
_COLUMN = 36  # of the sentences of the short help
# The options that `--help` shows; `--help-all` shows the others too.
_COMMON = {
    "": ("out", "preset", "config", "resume", "dry_run", "print_config", "quiet", "nproc",
         "max_restarts", "ledger"),
    "data": ("train", "evaluate", "fraction", "text", "augment", "image_size", "crop_scale",
             "threads"),
    "objective": (),
    "model": ("image_encoder", "drop_path", "text_width", "text_layers", "context_length",
              "init", "init_image", "init_text"),
    "optim": ("name", "lr", "lr_batch_size", "warmup_fraction", "weight_decay", "clip_norm",
              "freeze", "lora"),
    "efficiency": ("precision", "micro_batch_size", "compile"),
    "checkpoint": ("every_steps", "keep"),
    "run": ("global_batch_size", "samples", "steps", "seed", "evaluate_every_steps",
            "log_every_steps", "device"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainArguments(TrainConfig):
    """Trains a UniCL model on packed data sets (made by unicl-pack build)."""

    out: Path
    """Run folder: settings, metrics, curves, checkpoints. These are config.json, metrics.jsonl,
    curves.png, contact-sheet.png, log.txt, checkpoints/ and tensorboard/; quarantine.csv lists
    unreadable samples."""
    preset: str = DEFAULT_PRESET
    """Preset that all other settings start from; list shows all. auto chooses one that suits the
    data and the machine."""
    config: Path | None = None
    """YAML or JSON file with any of the settings. It overrides the preset, which it may name
    (preset: NAME); options given here override the file."""
    print_config: bool = False
    """Print all settings as YAML for --config, and exit. Needs neither --out nor data."""
    dry_run: bool = False
    """Do everything up to the first step, then exit. Data, checkpoint, settings and memory are
    checked, the model is built, and the summary is shown; nothing is written."""
    quiet: bool = False
    """Only show warnings and errors. --out/log.txt always has the whole log."""
    nproc: int = 1
    """Ranks to start on this machine; 1 under torchrun or SLURM."""
    resume: str = "never"
    """never; auto: from the newest checkpoint in --out; or a path. auto skips damaged checkpoints,
    and starts a new run if there is none. Without --preset it keeps the settings in
    --out/config.json; options change some of them."""
    max_restarts: int = 0
    """Times to restart all ranks after one has died. They resume from the newest checkpoint. (Only
    ranks that --nproc starts; torchrun has a flag of that name for its own.)"""
    ledger: bool = False
    """Record the samples of every step for unicl-ledger, in --out/ledger; later starts continue."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 on wrong input, and as docs/programs.md says otherwise."""
    # first, because a scheduler can stop the run at any time
    with exit_immediately_on_signals(_PROGRAM):
        end_with_torchrun()
        try:
            given = begin_program() if argv is None else list(argv)
            with line(current_phase, shown="--quiet" not in given):
                _main(given)
        except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
            stop(_PROGRAM, error, code=EXIT_WRONG_INPUT)
        except Interrupted as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"{_PROGRAM}: {error}; resume with --resume auto", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
        except KeyboardInterrupt:  # has been said
            sys.exit(EXIT_ABORTED)
        except (FloatingPointError, OSError, RuntimeError) as error:
            stop(_PROGRAM, explain(error), code=EXIT_FAULT)


def _main(argv: Sequence[str]) -> None:
    origin, arguments = parse_with_origin(argv)
    config, run_folder, resume = split_config(arguments), arguments.out, arguments.resume
    if arguments.print_config:
        print(as_yaml(config), end="")
        return
    nproc, max_restarts = arguments.nproc, arguments.max_restarts
    require(nproc >= 1, f"--nproc must be at least 1, not {nproc}")
    require(max_restarts >= 0, f"--max-restarts must be at least 0, not {max_restarts}")
    check_current_folder()
    choose_environment(config.run.device)
    require(
        bool(config.data.train) or resume != "auto",
        f"{run_folder} holds no run to resume: correct --out, or give --data.train DIR",
    )
    _refuse_wrong_data(config)
    with quick_imports():
        from unicl_fast.conversion.initial import initialise
        from unicl_fast.distributed.rendezvous import adopt_slurm_ranks
        from unicl_fast.pipelines.train_loader import TrainLoader
        from unicl_fast.training.run import check_request, pretrain

    adopt_slurm_ranks()
    if "WORLD_SIZE" in os.environ:
        require(
            not max_restarts or is_own_rank(),
            "--max-restarts is for ranks that --nproc starts; these were started by torchrun or "
            "srun: give it to torchrun, or let the scheduler start the job again with --resume "
            "auto",
        )
    elif nproc > 1 or max_restarts:
        # one message instead of one from each rank
        check_request(config, run_folder=run_folder, nproc=nproc, resume=resume)
        start_ranks("unicl_fast.tools.pretrain", nproc=nproc, argv=argv, max_restarts=max_restarts)
    keep_freed_memory()
    pretrain(
        config,
        run_folder=run_folder,
        build_loader=TrainLoader,
        evaluate=functools.partial(evaluate_in_run, quiet=arguments.quiet),
        initialise=initialise,
        compare=compare_with_baselines,
        resume=resume,
        origin=origin,
        ledger=arguments.ledger,
        dry_run=arguments.dry_run,
        quiet=arguments.quiet,
    )


def _refuse_wrong_data(config: TrainConfig) -> None:
    """Refuses paths that are not packed data sets before torch is imported, which is slow."""
    for place in (*config.data.train, *config.data.evaluate):
        require(
            not place.endswith("?..."),
            f"{place} is a URL without its query, which files of settings do not keep: give "
            "--data.train and --data.evaluate again",
        )
        folder, equals, _ = place.rpartition("=")  # DIR=WEIGHT
        if not is_url(place) and not (equals and Path(folder).exists()):
            Manifest.load(place)


def evaluate_in_run(
    model: UniCL,
    *,
    dataset: PackedDataset,
    rows_of_classes: NDArray[np.int64] | None,
    ranks: Ranks,
    kind: str,
    quiet: bool,
) -> Mapping[str, float]:
    from unicl_fast.evaluation.retrieval import evaluate_captions
    from unicl_fast.evaluation.zero_shot import evaluate_zero_shot

    on_ranks = _with_stored_features(model, ranks, progress=ranks.is_main and not quiet)
    if kind == "retrieval":
        return evaluate_captions(on_ranks, dataset)
    found = evaluate_zero_shot(on_ranks, dataset, rows_of_classes=rows_of_classes)
    columns = dataset.manifest.columns
    return {
        "top1": fmean(one.top1 for one in found.values()),
        "top5": fmean(one.top5 for one in found.values()),
        "chance": fmean(1 / len(columns[column]) for column in found),
        **{f"top1/{column}": one.top1 for column, one in found.items() if column},
    }


def _with_stored_features(model: UniCL, ranks: Ranks, *, progress: bool = False) -> ModelOnRanks:
    """The model of a run, which finds the features that the run stores."""
    from unicl_fast.evaluation.features import ModelOnRanks, text_folder_of

    stored = model.config.efficiency.stored_features
    return ModelOnRanks(
        model, ranks, progress=progress, folder=Path(stored) if stored else None,
        text_folder=text_folder_of(model),
    )  # fmt: skip


def compare_with_baselines(trainer: Trainer, run_folder: Path) -> list[str]:
    """A table for each data set that the run has evaluated: its last figures and the baselines."""
    from unicl_fast.distributed.ranks import Ranks
    from unicl_fast.evaluation.baselines import Figure, Measured, beside_table, of_run
    from unicl_fast.evaluation.retrieval import encode_captioned
    from unicl_fast.training.build import named_evaluations, open_evaluated
    from unicl_fast.training.metrics import read_metrics

    last = {name: value for line in read_metrics(run_folder) for name, value in line.items()}
    found = []
    on_ranks = _with_stored_features(trainer.model, Ranks())
    datasets = open_evaluated(trainer.config)
    for name, dataset in named_evaluations(trainer.config, datasets):
        kind: Kind = "captions" if name.startswith("retrieval/") else "labels"
        features = None
        if kind == "captions" and on_ranks.text_folder is not None:  # else texts would be encoded
            features = functools.partial(encode_captioned, on_ranks, dataset)
        methods = of_run(
            trainer.model, dataset, kind=kind, folder=on_ranks.folder, encodes=False, ours=features
        )
        if isinstance(methods, str):
            found.append(f"{name}: no baselines: {methods}")
            continue
        words = (("top-1 ", "top1/"), ("top-1", "top1"), ("R@", "text_to_image_recall_at_"))
        ours = {}
        for figure, one in methods[0].figures.items():
            start, key = next(pair for pair in words if figure.startswith(pair[0]))
            rate = last[f"{name}/{key}{figure.removeprefix(start)}"]
            ours[figure] = Figure.of(round(rate * one.num_tried), one.num_tried)
        freeze = trainer.config.optim.freeze
        table = beside_table(Measured("this run", ours), methods, freeze=freeze)
        found.append(f"{name}, after the last step:\n{table}")
    for dataset in datasets:
        dataset.close()
    return found


def parse_arguments(argv: Sequence[str]) -> PretrainArguments:
    """Only the arguments of `parse_with_origin`."""
    return parse_with_origin(argv)[1]


def parse_with_origin(argv: Sequence[str]) -> tuple[str, PretrainArguments]:
    """Applies preset and file first, then all other flags; prints the help if requested.

    Returns:
        A phrase for the source of the settings that no flag gives, and all settings.

    Raises:
        ValueError: there is no such preset, or the file does not contain settings.
        FileNotFoundError: there is no such file.
    """
    argv = _in_full(argv)
    finder = argparse.ArgumentParser(prog=_PROGRAM, add_help=False, allow_abbrev=False)
    for option in ("--preset", "--resume", "--run.device", "--data.cache-folder"):
        finder.add_argument(option)
    for name in INITIAL_WEIGHTS:
        finder.add_argument(f"--model.{name.replace('_', '-')}", f"--model.{name}")
    finder.add_argument("--objective.name")
    for name in ("image_size", "evaluation_resize"):
        finder.add_argument(f"--data.{name.replace('_', '-')}", f"--data.{name}", dest=name)
    finder.add_argument("--data.train", nargs="*")
    finder.add_argument("--data.fraction", nargs="*", type=_number_or_text)
    for option in ("--config", "--out"):
        finder.add_argument(option, type=Path)
    for flag in ("--help", "--help-all", "--print-config", "--dry-run"):
        finder.add_argument(flag, *["-h"] * (flag == "--help"), action="store_true")
    found = finder.parse_known_args(argv)[0]
    if found.preset == "list":
        print(list_presets())
        sys.exit()
    values = vars(found)
    has_help = found.help or found.help_all
    initial = {name: values[f"model.{name}"] for name in INITIAL_WEIGHTS if not has_help}
    origin, config = first_settings(
        preset=None if has_help and found.preset == AUTO else found.preset,
        file=found.config,
        run_folder=found.out,
        resume=found.resume,
        data={name: given for name in FOR_AUTO if (given := values[f"data.{name}"])},
        device=values["run.device"],
        initial={name: given for name, given in initial.items() if given is not None},
        keeps=not (found.print_config or found.dry_run),
    )
    if (found.image_size or "").isdecimal():
        sizes = {"image_size": int(found.image_size), "evaluation_resize": found.evaluation_resize}
        config = with_size(config, sizes)
    if (name := values["objective.name"]) is not None:  # each objective has its own options
        config = with_values(config, {"objective": {"name": name}})
    _refuse_options_of_others(argv, config)
    groups = _groups_of(config)
    if found.help:
        print(_short_help(PretrainArguments(**groups, out=Path("DIR")), origin))
        sys.exit()
    import tyro

    from .numbers import plain_numbers

    arguments = tyro.cli(
        PretrainArguments,
        default=PretrainArguments(**groups, out=Path() if found.print_config else tyro.MISSING),
        args=["--help"] if found.help_all else argv,
        prog=_PROGRAM,
        registry=plain_numbers(),
        description=f"{PretrainArguments.__doc__} The defaults below come from {origin}; "
        f"presets are {', '.join([*PRESETS, AUTO])}.",
    )
    return origin, arguments


def _refuse_options_of_others(argv: Sequence[str], config: TrainConfig) -> None:
    """Refuses options of other objectives."""
    objective = config.objective
    known = [field.name for field in dataclasses.fields(objective)]
    for flag in argv:
        option = flag.partition("=")[0].replace("-", "_")
        require(
            not option.startswith("__objective.") or option[12:] in known,
            f"objective.name={objective.name} has no {option[2:]}: its options are "
            f"{', '.join(known)}",
        )


def _number_or_text(word: str) -> float | str:
    """Returns a word as a number if possible; others are refused later."""
    try:
        return plain_number(word, float)
    except ValueError:
        return word


def _in_full(argv: Sequence[str]) -> list[str]:
    """Expands the short forms --init, --init-image and --init-text."""
    return [re.sub(r"^--(init(-image|-text)?)(?==|$)", r"--model.\1", flag) for flag in argv]


def split_config(arguments: PretrainArguments) -> TrainConfig:
    """Returns the run's settings, without those that only the command line has."""
    return TrainConfig(**_groups_of(arguments))


def _groups_of(config: TrainConfig) -> dict[str, Any]:
    return {group.name: getattr(config, group.name) for group in dataclasses.fields(TrainConfig)}


def _short_help(arguments: PretrainArguments, origin: str) -> str:
    """Returns one line for each common option: name, default, first sentence."""
    lines = [
        f"usage: {_PROGRAM} [--preset NAME] --data.train DIR [DIR ...] --out DIR [OPTIONS]",
        f"\n{PretrainArguments.__doc__}\nThese are the common options, with their values in "
        f"{origin}.\n{_PROGRAM} --help-all explains every option.",
        "\nexamples:",
        f"  {_PROGRAM} --preset cifar10-small --data.train packed/cifar10 --out runs/cifar10",
        f"  {_PROGRAM} --data.train packed/photos=0.5 packed/pairs=0.5 --out runs/mix --nproc 8 \\",
        "      --run.global-batch-size 1024 --efficiency.micro-batch-size 64 --resume auto",
        f"  {_PROGRAM} --out runs/mix --resume auto --nproc 8",
        "\npresets:",
        textwrap.indent(list_presets(), "  "),
        "\nobjectives (--help --objective.name NAME shows the options of one):",
        textwrap.indent(list_objectives(), "  "),
    ]
    for group, names in _COMMON.items():
        settings = getattr(arguments, group) if group else arguments
        sentences = _first_sentences(type(settings))
        if group == "objective":  # all options of the chosen one
            names = tuple(field.name for field in dataclasses.fields(settings))
        lines.append(f"\n{group or 'program'}:")
        for name in names:
            option = f"--{group}.{name}" if group else f"--{name}"
            value = getattr(settings, name)
            value = " ".join(map(str, value)) if isinstance(value, tuple) else value
            value = f"{value:.6g}" if isinstance(value, float) else value
            shown = "" if isinstance(value, bool) or value is None else str(value)
            head = f"  {option.replace('_', '-')} {shown}".ljust(_COLUMN - 1)
            lines += textwrap.wrap(
                f"{head} {sentences[name]}", width=100, subsequent_indent=" " * _COLUMN
            )
    return "\n".join(lines)


def _first_sentences(cls: type) -> dict[str, str]:
    """Returns the first sentence under each field of a dataclass and its bases."""
    pattern = re.compile(
        r'^    (\w+): .*\n(?:    [ )].*\n)*    """((?:.|\n)*?)\.(?:\s|""")', re.MULTILINE
    )
    sources = [inspect.getsource(one) for one in reversed(cls.__mro__) if one is not object]
    found = [pair for source in sources for pair in pattern.findall(source)]
    return {field: " ".join(sentence.split()) for field, sentence in found}


if __name__ == "__main__":
    main()
