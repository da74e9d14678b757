"""`unicl-ledger`: proves from a run's ledger that no step is missing and every sample had its turn.

Reading and proving are `unicl_fast.ledger.proof`'s; here the outcome is put into words and JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from unicl_fast.distributed.launch import stop
from unicl_fast.ledger.format import LEDGER_FOLDER

if TYPE_CHECKING:  # it imports numba, for which --help need not wait
    from unicl_fast.ledger.proof import LedgerProof

_MOST_LINES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerArguments:
    """Says whether the ledger of a run (unicl-pretrain --ledger) proves what the run was fed.

    Proven is: every step from the first to the last has its record of every rank, across all
    restarts and changes of the number of ranks; each pass over each data set scheduled each of its
    samples exactly once, and the pass that runs none twice. Only the sample ids in the ledger are
    believed, not the program that planned them. It also counts the substitutes that were shown for
    damaged samples, and the steps that were done twice because the run had gone back to a
    checkpoint. A run that is still going may be looked at.

    Exit code: 0 proven, 1 not proven, 2 no ledger there.

    Example: unicl-ledger runs/first --json ledger.json
    """

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    json: Path | None = None
    """Also write the outcome, with all substitutes, into this file."""
    replan: bool = False
    """Also plan the whole run again from its seed, and compare every visit with the ledger."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 1 where nothing is proven, 2 on wrong input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = tyro.cli(LedgerArguments, args=argv, prog="unicl-ledger")
    from unicl_fast.ledger.proof import prove

    replanned = None
    if arguments.replan:
        from .ledger_replan import Replan

        replanned = Replan()
    try:
        proof = prove(
            arguments.run / LEDGER_FOLDER,
            steps_done=newest_checkpoint_step(arguments.run),
            watch=replanned,
        )
    except (ValueError, FileNotFoundError) as error:
        stop("unicl-ledger", error, code=2)
    except OSError as error:
        stop("unicl-ledger", error, code=1)
    holds = proof.holds
    print(in_words(proof))
    if replanned is not None:
        print(replanned.in_words())
        holds = holds and not replanned.num_different
    if arguments.json is not None:
        values = as_json(proof)
        if replanned is not None:
            values["num_different_from_plan"] = replanned.num_different
        arguments.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if holds else 1)


def newest_checkpoint_step(run_folder: Path) -> int:
    """How many steps the newest checkpoint has done, by its name; 0 if there is none."""
    names = [path.name for path in (run_folder / "checkpoints").glob("step-*")]
    return max((int(name[5:]) for name in names if name[5:].isdigit()), default=0)


def in_words(proof: LedgerProof) -> str:
    """What a person wants to read."""
    sizes = [segment.header.world_size for segment in proof.segments]
    lines = [
        f"{proof.steps} steps of {proof.global_batch_size} samples are covered, "
        f"by {_count(len(sizes), 'start')} of the program on "
        f"{', then '.join(_count(size, 'rank') for size, _ in itertools.groupby(sizes))}; "
        f"{_count(proof.num_superseded, 'step')} of them were done twice, after going back",
    ]
    lines += [
        f"{source.name}: {source.visits} visits of {source.num_samples} samples, "
        f"{source.complete_passes} passes complete; lost {source.lost}, "
        f"scheduled twice in a pass {source.scheduled_twice}"
        for source in proof.sources
    ]
    lines.append(f"substitutes were shown at {_count(proof.num_substituted, 'visit')}")
    by_count = sorted(proof.substitutes.items(), key=lambda item: -item[1].total())
    for (source, sample), shown in by_count[:_MOST_LINES]:
        others = ", ".join(map(str, sorted(shown)[:_MOST_LINES]))
        lines.append(
            f"  for sample {sample} of {proof.sources[source].name}, "
            f"{_count(shown.total(), 'time')}: {others}"
        )
    if len(by_count) > _MOST_LINES:
        lines.append(f"  and for {len(by_count) - _MOST_LINES} more samples; --json has them all")
    lines += [f"note: {note}" for note in proof.notes]
    lines += [f"FAULT: {fault}" for fault in proof.faults]
    for start, end in proof.holes[:_MOST_LINES]:
        which = f"step {start} has" if end == start + 1 else f"steps {start} to {end - 1} have"
        lines.append(f"HOLE: {which} no record of all ranks, though the run went on from {end}")
    if len(proof.holes) > _MOST_LINES:
        lines.append(f"and {len(proof.holes) - _MOST_LINES} more holes")
    if proof.holds:
        lines.append("PROVEN: no step is missing, and every pass schedules each sample once")
    elif proof.holes:
        lines.append(f"NOT PROVEN: what stands above is about the steps before {proof.steps}")
    else:
        lines.append("NOT PROVEN")
    return "\n".join(lines)


def as_json(proof: LedgerProof) -> dict[str, Any]:
    """What a program wants to read."""
    sizes = [segment.header.world_size for segment in proof.segments]
    return {
        "proven": proof.holds,
        "steps": proof.steps,
        "global_batch_size": proof.global_batch_size,
        "holes": [list(hole) for hole in proof.holes],
        "num_lost_slots": proof.num_lost_slots,
        "num_starts": len(sizes),
        "num_changes_of_world_size": sum(a != b for a, b in itertools.pairwise(sizes)),
        "num_steps_done_twice": proof.num_superseded,
        "segments": [
            {
                "segment": segment.header.segment,
                "start_step": segment.header.start_step,
                "world_size": segment.header.world_size,
                "steps": [list(steps) for steps in segment.steps],
                "num_superseded": segment.num_superseded,
            }
            for segment in proof.segments
        ],
        "sources": [
            dataclasses.asdict(source) | {"complete_passes": source.complete_passes}
            for source in proof.sources
        ],
        "num_substituted": proof.num_substituted,
        "substitutes": [
            {"source": source, "sample": sample, "shown": dict(sorted(shown.items()))}
            for (source, sample), shown in sorted(proof.substitutes.items())
        ],
        "faults": list(proof.faults),
        "notes": list(proof.notes),
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    main()
