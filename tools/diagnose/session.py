"""The work of `unicl-bench run` on each rank: from a config to its diagnosis."""

import contextlib
import gc
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from unicl_fast.config import TrainConfig
from unicl_fast.config_json import config_to_dict
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_objects
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.system.machine import choose_device, keep_freed_memory
from unicl_fast.system.program import logging_at

from .advise import Advice, advise
from .bench import Bench
from .deadline import Budget
from .diagnose import LONGER, Diagnoser
from .model import Change, Measured, Trial
from .report import Diagnosis, Stored

_MOST_PASSES = 4


def measure(
    config: TrainConfig,
    budget: Budget,
    *,
    applies: bool,
    rounds: int,
    samples: int,
    scratch: Path,
    note: Callable[[Diagnosis], None],
) -> None:
    """Measures a run, with options of `unicl-bench run`; raises as `unicl-pretrain` does.

    Rank 0 calls `note` with each new result; `scratch` is an empty folder.
    """
    stored: Stored = "does" if config.efficiency.stored_features else ""
    if stored:  # what takes time is encoding; standardising needs the stored features
        config = config.changed(
            efficiency={"stored_features": ""}, model={"standardise": False, "feature_noise": 0.0}
        )
    with contextlib.suppress(ValueError):
        config.changed(efficiency={"stored_features": "features"})
        stored = stored or "could"
    applied: list[dict[str, Any]] = []
    refused: set[str] = set()
    with on_ranks(config) as (ranks, device):
        for number in range(_MOST_PASSES):
            if number:
                budget.begin("building the run with the change")
                budget.deadline = time.monotonic() + budget.most_seconds
            place = Path(tempfile.mkdtemp(dir=scratch))
            with on_bench(config, place, ranks=ranks, device=device) as bench:
                budget.begin("the run as it is")

                def tell(measured: Measured, bench: Bench = bench) -> None:
                    if ranks.is_main:
                        note(_diagnosis(measured, bench, samples, applied, stored))

                diagnoser = Diagnoser(bench, budget, folder=place, rounds=rounds, report=tell)
                measured = diagnoser.diagnose()
                tell(measured)
                best = _best(bench, measured, refused) if applies else None
                if best is None:
                    return
                gains = gains_again(diagnoser, measured, best.change)
                is_kept = from_rank_0(min(gains) > 0, ranks)
                change = {"option": best.change.option, "gain": best.gain}
                applied.append(change | {"again": list(gains), "is_kept": is_kept})
                tell(measured)
            if is_kept:
                config = config.changed(**best.change.set)
                torch.set_num_threads(best.change.compute_threads or torch.get_num_threads())
            else:
                refused.add(best.change.option)


def gains_again(diagnoser: Diagnoser, measured: Measured, change: Change) -> tuple[float, ...]:
    """The gains of a change in longer turns; 0 if it cannot be measured again."""
    found: Trial | str = next(one for one in measured.trials if one.change.option == change.option)
    if isinstance(found, Trial) and not found.is_again:
        found = diagnoser.trial(change, by_cpu=measured.by_cpu, turns=LONGER)
    return found.gains(by_cpu=measured.by_cpu) if isinstance(found, Trial) else (0.0,)


def _best(bench: Bench, measured: Measured, refused: set[str]) -> Advice | None:
    """The best advice that options can follow and that does not change the model."""
    useful = {one.change.option: one for one in advise(measured)[0]
              if one.change.side != "images" and one.change.same_results
              and one.change.option not in refused}  # fmt: skip
    option = from_rank_0(next(iter(useful), ""), bench.ranks)  # ranks measure different gains
    is_everywhere = all(gather_objects(option in useful, bench.ranks))
    return useful[option] if is_everywhere else None


def _diagnosis(
    measured: Measured,
    bench: Bench,
    samples: int,
    applied: list[dict[str, Any]],
    stored: Stored,
) -> Diagnosis:
    run = bench.config.run
    hours = (samples or run.total_steps * run.global_batch_size) / measured.rate / 3600
    config = config_to_dict(bench.config)
    return Diagnosis(
        measured=measured, hours=hours, applied=list(applied), config=config,
        num_images=sum(map(len, bench.parts.datasets)), stored=stored,
    )  # fmt: skip


@contextlib.contextmanager
def on_ranks(config: TrainConfig) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks of a run, and this one's device."""
    keep_freed_memory()
    device = choose_device(config.run.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    observers = logging.getLogger("unicl_fast.training.observers")
    observers.addHandler(logging.NullHandler())
    with (
        logging_at("unicl_fast", logging.ERROR),  # silences the start of each part
        logging_at(observers.name, logging.INFO),  # or evaluations go to stderr
        process_group(device, timeout_seconds=config.run.timeout_seconds) as ranks,
    ):
        yield ranks, device


@contextlib.contextmanager
def on_bench(
    config: TrainConfig, scratch: Path, *, ranks: Ranks, device: torch.device
) -> Iterator[Bench]:
    """A run on this rank's bench; caches of object stores start empty."""
    config = config.changed(data={"cache_folder": str(scratch / "cache")})
    bench = Bench(config, folder=scratch / "run", ranks=ranks, device=device)
    with contextlib.closing(bench):
        # each measurement collects garbage first: 0.3 s, unless the survivors are frozen
        gc.collect()
        gc.freeze()
        try:
            yield bench
        finally:
            gc.unfreeze()
