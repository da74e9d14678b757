"""The collectives of a step on many nodes, their bytes, and the work of the host beside them.

tests/golden/collectives.json is the table; UNICL_WRITE_BUDGETS=1 writes it anew. Each rank has 12
images and 5 distinct texts; in "ragged" the other ranks have 1 to 9 texts. DDP sends the gradients
of a tiny model; bytes of texts and sizes grow with the ranks.
"""

from typing import Any

import pytest
import torch
from budgets import compare
from fake_ranks import Collectives, fake_ranks
from rank_workers import blocks_gathered_in_bf16, needs_full
from small_runs import labelled_batch, objective_config

from unicl_fast.batch import ListLoader
from unicl_fast.distributed.signals import Interruption
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.trainer import Trainer

VERSIONS = {"torch": torch.__version__.split("+")[0]}
LOCAL_BATCH_SIZE = 12
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated. Please use.*:FutureWarning")


def step_of(
    world_size: int, *, ragged: bool = False, objective: str = "unicl", **efficiency: object
) -> dict[str, Any]:
    """The figures of rank 0's third step, with the question whether to stop after it."""
    images = torch.zeros(LOCAL_BATCH_SIZE, 32, 32, 3, dtype=torch.uint8)
    batch = labelled_batch(images, objective=objective)
    counts = [len(batch.texts.tokens)] * world_size
    if ragged:
        counts[1:] = [1 + 7 * rank % 9 for rank in range(1, world_size)]
    config = objective_config(objective, **{"precision": "fp32", **efficiency})
    config = config.changed(run={"global_batch_size": LOCAL_BATCH_SIZE * world_size})
    with fake_ranks(world_size) as ranks:
        trainer = make_trainer(
            config, ListLoader([batch]), ranks=ranks, device=torch.device("cpu"), progress=False
        )
        steps: list[Collectives] = []
        if config.efficiency.shard != "full":
            trainer.parallel.encode.register_comm_hook(
                None, lambda _, bucket: steps[-1].note_bucket(bucket)
            )
        with Interruption() as interruption, trainer.batches() as batches:
            for _ in range(3):  # the first makes what stays; in the second DDP orders its buckets
                steps.append(Collectives(ranks, text_counts=counts))
                with steps[-1]:
                    trainer.train_step(next(batches))
                    interruption.has_come(ranks)
    return steps[-1].figures()


def check_table(name: str, found: object) -> None:
    compare("collectives.json", name, found, versions=VERSIONS)


@pytest.mark.parametrize("world_size", [8, pytest.param(64, marks=pytest.mark.slow), 1024])
def test_the_collectives_of_a_step_are_those_of_the_table(world_size):
    """Work because other ranks have more texts is a line of its own: padding to the largest."""

    def table() -> dict[str, Any]:
        even, ragged = (step_of(world_size, ragged=ragged) for ragged in (False, True))
        more = ragged["dispatches"] - even["dispatches"]
        return {"even": even, "ragged": ragged, "dispatches because of raggedness": more}

    check_table(f"{world_size} ranks", table)


OTHERS = {
    "micro-batches": {"micro_batch_size": 6},
    "ce": {"objective": "ce"},
    "BatchNorm": {"image_encoder": "unicl_convnet7_small"},
    "shard=optimizer": {"shard": "optimizer"},
    "shard=full": {"shard": "full"},
    "shard=full, micro-batches": {"shard": "full", "micro_batch_size": 6},
    "shard=full, BatchNorm": {"shard": "full", "image_encoder": "unicl_convnet7_small"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_steps_send_what_the_table_says(name):
    check_table(f"64 ranks, {name}", lambda: step_of(64, **OTHERS[name]))


@pytest.mark.parametrize("shard", ["optimizer", "full"])
def test_divided_steps_send_what_the_table_says(shard):
    """All parameters once, from their owners; or each block's twice, and its gradients once."""
    check_table(f"8 ranks, shard={shard}", lambda: step_of(8, shard=shard))


@needs_full
def test_blocks_are_gathered_in_bf16_and_their_gradients_added_up_in_fp32():
    """Half the bytes of parameters, on GPUs; what is outside of blocks stays fp32."""
    sizes = []
    for devices in (set(), {"cpu"}):
        with blocks_gathered_in_bf16(devices):
            sizes.append(step_of(8, shard="full", precision="bf16")["collectives"])
    wide, narrow = ({name: one["bytes"] for name, one in found.items()} for found in sizes)
    gathered = "device allgather_base of "
    assert 2 * narrow[f"{gathered}bfloat16"] == wide[f"{gathered}float32"] - narrow.pop(
        f"{gathered}float32"
    )
    reduced = [name for name in narrow if "reduce_scatter" in name]
    assert reduced == ["device reduce_scatter_base of float32"]
    assert narrow[reduced[0]] == wide[reduced[0]]


def test_another_collective_is_seen(monkeypatch):
    monkeypatch.delenv("UNICL_WRITE_BUDGETS", raising=False)
    update = Trainer.update

    def update_and_send(trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(torch.ones(100))
        return update(trainer, loss)

    monkeypatch.setattr(Trainer, "update", update_and_send)
    found = step_of(8)
    with pytest.raises(AssertionError, match="device allreduce of float32, calls rose from"):
        check_table("8 ranks", {"even": found})


def test_figures_of_other_versions_are_neither_computed_nor_compared(monkeypatch):
    """The reason names the file and both versions."""
    monkeypatch.delenv("UNICL_WRITE_BUDGETS", raising=False)
    reason = r"collectives\.json is of torch .*; installed: torch 2\.15\.0"
    with pytest.raises(pytest.skip.Exception, match=reason):
        compare("collectives.json", "8 ranks", lambda: 1 / 0, versions={"torch": "2.15.0"})
