"""Times the parts of a training step, split at the features: encoders, loss, update."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from unicl_fast.batch import Batch
from unicl_fast.models.precision import Precision
from unicl_fast.objectives.operands import Classes, Operands
from unicl_fast.objectives.text_columns import TextColumns
from unicl_fast.training.encoding import classes_of_images, encoder_input, texts_to_encode
from unicl_fast.training.trainer import Trainer

from .measuring import wait_for_gpu


class StepInParts:
    """A trainer's step on one batch, in timed parts."""

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        self.trainer, self.batch = trainer, batch
        self.device = batch.images.device
        self.precision = Precision(trainer.config.efficiency.precision)
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.operations: dict[str, int] = {}
        self.counter = FlopCounterMode(display=False)  # counts inside its `with` block

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Records the seconds and operations of the block."""
        wait_for_gpu()
        started, cpu = time.perf_counter(), time.process_time()
        counted = self.counter.get_total_flops()
        yield
        wait_for_gpu()
        self.seconds[name] = time.perf_counter() - started
        self.cpu_seconds[name] = time.process_time() - cpu
        self.operations[name] = self.counter.get_total_flops() - counted

    def take(self) -> dict[str, float]:
        """Trains one step; returns the seconds of each part."""
        trainer = self.trainer
        trainer.model.train()
        loss = self.back_propagate()
        with self.part("clip and update"):
            trainer.update(loss)
            trainer.optimizer.zero_grad()
        return dict(self.seconds)

    def back_propagate(self) -> Tensor:
        """Accumulates the step's gradient; returns its loss."""
        trainer, batch = self.trainer, self.batch
        model, config = trainer.model, trainer.config
        model.set_drop_path_key(step=batch.step, global_index=batch.global_index)
        with self.part("normalise images"):
            pixels = encoder_input(batch.images, config)
            tokens, num_tokens, text_class_ids, text_counts = texts_to_encode(
                batch.texts, batch.targets.text_class_ids, config.efficiency
            )
        with self.part("image encoder forward"), self.precision.autocast(self.device.type):
            images = model.encode_image(pixels)
        with self.part("text encoder forward"), self.precision.autocast(self.device.type):
            texts = model.encode_text(tokens, num_tokens)
        roots = [images, texts, *model.learnt.values()]
        leaves = [one.detach().requires_grad_() for one in roots]
        with self.part("loss and its gradient"):
            classes = Classes(classes_of_images(batch), text_class_ids, text_counts)
            columns = TextColumns(classes, trainer.ranks)
            learnt = dict(zip(model.learnt, leaves[2:], strict=True))
            all_texts = columns.receive(columns.send(leaves[1]))
            form = config.efficiency.loss
            loss = config.objective.loss(
                Operands(leaves[0], all_texts, classes.images, learnt, form, trainer.ranks)
            )
            scaled = trainer.scaler.scale(loss)
            image_gradient, *gradients = torch.autograd.grad(scaled, leaves)
        with self.part("image encoder backward"):
            _go_back([images], [image_gradient])
        with self.part("text encoder backward"):
            _go_back(roots[1:], gradients)
        return loss.detach()


def _go_back(roots: list[Tensor], gradients: list[Tensor]) -> None:
    """Goes back through the roots that are not frozen."""
    learnt = {one: grad for one, grad in zip(roots, gradients, strict=True) if one.requires_grad}
    if learnt:
        torch.autograd.backward([*learnt], [*learnt.values()])
