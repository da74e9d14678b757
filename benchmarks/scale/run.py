"""Step time, images/s and efficiency on many GPUs: a model, not a measurement.

    unicl-bench scale --step-seconds 0.0864 [--gpus 8..1024] [--network 100 400 3200] [--plot FILE]
    unicl-bench scale --measured REPORT/gpu.json --local-batch 256
    unicl-bench scale --check [--json FILE]

Its parts are a step of one GPU that sends nothing (stated, from a report of `unicl-bench gpu`, or
timed here), the bytes of each collective, and the rates and latencies of links; model.py puts them
together. Efficiency is images/s against so many single machines; the last column names what costs
the most beside computing. `--check` compares the model with real ranks on slow links (check.py).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unicl_fast.config import TrainConfig
from unicl_fast.presets import build_preset

from ..harness import Figures, Stage, summarise
from ..step.parts import StepInParts, build_trainer, random_batch
from .check import run_check
from .model import Compute, ModelSize, Nccl, StepTime, binding, measure_size, simulate

TOLERANCE = 0.15
"""How far the model may be from a measured step on slow links, in the median over rounds."""
_INK, _FAINT = "#1f2933", "#9aa5b1"
_COLOURS = ("#c1440e", "#2563a8", "#5b8c5a", "#8a6bb1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale(Stage):
    """Models training steps on many GPUs from the parts of one: step time, images/s, efficiency."""

    gpus: str = "8..1024"
    """Numbers of GPUs: from..to in powers of two, or a list with commas."""
    network: tuple[float, ...] = (100, 400, 3200)
    """Gb/s of one machine, all its network cards together (a DGX H100 has 8 of 400)."""
    preset: str = "swin-tiny"
    """Preset whose model is meant."""
    image_encoder: str = ""
    """Another timm image encoder than the preset's."""
    text_encoder: tuple[int, int, int] = (0, 0, 0)
    """Another text encoder than the preset's: width, layers, entries of a feature."""
    local_batch: int = 512
    """Images of a GPU, each with a text of its own."""
    step_seconds: float = 0.0
    """Seconds of a step on one GPU. 0 takes those of --measured, or else a few steps here."""
    measured: Path | None = None
    """gpu.json of `unicl-bench gpu`, whose steps are Swin-T's."""
    host_seconds: float = 0.02
    """Seconds in which the host launches a step; then it exchanges the numbers of texts."""
    gpus_per_node: int = 8
    """GPUs of a machine."""
    nvlink: float = 360.0
    """GB/s of a GPU to the others of its machine: 80 % of an H100's 450 in each direction."""
    achieved: float = 0.85
    """Part of the network's rate that collectives reach: assumed."""
    plot: Path | None = None
    """File for a plot of the efficiencies, as PNG."""
    check: bool = False
    """Compare the model with trainers in network namespaces on slow links; needs root and tc."""
    check_ranks: tuple[int, ...] = (2, 4)
    """Ranks of the check, each with one thread."""
    check_mbit: tuple[float, ...] = (100, 200, 500)
    """Mb/s of each rank's link in the check."""

    def run(self) -> None:
        """Prints the table, and writes plot and JSON if they are wanted.

        Raises:
            ValueError: options that say nothing sensible, or a report without such a step.
            RuntimeError: the check found the model off by more than `TOLERANCE`, or cannot run.
        """
        if self.check:
            self._check()
            return
        counts = parse_counts(self.gpus, per_node=self.gpus_per_node)
        config = self._config()
        size = measure_size(config)
        compute, source = self._compute(config, size)
        rows = model_rows(self, counts, size, compute)
        title = f"{self.image_encoder or self.preset}, {self.local_batch} images a GPU"
        print(f"MODEL, not measured: {title}; {1e3 * compute.total:.1f} ms a step: {source}\n")
        print("\n".join(format_rows(rows)))
        if self.plot is not None:
            plot(rows, self.plot, title=title)
        figures = {
            f"{row['gpus']} GPUs, {row['network']:g} Gb/s, images/s": summarise([row["rate"]])
            for row in rows
        }
        parts = {"of_one_gpu": dataclasses.asdict(compute), "source": source}
        self.write_result(figures, kind="model, not measured", compute=parts, rows=rows)

    def _config(self) -> TrainConfig:
        config = build_preset(self.preset)
        model = config.model
        if self.image_encoder:
            model = dataclasses.replace(model, image_encoder=self.image_encoder)
        if any(self.text_encoder):
            width, layers, embed_dim = self.text_encoder
            model = dataclasses.replace(
                model,
                text_width=width,
                text_heads=width // 64,
                text_layers=layers,
                embed_dim=embed_dim,
            )
        return dataclasses.replace(config, model=model)

    def _compute(self, config: TrainConfig, size: ModelSize) -> tuple[Compute, str]:
        """The parts of a step of one GPU, and where their seconds come from."""
        if self.step_seconds < 0 or self.local_batch < 1:
            raise ValueError(
                f"--step-seconds must be at least 0 and --local-batch at least 1, not "
                f"{self.step_seconds:g} and {self.local_batch}"
            )
        split = functools.partial(
            Compute.split, size=size, local_batch=self.local_batch, num_texts=self.local_batch
        )
        if self.step_seconds:
            return split(self.step_seconds), "stated"
        if self.measured is not None:
            seconds = step_seconds_of(self.measured, self.local_batch)
            return split(seconds), "from a report of unicl-bench gpu"
        run = dataclasses.replace(config.run, global_batch_size=self.local_batch, steps=1 << 20)
        config = dataclasses.replace(config, run=run)
        batch = random_batch(
            self.local_batch, pixels=config.data.image_size, num_texts=self.local_batch
        )
        step = StepInParts(*build_trainer(config, batch))
        taken = [Compute.from_parts(step.take()) for _ in range(1 + self.rounds)][1:]
        middle = sorted(taken, key=lambda one: one.total)[len(taken) // 2]
        return middle, f"timed here, on {step.device.type}"

    def _check(self) -> None:
        print(
            "| ranks | Mb/s a link | measured, s | modelled, s | difference | without overlap "
            "| computing, s |\n|---|---|---|---|---|---|---|",
            flush=True,
        )
        figures: Figures = {}
        errors: dict[str, float] = {}
        for row in run_check(ranks=self.check_ranks, rates=self.check_mbit, rounds=self.rounds):
            name = f"{row.ranks} ranks, {row.link_mbit:g} Mb/s"
            errors[name] = row.error
            found = {
                "measured, s": row.measured,
                "modelled, s": row.modelled,
                "computing, s": row.compute,
                "without overlap, s": row.without_overlap,
                "a hop, us": [row.hop_us],
            }
            figures |= {f"{name}: {key}": summarise(values) for key, values in found.items()}
            cells = [summarise(values) for values in (row.measured, row.modelled, row.compute)]
            seconds = [
                f"{one['median']:.2f} ({one['low']:.2f} to {one['high']:.2f})" for one in cells
            ]
            print(
                f"| {row.ranks} | {row.link_mbit:g} | {seconds[0]} | {seconds[1]} "
                f"| {100 * row.error:+.1f} % | {100 * row.error_without_overlap:+.1f} % "
                f"| {seconds[2]} |",
                flush=True,
            )
        self.write_result(figures, kind="check of the model")
        if wrong := [name for name, error in errors.items() if abs(error) > TOLERANCE]:
            raise RuntimeError(
                f"the model is off by more than {TOLERANCE:.0%}: {'; '.join(wrong)}. On a machine "
                "that computes for others too, parts and steps differ from round to round: take "
                "more --rounds"
            )


def parse_counts(text: str, *, per_node: int) -> list[int]:
    """Reads `8..64` as 8, 16, 32, 64, and `8,24` as it stands.

    Raises:
        ValueError: neither, or GPUs that leave a machine of `per_node` half empty.
    """
    if found := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = map(int, found.groups())
        counts = [first << power for power in range(32) if first and first << power <= last]
    else:
        counts = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if not counts or min(counts) < 1:
        raise ValueError(
            f"--gpus must be a range such as 8..1024 or a list such as 8,64,512, not {text!r}"
        )
    if wrong := [count for count in counts if count > per_node and count % per_node]:
        raise ValueError(f"--gpus: {wrong[0]} GPUs do not fill machines of {per_node}")
    return counts


def step_seconds_of(report: Path, local_batch: int) -> float:
    """Seconds of Swin-T's step in a report of `unicl-bench gpu`.

    Raises:
        ValueError: it was a dry run, or has no step of this local batch.
    """
    content = json.loads(report.read_text(encoding="utf-8"))
    if content.get("dry_run", True):
        raise ValueError(f"{report} is no report of a GPU: --measured needs one, not a dry run's")
    figures = content["stages"].get("step", {}).get("figures", {})
    found = {
        int(size[1]): figure["median"]
        for name, figure in figures.items()
        if (size := re.fullmatch(r"swin-tiny, bf16, (\d+)", name)) and "median" in figure
    }
    if local_batch not in found:
        raise ValueError(
            f"{report} has no step of {local_batch} images; --local-batch can be "
            f"{', '.join(map(str, sorted(found))) or 'none: its stage `step` was not done'}"
        )
    return local_batch / float(found[local_batch])


def model_rows(
    options: Scale, counts: Sequence[int], size: ModelSize, compute: Compute
) -> list[dict[str, Any]]:
    """A row for each network and number of GPUs; seconds of waits by collective."""
    batch = options.local_batch
    rate = size.step_operations(batch, batch) / compute.total

    def step_on(count: int, network: Nccl) -> tuple[StepTime, Compute]:
        # the step of one GPU compared with its own texts
        grown = compute.with_columns((count - 1) * batch, size, local_batch=batch, rate=rate)
        step = simulate(
            grown,
            size,
            network,
            world_size=count,
            num_texts=batch,
            host_seconds=options.host_seconds,
        )
        return step, grown

    rows = []
    for gbit in options.network:
        network = Nccl(
            link_gbit=gbit,
            gpus_per_node=options.gpus_per_node,
            nvlink_gbyte=options.nvlink,
            achieved=options.achieved,
        )
        of_node, _ = step_on(options.gpus_per_node, network)
        for count in counts:
            step, grown = step_on(count, network)
            growth = grown.total - compute.total
            rows.append(
                {
                    "network": gbit,
                    "gpus": count,
                    "seconds": step.seconds,
                    "rate": count * batch / step.seconds,
                    "efficiency": of_node.seconds / step.seconds,
                    "loss_growth": growth,
                    "waits": dict(step.waits),
                    "binds": binding(step, compute=compute.total, loss_growth=growth),
                }
            )
    return rows


def format_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as a table of Markdown."""
    lines = [
        "| Gb/s a machine | GPUs | step, ms | images/s | efficiency | gradients, ms | texts, ms "
        "| loss, ms | host, ms | binds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        waits = row["waits"]
        of_texts = waits.get("texts", 0.0) + waits.get("text gradients", 0.0)
        of_loss = waits.get("loss statistics", 0.0) + row["loss_growth"]
        parts = (waits.get("gradients", 0.0), of_texts, of_loss, waits.get("text counts", 0.0))
        cells = [
            f"{row['network']:g}",
            f"{row['gpus']:,}",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['rate']:,.0f}",
            f"{100 * row['efficiency']:.1f} %",
            *(f"{1e3 * part:.1f}" for part in parts),
            row["binds"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Efficiency by GPUs, a line for each network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    panel = figure.subplots()
    networks = list(dict.fromkeys(row["network"] for row in rows))
    for number, gbit in enumerate(networks):
        chosen = [row for row in rows if row["network"] == gbit]
        counts = [row["gpus"] for row in chosen]
        values = [100 * row["efficiency"] for row in chosen]
        colour = _COLOURS[number % len(_COLOURS)]
        label = f"{gbit:g} Gb/s"
        panel.plot(counts, values, "o-", color=colour, label=label, markersize=4, linewidth=1.5)
    panel.legend(loc="lower left", fontsize=8, frameon=False)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted({row["gpus"] for row in rows}), minor=False)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.set_ylim(0, 105)
    panel.axhline(100, color=_FAINT, linestyle="--", linewidth=1)
    panel.set_xlabel("GPUs; Gb/s are those of a machine", fontsize=8)
    panel.set_ylabel("% of so many single machines", fontsize=8)
    panel.set_title(f"Model, not measured: {title}", fontsize=10, color=_INK)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
