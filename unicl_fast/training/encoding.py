"""A local batch on its way into the encoders: images, texts, classes."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unicl_fast.batch import Batch, Texts
from unicl_fast.config import EfficiencyConfig, TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.compilation import pad_texts, round_up_count, round_up_length, rounds_sizes
from unicl_fast.models.precision import Precision, normalise_images
from unicl_fast.models.sharding import divides_all
from unicl_fast.objectives.operands import Classes, Encoded
from unicl_fast.objectives.positives import Membership
from unicl_fast.training.step_clock import Part

_PIECE = 32
"""Images that a CPU encodes at once; a quarter less time than for 256."""
_PIECE_PIXELS = 8 * 224 * 224
"""At 224 pixels EfficientNet-Lite0 needs 0.45 GB more for 32 images than for 8, 10 % less time."""

Encode = Callable[..., Encoded]
"""The model, or its DDP wrapper. Called with images and, if there are texts, their tokens, the
number of tokens that are not padding, and the function that sends text features to other ranks."""
Send = Callable[[Tensor], Tensor]
Begin = Callable[[Part], None]
"""Counts the time from now on towards a part of the step."""


class Encoding(Protocol):
    """A local batch with its way through the encoders and back."""

    classes: Classes

    def encode(self, send: Send | None) -> Encoded:
        """Encodes texts, which `send` sends to other ranks, and images."""

    def back_propagate(self, scaled_loss: Tensor, begin: Begin) -> None:
        """Adds the gradient of the loss to the parameters' `.grad`."""


class WholeBatch:
    """A local batch that passes through the encoders in one piece."""

    def __init__(
        self,
        encode: Encode,
        batch: Batch,
        config: TrainConfig,
        ranks: Ranks,
        *,
        texts_among_images: bool = False,
    ) -> None:
        """Prepares images and texts.

        `texts_among_images` splits the graph at the texts under DDP; `back_propagate` joins it.
        """
        self._encode = encode
        self._splits_graph = texts_among_images and isinstance(encode, DistributedDataParallel)
        self._sent: tuple[Tensor, Tensor] | None = None
        self._autocast = encoder_autocast(config.efficiency, ranks, batch.images.device.type)
        self._texts: tuple[Tensor, int | None] | None = None
        text_ids = counts = None
        if config.objective.uses_texts:
            tokens, num_tokens, text_ids, counts = texts_to_encode(
                batch.texts, batch.targets.text_class_ids, config.efficiency
            )
            self._texts = tokens, num_tokens
        largest = max_num_texts(batch.texts, config.efficiency)
        self.classes = Classes(
            classes_of_images(batch), text_ids, counts, max_num_texts=largest,
            weights=batch.weights, text_weights=batch.texts.weights,
        )  # fmt: skip
        self._images = encoder_input(batch.images, config)

    def encode(self, send: Send | None) -> Encoded:
        with self._autocast:
            if self._texts is None:
                return self._encode(self._images)
            tokens, num_tokens = self._texts
            if send is not None and self._splits_graph:
                send = functools.partial(self._send_and_split, send)
            return self._encode(self._images, tokens, num_tokens, send)

    def _send_and_split(self, send: Send, texts: Tensor) -> Tensor:
        """Sends texts; the tensor that it returns begins a new graph."""
        sent = send(texts)
        if not sent.requires_grad:  # frozen
            return sent
        self._sent = sent, sent.detach().requires_grad_()
        return self._sent[1]

    def back_propagate(self, scaled_loss: Tensor, begin: Begin) -> None:
        """Goes back through the graph; under DDP, through texts among the images."""
        if self._sent is None:
            scaled_loss.backward()
            return
        # three quarters of the images hide the return of text gradients from other ranks, the rest
        # hides DDP's last bucket, a token embedding's gradient of 100 MB: up to 9 % of a step by
        # the model in docs/performance-notes.md, and never a loss
        assert isinstance(self._encode, DistributedDataParallel)
        with after_three_quarters(self._encode.module.image_encoder, self._back_propagate_texts):
            scaled_loss.backward()

    def _back_propagate_texts(self) -> None:
        assert self._sent is not None
        sent, received = self._sent
        self._sent = None
        sent.backward(received.grad)


@contextlib.contextmanager
def after_three_quarters(encoder: nn.Module, action: Callable[[], None]) -> Iterator[None]:
    """Calls `action` once: late in an encoder's backward pass, or else after it."""
    pending = [action]

    def act(*_: object) -> None:
        while pending:
            pending.pop()()

    # a parameter's gradient shows how far backward is; a hook in a block would be compiled with it
    trained = [one for one in encoder.parameters() if one.requires_grad]
    with contextlib.ExitStack() as stack:
        if trained:
            parameter = trained[len(trained) // 4]
            stack.callback(parameter.register_post_accumulate_grad_hook(act).remove)
        yield
    act()


def encoder_autocast(
    efficiency: EfficiencyConfig, ranks: Ranks, device_type: str
) -> contextlib.AbstractContextManager[object]:
    """The context in which encoders run in training."""
    # with divided blocks, the cache would keep whole 16-bit copies of all until forward ends
    cache_enabled = not divides_all(efficiency, ranks)
    return Precision(efficiency.precision).autocast(device_type, cache_enabled=cache_enabled)


def in_pieces(images: Tensor) -> tuple[Tensor, ...]:
    """Images [b h w ...], or features [b w], in pieces to encode without a graph."""
    at_once = len(images) or 1
    if images.device.type == "cpu":
        at_once = min(_PIECE, max(1, _PIECE_PIXELS // math.prod(images.shape[1:3])))
    return tuple(torch.split(images, at_once))


def loaded_at_once(batch_size: int, device: torch.device) -> int:
    """Images to decode at once, to be encoded without a graph `batch_size` at a time at most."""
    return min(batch_size, _PIECE) if device.type == "cpu" else batch_size


def encoder_input(images: Tensor, config: TrainConfig) -> Tensor:
    """Turns decoded images uint8 [b h w c] into the image encoder's input: normalised [b c h w].

    Stored features [b w] stay as they are.
    """
    if images.ndim == 2:
        return images
    dtype = Precision(config.efficiency.precision).compute_type
    return normalise_images(images, mean=config.data.mean, std=config.data.std, dtype=dtype)


def classes_of_images(batch: Batch) -> Tensor | Membership:
    """The class of each image, int64 [b], or all its classes if it has several.

    Texts keep their one class, so other ranks need to know nothing more.
    """
    if batch.targets.image_classes is None:
        return batch.targets.class_ids
    samples, labels = batch.targets.image_classes
    return Membership(samples, labels, torch.ones_like(labels, dtype=torch.float64))


def texts_to_encode(
    texts: Texts, class_ids: Tensor, efficiency: EfficiencyConfig
) -> tuple[Tensor, int | None, Tensor, Tensor]:
    """Cuts off the padding that no text needs, and counts tokens, so that none is computed.

    Stored features [u w] stay as they are.

    Returns:
        Token rows [u l]; the number of their tokens that are not padding; class ids [u] and counts
        [u] of the texts. Sizes are rounded up as `rounds_sizes` says.
    """
    rounds, tokens = rounds_sizes(efficiency, texts.tokens.device), texts.tokens
    num_tokens = None
    if not tokens.is_floating_point():
        longest, num_tokens = int(texts.lengths.max()), int(texts.lengths.sum())
        tokens = tokens[:, : round_up_length(longest) if rounds else longest]
    found = tokens, num_tokens, class_ids, texts.counts
    return pad_texts(*found) if rounds else found


def max_num_texts(
    texts: Texts, efficiency: EfficiencyConfig, *, piece: int = 0
) -> Callable[[], int] | None:
    """The largest number of texts a rank encodes, with those that `texts_to_encode` adds.

    Texts are encoded `piece` at a time; 0: all at once. None if ranks do not know it yet.
    """
    unrounded = texts.max_num_texts
    if unrounded is None or not rounds_sizes(efficiency, texts.tokens.device):
        return unrounded

    def rounded() -> int:
        pieces, rest = divmod(unrounded(), piece) if piece else (0, unrounded())
        return pieces * round_up_count(piece) + round_up_count(rest)

    return rounded
