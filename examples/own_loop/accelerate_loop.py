"""A plain loop of Hugging Face Accelerate with our loader, target map and loss.

Run it on data sets that `unicl-pack build` wrote:

    python accelerate_loop.py packed/photos --steps 100
    accelerate launch --num_processes 2 accelerate_loop.py packed/photos

With --state DIR it saves there at the end, loader included, and begins there if there is something;
on as many processes or others.
"""

import argparse
import math
from pathlib import Path

import torch
from accelerate import Accelerator

from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.pipelines.train_loader import TrainLoader
from unicl_fast.training.data import build_prompts, open_datasets
from unicl_fast.training.optim import build_optimizer, build_schedule
from unicl_fast.training.settle import settle_objective
from unicl_fast.training.step import global_loss


def train(config: TrainConfig, steps: int, state: Path | None = None) -> list[float]:
    """Takes the run's steps up to a number; returns their losses."""
    accelerator = Accelerator()
    rank, world_size = accelerator.process_index, accelerator.num_processes
    ranks = Ranks(rank, accelerator.local_process_index, world_size)
    datasets, weights = open_datasets(config.data)
    config = settle_objective(config, datasets)
    prompts = build_prompts(datasets, config)
    loader = TrainLoader(config, datasets, weights, prompts, rank, world_size, accelerator.device)
    model = build_model(config).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, len(loader))
    encode, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(loader)
    if state is not None and state.exists():
        accelerator.load_state(str(state))
    losses: list[float] = []
    for batch in loader:
        schedule.step_update(batch.step + 1)
        model.set_drop_path_key(step=batch.step, global_index=batch.global_index)
        loss = global_loss(encode, batch, config, ranks)
        accelerator.backward(loss * world_size)  # DDP averages what is to be summed
        accelerator.clip_grad_norm_(model.parameters(), config.optim.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            config.objective.limit(model.learnt)
        losses.append(float(loss))
        accelerator.print(f"step {batch.step + 1}: loss {losses[-1]:.4f}")
        if batch.step + 1 >= steps:
            break
    if state is not None:
        accelerator.save_state(str(state))
    loader.close()
    return losses


if __name__ == "__main__":
    from command_line import read_options

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path)
    config, given = read_options(parser)
    train(config, given.stop_at, given.state)
