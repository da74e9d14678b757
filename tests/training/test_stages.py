"""Training in stages: what a step shows, rates, exact resumes, and the order over a boundary."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import StepLoader, global_batch, tiny_config

from unicl_fast.batch import Batch
from unicl_fast.config import TrainConfig
from unicl_fast.training.mfu import flops_of_step
from unicl_fast.training.optim import build_optimizer, build_schedule, set_rates, steps_of_samples
from unicl_fast.training.trainer import Trainer

# 3 steps of 8 images of 16 pixels, 2 of 12 without half of their tokens, and the rest as it is
STAGES = (
    "0.4:image_size=16,global_batch_size=8,context_length=6,micro_batch_size=5",
    "0.4:token_drop=0.5",
)


def config_of(*stages: str, samples: int = 60, **settings: Any) -> TrainConfig:
    config = tiny_config(**settings)
    run = dataclasses.replace(config.run, steps=0, samples=samples, stages=stages)
    return dataclasses.replace(config, run=run)


class Loader(StepLoader):
    """Batches of the sizes of each step's stage."""

    def __init__(self, config: TrainConfig, images: torch.Tensor) -> None:
        super().__init__(images)
        self._config, self._images = config, images

    def batches(self, start_step: int) -> Any:
        for step in itertools.count(start_step):
            yield self._batch_of(step)

    def _batch_of(self, step: int) -> Batch:
        stage = [one for one in self._config.stages if one.span.first_step <= step][-1].config
        side = stage.data.image_size
        images = self._images[:, :side, :side].contiguous()
        whole = global_batch(images, step=step)
        size, length = stage.run.global_batch_size, stage.model.context_length
        texts = whole.text_index[:size].unique()
        counts = torch.bincount(whole.text_index[:size], minlength=len(whole.tokens))
        tokens = whole.tokens[: int(texts.max()) + 1, :length].clone()
        lengths = whole.text_lengths[: len(tokens)].clip(max=length)
        tokens[range(len(tokens)), lengths - 1] = 49407
        return dataclasses.replace(
            whole,
            images=whole.images[:size],
            text_index=whole.text_index[:size],
            class_ids=whole.class_ids[:size],
            global_index=whole.global_index[:size],
            tokens=tokens,
            text_lengths=lengths,
            text_class_ids=whole.text_class_ids[: len(tokens)],
            text_counts=counts[: len(tokens)],
        )


def trainer_in(folder: Path | None, config: TrainConfig, images: torch.Tensor, **more: Any) -> Any:
    loader = Loader(config, images)
    return Trainer(config, loader, run_folder=folder, progress=False, **more)


@pytest.mark.parametrize(
    ("image_encoder", "ema_decay"), [("test_vit", 0.0), ("unicl_swin6_small", 0.9)]
)
def test_a_resumed_run_equals_an_unbroken_one_within_stages_and_between_them(
    images: torch.Tensor, tmp_path: Path, image_encoder: str, ema_decay: float
) -> None:
    stages = STAGES
    if image_encoder == "unicl_swin6_small":  # BatchNorm takes no micro-batches, Swin drops none
        stages = ("0.4:image_size=16,global_batch_size=8", "0.4:image_size=24,context_length=7")
    config = config_of(*stages, image_encoder=image_encoder)
    optim = dataclasses.replace(config.optim, ema_decay=ema_decay)
    every = dataclasses.replace(config.checkpoint, every_steps=1)
    run = dataclasses.replace(config.run, evaluate_every_steps=1)
    config = dataclasses.replace(config, optim=optim, checkpoint=every, run=run)
    shown = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    evaluations = {"eval": lambda model: {"top1": float(model.encode_image(shown).detach().sum())}}
    unbroken = trainer_in(tmp_path / "unbroken", config, images, evaluations=evaluations)
    assert [one.span.end_step for one in unbroken.stages] == [3, 5, 6]
    unbroken.fit()
    for step in (2, 3, 4):
        folder = tmp_path / f"from {step}"
        resumed = trainer_in(folder, config, images, evaluations=evaluations)
        resumed.resume(tmp_path / "unbroken" / "checkpoints" / f"step-{step:08d}")
        assert resumed.stage.span.number == (0, 0, 0, 1, 1, 2)[step]
        resumed.fit()
        for name, weight in unbroken.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], weight)


def test_every_stage_trains_and_shows_what_it_says(images: torch.Tensor, tmp_path: Path) -> None:
    config = config_of(*STAGES)
    trainer = trainer_in(tmp_path, config, images)
    tokens: list[int] = []
    handle = trainer.model.image_encoder.blocks[0].register_forward_hook(
        lambda module, inputs, out: tokens.append(inputs[0].shape[1])
    )
    trainer.fit()
    handle.remove()
    prefix = trainer.model.image_encoder.num_prefix_tokens
    # twice the micro-batches of 5 and 3 images: one patch of 16 pixels; then half of 4; then all
    assert [count - prefix for count in tokens] == 3 * 4 * [1] + 2 * [2] + [4]
    assert trainer.model.image_encoder.pos_embed.shape[1] == 4 + prefix


def test_the_model_is_evaluated_at_the_runs_own_sizes(images: torch.Tensor) -> None:
    config = config_of("0.5:image_size=16,context_length=6", image_encoder="unicl_swin6_small")
    trainer = trainer_in(None, config, images)
    encoder, text = trainer.model.image_encoder, trainer.model.text_encoder
    assert (encoder.patch_embed.img_size[0], text.longest) == (16, 6)
    with trainer._at_full_size(trainer.model):
        assert (encoder.patch_embed.img_size[0], text.longest) == (32, 77)
    assert (encoder.patch_embed.img_size[0], text.longest) == (16, 6)


def test_rates_follow_samples_and_the_batch_of_the_stage() -> None:
    config = config_of("600:global_batch_size=3", samples=1200)
    config = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, lr_batch_size=12, warmup_fraction=0.0)
    )
    from unicl_fast.models.unicl import UniCL

    model = UniCL(config)
    optimizer = build_optimizer(model, config)
    assert steps_of_samples(config, 0) == 0
    assert steps_of_samples(config, config.run.total_steps) == 100
    schedule = build_schedule(optimizer, config, 100)
    lr, least = config.optim.lr, config.optim.lr_min

    def rate_at(step: int) -> float:
        set_rates(optimizer, schedule, config, step=step)
        return optimizer.param_groups[0]["lr"]

    def cosine(part: float) -> float:
        return least + (lr - least) * (1 + math.cos(math.pi * part)) / 2

    # a quarter of the rate for a quarter of the batch, and as far along the cosine as the samples
    assert rate_at(99) == pytest.approx(cosine(300 / 1200) / 4)
    assert rate_at(199) == pytest.approx(cosine(600 / 1200) / 4)
    assert rate_at(200) == pytest.approx(cosine(612 / 1200))
    assert rate_at(249) == pytest.approx(least)


def test_a_resumed_run_may_change_what_is_to_come_and_not_what_is_over(
    images: torch.Tensor, tmp_path: Path
) -> None:
    trainer_in(tmp_path, config_of(*STAGES), images).fit()
    after_4 = tmp_path / "checkpoints" / "step-00000004"
    with pytest.raises(ValueError, match=r"run\.stages shows 48 samples before step 4, .* after 36"):
        trainer_in(None, config_of(), images).resume(after_4)
    longer = config_of(STAGES[0].replace("0.4", "24"), "24:token_drop=0.5", samples=120)
    trainer_in(None, longer, images).resume(after_4)


def test_work_of_a_stage_is_its_own(images: torch.Tensor) -> None:
    config = config_of(*STAGES, image_encoder="test_vit")
    batches = Loader(config, images)
    low, dropped, full = (
        flops_of_step(stage.config, batches._batch_of(stage.span.first_step)) / size
        for stage, size in zip(config.stages, (8, 12, 12), strict=True)
    )
    assert low < dropped < full
