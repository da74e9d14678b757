"""A ledger's proof, and when it must fail: holes, doubles, superseded steps, damage."""

import dataclasses
import errno
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_tests import examples
from rank_workers import NAMED, ledger_in, named, run_on_ranks, write_a_ledger
from small_runs import StepLoader, tiny_config

from unicl_fast.batch import Batch
from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.dataset.weights import WeightedDraws
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.ledger import writer as ledger_module
from unicl_fast.ledger.format import (
    LedgerSource,
    SegmentHeader,
    encode_header,
    encode_record,
    read_segment_file,
    segment_name,
)
from unicl_fast.ledger.proof import Run, _EpochCounter, prove
from unicl_fast.pipelines.plan.plan import schedule_draws
from unicl_fast.stages import lay_out, span_at
from unicl_fast.tools import ledger as ledger_program
from unicl_fast.tools.ledger import Replan
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.observers import LedgerKeeper
from unicl_fast.training.trainer import Trainer

SOURCES = (LedgerSource("labels", 37), LedgerSource("captions", 300))
N = 12
STEPS = 60


def schedule(steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Source ids and sample ids [steps N]: each source shuffled anew for every epoch."""
    generator = np.random.default_rng(7)
    source_ids = generator.integers(0, 2, size=(steps, N))
    ids = np.empty_like(source_ids)
    for number, source in enumerate(SOURCES):
        mine = source_ids == number
        epochs = -(-np.count_nonzero(mine) // source.num_samples)
        order = [generator.permutation(source.num_samples) for _ in range(epochs)]
        ids[mine] = np.concatenate(order)[: np.count_nonzero(mine)]
    return source_ids, ids


SOURCE_IDS, IDS = schedule()


def header(number: int, start: int, *, rank: int = 0, world_size: int = 1) -> SegmentHeader:
    of_run = {"global_batch_size": N, "sources": SOURCES, "seed": 0, "shares": (1, 1)}
    return SegmentHeader(
        segment=number, start_step=start, rank=rank, world_size=world_size, **of_run
    )


def write(
    folder: Path, number: int, start: int, end: int, *, world_size: int = 1,
    ids: np.ndarray = IDS, shown: np.ndarray | None = None, fewer: dict[int, int] | None = None,
    lacks: set[int] | None = None, **run: object,
) -> list[Path]:  # fmt: skip
    """A start of the program that did the steps `start` to `end`; rank r lost the last fewer[r].

    `run` has more fields of the headers.
    """
    folder.mkdir(exist_ok=True)
    shown = ids if shown is None else shown
    paths = []
    for rank in range(world_size):
        head = header(number, start, rank=rank, world_size=world_size)
        head = dataclasses.replace(head, **run)
        mine = slice(rank * head.local_batch_size, (rank + 1) * head.local_batch_size)
        steps = [
            step
            for step in range(start, end - (fewer or {}).get(rank, 0))
            if step not in (lacks or set())
        ]
        paths.append(folder / segment_name(number, rank))
        of_steps = [array[steps, mine] for array in (SOURCE_IDS, ids, shown)]
        paths[-1].write_bytes(encoded(head, steps, *of_steps))
    return paths


def encoded(head: SegmentHeader, steps: Iterable[int], *ids: np.ndarray) -> bytes:
    """A file of these steps, given their sources and what was scheduled and shown, [steps b]."""
    names = "source_ids", "scheduled_ids", "shown_ids"
    records = (
        encode_record(head, step=step, **dict(zip(names, rows, strict=True)))
        for step, *rows in zip(steps, *ids, strict=True)
    )
    return encode_header(head) + b"".join(records)


def record_at(path: Path, step: int) -> int:
    """Where the record of a step begins, in a file without substitutes."""
    file = read_segment_file(path)
    (records,) = file.ranges
    return records.offset + (step - records.step) * file.header.record_bytes(0)


def test_restarts_on_other_ranks_supersede_what_was_done_before(tmp_path):
    other = IDS.copy()
    other[20:] = 0  # what was abandoned may be anything
    write(tmp_path, 1, 0, 30, ids=other)
    write(tmp_path, 2, 25, 45, world_size=3, fewer={1: 2}, ids=other)  # all of it is abandoned
    write(tmp_path, 3, 42, 42, world_size=2)  # ended before its first step
    write(tmp_path, 4, 20, STEPS, world_size=4, fewer={0: 1})
    proof = prove(tmp_path)
    assert proof.holds, proof.faults
    assert proof.steps == STEPS - 1, "the last step lacks a rank, so nobody knows it was done"
    assert [segment.header.world_size for segment in proof.segments] == [1, 3, 2, 4]
    assert [segment.num_superseded for segment in proof.segments] == [10, 18, 0, 0]
    assert proof.num_superseded == 28


HOLES = {
    "a record of one rank, which a later start took for written": (
        [{"end": 30, "world_size": 2, "fewer": {1: 1}}, {"start": 30}], 0, (29, 30),
    ),
    "steps that a checkpoint has done": ([{"end": 50}], 52, (50, 52)),
    "the beginning": ([{"start": 10}], 0, (0, 10)),
    "within a segment": ([{"world_size": 2, "lacks": {17, 18}}], 0, (17, 19)),
    "a file of one rank": (
        [{"end": 30, "world_size": 2, "fewer": {1: 31}}, {"start": 30}], 0, (0, 30),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOLES)
def test_holes_are_found(tmp_path, kind):
    starts, steps_done, hole = HOLES[kind]
    for number, values in enumerate(starts, start=1):
        values = {"start": 0, "end": STEPS} | values
        paths = write(tmp_path, number, **values)
        if kind == "a file of one rank" and number == 1:
            paths[1].unlink()
    proof = prove(tmp_path, steps_done=steps_done)
    assert not proof.holds
    assert (proof.steps, proof.holes, proof.num_lost_draws) == (
        hole[0], (hole,), N * (hole[1] - hole[0]),
    )  # fmt: skip
    assert any("nothing of rank 1" in note for note in proof.notes) == (kind[:6] == "a file")


@pytest.mark.parametrize("swap", [False, True], ids=["one again", "two exchanged over epochs"])
def test_a_sample_that_is_scheduled_twice_in_an_epoch_is_found(tmp_path, swap):
    ids = IDS.copy()
    places = np.argwhere(SOURCE_IDS == 0)
    first, other = tuple(places[3]), tuple(places[50 if swap else 20])
    assert ids[first] != ids[other]
    ids[first], ids[other] = (ids[other], ids[first]) if swap else (ids[other], ids[other])
    write(tmp_path, 1, 0, STEPS, ids=ids)
    proof = prove(tmp_path)
    assert not proof.holds
    assert (proof.sources[0].scheduled_twice, proof.sources[0].lost) == (2, 2) if swap else (1, 1)
    assert proof.sources[1].holds
    assert any("epoch 0 of labels schedules sample" in fault for fault in proof.faults)
    assert any(f"did not schedule sample {IDS[first]}" in fault for fault in proof.faults)


def test_faults_of_the_epoch_in_progress_are_found(tmp_path):
    ids = IDS.copy()
    places = np.argwhere(SOURCE_IDS == 1)
    assert len(places) % 300 > 10
    ids[tuple(places[-1])] = ids[tuple(places[-2])]
    ids[tuple(np.argwhere(SOURCE_IDS == 0)[-1])] = 37
    write(tmp_path, 1, 0, STEPS, ids=ids)
    proof = prove(tmp_path)
    assert (proof.sources[1].scheduled_twice, proof.sources[1].lost) == (1, 0)
    assert not proof.holds
    assert proof.sources[0].unknown == 1
    assert any("labels has no sample 37" in fault for fault in proof.faults)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_unbroken_run_is_proven_and_its_substitutes_are_counted(tmp_path, world_size):
    generator = np.random.default_rng(1)
    shown = IDS.copy()
    expected: dict[tuple[int, int], Counter[int]] = {}
    # many in one step, several steps in a row, steps with none between
    for step, index in [(0, 0), (0, 5), (0, 11), (1, 3), (2, 3), (30, 7), (STEPS - 1, 11)]:
        source = int(SOURCE_IDS[step, index])
        shown[step, index] = (IDS[step, index] + 1 + generator.integers(30)) % 37
        key = source, int(IDS[step, index])
        expected.setdefault(key, Counter())[int(shown[step, index])] += 1
    write(tmp_path, 1, 0, STEPS, world_size=world_size, shown=shown)
    proof = prove(tmp_path, steps_done=STEPS)
    assert proof.holds
    assert (proof.steps, proof.holes, proof.num_superseded, proof.notes) == (STEPS, (), 0, ())
    draws = np.bincount(SOURCE_IDS.reshape(-1)).tolist()
    assert [source.draws for source in proof.sources] == draws
    assert [source.complete_epochs for source in proof.sources] == [draws[0] // 37, draws[1] // 300]
    assert proof.sources[0].complete_epochs > 5
    assert proof.substitutes == expected
    assert proof.num_substituted == 7


def test_a_record_cut_off_anywhere_is_dropped(tmp_path):
    shown = IDS.copy()
    shown[19, 4] = (shown[19, 4] + 1) % 37
    (path,) = write(tmp_path, 1, 0, 20, shown=shown)
    whole = path.read_bytes()
    begin = len(whole) - header(1, 0).record_bytes(1)
    assert prove(tmp_path).steps == 20
    for size in range(begin, len(whole)):
        path.write_bytes(whole[:size])
        proof = prove(tmp_path)
        assert proof.holds, size
        assert proof.steps == 19
        assert bool(proof.notes) == (size > begin)
        assert all("ends within a record" in note for note in proof.notes)
    # what was cut off and done again is no hole; what a later start took for done is one
    write(tmp_path, 2, 19, STEPS)
    assert prove(tmp_path).holds
    (tmp_path / segment_name(2, 0)).unlink()
    write(tmp_path, 2, 20, STEPS)
    assert prove(tmp_path).holes == ((19, 20),)


def test_a_start_that_ended_within_its_header_is_as_if_it_had_not_been(tmp_path):
    write(tmp_path, 1, 0, 20)
    (path,) = write(tmp_path, 2, 10, 10)
    whole = path.read_bytes()
    for size in (0, 5, 16, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert prove(tmp_path).holds
    write(tmp_path, 3, 20, STEPS)
    assert prove(tmp_path).steps == STEPS


@examples(40)
@given(st.integers(0, 10_000), st.integers(1, 255), st.sampled_from([1, 2]))
def test_no_flipped_byte_goes_unnoticed(tmp_path_factory, at, flip, world_size):
    folder = tmp_path_factory.mktemp("ledger")
    path = write(folder, 1, 0, 20, world_size=world_size)[-1]
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at] ^= flip
    path.write_bytes(data)
    proof = prove(folder, steps_done=20)
    assert not proof.holds
    assert proof.notes
    header_bytes = len(encode_header(header(1, 0, rank=world_size - 1, world_size=world_size)))
    if at >= header_bytes:
        size = header(1, 0, world_size=world_size).record_bytes(0)
        step = (at - header_bytes) // size
        assert proof.holes == ((step, step + 1),), "the records behind it can be read"


def test_damage_where_a_later_start_has_records_costs_nothing(tmp_path):
    (path,) = write(tmp_path, 1, 0, 30)
    data = bytearray(path.read_bytes())
    data[record_at(path, 27) + 30] ^= 1
    path.write_bytes(data)
    write(tmp_path, 2, 25, STEPS)
    proof = prove(tmp_path)
    assert proof.holds
    assert "is damaged between bytes" in proof.notes[0]


@pytest.mark.parametrize(("window", "groups"), [(0, 128), (64, 1), (64, 4)])
def test_a_run_is_planned_again_with_the_shuffle_groups_of_its_header(tmp_path, window, groups):
    shuffle = {"shuffle_window": window, "shuffle_groups": groups}
    sizes = [source.num_samples for source in SOURCES]
    order = {"sizes": sizes, "seed": 0, "weights": (1, 1), "global_batch_size": N}
    scheduled = schedule_draws(np.arange(STEPS * N), **order, **shuffle)
    draws = [values.reshape(STEPS, N).astype(np.int64) for values in scheduled]
    path = tmp_path / segment_name(1, 0)
    path.write_bytes(encode_header(dataclasses.replace(header(1, 0), **shuffle)))
    found, replan = read_segment_file(path).header, Replan(tmp_path)
    replan(found, 0, *draws)
    assert (replan.num_draws, replan.num_different) == (STEPS * N, 0)
    replan(dataclasses.replace(found, shuffle_window=64, shuffle_groups=2), 0, *draws)
    assert replan.num_different > STEPS


def test_another_version_is_refused_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr("unicl_fast.ledger.format.VERSION", 2)
    write(tmp_path, 1, 0, 3)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format version 2, this program reads 1"):
        prove(tmp_path)


def test_any_name_of_a_data_set_is_printed(tmp_path, capsys):
    hostile = "100 % {} $x$ <b> \N{PILE OF POO}\n\0\x1b[2J\udcff"
    (path,) = write(tmp_path / "ledger", 1, 0, 3)
    records = path.read_bytes()[len(encode_header(header(1, 0))) :]
    named = dataclasses.replace(header(1, 0), sources=(LedgerSource(hostile, 37), SOURCES[1]))
    path.write_bytes(encode_header(named) + records)
    with pytest.raises(SystemExit) as end:
        ledger_program.main([str(tmp_path), "--json", str(tmp_path / "proof.json")])
    assert end.value.code == 0
    assert "100 % {} $x$ <b> \N{PILE OF POO}\n\\x00\\x1b[2J\\udcff: " in capsys.readouterr().out
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert proof["sources"][0]["name"] == hostile
    with pytest.raises(SystemExit) as end:
        ledger_program.main([str(tmp_path), "--json", str(tmp_path / "nowhere" / "proof.json")])
    assert end.value.code == 2  # it is proven, and cannot be written down


def test_starts_of_runs_with_other_ids_or_seeds_are_no_proof(tmp_path):
    """What two runs leave that shared a folder."""
    other = (SOURCES[0], LedgerSource("captions", 301))
    for change in ({"run_id": "b"}, {"seed": 1}, {"sources": other}):
        folder = tmp_path / "-".join(change)
        folder.mkdir()
        write(folder, 1, 0, 30, run_id="a")
        write(folder, 2, 30, STEPS, **{"run_id": "a"} | change)
        proof = prove(folder)
        assert not proof.holds
        assert "segments 1 and 2 are of different runs: run a with seed 0" in proof.faults[0]


def test_a_checkpoint_is_vouched_for_by_the_ledger_of_its_own_run(tmp_path):
    write(tmp_path, 1, 0, STEPS, run_id="a")
    own = Run(run_id="a", seed=0, global_batch_size=N, sizes=[37, 300])
    assert prove(tmp_path, steps_done=STEPS, run=own).holds
    for change in ({"run_id": "b"}, {"seed": 1}, {"sizes": [37, 301]}, {"global_batch_size": 6}):
        proof = prove(tmp_path, steps_done=STEPS, run=dataclasses.replace(own, **change))
        assert not proof.holds
        assert "the newest checkpoint is of another run than segment 1" in proof.faults[0]


@pytest.mark.parametrize(
    ("sizes", "id_bytes", "source_bytes"),
    [
        ((1,), 1, 0),
        ((256,), 1, 0),
        ((257,), 2, 0),
        ((2**24, 3), 3, 1),
        ((2**32,), 4, 0),
        ((2**32 + 1,), 5, 0),
        ((2**48,) + (1,) * 255, 6, 1),
        ((1,) * 257, 1, 2),
    ],
)
def test_ids_take_as_few_bytes_as_their_sources_allow(tmp_path, sizes, id_bytes, source_bytes):
    head = dataclasses.replace(
        header(1, 5),
        sources=tuple(LedgerSource(str(i), size) for i, size in enumerate(sizes)),
        shares=(1,) * len(sizes),
    )
    assert (head.id_bytes, head.source_bytes) == (id_bytes, source_bytes)
    generator = np.random.default_rng(3)
    source_ids = generator.integers(0, len(sizes), size=(4, N))
    scheduled = np.array(sizes)[source_ids] - 1
    shown = scheduled.copy()
    shown[2, 3] = 0
    path = tmp_path / segment_name(1, 0)
    path.write_bytes(encoded(head, range(5, 9), source_ids, scheduled, shown))
    file = read_segment_file(path)
    assert [(one.step, one.end) for one in file.ranges][-1][1] == 9
    read_sources, read_ids = file.batch_rows(6, 9)
    assert np.array_equal(read_sources, source_ids[1:])
    assert np.array_equal(read_ids, scheduled[1:])
    differs = [] if shown[2, 3] == scheduled[2, 3] else [(7, 3, 0)]
    assert list(file.substitutes(5, 9)) == differs


def trainer_in(folder: Path, images: torch.Tensor, loader: StepLoader | None = None) -> Trainer:
    loader = loader or StepLoader(images, change=named)
    keeper = LedgerKeeper(ledger_in(folder))
    options = {"run_folder": folder, "observers": [keeper], "progress": False}
    return make_trainer(tiny_config(), loader, **options)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_records_are_there_when_a_checkpoint_is_begun(images, tmp_path, world_size):
    if world_size == 1:
        write_a_ledger(Ranks(), images, tmp_path, False)
    else:
        run_on_ranks(write_a_ledger, 2, images, tmp_path, True)
    assert json.loads((tmp_path / "found.json").read_text()) == [[2, 2], [4, 4], [6, 6]]
    proof = prove(tmp_path / "ledger", steps_done=6)
    assert proof.holds
    assert [segment.header.world_size for segment in proof.segments] == [world_size]
    assert (proof.sources[0].draws, proof.sources[0].complete_epochs) == (72, 2)


def full(file: int, data: bytes) -> int:
    """In place of `os.write`."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_checkpoints_until_there_is_room_and_no_record(
    images, tmp_path, monkeypatch,
    caplog,
):  # fmt: skip
    written, write_all = [0], os.write

    def nearly_full(file: int, data: bytes) -> int:
        written[0] += 1
        if written[0] == 3:
            return write_all(file, data[:7])  # a part still fits
        if written[0] in (4, 5, 6):
            full(file, data)
        return write_all(file, data)

    monkeypatch.setattr(ledger_module.os, "write", nearly_full)
    trainer_in(tmp_path, images).fit()
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000004", "step-00000006"]
    assert "THE LEDGER CANNOT BE WRITTEN" in caplog.text
    assert "NO CHECKPOINT of step 2" in caplog.text
    assert "can be written again" in caplog.text
    proof = prove(tmp_path / "ledger", steps_done=6)
    assert proof.holds
    assert not proof.notes


@pytest.mark.parametrize("loss", ["moved", "not synced"])
def test_a_ledger_that_is_lost_ends_the_run_before_its_next_checkpoint(
    images, tmp_path, loss, monkeypatch
):
    def fail_once(file: int) -> None:
        monkeypatch.undo()
        raise OSError(errno.EIO, "Input/output error")

    def lose(batch: Batch) -> Batch:
        if batch.step == 2 and loss == "moved":
            (tmp_path / "ledger").rename(tmp_path / "elsewhere")
        elif batch.step == 2:
            monkeypatch.setattr(ledger_module.os, "fdatasync", fail_once)
        return named(batch)

    reason = "" if loss == "moved" else r" \(.*Input/output error\)"
    message = rf"ledger was moved or removed, or its disk failed{reason}, .* from step 0 on"
    with pytest.raises(OSError, match=message):
        trainer_in(tmp_path, images, StepLoader(images, change=lose)).fit()
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000002"]
    if loss == "moved":
        (tmp_path / "elsewhere").rename(tmp_path / "ledger")
    trainer = trainer_in(tmp_path, images)
    trainer.resume(tmp_path / "checkpoints" / "step-00000002")
    trainer.fit()
    assert prove(tmp_path / "ledger", steps_done=6).holds


def test_a_ledger_that_cannot_be_written_at_the_end_is_an_error(images, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module.os, "write", full)
    with pytest.raises(OSError, match="a checkpoint without it would leave a hole"):
        trainer_in(tmp_path, images).fit()
    assert not list_checkpoints(tmp_path / "checkpoints")


def test_a_loader_that_does_not_name_its_samples_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="a ledger needs a loader whose batches have source_ids"):
        trainer_in(tmp_path, images, StepLoader(images)).fit()


@pytest.mark.parametrize("field", ["source_ids", "scheduled_ids", "sample_ids"])
def test_ids_that_do_not_exist_are_refused(images, tmp_path, field):
    ledger = ledger_in(tmp_path)
    batch: Batch = next(StepLoader(images, change=named).batches(0))
    wrong = getattr(batch, field).clone()
    wrong[4] = NAMED.num_samples
    with ledger.segment(0), pytest.raises(ValueError, match="step 0 has s"):
        ledger.record(dataclasses.replace(batch, **{field: wrong}))


def test_where_there_is_no_ledger_that_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no ledger"):
        prove(tmp_path / "ledger")


IN_STAGES = lay_out(("72:global_batch_size=24",), samples=144, global_batch_size=N)
"""Three steps of 24 draws, then six of 12."""


def record_stages(folder: Path, start: int, end: int, *, ids: np.ndarray = IDS) -> None:
    """A start of the program on one rank, by a `Ledger`."""
    ledger = ledger_module.Ledger(folder, header(0, 0), spans=IN_STAGES)
    with ledger.segment(start, run_id="a"):
        for step in range(start, end):
            span = span_at(IN_STAGES, step)
            first = span.draws_before(step)
            mine = slice(first, first + span.global_batch_size)
            sources, shown = (torch.from_numpy(x.reshape(-1)[mine]) for x in (SOURCE_IDS, ids))
            rows = {"source_ids": sources, "scheduled_ids": shown, "sample_ids": shown}
            ledger.record(SimpleNamespace(step=step, **rows))


def test_a_run_in_stages_is_proven_over_their_boundary(tmp_path):
    record_stages(tmp_path, 0, 5)
    record_stages(tmp_path, 2, 9)
    own = Run(run_id="a", seed=0, global_batch_size=N, sizes=[37, 300])
    proof = prove(tmp_path, steps_done=9, run=own)
    assert proof.holds, proof.faults
    assert (proof.steps, proof.num_draws, proof.num_superseded) == (9, 144, 3)
    assert sum(source.draws for source in proof.sources) == 144
    assert proof.has_stages
    assert [(one.header.start_step, one.header.global_batch_size) for one in proof.segments] == [
        (0, 24), (3, 12), (2, 24), (3, 12),
    ]  # fmt: skip
    assert [segment.header.segment for segment in proof.starts] == [1, 3]


def test_a_draw_that_comes_again_behind_a_boundary_is_named(tmp_path):
    flat = IDS.reshape(-1).copy()
    source = SOURCE_IDS.reshape(-1)
    at = 72 + int(np.argmax(source[72:] == 1))  # captions have one epoch of all that is drawn
    flat[at] = flat[np.argmax(source == 1)]
    record_stages(tmp_path, 0, 9, ids=flat)
    proof = prove(tmp_path)
    assert not proof.holds
    where = f"at step {3 + (at - 72) // N}, global index {(at - 72) % N}"
    assert any(where in fault for fault in proof.faults), proof.faults


def test_a_stage_without_its_file_is_a_hole_of_its_draws(tmp_path):
    record_stages(tmp_path, 0, 5)
    record_stages(tmp_path, 6, 9)
    (tmp_path / segment_name(2, 0)).unlink()
    proof = prove(tmp_path)
    assert (proof.holes, proof.steps, proof.num_draws) == (((3, 6),), 3, 72)


def test_a_stage_does_not_begin_before_the_records_of_the_last_one_are_down(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module.os, "write", full)
    with pytest.raises(OSError, match="another stage of the run begins"):
        record_stages(tmp_path, 0, 4)


def test_the_proof_of_a_ledger_counts_draws_by_weight():
    draws = WeightedDraws(np.resize(np.array([1, 0.5, 300], np.float32), 40), seed=0, source=0)
    sound = np.concatenate([draws.samples_of(np.random.permutation(40), e) for e in range(3)])
    wrong = sound.copy()
    wrong[50] += 1  # one draw of another sample
    for ids, faults in ((sound, (0, 0)), (wrong, (1, 1))):
        counter = _EpochCounter([LedgerSource("", 40)], {0: draws})
        counter.add(0, np.zeros(120, np.int64), ids)
        (proof,) = counter.results()
        assert (proof.scheduled_twice, proof.lost) == faults
