"""Step time, images/s and efficiency on many GPUs: a model, not a measurement.

    unicl-bench scale --step-seconds 0.0864 [--gpus 8 64 512] [--network 100 400 3200] [--json FILE]

Efficiency is images/s compared with that of as many single machines; the last column names what
costs the most besides computing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unicl_fast.config import DeviceName, TrainConfig
from unicl_fast.presets import build_preset
from unicl_fast.system.checked_fields import require
from unicl_fast.system.machine import choose_device, free_memory
from unicl_fast.system.wording import count_of, markdown_table
from unicl_fast.training.memory_plan import plan as plan_memory

from ..harness import Stage, summarise
from ..step.parts import StepInParts, build_trainer, random_batch
from .model import Compute, Nccl, binding, simulate
from .sizes import ModelSize, measure_size

HOST_SECONDS = 0.02
"""Seconds in which the host launches a step: assumed."""
_GPUS_PER_NODE = 8
_BYTES_ON_CPU = 1.1e9
"""That a step may take by the memory plan where it is timed on a CPU; libraries and temporaries
take 0.7 GB more."""
_WITHOUT_UPDATE = ("images: activations", "texts: activations", "parameters", "gradients")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale(Stage):
    """Models training steps on many GPUs from a step on one: step time, images/s, efficiency."""

    gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of GPUs; beyond 8, whole machines of 8."""
    network: tuple[float, ...] = (100, 400, 3200)
    """Gb/s of a machine with 8 GPUs, all its network cards together (a DGX H100 has 8 of 400)."""
    preset: str = "swin-tiny"
    """Preset whose model is meant."""
    image_encoder: str = ""
    """A timm image encoder instead of the preset's."""
    text_encoder: tuple[int, int, int] = (0, 0, 0)
    """A text encoder instead of the preset's: width, layers, entries of a feature."""
    local_batch: int = 512
    """Images on a GPU, each with a text of its own."""
    step_seconds: float = 0.0
    """Seconds of a step on one GPU; 0 times a few steps here. On a CPU these are of as few images
    as fit into 2 GB, and are enlarged."""
    device: DeviceName = "auto"
    """Device of the step that is timed here."""

    def run(self) -> None:
        """Prints the table; ValueError for options that make no sense."""
        for count in self.gpus:
            require(
                count > 0 and (count < _GPUS_PER_NODE or count % _GPUS_PER_NODE == 0),
                f"--gpus: {count} GPUs do not fill machines of {_GPUS_PER_NODE}",
            )
        config = self._config()
        size = measure_size(config)
        compute, source = self._compute(config, size)
        rows = model_rows(self.gpus, self.network, size, compute, local_batch=self.local_batch)
        title = f"{self.image_encoder or self.preset}, {self.local_batch} images a GPU"
        print(f"MODEL, not measured: {title}; {1e3 * compute.total:.1f} ms a step: {source}\n")
        print(as_table(rows))
        figures = {
            f"{row['gpus']} GPUs, {row['network']:g} Gb/s, images/s": summarise([row["rate"]])
            for row in rows
        }
        parts = {"of_one_gpu": dataclasses.asdict(compute), "source": source}
        self.write_result(figures, kind="model, not measured", compute=parts, rows=rows)

    def _config(self) -> TrainConfig:
        config = build_preset(self.preset)
        model: dict[str, Any] = {}
        if self.image_encoder:
            model |= {"image_encoder": self.image_encoder}
        if any(self.text_encoder):
            width, layers, embed_dim = self.text_encoder
            text = {"text_width": width, "text_heads": width // 64, "text_layers": layers}
            model |= {**text, "embed_dim": embed_dim}
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, **model),
            run=dataclasses.replace(config.run, device=self.device),
        )

    def _compute(self, config: TrainConfig, size: ModelSize) -> tuple[Compute, str]:
        """The parts of a step of one GPU, and where their seconds come from."""
        require(
            self.step_seconds >= 0 and self.local_batch >= 1,
            f"--step-seconds must be at least 0 and --local-batch at least 1, not "
            f"{self.step_seconds:g} and {self.local_batch}",
        )
        if self.step_seconds:
            return Compute.split(self.step_seconds, size), "stated"
        config = timed_config(config, choose_device(self.device), local_batch=self.local_batch)
        count = config.run.global_batch_size
        batch = random_batch(count, pixels=config.data.image_size, num_texts=count)
        step = StepInParts(*build_trainer(config, batch))
        taken = [Compute.from_parts(_take(step)) for _ in range(1 + self.rounds)][1:]
        middle = sorted(taken, key=lambda one: one.total)[len(taken) // 2]
        source = f"timed here, on {step.device.type}"
        if count < self.local_batch:
            source += f", with {count_of(count, 'image')} and a text for each"
        return middle.enlarged(size, batch=count, local_batch=self.local_batch), source


def timed_config(config: TrainConfig, device: torch.device, *, local_batch: int) -> TrainConfig:
    """The config of a step that is timed here: of as many images as there is memory for.

    A CPU gives little of it: a machine that runs out of memory ends programs without a message.
    Raises ValueError if not even a step of one image fits.
    """
    is_cpu, free = device.type == "cpu", free_memory(device)
    size = local_batch
    while True:
        run = {"global_batch_size": size, "steps": 1 << 20}
        timed = config.changed(run=run)
        plan = plan_memory(timed, world_size=1, device_bytes=free, device_type=device.type)
        needed = sum(plan.parts[part] for part in _WITHOUT_UPDATE) if is_cpu else plan.total
        if needed <= (min(free, _BYTES_ON_CPU) if is_cpu and size > 1 else free):
            return timed
        require(
            size > 1,
            f"a step of one image takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free "
            "here: state the seconds of a step on one GPU by --step-seconds",
        )
        size = -(-size // 2)


def _take(step: StepInParts) -> dict[str, float]:
    """The seconds of each part of a step; on a CPU those of the update by the traffic of AdamW.

    Its averages of the gradients would take twice the memory of the weights.
    """
    if step.device.type != "cpu":
        return step.take()
    step.back_propagate()
    with torch.no_grad(), step.part("clip and update"):
        for parameter in step.trainer.model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=0.0)  # three passes over memory of eight
    step.trainer.optimizer.zero_grad()
    return step.seconds | {"clip and update": 8 / 3 * step.seconds["clip and update"]}


def model_rows(
    counts: Sequence[int],
    networks: Sequence[float],
    size: ModelSize,
    compute: Compute,
    *,
    local_batch: int,
    host_seconds: float = HOST_SECONDS,
) -> list[dict[str, Any]]:
    """A row for each network and number of GPUs; seconds of waits by collective.

    `compute` is a step of one GPU, which compares its images with its own texts.
    """
    rows = []
    for gbit in networks:
        network = Nccl(link_gbit=gbit, gpus_per_node=_GPUS_PER_NODE)
        steps = {}
        for count in (_GPUS_PER_NODE, *counts):
            grown = compute.on_ranks(count, size, local_batch=local_batch)
            batch = {"world_size": count, "num_texts": local_batch}
            step = simulate(grown, size, network, **batch, host_seconds=host_seconds)
            steps[count] = step, grown.total - compute.total
        for count in counts:
            step, growth = steps[count]
            rows.append(
                {
                    "network": gbit,
                    "gpus": count,
                    "seconds": step.seconds,
                    "rate": count * local_batch / step.seconds,
                    "efficiency": steps[_GPUS_PER_NODE][0].seconds / step.seconds,
                    "loss_growth": growth,
                    "waits": dict(step.waits),
                    "binds": binding(step, compute=compute.total, loss_growth=growth),
                }
            )
    return rows


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of Markdown."""
    head = ["Gb/s a machine", "GPUs", "step, ms", "images/s", "efficiency"]
    head += ["gradients, ms", "texts, ms", "loss, ms", "host, ms", "binds"]
    cells = []
    for row in rows:
        waits = row["waits"]
        of_texts = waits.get("texts", 0.0) + waits.get("text gradients", 0.0)
        of_loss = waits.get("loss statistics", 0.0) + row["loss_growth"]
        parts = (waits.get("gradients", 0.0), of_texts, of_loss, waits.get("host", 0.0))
        cells.append(
            [
                *(f"{row['network']:g}", f"{row['gpus']:,}", f"{1e3 * row['seconds']:.1f}"),
                *(f"{row['rate']:,.0f}", f"{100 * row['efficiency']:.1f} %"),
                *(f"{1e3 * part:.1f}" for part in parts),
                row["binds"],
            ]
        )
    return markdown_table(head, cells)
