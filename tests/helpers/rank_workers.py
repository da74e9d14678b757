"""Functions that several processes run together; here so that child processes can import them."""

import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_runs import (
    StepLoader,
    global_batch,
    labelled_loader,
    objective_config,
    poison_step,
    staged_batch,
    tiny_config,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from unicl_fast.batch import Batch, EvaluationBatch
from unicl_fast.checkpoints.load import build_model
from unicl_fast.checkpoints.state import collect_tensors
from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.conversion.initial import initialise
from unicl_fast.distributed.launch import SharedRefusal, explain
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_objects
from unicl_fast.distributed.rendezvous import process_group
from unicl_fast.distributed.signals import Interrupted
from unicl_fast.distributed.watchdog import Watchdog
from unicl_fast.evaluation import data
from unicl_fast.evaluation.features import ModelOnRanks
from unicl_fast.evaluation.report import ClassificationResult
from unicl_fast.evaluation.zero_shot import classify
from unicl_fast.ledger.format import LedgerSource, SegmentHeader
from unicl_fast.ledger.proof import prove
from unicl_fast.ledger.writer import Ledger
from unicl_fast.models import precision
from unicl_fast.models.compilation import compile_blocks
from unicl_fast.models.sharding import whole
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.loss_tiled import LARGEST_TILE
from unicl_fast.system.machine import usable_cores
from unicl_fast.training import build
from unicl_fast.training.agreement import check_ranks_agree
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.metrics import add_up
from unicl_fast.training.observers import DatasetNumbers, LedgerKeeper
from unicl_fast.training.trainer import Trainer

needs_full = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"),
    reason=f"efficiency.shard=full on a CPU needs a newer torch than {torch.__version__}",
)
compiled_by_torchs_own_kernels = mock.patch(
    "unicl_fast.training.parallel.compile_blocks",
    functools.partial(compile_blocks, backend="aot_eager"),
)
# Ranks are forked from a process that has imported the library and done nothing else: a fresh
# interpreter would import torch and timm for five seconds each time.
mp.set_forkserver_preload(["unicl_fast.training.run", "small_runs"])


def run_on_ranks(worker: Callable[..., Any], world_size: int, *arguments: object) -> list[Any]:
    """Calls `worker(ranks, *arguments)` in processes that form a gloo group: what each returns."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(world_size)]
        mp.start_processes(
            _enter,
            args=(worker, world_size, _free_port(), arguments, files),
            nprocs=world_size,
            join=True,
            start_method="forkserver",
        )
        return [torch.load(file, weights_only=False) for file in files]


@contextlib.contextmanager
def ranks_of(worker: Callable[..., None], world_size: int, *arguments: object) -> Iterator[list]:
    """The same processes, but a failure of one does not end the others. All end with the block."""
    port, context = _free_port(), mp.get_context("forkserver")
    processes = [
        context.Process(target=_enter, args=(rank, worker, world_size, port, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(
    rank: int,
    worker: Callable[..., Any],
    world_size: int,
    port: int,
    arguments: tuple,
    files: list[Path] | None = None,
) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with process_group(torch.device("cpu"), timeout_seconds=240) as ranks:
        found = worker(ranks, *arguments)
    if files is not None:
        torch.save(found, files[rank])


def trainer_of(
    ranks: Ranks,
    images: torch.Tensor,
    config: TrainConfig,
    *,
    loader: StepLoader | None = None,
    change: Callable[[Batch], Batch] = lambda batch: batch,
    **options: Any,
) -> Trainer:
    """A rank's trainer, by default with a `StepLoader` of its part of each batch."""
    loader = loader or StepLoader(images, change=change, **place_of(ranks))
    return make_trainer(config, loader, ranks=ranks, progress=False, **options)


def place_of(ranks: Ranks) -> dict[str, int]:
    return {"rank": ranks.rank, "world_size": ranks.world_size}


def signalled(batch: Batch, *, here: bool = True) -> Batch:
    """The batch; in step 2 this process gets a signal."""
    if here and batch.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return batch


def step_of_stop(trainer: Trainer) -> int:
    """The step at which the rank's training was stopped."""
    with pytest.raises(Interrupted):
        trainer.fit()
    return trainer.step


NAMED = LedgerSource("images", 32)


def named(batch: Batch) -> Batch:
    """The batch, with consecutive samples of one source."""
    ids = (batch.step * 12 + batch.global_index) % NAMED.num_samples
    return dataclasses.replace(
        batch, source_ids=torch.zeros_like(ids), scheduled_ids=ids, sample_ids=ids
    )


def ledger_in(run_folder: Path, ranks: Ranks | None = None) -> Ledger:
    ranks = ranks or Ranks()
    header = SegmentHeader(
        segment=0, start_step=0, rank=ranks.rank, world_size=ranks.world_size, sources=(NAMED,),
        global_batch_size=12, seed=0, shares=(1,),
    )  # fmt: skip
    return Ledger(run_folder / "ledger", header, ranks=ranks)


def first_gradients(images: torch.Tensor, ranks, config, loader=None) -> tuple[float, dict]:
    """Loss and parameter gradients of the first step, before clipping."""
    trainer = trainer_of(ranks, images, config, loader=loader)
    batch = next(trainer.loader.batches(0))
    trainer.model.train()
    # GradScaler's first scale is found by trial: it would overflow here, and skip the step
    enabled = trainer.scaler.is_enabled()
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)
    loss = trainer.back_propagate(batch)
    trainer.scaler.unscale_(trainer.optimizer)
    return loss.item(), {
        name: parameter.grad for name, parameter in trainer.model.named_parameters()
    }


@contextlib.contextmanager
def blocks_gathered_in_bf16(devices: set[str]) -> Iterator[None]:
    """As on a GPU, whose autocast computes norms in fp32."""
    norm = torch.nn.functional.layer_norm

    def wide_norm(x, shape, weight, bias, eps):
        return norm(x.float(), shape, weight.float(), bias.float(), eps)

    with (
        mock.patch("unicl_fast.models.sharding._NARROW", devices),
        mock.patch("torch.nn.functional.layer_norm", wide_norm),
    ):
        yield


def divided_gradients(ranks, images: torch.Tensor) -> list[tuple[float, dict]]:
    """Whole gradients of a step in bf16, of blocks gathered in fp32 and in bf16."""
    found = []
    for devices in (set(), {"cpu"}):
        with blocks_gathered_in_bf16(devices):
            config = tiny_config(shard="full", precision="bf16", micro_batch_size=3)
            loss, gradients = first_gradients(images, ranks, config)
        found.append((loss, {name: whole(gradient) for name, gradient in gradients.items()}))
    return found


@compiled_by_torchs_own_kernels
@mock.patch.dict(LARGEST_TILE, {"cpu": 3 * 3})
def gradients_of(ranks, images: torch.Tensor, objectives: list[str], efficiency: dict) -> dict:
    """Loss and gradients of this rank under each objective, in both forms and several tiles."""
    found = {}
    for objective in objectives:
        for form in ("dense", "tiled"):
            config = objective_config(objective, loss=form, **efficiency)
            loader = labelled_loader(images, objective, **place_of(ranks))
            found[objective, form] = first_gradients(images, ranks, config, loader)
    return found


def evaluated_buffers(ranks, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """BatchNorm's averages as an evaluation on each rank sees them."""
    found = {}

    def evaluation(model: torch.nn.Module) -> dict[str, float]:
        found.update({name: buffer.clone() for name, buffer in model.named_buffers()})
        return {}

    config = tiny_config(image_encoder="unicl_convnet7_small", steps=2, precision="fp32")
    trainer_of(ranks, images, config, evaluations={"buffers": evaluation}).fit()
    return found


class PassesByRank:
    """An evaluation that encodes the images as often as the number of its rank says."""

    def __init__(self, images: torch.Tensor, ranks: Ranks) -> None:
        self.pixels, self.ranks = images.permute(0, 3, 1, 2) / 255, ranks

    @torch.no_grad()
    def __call__(self, model: UniCL) -> dict[str, float]:
        assert not model.training
        pixels = self.pixels.to(model.logit_scale.dtype)
        found = [model.encode_image(pixels).square().sum().item() for _ in range(self.ranks.rank)]
        return {"worst": max((abs(norm - len(pixels)) for norm in found), default=0.0)}


@compiled_by_torchs_own_kernels
@mock.patch("unicl_fast.training.observers._CHECKED_EVERY", 1)
def train_each(
    ranks, images: torch.Tensor, folder: Path, runs: dict[str, tuple[TrainConfig, Path | None]]
) -> dict[str, list[int]]:
    """Trains runs of a name, a config and a checkpoint to resume from, each in its own folder.

    Weights are compared over ranks after each step. Returns the bytes that this rank has of
    each run's parameters and optimizer state.
    """
    sizes = {}
    for name, (config, checkpoint) in runs.items():
        in_stages = functools.partial(staged_batch, config=config)
        make = in_stages if config.run.stages else global_batch
        options = {"loader": StepLoader(images, **place_of(ranks), make=make)}
        options |= {"evaluations": {"passes": PassesByRank(images, ranks)}}
        trainer = trainer_of(ranks, images, config, run_folder=folder / name, **options)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        trainer.fit()
        if config.efficiency.compile == "blocks":
            from torch._dynamo.utils import counters  # its import lasts a second

            assert counters["stats"]["unique_graphs"] >= 2
        states = [one for state in trainer.optimizer.state.values() for one in state.values()]
        held = trainer.model.parameters(), states
        sizes[name] = [sum(local_part(tensor).nbytes for tensor in each) for each in held]
        assert torch.is_autocast_cache_enabled()  # which evaluations of other models need
    return sizes


def train_from_initial_weights(ranks, images: torch.Tensor, config) -> tuple[dict, str]:
    """The weights that a rank's trainer has before the first step, and a refusal.

    Rank 1 has no disk to read them from.
    """
    not_here = mock.Mock(side_effect=AssertionError("rank 0 alone reads"))
    with contextlib.ExitStack() as stack:
        if not ranks.is_main:
            stack.enter_context(
                mock.patch("unicl_fast.conversion.initial.initial_sources", not_here)
            )
        model = build_model(config)
        initialise(model, ranks)
        nowhere = build_model(config.changed(model={"init": "/nowhere"}))
        with pytest.raises(SharedRefusal) as refusal:
            initialise(nowhere, ranks)
    trainer = trainer_of(ranks, images, config, model=model)
    weights = whole_weights(trainer)
    trainer.train_step(next(trainer.loader.batches(0)))
    return weights, str(refusal.value)


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: whole(one).clone() for name, one in trainer.model.state_dict().items()}


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def resume_and_write(ranks, images: torch.Tensor, checkpoints: list[Path], config) -> None:
    """Each rank writes its state after resuming, or the error, beside a checkpoint.

    Rank 1 looks for the checkpoint on a disk without one.
    """
    for checkpoint in checkpoints:
        trainer = trainer_of(ranks, images, config)
        try:
            trainer.resume(checkpoint if ranks.is_main else Path("/not-there") / checkpoint.name)
            found = [trainer.step, trainer.run_id, trainer.scaler.state_dict()]
        except ValueError as error:
            found = str(error)
        tensors = collect_tensors(model=trainer.model, optimizer=trainer.optimizer)
        torch.save((found, tensors), checkpoint.parent / f"{checkpoint.name}-{ranks.rank}.pt")


def train_until_rank_1_is_signalled(ranks, images: torch.Tensor, run_folder: Path) -> int:
    """Rank 1 gets SIGTERM in step 2; the last step of each rank."""
    change = functools.partial(signalled, here=ranks.rank == 1)
    config = tiny_config(steps=50)
    return step_of_stop(trainer_of(ranks, images, config, change=change, run_folder=run_folder))


def write_a_ledger(ranks, images: torch.Tensor, folder: Path, slow: bool) -> None:
    """Six steps; rank 1 can be slow to write its records. Writes the steps at each checkpoint."""
    ledger = ledger_in(folder, ranks)
    files = {"run_folder": folder, "observers": [LedgerKeeper(ledger)]}
    trainer = trainer_of(ranks, images, tiny_config(), change=named, **files)
    write, found = ledger._write, []

    def write_late() -> None:
        time.sleep(0.2)
        write()

    def save(*_: object, step: int, **__: object) -> None:
        found.append([step, prove(folder / "ledger").steps])

    if slow and ranks.rank == 1:
        ledger._write = write_late
    with mock.patch("unicl_fast.checkpoints.writer.CheckpointWriter.write", save):
        trainer.fit()
    if ranks.is_main:
        (folder / "found.json").write_text(json.dumps(found))


def with_replaced(batch: Batch, count: int) -> Batch:
    scheduled = torch.arange(batch.batch_size)
    shown = scheduled.clone()
    shown[:count] += 100
    return dataclasses.replace(batch, sample_ids=shown, scheduled_ids=scheduled)


def train_with_replaced_samples(ranks, images: torch.Tensor, run_folder: Path) -> str:
    """Rank r reports r + 1 replaced samples a step; why the run stopped."""
    import unicl_fast.training.limits as limits

    # 12 samples a step, limit 30 * 0.2 = 6, then 0.2 of all
    limits.LEAST_DRAWS = 30
    config = tiny_config(steps=50).changed(data={"max_bad_fraction": 0.2})
    change = functools.partial(with_replaced, count=ranks.rank + 1)
    trainer = trainer_of(ranks, images, config, change=change, run_folder=run_folder)
    with pytest.raises(limits.TooManyBadSamplesError) as error:
        trainer.fit()
    return str(error.value)


def train_watched(ranks, images: torch.Tensor, folder: Path, limit_seconds: float) -> None:
    """Trains without end under a watchdog; writes stderr-RANK, and step-RANK after a step."""
    os.dup2(os.open(folder / f"stderr-{ranks.rank}", os.O_WRONLY | os.O_CREAT), 2)

    def note(batch: Batch) -> Batch:
        if batch.step == 2:
            (folder / f"step-{ranks.rank}").touch()
        return batch

    config = tiny_config(steps=100_000).changed(checkpoint={"every_steps": 0})
    with Watchdog(limit_seconds=limit_seconds, **place_of(ranks)):
        trainer_of(ranks, images, config, change=note).fit()


def recorded(batch: Batch) -> Batch:
    """The batch with ids of samples that tell the step and the index, and two sources."""
    sample_ids = 100 * batch.step + batch.global_index
    return dataclasses.replace(
        batch,
        sample_ids=sample_ids,
        scheduled_ids=sample_ids + 50,
        source_ids=batch.global_index % 2,
    )


def train_with_a_poisoned_rank(ranks, images: torch.Tensor, run_folder: Path, shard: str) -> dict:
    config = tiny_config(steps=4, shard=shard).changed(run={"max_bad_steps": 1})
    trainer = trainer_of(ranks, images, config, change=recorded, run_folder=run_folder)
    if ranks.rank == 1:
        poison_step(trainer, step=2)
    trainer.fit()
    return whole_weights(trainer)


class ZeroShotOfFour:
    """An evaluation of four batches a rank; in one of its passes this process gets SIGTERM."""

    def __init__(
        self, images: torch.Tensor, *, ranks: Ranks | None = None, signals_in_pass: int = 0
    ) -> None:
        self.images, self.ranks, self.signals_in_pass = images, ranks or Ranks(), signals_in_pass
        self.shown: list[int] = []
        """Batches of each pass."""

    def __iter__(self) -> Iterator[EvaluationBatch]:
        self.shown.append(0)
        for number in range(4):
            if number == 2 and len(self.shown) == self.signals_in_pass:
                os.kill(os.getpid(), signal.SIGTERM)
            self.shown[-1] = number
            places = torch.arange(3 * number, 3 * number + 3)
            ids = self.ranks.rank + self.ranks.world_size * places
            yield EvaluationBatch(images=self.images[places], sample_ids=ids)
        self.shown[-1] = 4

    def close(self) -> None: ...

    def __call__(self, model) -> dict[str, float]:
        generator = torch.Generator().manual_seed(1)
        width = model.config.model.embed_dim
        classifier = torch.randn(3, width, dtype=torch.float64, generator=generator)
        on_ranks = ModelOnRanks(model=model, ranks=self.ranks)
        count = 12 * self.ranks.world_size
        labels = [[sample % 3] for sample in range(count)]
        judge = functools.partial(
            classify, classifier=classifier, labels=labels, class_names=("a", "b", "c"),
            columns={"": (0, 1, 2)},
        )  # fmt: skip
        features = on_ranks.encode(self, num_samples=count)
        found = on_ranks.on_rank_0(judge, features, dict[str, ClassificationResult])
        return {"top1": found[""].top1}


def evaluate_until_rank_1_is_signalled(ranks, images: torch.Tensor, run_folder: Path) -> int:
    """Rank 1 gets SIGTERM while it evaluates in step 3; the last step of each rank."""
    config = tiny_config(steps=50).changed(run={"evaluate_every_steps": 3})
    zero_shot = ZeroShotOfFour(images, ranks=ranks, signals_in_pass=int(ranks.rank == 1))
    options = {"run_folder": run_folder, "evaluations": {"some": zero_shot}}
    return step_of_stop(trainer_of(ranks, images, config, **options))


def described(
    numbers: DatasetNumbers, batch: Batch, ranks: Ranks | None = None, *, step: int
) -> dict[str, float]:
    """The figures of a batch in the line of a step."""
    run, sums = mock.Mock(ranks=ranks or Ranks()), dict[str, float | torch.Tensor]()
    numbers.contribute(run, batch, sums)
    totals = add_up(sums, run.ranks, torch.device("cpu")).tolist()
    values: dict[str, float] = {"step": step}
    numbers.measure(run, dict(zip(sums, totals, strict=True)), values)
    del values["step"]
    return values


def describe_sources_of_slices(ranks, images: torch.Tensor, objectives: tuple[str, ...]) -> list:
    """The figures of a rank's slice of a batch of two sources."""
    found = []
    for objective in objectives:
        loader = labelled_loader(images, objective, **place_of(ranks))
        batch = next(iter(loader.batches(0)))
        batch = dataclasses.replace(batch, source_ids=batch.global_index % 2)
        numbers = DatasetNumbers(["a", "b"], epochs=lambda step: [1.0, 2.0])
        found.append(described(numbers, batch, ranks, step=1))
    return found


def exchange_objects(ranks: Ranks) -> None:
    """Values of all kinds and of unequal sizes, among them names that UTF-8 cannot write."""
    texts = ["", "a" * 70_000, "b/\udcff.jpg"]
    with mock.patch.object(torch.distributed.distributed_c10d, "_tensor_to_object") as unpickle:
        value = [None, True, 1.5 / 7, {"name": texts[ranks.rank]}, [[2**53 + 1], []]]
        for rank, found in enumerate(gather_objects(value, ranks)):
            assert found == [*value[:3], {"name": texts[rank]}, value[4]]
        for text in texts:
            assert from_rank_0(text if ranks.is_main else "other", ranks) == text
        assert gather_objects(None, ranks) == [None] * ranks.world_size
    assert not unpickle.called
    # as their affinities, which they exchanged when they met
    assert ranks.cores == max(1, usable_cores() // ranks.world_size)
    # rank 0 finds bf16 faster; the others, which find it slower, are not asked
    seconds = (2.0, 1.0) if ranks.is_main else (1.0, 2.0)
    with mock.patch.object(precision, "seconds_of_products", return_value=seconds):
        assert precision.settle_precision("auto", torch.device("cpu"), ranks=ranks) == "bf16"


def name_data_by_rank(ranks: Ranks, images: torch.Tensor) -> None:
    """On rank 1 the same data lies in another folder, and in a store; both find the same of it."""
    names = ("here", "there")
    dataset = mock.MagicMock(folder=Path(names[ranks.rank]), cache=None, needed_bytes=7)
    dataset.__len__.return_value = 12
    if ranks.rank:
        dataset.cache, dataset.fetched_bytes = mock.Mock(), 9
    data = mock.Mock(config=TrainConfig(), datasets=[dataset], description={})
    plan = mock.Mock(global_batch_size=4, seed=1, weights=(1,), weighted={})
    with mock.patch.object(build, "Ledger") as ledger:
        build._build_ledger(Path(), data, plan, ranks)
    assert [source.name for source in ledger.call_args.args[1].sources] == ["here"]
    numbers = DatasetNumbers(["a"], epochs=lambda step: [0.0], datasets=[dataset])
    found = described(numbers, global_batch(images), ranks, step=1)
    assert (found["storage_bytes_read"], found["storage_bytes_needed"]) == (9, 7)


def name_evaluations(ranks: Ranks, folders: list[str]) -> None:
    """Each rank has a link to another folder, and evaluations have the name of rank 0's."""
    mine = folders[ranks.rank]
    with mock.patch.object(build, "PackedDataset") as opened:
        opened.return_value.count_longer_captions.return_value = 0
        # the same one twice, on one rank
        for evaluate in ((mine,), (mine, folders[0]), (mine, folders[1])):
            config = TrainConfig(data=DataConfig(evaluate=evaluate))
            try:
                data = mock.Mock(config=config, datasets=[])
                found = list(build._build_evaluations(data, ranks, mock.Mock()))
            except SharedRefusal as error:
                found = [str(error).rpartition(": ")[2]]
            expected = "name it once" if len(evaluate) > 1 else "zero_shot/first"
            assert found == [expected]


def open_class_folders(ranks: Ranks, source: str, seconds: float, ends: bool) -> None:
    """Rank 0 packs longer than a collective may last; or ends instead, and rank 1 explains it."""
    timeout = datetime.timedelta(seconds=seconds)
    ranks = dataclasses.replace(ranks, host_group=dist.new_group(backend="gloo", timeout=timeout))
    dist.barrier(ranks.host_group)  # connects them, as in a run
    pack = data.build_dataset

    def pack_slowly(*arguments: object, **settings: object) -> None:
        if ends:
            os._exit(3)
        time.sleep(2 * seconds)
        pack(*arguments, **settings)

    with mock.patch.object(data, "build_dataset", pack_slowly):
        try:
            with data.open_data(source, ranks=ranks) as opened:
                assert len(opened.dataset) == 21
        except RuntimeError as error:
            sys.exit(4 if "another rank has ended" in str(explain(error)) else str(error))


def refuse(value: ClassificationResult) -> ClassificationResult:
    raise ValueError("no label")


def disagree(ranks, same: dict, descriptions: list[dict]) -> list[str]:
    """Rank 1 has each of the descriptions, rank 0 the same one: the errors of each rank."""
    check_ranks_agree(same, ranks)
    said = []
    for other in descriptions:
        with pytest.raises(ValueError) as error:
            check_ranks_agree(other if ranks.rank else same, ranks)
        said.append(str(error.value))
    return said


def train_with_a_parted_weight(ranks, images: torch.Tensor, every_steps: int) -> str:
    """One bit of one weight of rank 1 changes after step 3."""
    trainer = trainer_of(ranks, images, tiny_config(steps=6))
    train_step = trainer.train_step

    def parting(batch: Batch):
        result = train_step(batch)
        if ranks.rank == 1 and trainer.step == 3:
            with torch.no_grad():
                weight = trainer.model.image_projection.view(torch.int64)
                weight[0, 0] ^= 1
        return result

    trainer.train_step = parting
    with (
        mock.patch("unicl_fast.training.observers._CHECKED_EVERY", every_steps),
        pytest.raises(RuntimeError) as error,
    ):
        trainer.fit()
    return str(error.value)
