"""Classification by the k nearest training images, weighted as DINO does.

Each of the k training samples most similar to an image votes for its label with weight
exp(similarity / temperature); similarity is the cosine (Caron et al., arXiv 2104.14294, appendix
F.1). The search is exact: every training sample is compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.evaluation.features import LabelledFeatures, extract_sets
from unicl_fast.evaluation.report import (
    ClassificationCounts,
    ClassificationResult,
    classification_table,
    draw_confusion,
    rank_classes,
    write_results,
)
from unicl_fast.evaluation.requests import Knn
from unicl_fast.system.progress import heartbeat_and_check_stop

_QUERIES, _KEYS = 512, 65_536
"""Similarities at once: 128 MiB."""


def nearest(
    queries: Float[Tensor, "q d"],
    keys: Float[Tensor, "n d"],
    *,
    k: int,
    queries_at_once: int = _QUERIES,
    keys_at_once: int = _KEYS,
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Cosines with the k most similar keys, falling, and the rows of these keys.

    Memory is that of queries_at_once * keys_at_once similarities, whatever q and n.
    """
    keys = F.normalize(keys, dim=1)
    found_cosines, found_keys = [], []
    for query in F.normalize(queries, dim=1).split(queries_at_once):
        heartbeat_and_check_stop()  # shows progress
        best = query.new_empty(len(query), 0)
        rows = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
        for start in range(0, len(keys), keys_at_once):
            piece = query @ keys[start : start + keys_at_once].T
            top, where = piece.topk(min(k, piece.shape[1]), dim=1)
            best = torch.cat([best, top], dim=1)
            rows = torch.cat([rows, where + start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            rows = rows.gather(1, order)
        found_cosines.append(best)
        found_keys.append(rows)
    return torch.cat(found_cosines), torch.cat(found_keys)


def knn_accuracy(
    train: LabelledFeatures,
    test: LabelledFeatures,
    *,
    class_names: Sequence[str],
    ks: Sequence[int],
    temperature: float = 0.07,
    confusion: bool = False,
) -> dict[int, ClassificationResult]:
    """Results for several k, from one search.

    Args:
        train: samples that vote, each for its first label.
        test: samples to classify.
        class_names: names of all classes.
        ks: numbers of neighbours.
        temperature: of the votes, positive.
        confusion: also count which class is taken for which.

    Raises:
        ValueError: more neighbours than training samples, or features that are not finite.
    """
    if not ks or min(ks) < 1 or max(ks) > len(train):
        raise ValueError(
            f"k must lie in 1 to the {len(train)} training samples, not {', '.join(map(str, ks))}"
        )
    if not (train.features.isfinite().all() and test.features.isfinite().all()):
        raise ValueError("features hold values that are not finite: the model is broken")
    cosines, neighbours = nearest(test.features, train.features, k=max(ks))
    results = {}
    for k in ks:
        counts = ClassificationCounts(class_names, confusion=confusion)
        for start in range(0, len(test), _QUERIES):
            rows = slice(start, start + _QUERIES)
            # relative to the nearest: exp(1 / temperature) may be more than fp32 holds
            votes = ((cosines[rows, :k] - cosines[rows, :1]) / temperature).exp()
            scores = votes.new_zeros(len(votes), len(class_names))
            scores.scatter_add_(1, train.labels[neighbours[rows, :k]], votes)
            # a class without a vote is not found, even if the first five have room for it
            voted = (scores > 0).sum(dim=1).tolist()
            rankings = [best[:n] for best, n in zip(rank_classes(scores), voted, strict=True)]
            counts.add(rankings, test.all_labels[rows])
        results[k] = counts.result(what="nearest neighbours")
    return results


def run(command: Knn) -> None:
    """Extracts features on all ranks; rank 0 searches, prints and writes."""
    sets = extract_sets(command)
    if sets is None:
        return
    results = knn_accuracy(
        sets.train,
        sets.test,
        class_names=sets.class_names,
        ks=command.k,
        temperature=command.temperature,
        confusion=command.figures is not None,
    )
    rows = [(f"k = {k}", sets.metric, result) for k, result in results.items()]
    table = classification_table(rows, mean=False)  # a mean over k would mean nothing
    print(table)
    if command.figures is not None:
        best = max(results, key=lambda k: results[k].value(sets.metric))
        title = f"{sets.test_name}, {best} nearest neighbours"
        path = command.figures / "confusion-knn.png"
        draw_confusion(results[best], sets.class_names, path, title=title)
    found = [{"k": k} | result.to_json() for k, result in results.items()]
    values = {"temperature": command.temperature, "results": found}
    write_results(command, sets.described(command) | values, table)
