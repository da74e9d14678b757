"""A plain loop that saves model, optimizer and loader by torch.distributed.checkpoint.

That is how torchtitan saves its own. Each part is saved once, and any number of ranks may resume:

    torchrun --nproc-per-node 2 dcp_loop.py packed/photos --state state --stop-at 50
    torchrun --nproc-per-node 3 dcp_loop.py packed/photos --state state
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.pipelines.train_loader import TrainLoader
from unicl_fast.training.data import build_prompts, open_datasets
from unicl_fast.training.optim import build_optimizer, build_schedule
from unicl_fast.training.settle import settle_objective
from unicl_fast.training.step import global_loss


def train(config: TrainConfig, steps: int, state: Path) -> list[float]:
    """Takes the run's steps up to a number, from the state if there is one, and saves it."""
    rank, world_size = (
        int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    if world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group()
    ranks = Ranks(rank, int(os.environ.get("LOCAL_RANK", 0)), world_size)
    datasets, weights = open_datasets(config.data)
    config = settle_objective(config, datasets)
    device = torch.device(f"cuda:{ranks.local_rank}" if torch.cuda.is_available() else "cpu")
    prompts = build_prompts(datasets, config)
    loader = TrainLoader(config, datasets, weights, prompts, rank, world_size, device)
    model = build_model(config).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, len(loader))
    encode = DistributedDataParallel(model) if world_size > 1 else model
    if state.exists():
        weights_then, optimizer_then = get_state_dict(model, optimizer)
        saved = {"model": weights_then, "optimizer": optimizer_then, "loader": loader}
        dcp.load(saved, checkpoint_id=state)
        set_state_dict(
            model, optimizer, model_state_dict=weights_then, optim_state_dict=optimizer_then
        )
    losses: list[float] = []
    for batch in loader:
        schedule.step_update(batch.step + 1)
        model.set_drop_path_key(step=batch.step, global_index=batch.global_index)
        loss = global_loss(encode, batch, config, ranks)
        (loss * world_size).backward()  # DDP averages what is to be summed
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            config.objective.limit(model.learnt)
        losses.append(float(loss))
        if batch.step + 1 >= steps:
            break
    weights_now, optimizer_now = get_state_dict(model, optimizer)
    saved = {"model": weights_now, "optimizer": optimizer_now, "loader": loader}
    dcp.save(saved, checkpoint_id=state)
    loader.close()
    return losses


if __name__ == "__main__":
    from command_line import read_options

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("state"))
    config, given = read_options(parser)
    train(config, given.stop_at, given.state)
