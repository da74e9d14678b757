"""Batches larger than memory: encode in micro-batches, compare the whole batch, encode again.

The loss compares every image with every text, so gradients of micro-batches do not add up as for a
classifier. But it sees a sample only through its feature, which is small:

    1. encode all micro-batches without a graph and keep the features;
    2. take the loss of the whole global batch and its gradient with respect to the features;
    3. encode each micro-batch once more, with a graph, and back-propagate its features' gradient.

The result is the plain step's, up to the order of summation: drop path is a function of a sample's
global index, so both forward passes drop the same branches. The price is one more forward pass,
about 4/3 of the time. Gao et al., arXiv 2101.06983.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks, gather_integers
from unicl_fast.models.freezing import encoder_is_frozen, is_trained
from unicl_fast.models.sharding import divides_all
from unicl_fast.models.unicl import UniCL
from unicl_fast.training.global_loss import (
    Encode,
    TextColumns,
    classes_of_images,
    encoder_autocast,
    encoder_input,
    texts_to_encode,
)
from unicl_fast.training.step_clock import Part


def check_micro_batches(model: UniCL) -> None:
    """Refuses (ValueError) a model with BatchNorm that is not frozen for good."""
    frozen: set[nn.Module] = set()
    if not model.config.optim.unlock_at_step:
        frozen = {module for part in model.frozen.modules for module in part.modules()}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module not in frozen:
            raise ValueError(
                f"efficiency.micro_batch_size: {name} is a {type(module).__name__}, whose "
                "statistics would be those of a micro-batch instead of the batch; set "
                "efficiency.micro_batch_size=0, or take an image encoder without BatchNorm (Swin, "
                "ViT, FocalNet)"
            )


def back_propagate_in_micro_batches(
    model: UniCL,
    encode: Encode,
    batch: Batch,
    config: TrainConfig,
    ranks: Ranks,
    scale_loss: Callable[[Tensor], Tensor],
    *,
    begin: Callable[[Part], None] = lambda part: None,
) -> Tensor:
    """Adds the gradient of the scaled loss of the global batch to the parameters' `.grad`.

    `efficiency.micro_batch_size` images, and as many distinct texts, go through an encoder at once;
    it need not divide the local batch. Only the last micro-batch goes through `encode`, the DDP
    wrapper, when all other gradients are there: one reduction over ranks a step. `begin` is told
    which part of the step begins; the second forward pass is `forward` too.

    Returns:
        The loss of the global batch, not scaled, equal on all ranks.
    """
    pieces = _MicroBatches(model, batch, config, ranks)
    columns = TextColumns(pieces.text_class_ids, pieces.text_counts, ranks)
    text_features = pieces.encode_texts().requires_grad_()
    texts_of_all = columns.send(text_features)
    image_features = pieces.encode_images().requires_grad_()
    with torch.no_grad(), pieces.autocast():
        scale = model.scale.requires_grad_()
    bias = None if model.logit_bias is None else model.logit_bias.detach().requires_grad_()
    learnt = [one for one in (scale, bias) if one is not None]
    begin("loss")
    loss = columns.contrast(
        image_features,
        texts_of_all,
        class_ids=classes_of_images(batch),
        scale=scale,
        bias=bias,
        form=config.efficiency.loss,
    )
    gradients = torch.autograd.grad(scale_loss(loss), [image_features, text_features, *learnt])
    pieces.back_propagate(encode, gradients, begin)
    return loss.detach()


class _MicroBatches:
    """The images and texts of a local batch, in pieces that an encoder takes at once."""

    def __init__(self, model: UniCL, batch: Batch, config: TrainConfig, ranks: Ranks) -> None:
        self._model, self._config, self._step = model, config, batch.step
        self._size = config.efficiency.micro_batch_size
        images = zip(
            batch.images.split(self._size), batch.global_index.split(self._size), strict=True
        )
        self._images = list(images)
        self._texts, self.text_class_ids, self.text_counts = _texts_in_pieces(batch, config, ranks)
        is_stored = batch.images.ndim == 2  # features of a frozen encoder
        self._encodes_images_once = (
            encoder_is_frozen(model, "image") and not is_stored and not divides_all(config, ranks)
        )
        self.autocast = functools.partial(encoder_autocast, config, ranks, batch.images.device.type)

    def encode_texts(self) -> Tensor:
        """Features of all texts, without a graph."""
        # one autocast for all micro-batches of an encoder: its weights are cast once
        with torch.no_grad(), self.autocast():
            return torch.cat([self._model.encode_text(*rows) for rows in self._texts])

    def encode_images(self) -> Tensor:
        """Features of all images, without a graph."""
        if self._encodes_images_once:  # and features are taken for images: a projection may learn
            with torch.no_grad(), self.autocast():
                encoder = self._model.image_encoder
                self._images = [
                    (encoder(self._input_of(*piece)), piece[1]) for piece in self._images
                ]
        with torch.no_grad(), self.autocast():
            return torch.cat([self._encode_images(*piece) for piece in self._images])

    def back_propagate(
        self, encode: Encode, gradients: Sequence[Tensor], begin: Callable[[Part], None]
    ) -> None:
        """Encodes again, with a graph; `gradients` are of images, texts and what else is learnt."""
        of_images, of_texts, *others = gradients
        image_gradients = of_images.split(self._size)
        text_gradients = of_texts.split([len(tokens) for tokens, _ in self._texts])

        def encode_again(encode: Callable[[], Tensor], gradient: Tensor) -> None:
            begin("forward")
            # one autocast for each graph: weights cast in one are not to be found in the next one's
            with self.autocast():
                features = encode()
            begin("backward")
            features.backward(gradient)

        # towers with nothing to train are not encoded again, but in the last pass, which is DDP's
        images = self._images[:-1] if is_trained(self._model, "image") else []
        texts = self._texts[:-1] if is_trained(self._model, "text") else []
        for piece, gradient in zip(images, image_gradients, strict=False):
            encode_again(functools.partial(self._encode_images, *piece), gradient)
        for rows, gradient in zip(texts, text_gradients, strict=False):
            encode_again(functools.partial(self._model.encode_text, *rows), gradient)
        begin("forward")
        with self.autocast():
            encoded = encode(self._input_of(*self._images[-1]), *self._texts[-1])
        begin("backward")
        last = [one for one in encoded if one is not None]
        back_propagate_learnt(last, [image_gradients[-1], text_gradients[-1], *others])

    def _input_of(self, images: Tensor, global_index: Tensor) -> Tensor:
        self._model.set_drop_path_key(step=self._step, global_index=global_index)
        return encoder_input(images, self._config)

    def _encode_images(self, images: Tensor, global_index: Tensor) -> Tensor:
        return self._model.encode_image(self._input_of(images, global_index))


def back_propagate_learnt(features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Continues from the gradients of features, leaving out those without a graph.

    That is a fixed scale, or the features of a tower that is frozen.
    """
    learnt = [pair for pair in zip(features, gradients, strict=True) if pair[0].requires_grad]
    torch.autograd.backward([feature for feature, _ in learnt], [one for _, one in learnt])


def _texts_in_pieces(
    batch: Batch, config: TrainConfig, ranks: Ranks
) -> tuple[list[tuple[Tensor, int | None]], Tensor, Tensor]:
    """The arguments of `encode_text` for each micro-batch, and all class ids [u] and counts [u]."""
    pieces = [texts_to_encode(piece, config) for piece in _text_micro_batches(batch, config)]
    if divides_all(config, ranks):  # all ranks send parameters for each piece
        tokens, num_tokens, class_ids, counts = pieces[-1]
        again = tokens, num_tokens, class_ids, torch.zeros_like(counts)
        pieces += [again] * (max(gather_integers(len(pieces), ranks)) - len(pieces))
    texts = [(tokens, num_tokens) for tokens, num_tokens, _, _ in pieces]
    _, _, class_ids_of_all, counts_of_all = zip(*pieces, strict=True)
    return texts, torch.cat(class_ids_of_all), torch.cat(counts_of_all)


def _text_micro_batches(batch: Batch, config: TrainConfig) -> list[Batch]:
    """Splits the texts of a batch, by themselves where `efficiency.unique_texts`, or by samples."""
    names = ["text_index", "class_ids"]
    if config.efficiency.unique_texts:
        names = ["tokens", "text_lengths", "text_class_ids", "text_counts"]
    fields = {name: getattr(batch, name) for name in names}
    size = config.efficiency.micro_batch_size
    return [
        dataclasses.replace(batch, **{name: fields[name][start : start + size] for name in names})
        for start in range(0, len(fields[names[0]]), size)
    ]
