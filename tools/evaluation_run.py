"""What `unicl-eval` does once its arguments are read: open, evaluate, report."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from unicl_fast.checkpoint import find_checkpoint, load_model
from unicl_fast.devices import choose_device
from unicl_fast.dist import Ranks, process_group
from unicl_fast.evaluation.retrieval import RetrievalResult
from unicl_fast.evaluation.zero_shot import ZeroShotResult
from unicl_fast.models.unicl import UniCL
from unicl_fast.prompts import read_templates
from unicl_fast.remote.object_store import is_url
from unicl_fast.shards import MANIFEST_NAME, PackedDataset
from unicl_fast.tools.build_dataset import build_dataset
from unicl_fast.tools.class_names import read_label_space
from unicl_fast.tools.evaluate import Retrieval, ZeroShot
from unicl_fast.tools.evaluations import evaluate_retrieval, evaluate_zero_shot, move_to_device
from unicl_fast.tools.launch import configure_logging
from unicl_fast.tools.temporary_folder import temporary_folder


def check_request(command: ZeroShot | Retrieval) -> None:
    """Refuses what can be told to be wrong before ranks are started or a model is loaded.

    Raises:
        ValueError: a number out of range.
        FileNotFoundError: no checkpoint, or no data.
    """
    if command.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {command.batch_size}")
    if isinstance(command, ZeroShot) and command.nproc < 1:
        raise ValueError(f"--nproc must be at least 1, not {command.nproc}")
    find_checkpoint(command.checkpoint)
    if isinstance(command, Retrieval):
        PackedDataset(command.data).close()


def run_zero_shot(command: ZeroShot) -> ZeroShotResult:
    """Evaluates on all ranks; rank 0 prints the table and writes the JSON."""
    with _model_on_ranks(command) as (model, ranks):
        packed = open_or_pack(
            command.data, class_names=command.class_names, templates=command.templates, ranks=ranks
        )
        with packed as dataset:
            result = evaluate_zero_shot(
                model,
                dataset,
                class_names=read_label_space(command.class_names).names
                if command.class_names
                else (),
                templates=read_templates(command.templates) if command.templates else (),
                ranks=ranks,
                batch_size=command.batch_size,
                progress=ranks.is_main,
            )
            num_quarantined = dataset.manifest.num_quarantined
        if ranks.is_main:
            _report(result, command, {"num_quarantined": num_quarantined})
            if num_quarantined:
                print(f"{num_quarantined} files were refused when packing; not counted above")
    return result


def run_retrieval(command: Retrieval) -> RetrievalResult:
    """Evaluates in this process, prints the table and writes the JSON."""
    with (
        _model_on_ranks(command) as (model, ranks),
        PackedDataset(command.data) as dataset,
    ):
        if ranks.world_size > 1:
            raise ValueError("retrieval compares all pictures with all captions in one process")
        result = evaluate_retrieval(model, dataset, batch_size=command.batch_size, progress=True)
        _report(result, command, {})
    return result


@contextlib.contextmanager
def open_or_pack(
    path: str | Path, *, class_names: str = "", templates: str = "", ranks: Ranks
) -> Iterator[PackedDataset]:
    """A packed data set as it is; class folders packed by rank 0 into a temporary folder."""
    if is_url(path) or (Path(path) / MANIFEST_NAME).is_file():
        with PackedDataset(path) as dataset:
            yield dataset
        return
    with contextlib.ExitStack() as stack:
        folder: list[Any] = [None]
        if ranks.is_main:
            folder[0] = str(stack.enter_context(temporary_folder("unicl-eval-")) / "packed")
            build_dataset(
                [path],
                folder[0],
                class_names=class_names,
                templates=templates,
                progress=sys.stderr.isatty(),
            )
        if ranks.world_size > 1:
            dist.broadcast_object_list(folder, src=0, group=ranks.host_group)
        yield stack.enter_context(PackedDataset(folder[0]))
        if ranks.world_size > 1:
            dist.barrier(group=ranks.host_group)  # rank 0 removes what the others still read


@contextlib.contextmanager
def _model_on_ranks(command: ZeroShot | Retrieval) -> Iterator[tuple[UniCL, Ranks]]:
    device = choose_device(command.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(device) as ranks:
        configure_logging(ranks)
        model = load_model(command.checkpoint, weights=command.weights)
        yield move_to_device(model, device), ranks


def _report(
    result: ZeroShotResult | RetrievalResult, command: ZeroShot | Retrieval, more: dict[str, Any]
) -> None:
    print(result.to_table())
    if command.json is not None:
        values = {
            "checkpoint": str(command.checkpoint),
            "weights": command.weights,
            "data": str(command.data),
        }
        values |= result.to_json() | more
        command.json.parent.mkdir(parents=True, exist_ok=True)
        command.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        print(f"written to {command.json}")
