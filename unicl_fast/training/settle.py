"""Settles a config, the last place that changes it: `auto` and blanks, for data and machines.

`set_up` checks the settings and settles all that needs no model, `with_kernels` the rest. Each
choice is logged. config.json and checkpoints hold the given config, and checkpoints also the
settled one: a run that resumes keeps its precision and its decoder, and chooses kernels anew.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence

import numpy as np
import torch

from unicl_fast.config import INITIAL_WEIGHTS, TrainConfig
from unicl_fast.dataset.arrays import blocks_of
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.compilation import all_can, settle_compilation, settle_window_attention
from unicl_fast.models.precision import settle_precision
from unicl_fast.models.sharding import check_sharding
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.loss import TRIAL, fault_of_triton, stores_logits
from unicl_fast.objectives.operands import LossForm
from unicl_fast.system.gpu_kernels import adopt_answer
from unicl_fast.system.machine import choose_decode_device

logger = logging.getLogger(__name__)

_RELEASED_EPOCHS = 32
_MOST_LOGITS_PER_PAIR = 2  # of an image and a sample: texts are padded


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The settings of a run and the machine that they are settled for."""

    given: TrainConfig  # stored in checkpoints
    config: TrainConfig  # settled; the kernels only once there is a model
    ranks: Ranks
    device: torch.device


def set_up(
    given: TrainConfig,
    *,
    ranks: Ranks,
    device: torch.device,
    datasets: Sequence[PackedDataset] = (),
    stored: TrainConfig | None = None,
) -> Setup:
    """Settles a config and checks it; arguments and errors are as in `settle`."""
    config = settle(given, device=device, ranks=ranks, datasets=datasets, stored=stored)
    check_settings(config, ranks)
    if not config.run.total_steps:
        raise ValueError("the run has no length: set run.samples or run.steps")
    return Setup(given=given, config=config, ranks=ranks, device=device)


def check_settings(config: TrainConfig, ranks: Ranks) -> None:
    """Refuses (ValueError) settings that cannot work together, before anything is built."""
    check_sharding(config.efficiency, optimizer=config.optim.name)
    if config.model.standardise and not (config.efficiency.stored_features or config.model.init):
        raise ValueError(
            "model.standardise measures the features of the training data: name a folder by "
            "efficiency.stored_features, or a model that has their statistics by model.init"
        )
    objective = config.objective
    if config.data.sample_weights == "loss" and not objective.takes_weights:
        raise ValueError(
            f"data.sample_weights=loss: the loss of objective.name={objective.name} takes no "
            "weights; set draws"
        )
    for stage in config.settings_of_stages:
        ranks.local_batch_size(stage.run.global_batch_size)


def settle(
    config: TrainConfig,
    *,
    device: torch.device,
    ranks: Ranks,
    datasets: Sequence[PackedDataset] = (),
    stored: TrainConfig | None = None,
) -> TrainConfig:
    """The config without `auto` and without blanks; all ranks call it together.

    `datasets` are data.train's, open; without any, the data are the caller's business. `stored` is
    the settled config of the checkpoint that the run resumes from.

    Raises ValueError: the data lack labels or a hierarchy that the objective needs.
    """
    before = None if stored is None else stored.efficiency.precision
    precision = settle_precision(config.efficiency.precision, device, stored=before, ranks=ranks)
    config = config.changed(efficiency={"precision": precision})
    if stored is not None:
        config = _with_first_weights(config, stored)
    data, least = config.data, config.data.crop_scale[0]
    if "crops" in data.drawn and data.part_shown**2 < least / 2:
        logger.warning(
            "evaluations show the middle %.0f %% of an image, training at least %.0f %%: leave "
            "data.evaluation_resize=%s out, or set %d, to show all",
            100 * data.part_shown**2, 100 * least, data.evaluation_resize, data.image_size,
        )  # fmt: skip
    if not datasets:
        return config
    config = settle_decoding(config, device, ranks)
    config = settle_objective(config, datasets)
    if not config.run.total_steps:
        samples = _RELEASED_EPOCHS * sum(map(len, datasets))
        logger.info("run.samples: %d, %d epochs", samples, _RELEASED_EPOCHS)
        config = config.changed(run={"samples": samples})
    return config


def with_kernels(setup: Setup, model: UniCL) -> Setup:
    """Settles compilation, window attention and the loss; all ranks call it together.

    The model needs no weights (`memory_plan.build_on_meta`).

    Raises SharedRefusal: a kernel of the config cannot work on some rank; all ranks raise it.
    """
    config, device, ranks = setup.config, setup.device, setup.ranks
    attention = settle_window_attention(config.efficiency, model, device, ranks=ranks)
    config = config.changed(efficiency={"window_attention": attention})
    # the trial of blocks needs to know their attention
    blocks = settle_compilation(config.efficiency, model, device, ranks=ranks)
    form = settle_loss(config, device, ranks)
    config = config.changed(efficiency={"compile": blocks, "loss": form})
    return dataclasses.replace(setup, config=config)


def settle_loss(config: TrainConfig, device: torch.device, ranks: Ranks) -> LossForm:
    """Settles `efficiency.loss`: tiled if auto could choose kernels that fail on some machine."""
    form = config.efficiency.loss
    sizes = [stage.run.global_batch_size for stage in config.settings_of_stages]
    largest = _MOST_LOGITS_PER_PAIR * max(ranks.local_batch_size(one) * one for one in sizes)
    untried = form != "auto" or device.type != "cuda" or "triton" not in config.objective.forms
    if untried or stores_logits(form, largest, device.type):
        return form
    best, trial = "dense, or triton for many logits", functools.partial(fault_of_triton, device)
    if not all_can("loss", best, "tiled", "", device, ranks, trial=trial):
        return "tiled"
    adopt_answer("", TRIAL, device, "float32")  # else each rank would try them in its first step
    return "auto"


def _with_first_weights(config: TrainConfig, stored: TrainConfig) -> TrainConfig:
    """Replaces `model.init` of a run that resumes by the first start's, which stays stored."""
    first = {name: getattr(stored.model, name) for name in INITIAL_WEIGHTS}
    for name, value in first.items():
        if (given := getattr(config.model, name)) not in ("", value):
            logger.warning(
                "model.%s=%s is not read: the run resumes, and started from %s",
                name, given, value or "fresh weights",
            )  # fmt: skip
    return config.changed(model=first)


def settle_decoding(config: TrainConfig, device: torch.device, ranks: Ranks) -> TrainConfig:
    """Decides the decoding threads of this rank, and the device that decodes.

    CPU training always decodes on the CPU.
    """
    requested, threads = config.data.decode_device, config.data.threads or ranks.cores
    chosen, why = choose_decode_device(requested, device=device, threads=threads)
    if requested == "auto" and device.type == "cuda":
        logger.info("images are decoded on the CPU: %s", why)
    decodes = "gpu" if chosen.type == "cuda" else "cpu"
    return config.changed(data={"threads": threads, "decode_device": decodes})


def settle_objective(config: TrainConfig, datasets: Sequence[PackedDataset]) -> TrainConfig:
    """Fills in the options of the objective that depend on the data.

    Raises ValueError: samples without labels for an objective that needs them, other classes than
    its options say, or levels of a hierarchy if no data set has one.
    """
    objective, manifests = config.objective, [dataset.manifest for dataset in datasets]
    if config.data.prompts == "levels" and not any(one.hierarchy for one in manifests):
        raise ValueError(
            "data.prompts=levels needs a hierarchy of classes, and no data set of data.train has "
            "one: pack with --hierarchy, or set data.prompts=labels"
        )
    use = config.data.sample_weights
    if (use != "none") > any(one.weights is not None for one in datasets):
        raise ValueError(
            f"data.sample_weights={use}: data.train has no weights; pack it with --weight-column"
        )
    if objective.needs_labels:
        _check_labels(objective.name, datasets)
        config = config.changed(data={"text": "labels"})
    several = 0
    if config.data.prompts == "labels":
        several = sum(_count_several(dataset, config.data.text) for dataset in datasets)
    counts = tuple(len(one.class_names) for one in manifests)
    return dataclasses.replace(config, objective=objective.settle(counts, num_several=several))


def _check_labels(objective: str, datasets: Sequence[PackedDataset]) -> None:
    """Refuses (ValueError) samples without labels, and labels without names."""
    for dataset in datasets:
        num_unlabelled = sum(
            int(np.count_nonzero(rows["labels_count"] == 0)) for rows in blocks_of(dataset.samples)
        )
        fault, place = "", dataset.location
        if num_unlabelled:
            fault = f"{num_unlabelled:,} of {len(dataset):,} samples of {place} have none"
        elif not dataset.manifest.class_names:
            fault = f"those of {place} have no class names"
        if fault:
            raise ValueError(
                f"objective.name={objective} learns from labels, and {fault}: leave it out, "
                "or set objective.name=unicl"
            )


def _count_several(dataset: PackedDataset, text: str) -> int:
    """Samples with another class besides their text's: another label, or a caption."""
    if not dataset.manifest.class_names:
        return 0  # without class names no prompt makes a label a class
    several = 0
    for rows in blocks_of(dataset.samples):
        has_both = (rows["labels_count"] > 0) & (rows["captions_count"] > 0) & (text != "labels")
        several += int(np.count_nonzero(has_both | (rows["labels_count"] > 1)))
    return several
