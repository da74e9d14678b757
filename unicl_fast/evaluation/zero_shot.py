"""Zero-shot classification: an image's class is the one whose prompts it is most like.

The classifier of a class is the mean of its normalised prompt embeddings, normalised again
(Radford et al., arXiv 2103.00020, section 3.1.4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.batch import EvaluationLoader
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation.classification import ClassificationResult, classify
from unicl_fast.evaluation.encode import (
    encode_images,
    encode_token_rows,
    require_text_encoder,
)
from unicl_fast.models.unicl import UniCL
from unicl_fast.text.class_lists import fill_template
from unicl_fast.text.tokenizer import Tokenizer


@torch.no_grad()
def zero_shot_classifier(
    model: UniCL,
    *,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 512,
    progress: bool = False,
) -> Float[Tensor, "k d"]:
    """One unit-norm row for each class.

    Args:
        model: in evaluation mode.
        class_names: k names.
        templates: texts with one `{}` each.
        batch_size: prompts encoded at once.
        progress: show a progress bar.

    Raises:
        ValueError: the model has no text encoder.
    """
    require_text_encoder(model, "zero-shot classification")
    prompts = [fill_template(template, name) for name in class_names for template in templates]
    rows = Tokenizer(model.config.model.context_length).encode(prompts)
    features = encode_token_rows(model, rows, batch_size=batch_size, progress=progress)
    each = features.view(len(class_names), len(templates), -1)
    return F.normalize(each.mean(dim=1), dim=-1)


@torch.no_grad()
def zero_shot_accuracy(
    model: UniCL,
    loader: EvaluationLoader,
    classifier: Float[Tensor, "k d"],
    *,
    labels_of: Callable[[int], Sequence[int]],
    class_names: Sequence[str],
    ranks: Ranks | None = None,
    num_batches: int | None = None,
    confusion: bool = False,
) -> ClassificationResult:
    """Classifies what the loader yields.

    Args:
        model: in evaluation mode.
        loader: over all ranks, each sample once.
        classifier: from `zero_shot_classifier`.
        labels_of: labels of a sample of the data set; with several, any of them is right and the
            first is the class it counts for. Samples without labels are left out and counted.
        class_names: k names.
        ranks: whose counts are added up.
        num_batches: for the progress bar; None shows none.
        confusion: also count which class is taken for which.

    Raises:
        ValueError: no sample has a label.
        EvaluationStopped: it was asked to leave off, on all ranks.
    """

    def scores_of(images: Tensor) -> Tensor:
        features = encode_images(model, images)
        return features @ classifier.to(features.dtype).T

    return classify(
        loader,
        scores_of,
        labels_of=labels_of,
        class_names=class_names,
        ranks=ranks,
        num_batches=num_batches,
        confusion=confusion,
        what="zero-shot",
    )
