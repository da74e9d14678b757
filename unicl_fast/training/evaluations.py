"""Evaluations of a run: taken at their steps, written down, made up for when a stop cut them off.

What an evaluation computes is its own business (zero_shot.py); when it is due, and what becomes of
the best one, the trainer's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping

import torch
from tqdm import tqdm

from unicl_fast.distributed.ranks import Ranks, from_rank_0
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.progress import EvaluationStopped, WaitingForRanks, stopping_when
from unicl_fast.training.metrics import MetricsWriter, unwritten_evaluations

Evaluation = Callable[[UniCL], Mapping[str, float]]


def evaluate_by_name(
    evaluations: Mapping[str, Evaluation],
    names: Collection[str],
    model: UniCL,
    *,
    step: int,
    ranks: Ranks,
    metrics: MetricsWriter | None,
    begin: Callable[[str], None],
    is_stopped: Callable[[], bool],
) -> dict[str, float] | None:
    """Numbers of the named evaluations, as `name/key`; each is written as soon as it is there.

    Args:
        evaluations: all that the run has.
        names: those to take.
        model: what to evaluate; all ranks call this together.
        step: for the records.
        ranks: this process among its peers.
        metrics: where lines go, on rank 0.
        begin: told the name of each that begins.
        is_stopped: asked between batches.

    Returns:
        None, the same on all ranks, if they were stopped before their end.
    """
    values: dict[str, float] = {}
    try:
        with stopping_when(is_stopped):
            for name in names:
                begin(name)
                found = _evaluate_one(evaluations[name], model.eval(), ranks)
                named = {f"{name}/{key}": value for key, value in found.items()}
                if metrics is not None:
                    metrics.write({"step": step, **named})
                    shown = ", ".join(f"{key} {value:.4g}" for key, value in named.items())
                    tqdm.write(f"step {step}: {shown}", file=sys.stderr)
                values |= named
    except EvaluationStopped:
        return None
    return values


def owed_evaluations(
    lines: list[dict[str, float]], names: Collection[str], *, step: int, ranks: Ranks
) -> list[str]:
    """Those of a step that was due which were cut off: they have no line yet.

    Args:
        lines: of metrics.jsonl, on rank 0.
        names: of all evaluations.
        step: where the run goes on from.
        ranks: they all get what rank 0 finds.
    """
    owed = unwritten_evaluations(lines, names, step=step) if ranks.is_main else []
    found: list[str] = from_rank_0(owed, ranks)
    return found


def _evaluate_one(evaluation: Evaluation, model: UniCL, ranks: Ranks) -> Mapping[str, float]:
    if ranks.world_size > 1:
        # DDP gives rank 0's BatchNorm averages to the others before a forward pass, not after
        with WaitingForRanks():
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
    return evaluation(model)
