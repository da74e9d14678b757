"""The words of an image's text as classes of the image: the second term of `objective.words`.

SuperCLIP (Zhao et al., arXiv 2512.14480) has an image predict which tokens its text has, by a
linear layer and the cross-entropy of a softmax over the vocabulary; the target of a word is its
inverse document frequency (IDF) over the sum of those of its text. That is the loss of images and
learnt rows that cross-entropy over classes is too, with several weighted labels an image, so it is
`unified_contrastive_loss`, in tiles: no logit of all words is stored.

The papers estimate document frequencies from the batches so far. Here they are counted once, of
all texts that the plan may draw, so they are the same at every step, on every rank, and after a
resume.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.config import LossForm, ObjectiveConfig
from unicl_fast.objectives.loss import AllReduce, one_rank, unified_contrastive_loss
from unicl_fast.objectives.positives import Membership

_LEAST_IDF = 1e-9
"""The IDF of a word of every text is 0, which rounding turns into about 1e-16: that must not become
the whole target of a text without other words."""


class Words(NamedTuple):
    """The tokens that are words of a run's texts."""

    rows: Int[Tensor, " v"]
    """The learnt row of each token of the vocabulary; 0 also for one that is no word."""
    weights: Float[Tensor, " v"]
    """The IDF of each, at least 0; 0 for one that is no word."""

    @property
    def num_words(self) -> int:
        """How many rows are learnt."""
        return 1 + int(self.rows.max())


def find_words(chances: NDArray[np.float64], *, num_samples: int, no_words: list[int]) -> Words:
    """Numbers the tokens that texts have, and weighs them by their IDF.

    Args:
        chances: [v] the probability of each token to be in the text of a draw
            (`token_rows.add_chances`).
        num_samples: N; the IDF of a token is log((N + 1) / (N chance + 1)).
        no_words: tokens that mark the start, the end and the padding.
    """
    is_word = chances > 0
    is_word[no_words] = False
    idf = np.log((num_samples + 1) / (num_samples * chances + 1))
    weights = np.where(is_word & (idf > _LEAST_IDF), idf, 0)
    rows = np.where(is_word, np.cumsum(is_word) - 1, 0)
    return Words(torch.from_numpy(rows), torch.from_numpy(weights))


def place_words(
    words: Words | None, objective: ObjectiveConfig, device: torch.device
) -> Words | None:
    """The words on the device; None where the objective has none.

    Raises:
        ValueError: `objective.words`, and no words or another number of them.
    """
    if not objective.words:
        return None
    if words is None or words.num_words != objective.num_words:
        found = "none came" if words is None else f"{words.num_words} came"
        raise ValueError(
            f"objective.words needs the {objective.num_words} words that objective.num_words says, "
            f"and {found}: hand the trainer `words`, as `find_words` makes them"
        )
    return Words(*(table.to(device) for table in words))


def word_loss(
    image_features: Float[Tensor, "b d"],
    word_rows: Float[Tensor, "k e"],
    words: Words,
    *,
    tokens: Int[Tensor, "u l"],
    text_index: Int[Tensor, " b"],
    form: LossForm = "auto",
    all_reduce: AllReduce = one_rank,
) -> Float[Tensor, ""]:
    """The cross-entropy of the words that images' texts have, each of them once.

    Args:
        image_features: of unit norm.
        word_rows: [k d + 1] the learnt weights of each word and its bias.
        words: those of the run.
        tokens: distinct texts, in any padding.
        text_index: which text each image has.
        form: as for `unified_contrastive_loss`, which also says the type of the result.
        all_reduce: completes the mean where other ranks hold other images.

    Returns:
        The mean over images. One whose text has no words but those of all texts adds 0.
    """
    (num_images, width), length = image_features.shape, tokens.shape[1]
    ordered = tokens.sort(dim=1).values
    comes_again = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    weights = words.weights[ordered].masked_fill(comes_again, 0)
    samples = torch.arange(num_images, device=tokens.device).repeat_interleave(length)
    targets = Membership(
        samples,
        words.rows[ordered][text_index].reshape(-1),
        weights[text_index].reshape(-1),
    )
    # numbers of about 1, as an encoder's features have them behind its last LayerNorm: on a vector
    # of unit norm the layer would have to learn weights, and send back gradients, sqrt(d) as large
    features = F.pad(image_features * math.sqrt(width), (0, 1), value=1.0)
    return unified_contrastive_loss(
        features,
        word_rows,
        targets,
        features.new_ones(()),  # a number would be sent to the device, for which the host waits
        text_class_ids=torch.arange(len(word_rows), device=tokens.device),
        directions="i2t",
        form=form,
        all_reduce=all_reduce,
    )
