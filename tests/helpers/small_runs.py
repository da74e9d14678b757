"""A tiny configuration and real images with texts, for tests that train."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unicl_fast.batch import Batch
from unicl_fast.config import (
    CheckpointConfig,
    DataConfig,
    EfficiencyConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from unicl_fast.objectives import registry
from unicl_fast.objectives.objective import NoObjective
from unicl_fast.objectives.registry import make_objective
from unicl_fast.objectives.targets import collate
from unicl_fast.stages import span_at
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.observers import Checkpoints
from unicl_fast.training.trainer import Trainer

IMAGE_SIZE = 32
TEXTS = [
    "a photo of a dog",
    "a photo of a cat",
    "the photo of a cat in the snow, taken from far away by somebody in a hurry",
    "two people",
    "a photo of a horse",
]
TEXT_LABELS = [0, 1, 1, -1, 7]
TOKENIZER = Tokenizer()
"""Stays, so that its vocabulary is read once: that takes as long as a step."""
TOKENS = TOKENIZER(TEXTS)


def tiny_config(
    *,
    image_encoder: str = "test_vit",
    steps: int = 6,
    optimizer: str = "adamw",
    **efficiency: object,
) -> TrainConfig:
    """By default fp64 and without BatchNorm; with drop path if there are branches."""
    return TrainConfig(
        data=DataConfig(image_size=IMAGE_SIZE, evaluation_resize=IMAGE_SIZE),
        model=ModelConfig(
            image_encoder=image_encoder,
            drop_path=0.0 if image_encoder == "unicl_convnet7_small" else 0.3,
            text_width=16,
            text_heads=2,
            text_layers=2,
            embed_dim=8,
        ),
        optim=OptimConfig(name=optimizer, lr=1e-3, lr_batch_size=0),
        efficiency=EfficiencyConfig(**({"precision": "fp64"} | efficiency)),
        checkpoint=CheckpointConfig(every_steps=2, keep=0),
        run=RunConfig(global_batch_size=12, steps=steps, log_every_steps=1, device="cpu"),
    )


def real_images(shared_data: Path, count: int) -> torch.Tensor:
    """uint8 [count 32 32 3] from photographs."""
    files = sorted((shared_data / "captions" / "flickr8k" / "images").glob("*.jpg"))[:count]
    images = [Image.open(file).convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)) for file in files]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def global_batch(
    images: torch.Tensor, *, step: int = 0, rank: int = 0, world_size: int = 1
) -> Batch:
    """12 samples with texts and labels of uneven classes; the last third are captions only."""
    which = (torch.arange(12) * 7 + step) % 3
    which[8:] = 3
    which[5] = 4
    labels, place = torch.tensor(TEXT_LABELS)[which], {"rank": rank, "world_size": world_size}
    batch = collate(images.roll(step, dims=0), TOKENS[which], labels, step=step, **place)
    return dataclasses.replace(batch, step=step)


def staged_batch(
    images: torch.Tensor, *, config: TrainConfig, step: int = 0, rank: int = 0, world_size: int = 1
) -> Batch:
    """A batch as the stage of its step has it: so many images of its size, and texts as short."""
    stage = config.stages[span_at(config.run.spans, step).number].config
    n, side = stage.run.global_batch_size, stage.data.image_size
    which = (torch.arange(n) * 7 + step) % 3
    which[2 * n // 3 :] = 3
    which[n // 2] = 4
    return collate(
        images.roll(step, dims=0)[:n, :side, :side].contiguous(),
        Tokenizer(stage.model.context_length)(TEXTS)[which],
        torch.tensor(TEXT_LABELS)[which],
        step=step,
        rank=rank,
        world_size=world_size,
    )


def finish_writing(trainer: Trainer) -> None:
    """Waits until the checkpoint that was begun is on the disk."""
    next(one for one in trainer.observers if isinstance(one, Checkpoints))._writer.wait()


def poison_step(trainer: Trainer, *, step: int) -> None:
    """In that step the first image is NaN, for BatchNorm and in its features."""

    def poison(module: torch.nn.Module, inputs: tuple, outputs: torch.Tensor) -> torch.Tensor:
        if not module.training or trainer.step != step:
            return outputs
        return torch.cat([outputs[:1] * torch.nan, outputs[1:]])

    encoder = trainer.model.image_encoder
    convolutions = [module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d)]
    for module in (convolutions[0], encoder):
        module.register_forward_hook(poison)


_BY_LABELS = {"positives": "labels"}
_SETTINGS = {
    "unicl": ("unicl", {}),
    "clip": ("clip", {}),
    "ce": ("ce", {"num_classes": (2, 3)}),
    "sigmoid": ("sigmoid", {}),
    "siglip": ("siglip", {}),
    "sigmoid, labels": ("sigmoid", _BY_LABELS),
    "unicl, labels": ("unicl", _BY_LABELS),
    "unicl, weighted labels": ("unicl", _BY_LABELS),
    "ce, labels": ("ce", {"num_classes": (2, 3), **_BY_LABELS}),
}
# one test deletes an objective, and all others must work then
OBJECTIVES = {
    case: make_objective(name, **settings)
    for case, (name, settings) in _SETTINGS.items()
    if name in registry.OBJECTIVES
}


def objective_config(objective: str, **settings: object) -> TrainConfig:
    """`tiny_config` for one of `OBJECTIVES`, or none."""
    chosen = NoObjective() if objective == "none" else OBJECTIVES[objective]
    return dataclasses.replace(tiny_config(**settings), objective=chosen)


def labelled_batch(
    images: torch.Tensor, *, objective: str, step: int = 0, rank: int = 0, world_size: int = 1
) -> Batch:
    """12 samples of five classes of two data sets, with prompts for texts.

    If images are mixed by UniCL or have several labels, the last ones have captions. Of several
    labels an image has none to three, the one of its prompt among them.
    """
    which = (torch.arange(12) * 7 + step) % 5
    all_labels = [0, 1, 2**32, 2**32 + 1, 2**32 + 2]
    labels = torch.tensor(all_labels)[which]
    prompts = [TEXTS[0], TEXTS[1], TEXTS[4], "a fish", "a bird"]
    tokens = TOKENIZER(prompts)[which]
    image_labels = None
    if objective.endswith("labels"):
        others = [[], [all_labels[0]], [all_labels[2], all_labels[4]]]
        image_labels = [
            [all_labels[label], *others[sample % 3]] for sample, label in enumerate(which.tolist())
        ]
        image_labels[-1] = image_labels[-1] if objective.startswith("ce") else []
    if objective.startswith(("unicl, ", "sigmoid, ")):
        labels[-3:] = -1
        tokens[-3:] = TOKENS[[3, 3, 4]]
    if objective.startswith(("clip", "siglip")):
        labels[:] = -1
    batch = collate(
        images.roll(step, dims=0),
        tokens,
        labels,
        image_labels=image_labels,
        step=step,
        rank=rank,
        world_size=world_size,
    )
    if "weighted" in objective:
        weights, texts = 1.0 + batch.global_index**2 % 7, batch.texts
        sums = torch.zeros(len(texts.tokens)).index_add(0, texts.index, weights)
        texts = dataclasses.replace(texts, weights=sums)
        batch = dataclasses.replace(batch, weights=weights, texts=texts)
    return batch


class StepLoader:
    """The tests' one loader: a rank's slice of the global batch of each step, from any step on.

    `make` returns the batch of a step; `change` returns it as the trainer sees it, and can do
    anything meanwhile: hang, send a signal.
    """

    def __init__(
        self,
        images: torch.Tensor,
        *,
        rank: int = 0,
        world_size: int = 1,
        make: Callable[..., Batch] = global_batch,
        change: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        self.change = change
        self.batch_of = functools.partial(make, images, rank=rank, world_size=world_size)

    def batches(self, start_step: int) -> Iterator[Batch]:
        for step in itertools.count(start_step):
            yield self.change(self.batch_of(step=step))

    def close(self) -> None: ...


def labelled_loader(images: torch.Tensor, objective: str, **rank: int) -> StepLoader:
    return StepLoader(images, make=functools.partial(labelled_batch, objective=objective), **rank)


def trainer_of(
    images: torch.Tensor,
    config: TrainConfig | None = None,
    folder: Path | None = None,
    *,
    change: Callable[[Batch], Batch] = lambda batch: batch,
    **options: Any,
) -> Trainer:
    """A trainer on the batches of a `StepLoader`; by default of `tiny_config` and without files."""
    options = {"loader": StepLoader(images, change=change), "progress": False, **options}
    return make_trainer(config or tiny_config(), run_folder=folder, **options)
