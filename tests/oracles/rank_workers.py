"""Functions that several processes run together; here so that child processes can import them."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp
from small_runs import global_batch, ragged_features, tiny_config

from unicl_fast.dist import process_group
from unicl_fast.interruption import Interrupted
from unicl_fast.trainer import Trainer

# Ranks are forked from a process that has imported the library and done nothing else: a fresh
# interpreter would import torch and timm for five seconds each time.
mp.set_forkserver_preload(["unicl_fast.trainer", "unicl_fast.tools.training_run"])


def run_on_ranks(worker: Callable[..., None], world_size: int, *arguments: object) -> None:
    """Calls `worker(*arguments)` in `world_size` processes that form a gloo group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(
        _enter,
        args=(worker, world_size, port, arguments),
        nprocs=world_size,
        join=True,
        start_method="forkserver",
    )


def _enter(
    rank: int, worker: Callable[..., None], world_size: int, port: int, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with process_group(torch.device("cpu"), timeout_seconds=60) as ranks:
        worker(ranks, *arguments)


class StepwiseLoader:
    """Feeds a rank's slice of the test's global batches."""

    def __init__(self, images: torch.Tensor, *, rank: int = 0, world_size: int = 1) -> None:
        self.images, self.rank, self.world_size = images, rank, world_size

    def batches(self, start_step: int):
        step = start_step
        while True:
            yield global_batch(self.images, step=step, rank=self.rank, world_size=self.world_size)
            step += 1

    def close(self) -> None: ...


def first_gradients(images: torch.Tensor, ranks, config) -> tuple[float, dict]:
    """Loss and parameter gradients of the first step, before clipping."""
    trainer = Trainer(
        config,
        StepwiseLoader(images, rank=ranks.rank, world_size=ranks.world_size),
        ranks=ranks,
        progress=False,
    )
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


def write_gradients(ranks, images: torch.Tensor, folder: str, efficiency: dict) -> None:
    """Loss and parameter gradients of this rank, with the loss in both forms."""
    for form in ("dense", "tiled"):
        loss, gradients = first_gradients(images, ranks, tiny_config(**efficiency, loss=form))
        torch.save((loss, gradients), Path(folder) / f"{form}{ranks.rank}.pt")


def write_feature_gradients(ranks, folder: str) -> None:
    """Loss and gradients of this rank's pictures and of the table of texts, in both forms."""
    from unicl_fast.step import contrast_over_ranks

    images, texts, text_index, class_ids = ragged_features()
    share = ranks.share_of(len(images))
    mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
    distinct, counts = text_index[mine].unique(return_counts=True)
    class_of_text = dict(zip(text_index.tolist(), class_ids.tolist(), strict=True))
    for form in ("dense", "tiled"):
        inputs = images[mine].clone().requires_grad_(), texts.clone().requires_grad_()
        loss = contrast_over_ranks(
            inputs[0],
            inputs[1][distinct],
            class_ids=class_ids[mine],
            text_class_ids=torch.tensor([class_of_text[text] for text in distinct.tolist()]),
            text_counts=counts,
            scale=torch.tensor(40.0, dtype=torch.float64),
            ranks=ranks,
            form=form,
        )
        gradients = torch.autograd.grad(loss, inputs)
        torch.save((loss.item(), *gradients), Path(folder) / f"{form}{ranks.rank}.pt")


def write_evaluated_buffers(ranks, images: torch.Tensor, folder: str) -> None:
    """BatchNorm's averages as an evaluation on each rank sees them."""

    def evaluation(model: torch.nn.Module) -> dict[str, float]:
        torch.save(dict(model.named_buffers()), Path(folder) / f"{ranks.rank}.pt")
        return {}

    Trainer(
        tiny_config(image_encoder="unicl_convnet7_small", steps=2, precision="fp32"),
        StepwiseLoader(images, rank=ranks.rank, world_size=ranks.world_size),
        ranks=ranks,
        evaluations={"buffers": evaluation},
        progress=False,
    ).fit()


def write_averages(ranks, images: torch.Tensor, folder: Path, config) -> None:
    """Trains, and writes the average of the weights as this rank has it."""
    loader = StepwiseLoader(images, rank=ranks.rank, world_size=ranks.world_size)
    trainer = Trainer(config, loader, ranks=ranks, progress=False)
    trainer.fit()
    torch.save(trainer.ema.model.state_dict(), folder / f"{ranks.rank}.pt")


def train(ranks, images: torch.Tensor, folder: str, steps: int, resume: str = "") -> None:
    trainer = Trainer(
        tiny_config(steps=steps),
        StepwiseLoader(images, rank=ranks.rank, world_size=ranks.world_size),
        run_folder=Path(folder),
        ranks=ranks,
        progress=False,
    )
    if resume:
        trainer.resume(Path(resume))
    trainer.fit()


def count_reductions(ranks, images: torch.Tensor, folder: str) -> None:
    """Gradient values that DDP sends in each of three steps in micro-batches of 2."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    trainer = Trainer(
        tiny_config(micro_batch_size=2),
        StepwiseLoader(images, rank=ranks.rank, world_size=ranks.world_size),
        ranks=ranks,
        progress=False,
    )
    reduced = [0, 0, 0]

    def count(state, bucket):  # DDP reads annotations, and takes no strings
        reduced[trainer.step] += bucket.buffer().numel()
        return allreduce_hook(None, bucket)

    trainer._encode.register_comm_hook(None, count)
    batches = trainer.loader.batches(0)
    for _ in range(3):
        trainer.train_step(next(batches))
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    torch.save({"reduced": reduced, "parameters": parameters}, Path(folder) / f"{ranks.rank}.pt")


def train_until_rank_1_is_signalled(ranks, images: torch.Tensor, folder: Path) -> None:
    """Rank 1 sends itself SIGTERM at step 2; each rank writes down where it stopped."""
    loader = StepwiseLoader(images, rank=ranks.rank, world_size=ranks.world_size)
    trainer = Trainer(
        tiny_config(steps=50), loader, run_folder=folder / "run", ranks=ranks, progress=False
    )
    step_of = trainer.train_step

    def train_step(batch):
        if ranks.rank == 1 and batch.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(batch)

    trainer.train_step = train_step
    try:
        trainer.fit()
    except Interrupted:
        (folder / f"rank-{ranks.rank}").write_text(str(trainer.step))
