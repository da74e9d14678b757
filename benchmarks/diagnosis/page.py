"""A diagnosis as one HTML page that needs nothing else (`unicl_fast.system.pages`).

The page is the template page.html beside this file; here are its numbers in words. Bars of stages
are elements of the page, which wrap on a phone as its texts do; charts.py draws what has an axis.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unicl_fast.system.pages import fill_page
from unicl_fast.system.wording import count_of

from .advise import LEAST_GAIN
from .charts import PARTS, Bar, draw_bars, draw_timeline, part_of
from .earlier import Comparison, Peers
from .model import CHECKPOINT, Cost, Measured, Stage
from .report import (
    SIDES,
    Diagnosis,
    Table,
    advice_table,
    change_table,
    checkpoint_sentence,
    peer_rates,
    plan_table,
    rate_text,
    time_of,
    waits_sentence,
)

_STORE = "object store"


def make_page(
    found: Diagnosis,
    result: Mapping[str, Any],
    *,
    comparison: Comparison | None,
    peers: Sequence[Peers],
) -> str:
    """The page as text, to be written in UTF-8; `result` is the JSON with machine and options."""
    measured, machine = found.measured, result["machine"]
    steps = measured.timeline
    batch = found.largest_batch
    return fill_page(
        Path(__file__).with_name("page.html"),
        rate=f"{measured.rate:,.0f}",
        about=_about(found),
        tiles=_tiles(found),
        limit=found.limit,
        comparison=comparison,
        changes=None if comparison is None else change_table(comparison),
        boxes=_boxes(found),
        together=_together(found),
        ranks=_ranks(found),
        num_steps=len(steps),
        timeline=draw_timeline(steps, measured.made_meanwhile) if steps else None,
        waits=waits_sentence(measured),
        legend=_legend(measured),
        advice=advice_table(found.useful),
        idle=advice_table(found.idle),
        tried=found.tried_sentence(),
        not_measured=measured.not_measured,
        peers=[_peers(each, found, machine) for each in peers],
        plan_sentence=found.plan_sentence(),
        batch_sentence=(
            f"By the memory plan, the largest local batch that fits has {count_of(batch, 'image')}."
            if batch
            else "By the memory plan, no local batch fits."
        ),
        start_seconds=measured.start_seconds,
        checkpoint=checkpoint_sentence(measured),
        plan=plan_table(found),
        machine=_machine(measured, machine),
        command=shlex.join(["unicl-bench", "run", *map(str, result["settings"]["given"])]),
        settings=json.dumps(found.config, indent=1),
    )


def _about(found: Diagnosis) -> str:
    measured, config = found.measured, found.config
    return (
        f"{config['model']['image_encoder']} on {', '.join(config['data']['train'])}: "
        f"{count_of(measured.world_size, 'rank')} on {measured.device}, a local batch of "
        f"{count_of(measured.local_batch, 'image')} of {config['data']['image_size']} pixels, "
        f"{config['efficiency']['precision']}"
    )


def _tiles(found: Diagnosis) -> list[tuple[str, str]]:
    measured = found.measured
    tiles = [(f"{measured.rate:,.0f}", "images/s"), (found.limit.stage, "is the bottleneck")]
    if found.useful:
        best = found.useful[0]
        option = textwrap.shorten(best.variant.option, 40, placeholder=" ...")
        tiles.append((f"{best.gain:+.0%}", f"by {option}"))
    else:
        tiles.append((f"< {LEAST_GAIN:.0%}", "by any change that was tried"))
    if measured.timeline:
        tiles.append((f"{_part(measured, 'data_wait'):.0%}", "of the time waits for batches"))
    plan = found.plans[0]
    tiles.append((time_of(plan.hours), f"for the whole run on {count_of(plan.ranks, 'rank')}"))
    return tiles


def _boxes(found: Diagnosis) -> list[dict[str, Any]]:
    """The chapters of the batch's way, each with its stages."""
    measured, limit = found.measured, found.limit
    slowest = _STORE if limit.resource == "store" else limit.stage
    walls = [measured.store_wall, *(stage.cost.wall for stage in measured.stages)]
    longest = max(walls) or 1.0

    def shown(stage: Stage) -> dict[str, Any]:
        return {
            "name": stage.name,
            "rate": rate_text(stage.cost),
            "cpu": f"{1e3 * stage.cost.cpu:.3f} ms CPU",
            "width": 100 * stage.cost.wall / longest,
            "note": stage.note,
            "is_limit": stage.name == slowest,
        }

    boxes: list[dict[str, Any]] = []
    if measured.store_wall:
        store = Stage(name=_STORE, cost=Cost(wall=measured.store_wall, cpu=0.0), side="")
        boxes.append({"title": "in the first epoch", "stages": [shown(store) | {"cpu": ""}]})
    for side, title in SIDES.items():
        if stages := [shown(stage) for stage in measured.stages if stage.side == side]:
            boxes.append({"title": title, "stages": stages})
    one = measured.checkpoint
    checkpoint = {
        "name": CHECKPOINT,
        "rate": f"the step waits {one.blocking_seconds:.3f} s",
        "cpu": "",
        "width": None,
        "note": f"{one.num_bytes / 1e6:,.1f} MB, written in {one.writing_seconds:.2f} s",
        "is_limit": slowest == CHECKPOINT,
    }
    every = f"every {one.every_steps:,} steps" if one.every_steps else "at the end"
    boxes.append({"title": every, "stages": [checkpoint]})
    return [box | {"is_slow": any(one["is_limit"] for one in box["stages"])} for box in boxes]


def _together(found: Diagnosis) -> list[dict[str, Any]]:
    """Rates on a rank of the three resources, and of all of it."""
    measured = found.measured
    seconds = measured.resources()
    slowest = max(seconds, key=lambda name: seconds[name])
    names = {
        "loader": "the loader alone",
        "step": "the step alone",
        "cores": "both, on the cores that are left",
    }
    rates = {text: 1 / seconds[name] for name, text in names.items()}
    rates["all together, as measured"] = 1 / measured.whole.wall
    top = max(rates.values())
    return [
        {
            "name": name,
            "rate": f"{rate:,.0f} images/s",
            "width": 100 * rate / top,
            "is_limit": name == names[slowest],
        }
        for name, rate in rates.items()
    ]


def _ranks(found: Diagnosis) -> Table | None:
    measured = found.measured
    if measured.world_size == 1:
        return None
    mark = ", the bottleneck"
    rows = [
        [
            f"rank {one.rank}{mark if found.limit.stage == f'rank {one.rank}' else ''}",
            f"{1 / one.loader:,.0f}",
            f"{1 / one.step:,.0f}" if one.step else "-",
        ]
        for one in measured.ranks
    ]
    return ["rank", "loader alone, images/s", "step by itself, images/s"], rows


def _part(measured: Measured, name: str) -> float:
    """The part of the time line's time that a part of the steps takes."""
    parts = [item for step in measured.timeline for item in step.parts.items()]
    total = sum(seconds for _, seconds in parts)
    mine = sum(seconds for each, seconds in parts if part_of(each) == name)
    return mine / total if total else 0.0


def _legend(measured: Measured) -> list[tuple[str, str]]:
    shown = [
        (name, f"{text}, {_part(measured, name):.0%}")
        for name, text in PARTS.items()
        if _part(measured, name) >= 0.005
    ]
    if any(step.made is not None for step in measured.timeline):
        shown = [
            ("made", "the loader plans and reads the batch"),
            ("ready", "it is decoded and kept ready"),
            *shown,
        ]
    return shown


def _peers(peers: Peers, found: Diagnosis, machine: Mapping[str, Any]) -> dict[str, Any]:
    config, rates = found.config, peer_rates(peers, found.measured)
    part = "loader" if peers.is_of_loader else "step"
    own = {
        "image_size": config["data"]["image_size"],
        "batch_size": found.measured.local_batch,
        **({"threads": found.measured.threads} if peers.is_of_loader else {}),
        **({} if peers.is_of_loader else {"image_encoder": config["model"]["image_encoder"]}),
        **{key: machine[key] for key in ("processor", "cores", "gpu") if key in machine},
    }
    differences = peers.differences(own)
    bars = [
        Bar(name=name, rate=rate, is_ours=name.startswith(("this run", "unicl_fast")))
        for name, rate in rates.items()
    ]
    title = f"The {part}, from {peers.file}"
    return {
        "title": title,
        "about": f"Measured by unicl-bench on {peers.settings.get('data', 'data of its own')}, "
        f"at commit {peers.machine.get('commit', 'unknown')}. A run's own {part} also does what "
        "the run asks of it, such as texts and augmentation.",
        "differences": f"Under other conditions than this run: {'; '.join(differences)}."
        if differences
        else "",
        "chart": draw_bars(bars, label=title),
    }


def _machine(measured: Measured, machine: Mapping[str, Any]) -> list[list[str]]:
    rows = [[name, _shown(value)] for name, value in machine.items()]
    return [
        *rows,
        ["cores of a rank", f"{measured.cores:g}"],
        ["decoding threads of a rank", str(measured.threads)],
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)
