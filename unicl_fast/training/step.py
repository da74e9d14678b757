"""One step on one rank: encode, gather, loss, back-propagate.

    encode  this rank's distinct texts, then its images
    gather  the texts of all ranks, with gradient, while images are encoded; image features stay on
            their rank
    loss    the objective's, from features and classes (`objectives/`)

`loss_of` does these three for any objective, for whole batches and micro-batches. Every rank ends
with the same scalar. Its gradient with respect to a rank's own features is exact, so parameter
gradients summed over ranks equal the gradient of one process on the global batch.
"""

import functools
from collections.abc import Callable

from torch import Tensor

from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.operands import Operands
from unicl_fast.objectives.text_columns import TextColumns
from unicl_fast.training.encoding import Begin, Encode, Encoding, WholeBatch, encoder_input
from unicl_fast.training.micro_batches import MicroBatches
from unicl_fast.training.step_clock import Part


def _no_clock(part: Part) -> None:
    pass


def back_propagate(
    model: UniCL,
    encode: Encode,
    batch: Batch,
    config: TrainConfig,
    ranks: Ranks,
    *,
    scale_loss: Callable[[Tensor], Tensor] = lambda loss: loss,
    begin: Begin = _no_clock,
) -> Tensor:
    """Adds the gradient of the scaled loss of the global batch to the parameters' `.grad`.

    `encode` is the model or its DDP wrapper, `config` the present stage's.

    Returns:
        The loss of the global batch, not scaled, equal on all ranks.
    """
    encoding: Encoding
    if 0 < config.efficiency.micro_batch_size < batch.batch_size:
        normalise = functools.partial(encoder_input, config=config)
        encoding = MicroBatches(model, encode, batch, config.efficiency, ranks, normalise=normalise)
    else:
        model.set_drop_path_key(step=batch.step, global_index=batch.global_index)
        encoding = WholeBatch(encode, batch, config, ranks, texts_among_images=True)
    loss = loss_of(encoding, config, ranks, begin)
    encoding.back_propagate(scale_loss(loss), begin)
    return loss.detach()


def loss_of(
    encoding: Encoding, config: TrainConfig, ranks: Ranks, begin: Begin = _no_clock
) -> Tensor:
    """The loss of the global batch, a scalar equal on all ranks, with its graph."""
    objective, classes = config.objective, encoding.classes
    columns = TextColumns(classes, ranks) if objective.uses_texts else None
    encoded = encoding.encode(None if columns is None else columns.send)
    begin("loss")
    texts = None
    if columns is not None and encoded.texts is not None:
        texts = columns.receive(encoded.texts)
    form = config.efficiency.loss
    operands = Operands(encoded.images, texts, classes.images, encoded.learnt, form, ranks)
    if classes.weights is not None and texts is not None and texts.weights is not None:
        operands = operands._replace(weights=(classes.weights, texts.weights))
    return objective.loss(operands)


def global_loss(encode: Encode, batch: Batch, config: TrainConfig, ranks: Ranks) -> Tensor:
    """`loss_of` a whole batch, for training loops outside this package."""
    return loss_of(WholeBatch(encode, batch, config, ranks), config, ranks)
