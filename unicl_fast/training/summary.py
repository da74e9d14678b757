"""The summary that a run logs before its first step: data, model, length, device, files."""

from pathlib import Path

import torch

from unicl_fast.config_json import config_to_dict, settled_values
from unicl_fast.system.wording import count_of, without_secrets
from unicl_fast.training.stages import describe_stage
from unicl_fast.training.trainer import Trainer


def describe_run(trainer: Trainer, run_folder: Path, *, origin: str = "") -> list[str]:
    """Returns the summary, a line for each subject.

    `run_folder` is the run's, `origin` the source of its settings.
    """
    config = trainer.config
    settled = settled_values(config_to_dict(trainer.given), config)
    choices = [f"{g}.{name}={one}" for g in settled for name, one in settled[g].items()]
    evaluated = ", ".join(map(without_secrets, config.data.evaluate))
    every, total = config.run.evaluate_every_steps, trainer.total_steps
    evaluated += f", {_every(every, total)}" if evaluated else "nothing"
    stages = trainer.stages if len(trainer.stages) > 1 else ()
    return [
        *([f"settings: {origin}"] if origin else []),
        f"settled: {' '.join(choices) or 'nothing was left open'}",
        *_describe_data(trainer),
        f"evaluated: {evaluated}",
        _describe_model(trainer),
        _describe_length(trainer),
        *(f"from step {one.span.first_step:,} on: {describe_stage(one)}" for one in stages),
        _describe_device(trainer),
        f"saved: checkpoints in {run_folder}/checkpoints, "
        f"{_every(config.checkpoint.every_steps, total)}; metrics.jsonl every "
        f"{count_of(config.run.log_every_steps, 'step')}",
    ]


def _every(steps: int, total: int) -> str:
    return f"every {count_of(steps, 'step')} and at the end" if 0 < steps < total else "at the end"


def _describe_data(trainer: Trainer) -> list[str]:
    """Sizes, classes and epochs of each data set, and its part of a batch."""
    sources = trainer.data.get("sources", [])
    if not sources:
        return []
    plan = trainer.loader.plan  # type: ignore[attr-defined]  # a run's loader has one
    columns = trainer.config.data.train, sources, plan.weights, plan.epochs(trainer.total_steps)
    lines = []
    for name, source, weight, drawn in zip(*columns, strict=True):
        part, size = weight / sum(plan.weights), source["num_samples"]
        classes = source["num_classes"]
        kinds = count_of(classes, "class") if classes else "captions only"
        lines.append(
            f"data: {without_secrets(name)}: {count_of(size, 'image')}, {kinds}; {part:.1%} of "
            f"each batch, {drawn:,.1f} epochs"
        )
    return lines


def _describe_model(trainer: Trainer) -> str:
    """Names and sizes of the encoders, and how many parameters are trained."""
    config = trainer.config
    parameters = list(trainer.model.named_parameters())
    parts = [f"{config.model.image_encoder}, {_millions(parameters, 'image_encoder.')}"]
    if config.objective.uses_texts:
        layers = count_of(config.model.text_layers, "layer")
        size = f"width {config.model.text_width}, {_millions(parameters, 'text_encoder.')}"
        parts.append(f"text encoder of {layers}, {size}")
    trained = [(name, one) for name, one in parameters if one.requires_grad]
    part = ""
    if len(trained) < len(parameters):
        numbers = [sum(one.numel() for _, one in some) for some in (trained, parameters)]
        part = f" ({100 * numbers[0] / numbers[1]:.1f} %)"
    return (
        f"model: {'; '.join(parts)}; {_millions(parameters)} parameters in all, "
        f"{_millions(trained)} trained{part}, by {config.objective.name}, {config.optim.name}"
    )


def _millions(parameters: list[tuple[str, torch.nn.Parameter]], prefix: str = "") -> str:
    return f"{sum(one.numel() for name, one in parameters if name.startswith(prefix)) / 1e6:,.2f} M"


def _describe_length(trainer: Trainer) -> str:
    """Steps, and how a batch is divided."""
    config, world_size = trainer.config, trainer.ranks.world_size
    local = config.run.global_batch_size // world_size
    at_once = config.efficiency.micro_batch_size or local
    return (
        f"run: {trainer.step:,} of {count_of(trainer.total_steps, 'step')} done; "
        f"{count_of(config.run.global_batch_size, 'image')} a step at {config.data.image_size} "
        f"pixels, {count_of(world_size, 'rank')} of {local:,} each, {min(at_once, local):,} at once"
    )


def _describe_device(trainer: Trainer) -> str:
    config, device = trainer.config, trainer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    decodes = "CPU" if config.data.decode_device != "gpu" else "GPU"
    return (
        f"device: {name}, {config.efficiency.precision}; images are decoded on the {decodes}, in "
        f"{count_of(config.data.threads, 'thread')} a rank"
    )
