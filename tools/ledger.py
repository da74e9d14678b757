"""`unicl-ledger`: proves from a run's ledger that no step is missing and no sample was left out."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from unicl_fast.dataset.weights import WeightedDraws
from unicl_fast.distributed.launch import stop
from unicl_fast.ledger.format import LEDGER_FOLDER, SegmentHeader, read_weighted
from unicl_fast.ledger.proof import LedgerProof, Run, prove
from unicl_fast.system.checksums import parse_checksummed_json
from unicl_fast.system.program import begin_program
from unicl_fast.system.untrusted_files import read_file
from unicl_fast.system.wording import count_of, print_text

from .numbers import plain_numbers

_MOST_LINES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerArguments:
    """Reads the ledger of a run (unicl-pretrain --ledger) and says whether it is a proof.

    Proven: every step from the first to the last has a record of every rank, across all restarts
    and changes of the number of ranks; each complete epoch of each data set scheduled each sample
    exactly once (with data.sample_weights=draws as often as its weight says), and the epoch in
    progress none more often. The proof needs only the sample ids in the ledger, and does not trust
    the program that planned them. It counts substitutes for damaged samples, and steps done twice
    because the run resumed from a checkpoint. The run can still be in progress.

    Exit code: 0 proven, 1 not proven, 2 wrong input, such as a missing ledger.

    Example: unicl-ledger runs/first --json ledger.json
    """

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    json: Path | None = None
    """Also write the result, with all substitutes, into this file."""
    replan: bool = False
    """Also plan the whole run again from its seed, and compare every draw with the ledger."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 1 if nothing is proven, 2 on wrong input."""
    argv = begin_program() if argv is None else list(argv)
    arguments = tyro.cli(LedgerArguments, args=argv, prog="unicl-ledger", registry=plain_numbers())
    try:
        steps_done, run = newest_checkpoint(arguments.run)
        folder = arguments.run / LEDGER_FOLDER
        replan = Replan(folder) if arguments.replan else None
        proof = prove(folder, steps_done=steps_done, run=run, watch=replan)
    except (ValueError, FileNotFoundError) as error:
        stop("unicl-ledger", error, code=2)
    except OSError as error:
        stop("unicl-ledger", error, code=1)
    except MemoryError as error:  # one byte a sample
        too_large = MemoryError(f"{folder} describes data sets too large for any memory: {error}")
        stop("unicl-ledger", too_large, code=1)
    print_text(in_words(proof), sys.stdout)
    values = as_json(proof)
    if replan is not None:
        print_text(replan.in_words(), sys.stdout)
        values["num_different_from_plan"] = replan.num_different
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            stop("unicl-ledger", error, code=2)
    sys.exit(0 if proof.holds and not (replan and replan.num_different) else 1)


def newest_checkpoint(run_folder: Path) -> tuple[int, Run | None]:
    """Returns the newest checkpoint's steps, by its name (0 without one), and its run.

    The run is None if state.json is damaged; then only the steps are compared.
    """
    folders = (run_folder / "checkpoints").glob("step-*")
    steps = {int(path.name[5:]): path for path in folders if path.name[5:].isdecimal()}
    if not steps:
        return 0, None
    newest = max(steps)
    try:
        state = parse_checksummed_json(read_file(steps[newest] / "state.json"))
        sizes = [source["num_samples"] for source in state["data"]["sources"]]
        settings = state["config"]["run"]
        run_id = str(state["run_id"])
        return newest, Run(run_id, settings["seed"], settings["global_batch_size"], sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return newest, None


class Replan:
    """Plans the draws of a ledger again (a `watch` of `prove`), and counts those that differ."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._weighted = folder, dict[int, WeightedDraws]()
        self.num_draws = 0
        self.num_different = 0
        self._first = ""

    def __call__(
        self,
        header: SegmentHeader,
        first_step: int,
        source_ids: NDArray[np.int64],
        ids: NDArray[np.int64],
    ) -> None:
        """Compares the draws [steps n] of some steps."""
        from unicl_fast.pipelines.plan.plan import schedule_draws

        if not self.num_draws:
            self._weighted = read_weighted(self._folder, header)
        draws = header.draws_before(first_step) + np.arange(ids.size, dtype=np.int64)
        planned_sources, planned = schedule_draws(
            draws, sizes=[source.num_samples for source in header.sources], seed=header.seed,
            weights=header.shares, global_batch_size=header.global_batch_size,
            shuffle_window=header.shuffle_window, shuffle_groups=header.shuffle_groups,
            weighted=self._weighted,
        )  # fmt: skip
        different = (planned != ids.reshape(-1)) | (planned_sources != source_ids.reshape(-1))
        self.num_draws += ids.size
        self.num_different += int(np.count_nonzero(different))
        if different.any() and not self._first:
            at = int(np.argmax(different))
            step, index = divmod(at, header.global_batch_size)
            self._first = (
                f"; the first at step {first_step + step}, global index {index}: planned was "
                f"sample {planned[at]} of source {planned_sources[at]}, the ledger has "
                f"{ids.reshape(-1)[at]} of {source_ids.reshape(-1)[at]}"
            )

    def in_words(self) -> str:
        return f"planned again: {self.num_different} of {self.num_draws} draws differ{self._first}"


def in_words(proof: LedgerProof) -> str:
    sizes = [segment.header.world_size for segment in proof.starts]
    batch = count_of(proof.global_batch_size, "sample")
    if proof.has_stages:
        batch = f"several stages, {count_of(proof.num_draws, 'sample')} in all,"
    lines = [
        f"{count_of(proof.steps, 'step')} of {batch} "
        f"{'is' if proof.steps == 1 else 'are'} covered, "
        f"by {count_of(len(sizes), 'start')} of the program on "
        f"{', then '.join(count_of(size, 'rank') for size, _ in itertools.groupby(sizes))}; "
        f"{count_of(proof.num_superseded, 'step')} of them were done twice, after resuming"
    ]
    lines += [
        f"{source.name}: {count_of(source.draws, 'draw')} "
        f"of {count_of(source.num_samples, 'sample')}, "
        f"{count_of(source.complete_epochs, 'epoch')} complete; lost {source.lost}, "
        f"scheduled twice in an epoch {source.scheduled_twice}"
        for source in proof.sources
    ]
    lines.append(f"substitutes were shown for {count_of(proof.num_substituted, 'draw')}")
    by_count = sorted(proof.substitutes.items(), key=lambda item: -item[1].total())
    for (source, sample), shown in by_count[:_MOST_LINES]:
        others = ", ".join(map(str, sorted(shown)[:_MOST_LINES]))
        lines.append(
            f"  for sample {sample} of {proof.sources[source].name}, "
            f"{count_of(shown.total(), 'time')}: {others}"
        )
    if len(by_count) > _MOST_LINES:
        more = count_of(len(by_count) - _MOST_LINES, "more sample")
        lines.append(f"  and for {more}; --json has them all")
    lines += [f"note: {note}" for note in proof.notes]
    lines += [f"FAULT: {fault}" for fault in proof.faults]
    for start, end in proof.holes[:_MOST_LINES]:
        which = f"step {start} has" if end == start + 1 else f"steps {start} to {end - 1} have"
        lines.append(f"HOLE: {which} no record of all ranks, though step {end - 1} was done")
    if len(proof.holes) > _MOST_LINES:
        lines.append(f"and {count_of(len(proof.holes) - _MOST_LINES, 'more hole')}")
    if proof.holds:
        headers = [segment.header for segment in proof.segments]
        by_weight = any(source.weights for header in headers for source in header.sources)
        often = "as often as its weight says" if by_weight else "once"
        lines.append(f"PROVEN: no step is missing, and every epoch schedules each sample {often}")
    elif proof.holes:
        lines.append(f"NOT PROVEN: the lines above are about the steps before {proof.steps}")
    else:
        lines.append("NOT PROVEN")
    return "\n".join(lines)


def as_json(proof: LedgerProof) -> dict[str, Any]:
    sizes = [segment.header.world_size for segment in proof.starts]
    return {
        "proven": proof.holds,
        "steps": proof.steps,
        "global_batch_size": proof.global_batch_size,
        "holes": proof.holes,
        "num_lost_draws": proof.num_lost_draws,
        "num_starts": len(sizes),
        "num_changes_of_world_size": sum(a != b for a, b in itertools.pairwise(sizes)),
        "num_steps_done_twice": proof.num_superseded,
        "segments": [
            {
                "segment": segment.header.segment,
                "start_step": segment.header.start_step,
                "global_batch_size": segment.header.global_batch_size,
                "world_size": segment.header.world_size,
                "steps": segment.steps,
                "num_superseded": segment.num_superseded,
            }
            for segment in proof.segments
        ],
        "sources": [
            dataclasses.asdict(source) | {"complete_epochs": source.complete_epochs}
            for source in proof.sources
        ],
        "num_substituted": proof.num_substituted,
        "substitutes": [
            {"source": source, "sample": sample, "shown": dict(sorted(shown.items()))}
            for (source, sample), shown in sorted(proof.substitutes.items())
        ],
        "faults": proof.faults,
        "notes": proof.notes,
    }


if __name__ == "__main__":
    main()
