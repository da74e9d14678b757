"""Our loader as the trainer of torchtitan builds, iterates and saves it.

config.dataloader = UniclDataLoader.Config(dataset_path="packed/photos", steps=1000)

The trainer is for language models: its `train_step`, overridden, takes the whole `Batch` from the
inputs, and calls `global_loss` as dcp_loop.py does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchtitan.components.dataloader import BaseDataLoader

from unicl_fast.pipelines.train_loader import TrainLoader
from unicl_fast.presets import build_preset
from unicl_fast.training.data import build_prompts, open_datasets
from unicl_fast.training.settle import settle_objective


class UniclDataLoader(BaseDataLoader):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        preset: str = "mixed-small"
        steps: int = 1000

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any
    ) -> None:
        run = {"global_batch_size": dp_world_size * local_batch_size, "samples": 0}
        preset = build_preset(config.preset).changed(
            data={"train": (config.dataset_path,)}, run=run | {"steps": config.steps}
        )
        datasets, weights = open_datasets(preset.data)
        self.settings = settle_objective(preset, datasets)
        prompts = build_prompts(datasets, self.settings)
        self.loader = TrainLoader(self.settings, datasets, weights, prompts, dp_rank, dp_world_size)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Any]]:
        for batch in self.loader:
            yield {"input": batch.images, "batch": batch}, batch.targets.class_ids

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loader.load_state_dict(state_dict)
