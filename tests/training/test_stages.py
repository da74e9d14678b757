"""Training in stages: what a step shows, rates, exact resumes, and the order over a boundary."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_runs import IN_FP64, assert_close_states, assert_equal, last_of, losses_of, state_of
from rank_workers import needs_full, run_on_ranks, train_each
from small_runs import StepLoader, staged_batch, tiny_config

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig
from unicl_fast.models.compilation import has_compiler
from unicl_fast.models.unicl import UniCL
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.mfu import flops_of_step
from unicl_fast.training.optim import build_optimizer, build_schedule, set_rates, steps_of_samples

# 3 steps of 8 images of 16 pixels, 2 of 12 with shorter texts, and the rest as it is
STAGES = (
    "0.4:image_size=16,global_batch_size=8,context_length=6,micro_batch_size=5",
    "0.4:context_length=7",
)


def config_of(*stages: str, samples: int = 60, **settings: Any) -> TrainConfig:
    config = tiny_config(**settings)
    return config.changed(run={"steps": 0, "samples": samples, "stages": stages})


def trainer_in(folder: Path | None, config: TrainConfig, images: torch.Tensor, **more: Any) -> Any:
    loader = StepLoader(images, make=functools.partial(staged_batch, config=config))
    return make_trainer(config, loader, run_folder=folder, progress=False, **more)


@needs_full
@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")  # torch.compile would trace the checks
@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        ({}, ("image:2", "text:1")),
        pytest.param({"image_encoder": "unicl_swin6_small"}, (), marks=pytest.mark.long),
        pytest.param(
            *({"compile": "blocks"}, ()),
            marks=[
                pytest.mark.long,
                pytest.mark.skipif(not has_compiler(), reason="no C++ compiler for torch.compile"),
            ],
        ),
    ],
    ids=["frozen blocks", "Swin", "compiled"],
)
def test_three_ranks_resume_bit_for_bit_in_every_stage_and_equal_one_rank(
    images, tmp_path, settings, frozen
):
    """The order in which DDP's buckets are added up shows from three ranks on."""
    stages = ("12:image_size=16,global_batch_size=6,context_length=6", "12:crop_scale=0.5..1")
    plain = config_of(*stages, samples=36, **settings)
    plain = plain.changed(checkpoint={"every_steps": 1}, optim={"freeze": frozen})
    shards = ("off", "optimizer", "full")
    config = {shard: plain.changed(efficiency={"shard": shard}) for shard in shards}
    first = {shard: (config[shard], None) for shard in config}
    run_on_ranks(train_each, 3, images, tmp_path, first)
    checkpoints = {shard: list_checkpoints(tmp_path / shard / "checkpoints") for shard in config}
    assert all(len(found) == 4 for found in checkpoints.values())
    again = {
        f"{shard} from {number + 1}": (config[shard], checkpoints[shard][number])
        for shard in config
        for number in (range(3) if shard == "off" else [1])  # all steps, or between two stages
    }
    run_on_ranks(train_each, 3, images, tmp_path, again)
    states = {run: state_of(last_of(tmp_path / run)) for run in (*config, *again)}
    for run, (resumed, _) in again.items():
        assert_equal(states[run], states[resumed.efficiency.shard])
    assert_equal(states["optimizer"], states["off"])
    if "image_encoder" not in settings:  # BatchNorm of the small Swin sees the local batch
        trainer_in(tmp_path / "alone", config["off"], images).fit()
        alone = pytest.approx(losses_of(tmp_path / "alone"), rel=1e-9)
        for shard in ("off", "full"):
            assert losses_of(tmp_path / shard) == alone
            runs = tmp_path / shard, tmp_path / "alone"
            # Inductor adds up in an order that depends on the batch size
            rounding = IN_FP64 | ({"atol": 4e-12} if "compile" in settings else {})
            assert_close_states(*runs, **rounding, of_in_proj_bias=1e-8)


@pytest.mark.parametrize(
    "image_encoder", ["test_vit", pytest.param("unicl_swin6_small", marks=pytest.mark.slow)]
)
def test_a_resumed_run_equals_an_unbroken_one_within_stages_and_between_them(
    images, tmp_path, image_encoder
):
    stages = STAGES
    if image_encoder == "unicl_swin6_small":  # BatchNorm takes no micro-batches
        stages = ("0.4:image_size=16,global_batch_size=8", "0.4:image_size=24,context_length=7")
    config = config_of(*stages, image_encoder=image_encoder)
    config = config.changed(
        checkpoint={"every_steps": 1, "best": "none"}, run={"evaluate_every_steps": 1}
    )
    shown = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    evaluations = {"eval": lambda model: {"top1": float(model.encode_image(shown).detach().sum())}}
    unbroken = trainer_in(tmp_path / "unbroken", config, images, evaluations=evaluations)
    assert [one.span.end_step for one in unbroken.stages] == [3, 5, 6]
    unbroken.fit()
    for step in (2, 3, 4) if image_encoder == "test_vit" else (3,):
        folder = tmp_path / f"from {step}"
        resumed = trainer_in(folder, config, images, evaluations=evaluations)
        resumed.resume(tmp_path / "unbroken" / "checkpoints" / f"step-{step:08d}")
        assert resumed.stage.span.number == (0, 0, 0, 1, 1, 2)[step]
        resumed.fit()
        assert_equal(resumed.model.state_dict(), unbroken.model.state_dict())


def test_every_stage_trains_and_shows_what_it_says(images, tmp_path):
    config = config_of(*STAGES)
    trainer = trainer_in(tmp_path, config, images)
    tokens: list[int] = []
    trainer.model.image_encoder.blocks[0].register_forward_hook(
        lambda module, inputs, out: tokens.append(inputs[0].shape[1])
    )
    trainer.fit()
    prefix = trainer.model.image_encoder.num_prefix_tokens
    # twice the micro-batches of 5 and 3 images: one patch of 16 pixels; then all four
    assert [count - prefix for count in tokens] == 3 * 4 * [1] + 3 * [4]
    assert trainer.model.image_encoder.pos_embed.shape[1] == 4 + prefix


def test_the_model_is_evaluated_at_the_runs_own_sizes(images):
    config = config_of("0.5:image_size=16,context_length=6", image_encoder="unicl_swin6_small")
    evaluated: list[tuple[int, int]] = []

    def sizes(model: UniCL) -> tuple[int, int]:
        return model.image_encoder.patch_embed.img_size[0], model.text_encoder.longest

    def evaluation(model: UniCL) -> dict[str, float]:
        evaluated.append(sizes(model))
        return {}

    trainer = trainer_in(None, config, images, evaluations={"sizes": evaluation})
    assert sizes(trainer.model) == (16, 6)
    trainer._evaluate_one("sizes")
    assert evaluated == [(32, 77)]
    assert sizes(trainer.model) == (16, 6)


def test_rates_follow_samples_and_the_batch_of_the_stage():
    config = config_of("600:global_batch_size=3", samples=1200)
    config = config.changed(optim={"lr_batch_size": 12, "warmup_fraction": 0.0})
    optimizer = build_optimizer(build_model(config), config)
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


def test_a_resumed_run_may_change_what_is_to_come_and_not_what_is_over(images, tmp_path):
    trainer_in(tmp_path, config_of(*STAGES), images).fit()
    after_4 = tmp_path / "checkpoints" / "step-00000004"
    said = r"run\.stages shows 48 samples before step 4, .* after 36"
    with pytest.raises(ValueError, match=said):
        trainer_in(None, config_of(), images).resume(after_4)
    longer = config_of(STAGES[0].replace("0.4", "24"), "24:context_length=7", samples=120)
    trainer_in(None, longer, images).resume(after_4)


@pytest.mark.slow
def test_work_of_a_stage_is_its_own(images):
    config = config_of(*STAGES, image_encoder="test_vit")
    work = []
    for stage, size in zip(config.stages, (8, 12, 12), strict=True):
        batch = staged_batch(images, config=config, step=stage.span.first_step)
        work.append(flops_of_step(stage.config, batch) / size)
    low, short, full = work
    assert low < short < full
