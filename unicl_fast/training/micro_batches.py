"""Batches larger than memory: encode in micro-batches, compare the whole batch, encode again.

The loss compares every image with every text, so gradients of micro-batches do not simply add up.
But it sees a sample only through its feature, which is small:

    1. encode all micro-batches without a graph and keep the features;
    2. compute the loss of the whole global batch and its gradient with respect to the features;
    3. encode each micro-batch again, with a graph, and back-propagate its features' gradient.

The result equals the plain step's up to the order of summation: drop path depends on a sample's
global index, so both forward passes drop the same branches. The price is one more forward pass,
about 4/3 of the time. Gao et al., arXiv 2101.06983.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from unicl_fast.batch import Batch
from unicl_fast.config import EfficiencyConfig
from unicl_fast.distributed.ranks import Ranks, gather_integers
from unicl_fast.models.freezing import encoder_is_frozen, is_trained
from unicl_fast.models.sharding import divides_all
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.operands import Classes, Encoded
from unicl_fast.training.encoding import (
    Begin,
    Encode,
    Send,
    classes_of_images,
    encoder_autocast,
    max_num_texts,
    texts_to_encode,
)


def check_micro_batches(model: UniCL) -> None:
    """Refuses (ValueError) a model with BatchNorm that is not frozen."""
    frozen = {module for part in model.frozen.modules for module in part.modules()}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module not in frozen:
            raise ValueError(
                f"efficiency.micro_batch_size: {name} is a {type(module).__name__}, whose "
                "statistics would be those of a micro-batch instead of the batch; set "
                "efficiency.micro_batch_size=0, or take an image encoder without BatchNorm ("
                "vit_tiny_patch16_224, Swin, FocalNet)"
            )


class MicroBatches:
    """A local batch that passes through the encoders in pieces of `efficiency.micro_batch_size`.

    As many distinct texts are encoded at once as images; the size need not divide the local batch.
    Only the last piece goes through `encode`, the DDP wrapper: one reduction over ranks a step.
    """

    def __init__(
        self,
        model: UniCL,
        encode: Encode,
        batch: Batch,
        efficiency: EfficiencyConfig,
        ranks: Ranks,
        *,
        normalise: Callable[[Tensor], Tensor],
    ) -> None:
        """Cuts the batch into pieces; `normalise` makes images into the image encoder's input."""
        self._model, self._encode, self._step = model, encode, batch.step
        self._size, self._normalise = efficiency.micro_batch_size, normalise
        pieces = (one.split(self._size) for one in (batch.images, batch.global_index))
        self._images = list(zip(*pieces, strict=True))
        self._texts, text_class_ids, text_counts = _texts_in_pieces(batch, efficiency, ranks)
        is_divided, largest = divides_all(efficiency, ranks), None
        if not is_divided:  # else some ranks repeat a piece
            largest = max_num_texts(batch.texts, efficiency, piece=self._size)
        self.classes = Classes(
            classes_of_images(batch), text_class_ids, text_counts, max_num_texts=largest,
            weights=batch.weights, text_weights=batch.texts.weights,
        )  # fmt: skip
        is_stored = batch.images.ndim == 2  # features of a frozen encoder
        is_frozen = encoder_is_frozen(model, "image")
        self._encodes_images_once = is_frozen and not is_stored and not is_divided
        self._autocast = functools.partial(
            encoder_autocast, efficiency, ranks, batch.images.device.type
        )
        self._leaves: list[Tensor] = []

    def encode(self, send: Send | None) -> Encoded:
        """Encodes all pieces without a graph; features and learnt parameters begin a new one."""
        texts = self._encode_texts().requires_grad_()
        sent = texts if send is None else send(texts)
        images = self._encode_images().requires_grad_()
        learnt = {name: one.detach().requires_grad_() for name, one in self._model.learnt.items()}
        self._leaves = [images, texts, *learnt.values()]
        return Encoded(images, sent, learnt)

    def _encode_texts(self) -> Tensor:
        """Features of all texts, without a graph."""
        # one autocast for all micro-batches, so that an encoder's weights are cast once
        with torch.no_grad(), self._autocast():
            return torch.cat([self._model.encode_text(*rows) for rows in self._texts])

    def _encode_images(self) -> Tensor:
        """Features of all images, without a graph."""
        if self._encodes_images_once:  # from here on the features stand in for the images
            with torch.no_grad(), self._autocast():
                encoder = self._model.image_encoder
                self._images = [
                    (encoder(self._input_of(*piece)), piece[1]) for piece in self._images
                ]
        with torch.no_grad(), self._autocast():
            return torch.cat([self._encode_piece(*piece) for piece in self._images])

    def back_propagate(self, scaled_loss: Tensor, begin: Begin) -> None:
        """Encodes each piece again, with a graph, and goes back through it."""
        of_images, of_texts, *of_learnt = torch.autograd.grad(scaled_loss, self._leaves)
        image_gradients = of_images.split(self._size)
        text_gradients = of_texts.split([len(tokens) for tokens, _ in self._texts])

        def encode_again(encode: Callable[[], Tensor], gradient: Tensor) -> None:
            begin("forward")
            # one autocast for each graph, which must not find the weights cast for another
            with self._autocast():
                features = encode()
            begin("backward")
            features.backward(gradient)

        # frozen encoders run again only in the last pass, which is DDP's
        images = self._images[:-1] if is_trained(self._model, "image") else []
        texts = self._texts[:-1] if is_trained(self._model, "text") else []
        for piece, gradient in zip(images, image_gradients, strict=False):
            encode_again(functools.partial(self._encode_piece, *piece), gradient)
        for rows, gradient in zip(texts, text_gradients, strict=False):
            encode_again(functools.partial(self._model.encode_text, *rows), gradient)
        begin("forward")
        with self._autocast():
            last = self._encode(self._input_of(*self._images[-1]), *self._texts[-1])
        assert last.texts is not None
        begin("backward")
        roots = last.images, last.texts, *last.learnt.values()
        pairs = zip(roots, (image_gradients[-1], text_gradients[-1], *of_learnt), strict=True)
        # frozen parts have no graph
        learning = [(root, gradient) for root, gradient in pairs if root.requires_grad]
        torch.autograd.backward([root for root, _ in learning], [one for _, one in learning])

    def _input_of(self, images: Tensor, global_index: Tensor) -> Tensor:
        self._model.set_drop_path_key(step=self._step, global_index=global_index)
        return self._normalise(images)

    def _encode_piece(self, images: Tensor, global_index: Tensor) -> Tensor:
        return self._model.encode_image(self._input_of(images, global_index))


def _texts_in_pieces(
    batch: Batch, efficiency: EfficiencyConfig, ranks: Ranks
) -> tuple[list[tuple[Tensor, int | None]], Tensor, Tensor]:
    """The arguments of `encode_text` for each micro-batch, and all class ids [u] and counts [u]."""
    texts, class_ids = batch.texts, batch.targets.text_class_ids
    size = efficiency.micro_batch_size
    pieces = []
    for start in range(0, len(texts.tokens), size):
        part = slice(start, start + size)
        piece = dataclasses.replace(
            texts, tokens=texts.tokens[part], lengths=texts.lengths[part], counts=texts.counts[part]
        )
        pieces.append(texts_to_encode(piece, class_ids[part], efficiency))
    if divides_all(efficiency, ranks):  # all ranks send parameters for each piece
        tokens, num_tokens, class_ids, counts = pieces[-1]
        again = tokens, num_tokens, class_ids, torch.zeros_like(counts)
        pieces += [again] * (max(gather_integers(len(pieces), ranks)) - len(pieces))
    rows = [(tokens, num_tokens) for tokens, num_tokens, _, _ in pieces]
    _, _, class_ids_of_all, counts_of_all = zip(*pieces, strict=True)
    return rows, torch.cat(class_ids_of_all), torch.cat(counts_of_all)
