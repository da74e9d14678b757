"""Work of different streams and communicators is ordered, and each wait is needed for that.

Whole runs of a few steps with a logging step, on fake tensors of a GPU, under a checker of what
happens before what; see `happens_before`.
"""

import contextlib
import re
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from fake_gpu import GPU, fake_gpu, fake_trainer
from happens_before import Checker, ranks_on_gpus
from small_runs import labelled_batch, objective_config

import unicl_fast
from unicl_fast.batch import copied_ahead
from unicl_fast.checkpoints.writer import HostCopies
from unicl_fast.distributed.ranks import RowsInFlight

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.usefixtures("unchecked_shapes"),  # its streams are none of torch's
]
slow = pytest.mark.slow
# The ranks of a path, whether batches are copied ahead, its settings, and the waits that are tried
# there; others that it has are tried in another path.
PATHS = {
    "plain": (1, False, {}, ["synchronize in StepClock._sum for StepMeter.begin_line.read"]),
    "copied ahead, fp16": (
        *(1, True, {"precision": "fp16"}),
        [
            "wait_event in copied_ahead for Trainer._next_batch",
            "record_stream in copied_ahead for Trainer._next_batch",
        ],
    ),
    "texts among images": (
        *(2, False, {}),
        [
            "work.wait in _begin_maximum_on_gpu for PendingMaximum.__init__",
            "synchronize in PendingMaximum.wait for max_num_texts.rounded",
            "synchronize in PendingMaximum.wait for Interruption.has_come",
            "synchronize in PendingMaximum.wait for Interruption.__exit__",
            "work.wait in RowsInFlight.wait for _Receive.forward",
            "work.wait in RowsInFlight.wait for _Send.backward",
            "work.wait in max_over_ranks for all_reduce_over.all_reduce",
            "work.wait in _SumOverRanks.forward for sum_over_ranks",
        ],
    ),
    "micro-batches, copied ahead": (
        *(2, True, {"precision": "fp16", "micro_batch_size": 5}),
        [
            "wait_event in copied_ahead for asked_ahead.each",
            "record_stream in copied_ahead for asked_ahead.each",
        ],
    ),
    "shard=optimizer": (
        *(2, False, {"shard": "optimizer"}),
        ["work.wait in send_from for ParameterOwners.send_updates"],
    ),
    "shard=full": (
        *(2, True, {"shard": "full"}),
        ["work.wait in average_whole_gradients for Parallel.join_gradients"],
    ),
}
ALL_WAITS = {wait for *_, waits in PATHS.values() for wait in waits}


def checked(stand_in, path: str, *, without: str = "") -> Checker:
    """A run of three steps."""
    world_size, is_ahead, settings, _ = PATHS[path]
    config = objective_config("unicl", **{"precision": "bf16", "compile": "off", **settings})
    run = {"global_batch_size": 12 * world_size, "steps": 3, "log_every_steps": 2}
    batch = labelled_batch(torch.zeros(12, 32, 32, 3, dtype=torch.uint8), objective="unicl")
    with contextlib.ExitStack() as stack:
        options = {}
        if world_size > 1:
            options["ranks"] = stack.enter_context(ranks_on_gpus(world_size))
        mode = stack.enter_context(fake_gpu(stand_in))
        trainer, _ = fake_trainer(mode, config.changed(run=run), batch, **options)
        if is_ahead:
            batches = trainer.loader.batches
            trainer.loader.batches = lambda step: copied_ahead(batches(step), GPU)
        checker = stack.enter_context(Checker(without=without))
        trainer.fit()
    return checker


@slow
@pytest.mark.parametrize("path", PATHS)
def test_streams_and_communicators_of_a_run_are_ordered(stand_in, path):
    checker = checked(stand_in, path)
    assert not checker.faults
    assert {*PATHS[path][3]} <= {*checker.waits} <= ALL_WAITS  # a new one is to be tried below


@slow
@pytest.mark.parametrize(
    ("path", "wait"),
    [
        pytest.param(path, wait, id=wait, marks=[pytest.mark.long] * (number > 0))
        for path, (*_, waits) in PATHS.items()
        for number, wait in enumerate(waits)
    ],
)
def test_a_wait_that_is_left_out_is_noticed(stand_in, path, wait):
    assert checked(stand_in, path, without=wait).faults


@slow
def test_rows_that_are_freed_while_they_are_sent_are_noticed(stand_in):
    def start(in_flight, collective, output, rows) -> None:
        in_flight._work = collective(output, rows, async_op=True)

    with mock.patch.object(RowsInFlight, "start", start):
        faults = checked(stand_in, "texts among images").faults
    assert any("gets memory again that _allgather_base_" in fault for fault in faults)


@pytest.mark.parametrize("without", ["", "synchronize in HostCopies.wait for a test"])
def test_a_checkpoint_is_written_once_its_copies_are_done(stand_in, without):
    with fake_gpu(stand_in), Checker(without=without) as checker:
        copies = HostCopies()
        written = copies.take({"model": {"weight": torch.ones(3, device=GPU)}})
        copies.wait()
        written["model"]["weight"].sum()
    assert bool(checker.faults) == bool(without)


def test_all_waits_of_the_library_are_tried_here():
    """A new line that waits changes the count: try it above."""
    waits = r"work\.wait\(|\.wait_event\(|\.wait_stream\(|\.record_stream\(|\.synchronize\("
    files = Path(unicl_fast.__file__).parent.rglob("*.py")
    found = Counter(wait for file in files for wait in re.findall(waits, file.read_text("utf-8")))
    assert found == {"work.wait(": 2, ".wait_event(": 1, ".record_stream(": 1, ".synchronize(": 2}
