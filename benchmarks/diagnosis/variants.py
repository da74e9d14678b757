"""Changes of settings that may make a run faster."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from unicl_fast.pipelines.loader import decoder_of

from .bench import Bench
from .loader_parts import image_kind
from .model import Change

_SMALLEST_BATCH = 64
"""Local batches below this are tried larger."""


def candidates(bench: Bench) -> list[Change]:
    """Changes worth a try with these settings; of one stage, those first that may gain the most."""
    return [*_of_step(bench), *_of_batch(bench), *_of_loader(bench)]


def _switch(group: str, name: str, value: Any, about: str, **more: Any) -> Change:
    option = f"--{group}.{name.replace('_', '-')} {value}"
    if isinstance(value, bool):
        option = f"--{group}.{'' if value else 'no-'}{name.replace('_', '-')}"
    return Change(option=option, about=about, set={group: {name: value}}, **more)


def _of_step(bench: Bench) -> Iterator[Change]:
    efficiency, device = bench.config.efficiency, bench.device.type
    make = functools.partial(_switch, "efficiency", side="step", stage="image encoder")
    other = "bf16" if efficiency.precision in ("fp32", "fp64") else "fp32"
    if 0 < efficiency.micro_batch_size < bench.local_batch:
        about = "encodes each image once; takes more memory"
        yield make("micro_batch_size", 0, about, stage="forward and backward")
    threads, cores = torch.get_num_threads(), int(bench.cores)
    if device == "cpu" and threads != cores:
        yield Change(
            option=f"OMP_NUM_THREADS={cores}", about="a thread of torch's operators for each core",
            stage="image encoder", side="nothing", compute_threads=cores,
        )  # fmt: skip
    if efficiency.activation_checkpointing:
        yield make("activation_checkpointing", False, "keeps activations; takes more memory")
    if efficiency.loss != "auto":
        yield make("loss", "auto", "the fastest form of the loss here")
    yield make("precision", other, "arithmetic of the encoders; rounds differently")
    if efficiency.compile == "off" and device == "cuda":
        yield make("compile", "blocks", "compiled encoders; a minute more at the start")


def _of_loader(bench: Bench) -> Iterator[Change]:
    data = bench.config.data
    make = functools.partial(_switch, "data", side="loader")
    decode = f"{image_kind(bench.parts['datasets'][0])} decode"
    cores = int(bench.cores)
    if data.threads < cores:
        yield make("threads", cores, "a thread for each core", stage=decode)
    if data.threads >= max(2, cores):
        yield make("threads", data.threads // 2, "fewer decoding threads", stage=decode)
    if bench.loader.augmentation is not None and bench.loader.plan.num_views == 1:
        yield Change(
            option="--data.augment none", about="only crops and flips", stage="augment",
            side="loader", set={"data": {"augment": ["none"]}}, same_results=False,
        )  # fmt: skip
    if data.resample == "dali" and bench.device.type == "cpu":
        yield make("resample", "fused", "our operators", stage="resize and flip")
    if data.prefetch:
        yield make("prefetch", 0, "as many batches ahead as fit their size", stage=decode)
    else:
        yield make("prefetch", 4, "more batches ahead", stage=decode)
    if bench.device.type == "cuda":
        other = "cpu" if decoder_of(data, bench.device).type == "cuda" else "gpu"
        yield make("decode_device", other, "levels differ a little", stage=decode)


def _of_batch(bench: Bench) -> Iterator[Change]:
    prompts, data = bench.parts["prompts"], bench.config.data
    several = int(max(prompts.num_templates, default=1)) > 1
    if bench.config.objective.name == "unicl" and several and data.templates == "per_sample":
        yield _switch(
            "data", "templates", "per_class", "as many prompts to encode as classes",
            side="both", stage="text encoder", same_results=False,
        )  # fmt: skip
    if bench.local_batch < _SMALLEST_BATCH:
        factor = max(2, _SMALLEST_BATCH // bench.local_batch)
        yield _switch(
            "run", "global_batch_size", factor * bench.config.run.global_batch_size,
            "fixed costs of a step are shared by more",
            side="both", stage="clip and update", same_results=False,
        )  # fmt: skip
