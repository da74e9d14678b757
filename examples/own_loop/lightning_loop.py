"""A Lightning module with our loader, target map and loss.

Run it on data sets that `unicl-pack build` wrote:

    python lightning_loop.py packed/photos --steps 100 --devices 1

Lightning's checkpoints hold the loader's place; --resume FILE.ckpt begins there.
"""

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor

from unicl_fast.batch import Batch
from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.pipelines.train_loader import TrainLoader
from unicl_fast.training.data import build_prompts, open_datasets
from unicl_fast.training.optim import build_optimizer, build_schedule
from unicl_fast.training.settle import settle_objective
from unicl_fast.training.step import global_loss


class UniCLModule(lightning.LightningModule):
    """Image and text encoder, trained by the unified contrastive loss."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.model = build_model(config).to(memory_format=torch.channels_last)
        self.losses: list[float] = []

    def train_dataloader(self) -> Any:
        datasets, weights = open_datasets(self.config.data)
        self.config = settle_objective(self.config, datasets)
        prompts = build_prompts(datasets, self.config)
        rank, world_size = self.global_rank, self.trainer.world_size
        self.ranks = Ranks(rank, self.local_rank, world_size)
        return TrainLoader(self.config, datasets, weights, prompts, rank, world_size, self.device)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, _: int) -> Batch:
        return batch.to(device)

    def training_step(self, batch: Batch) -> Tensor:
        self.schedule.step_update(batch.step + 1)
        self.model.set_drop_path_key(step=batch.step, global_index=batch.global_index)
        loss = global_loss(self.model, batch, self.config, self.ranks)
        self.losses.append(float(loss))
        self.log("loss", loss.detach(), prog_bar=True, batch_size=batch.batch_size)
        return loss * self.ranks.world_size  # DDP averages what is to be summed

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        with torch.no_grad():
            self.config.objective.limit(self.model.learnt)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.model, self.config)
        self.schedule = build_schedule(optimizer, self.config, self.config.run.total_steps)
        return optimizer


def train(
    config: TrainConfig, steps: int, *, devices: int = 1, resume: str | None = None
) -> list[float]:
    """Takes the run's steps up to a number, and saves a checkpoint; returns their losses."""
    trainer = lightning.Trainer(
        max_steps=steps,
        devices=devices,
        gradient_clip_val=config.optim.clip_norm or None,
        logger=False,
    )
    module = UniCLModule(config)
    trainer.fit(module, ckpt_path=resume)
    return module.losses


if __name__ == "__main__":
    from command_line import read_options

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--resume", metavar="FILE.ckpt")
    config, given = read_options(parser)
    train(config, given.stop_at, devices=given.devices, resume=given.resume)
