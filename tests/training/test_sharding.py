"""`efficiency.shard`: ranks that divide the training state train as ranks that do not.

Under `optimizer` bit for bit, under `full` within rounding; checkpoints hold whole tensors.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from compared_runs import IN_FP64, assert_close_states, assert_equal, last_of, losses_of, state_of
from rank_workers import divided_gradients, needs_full, run_on_ranks, train_each
from small_runs import tiny_config, trainer_of
from torch.distributed.fsdp import FSDPModule

from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.sharding import choose_owners, largest_load, shard_encoders
from unicl_fast.presets import build_preset
from unicl_fast.training.encoding import encoder_autocast
from unicl_fast.training.memory_plan import plan
from unicl_fast.training.metrics import read_metrics
from unicl_fast.training.run import check_request
from unicl_fast.training.step_clock import NO_TRAINING, PARTS

STEPS = 4


def config_of(shard: str = "off", *, clip_norm: float = 5.0, **settings: object) -> TrainConfig:
    config = tiny_config(steps=STEPS, shard=shard, **settings)
    return config.changed(optim={"clip_norm": clip_norm}, run={"evaluate_every_steps": 3})


def quick_config(shard: str) -> TrainConfig:
    """Without an evaluation, and with one checkpoint, of the last step."""
    config = config_of(shard)
    return config.changed(checkpoint={"every_steps": 0}, run={"steps": 2, "log_every_steps": 1})


def assert_equal_runs(found: Path, expected: Path) -> None:
    """Bit for bit: each loss that both have, and every tensor of the last checkpoint."""
    losses = losses_of(found)
    assert losses == losses_of(expected)[-len(losses) :]
    assert_equal(state_of(last_of(found)), state_of(last_of(expected)))


def assert_close_runs(found: Path, expected: Path, *, rtol: float, atol: float) -> None:
    losses = losses_of(found)
    assert losses == pytest.approx(losses_of(expected)[-len(losses) :], rel=rtol)
    assert_close_states(found, expected, rtol=rtol, atol=atol)


@needs_full
def test_two_ranks_that_divide_the_state_train_as_before(images, tmp_path):
    """And hold half of it each; `optimizer` divides no parameter, and one is 0.8 of this model."""
    runs = {shard: (quick_config(shard), None) for shard in ("off", "optimizer", "full")}
    of_ranks = run_on_ranks(train_each, 2, images, tmp_path, runs)
    sizes = {shard: [of_runs[shard] for of_runs in of_ranks] for shard in runs}
    assert_equal_runs(tmp_path / "optimizer", tmp_path / "off")
    assert_close_runs(tmp_path / "full", tmp_path / "off", **IN_FP64)
    for shard in runs:
        for line in (line for line in read_metrics(tmp_path / shard) if "loss" in line):
            seconds = {part: line[f"seconds/{part}"] for part in PARTS if part not in NO_TRAINING}
            assert sum(seconds.values()) == pytest.approx(line["step_seconds"])
            assert 0 < seconds["communication"] < line["step_seconds"]
    ((parameters, states), _) = sizes["off"]
    assert [of_parameters for of_parameters, _ in sizes["optimizer"]] == [parameters] * 2
    assert sum(of_states for _, of_states in sizes["optimizer"]) == states
    for of_parameters, of_states in sizes["full"]:
        assert of_parameters == pytest.approx(parameters / 2, rel=0.01)
        assert of_states == pytest.approx(states / 2, rel=0.01)
    for shard in ("optimizer", "full"):
        planned = plan(quick_config(shard), world_size=2, device_bytes=0, device_type="cpu").parts
        assert planned["gradients"] == sizes[shard][0][0]
        largest = max(of_states for _, of_states in sizes[shard])
        assert planned["optimizer"] == pytest.approx(largest, abs=1000)  # and counts of steps


ROUNDED = {"rtol": 1e-5, "atol": 1e-4}
"""AdamW makes steps of the learning rate even of gradients that are only rounding."""
CASES: dict[str, tuple[dict, dict | None]] = {
    "clipped": ({"clip_norm": 0.05}, IN_FP64),
    "fp32": ({"precision": "fp32"}, ROUNDED),
    "fp16": ({"precision": "fp16"}, None),
    "lamb, fp16": ({"optimizer": "lamb", "precision": "fp16"}, None),
    "bf16": ({"precision": "bf16"}, ROUNDED),
    "micro-batches": ({"micro_batch_size": 1}, IN_FP64),
    "recomputed": ({"micro_batch_size": 2, "activation_checkpointing": True}, IN_FP64),
    "BatchNorm": ({"image_encoder": "unicl_convnet7_small"}, IN_FP64),
}
"""Settings, and how near `full` is; None if it is refused."""
SLOW = [*CASES][:3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.long] * (one not in SLOW)) for one in CASES]
)
@needs_full
def test_divided_runs_are_the_plain_run(images, tmp_path, name):
    """Ranks have other numbers of micro-batches of texts, and of passes in an evaluation."""
    settings, near = CASES[name]
    shards = ["off", "optimizer", *["full", "full, again"] * (near is not None)]
    runs = {run: (config_of(run.removesuffix(", again"), **settings), None) for run in shards}
    run_on_ranks(train_each, 2, images, tmp_path, runs)
    assert_equal_runs(tmp_path / "optimizer", tmp_path / "off")
    if near is not None:
        assert_equal_runs(tmp_path / "full, again", tmp_path / "full")
        assert_close_runs(tmp_path / "full", tmp_path / "off", **near)
    for run in runs if "precision" not in settings else ():
        found = [line["passes/worst"] for line in read_metrics(tmp_path / run) if len(line) == 2]
        assert len(found) == 2
        assert max(found) < 1e-12


@needs_full
@pytest.mark.slow
def test_blocks_gathered_in_bf16_have_the_same_gradients_but_for_rounding(images):
    """Those of matrices, which autocast rounds too, are equal: they are added up in fp32.

    The gradients of norms are rounded once. Fresh norms are ones and zeros, which bf16 has.
    """
    ((loss, wide), (other, narrow)), _ = run_on_ranks(divided_gradients, 2, images)
    assert other == loss
    for name, gradient in wide.items():
        assert narrow[name].dtype == torch.float32
        if gradient.ndim > 1:
            assert torch.equal(narrow[name], gradient), name
        assert (narrow[name] - gradient).norm() <= 4e-3 * gradient.norm(), name
    assert not torch.equal(narrow[norm := "text_encoder.resblocks.0.ln_2.weight"], wide[norm])


@needs_full
@pytest.mark.long
def test_a_divided_run_resumes_on_other_ranks_and_divided_in_another_way(images, tmp_path):
    """From four ranks to two and to one, and back; on as many ranks bit for bit."""
    configs = {shard: config_of(shard) for shard in ("off", "optimizer", "full")}
    run_on_ranks(train_each, 4, images, tmp_path, {"full": (configs["full"], None)})
    middle = tmp_path / "full" / "checkpoints" / "step-00000002"
    on_two = {f"{shard} on 2": (config, middle) for shard, config in configs.items()}
    run_on_ranks(train_each, 2, images, tmp_path, on_two)
    trainer = trainer_of(images, configs["full"], tmp_path / "alone")
    trainer.resume(middle)
    trainer.fit()
    back = {"same": (configs["full"], middle)}
    for run, shard in (("off on 2", "full"), ("full on 2", "optimizer")):
        longer = configs[shard].changed(run={"steps": 2 * STEPS})
        back[f"back from {run}"] = longer, last_of(tmp_path / run)
    run_on_ranks(train_each, 4, images, tmp_path, back)
    assert_equal_runs(tmp_path / "same", tmp_path / "full")
    for run in (*on_two, "alone"):
        assert_close_runs(tmp_path / run, tmp_path / "full", **IN_FP64)
    first, second = ("back from off on 2", "back from full on 2")
    assert losses_of(tmp_path / first) == pytest.approx(losses_of(tmp_path / second), rel=1e-9)
    assert len(losses_of(tmp_path / first)) == STEPS


def loads_of(owners: list[int], sizes: list[int]) -> Counter[int]:
    loads = Counter[int]()
    for owner, size in zip(owners, sizes, strict=True):
        loads[owner] += size
    return loads


def test_owners_have_nearly_as_much_each_and_are_no_more_than_leave_the_fullest_no_fuller():
    sizes = [7, 1, 1, 30, 5, 5, 4, 9, 2, 20]
    loads = loads_of(choose_owners(sizes, 3), sizes)
    assert max(loads.values()) == largest_load(sizes, 3) == 30
    assert min(loads.values()) >= 26
    assert choose_owners([3, 2], 4) == [0, 1]  # two ranks have none
    with torch.device("meta"):
        model = build_model(build_preset("swin-tiny"))
    sizes = [one.numel() for one in model.parameters()]
    for world_size, owners in {1: 1, 2: 2, 3: 3, 4: 4, 1024: 4}.items():
        loads = loads_of(choose_owners(sizes, world_size), sizes)
        assert max(loads.values()) == largest_load(sizes, world_size)
        assert sorted(loads) == list(range(owners))
    assert largest_load(sizes, 1024) == model.text_encoder.token_embedding.weight.numel()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lamb"}, "optim.name=lamb.*take optim.name=adamw"),
        ({"precision": "fp16"}, "efficiency.precision=fp16.*take efficiency.precision=bf16"),
    ],
)
def test_what_full_cannot_divide_is_refused(images, tmp_path, settings, message):
    """By the trainer, and before the data is opened."""
    config = tiny_config(shard="full", **settings)
    with pytest.raises(ValueError, match=f"{message}, or efficiency.shard=optimizer"):
        trainer_of(images, config)
    config = dataclasses.replace(config, data=DataConfig(train=("no such folder",)))
    with pytest.raises(ValueError, match=message):
        check_request(config, run_folder=tmp_path, nproc=2, resume="never")


def test_full_refuses_the_fp16_that_auto_means_on_older_gpus(images, monkeypatch):
    monkeypatch.setattr("unicl_fast.models.precision.fast_precision", lambda device: "fp16")
    config = tiny_config(shard="full", precision="auto")
    with pytest.raises(ValueError, match="efficiency.precision=fp16.*take efficiency.precision="):
        trainer_of(images, config)


def test_full_is_refused_with_a_torch_that_lacks_what_it_needs(monkeypatch):
    model = build_model(tiny_config())
    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms", raising=False)
    for device, place in {"cpu": " on a CPU", "meta": ""}.items():
        message = f"^efficiency.shard=full{place} needs a newer torch .*set efficiency.shard=opt"
        with pytest.raises(ValueError, match=message):
            shard_encoders(model.to(device), Ranks(world_size=2))
        monkeypatch.setattr("unicl_fast.models.sharding._CHOOSES_WHAT_RESHARDS", False)


def test_an_encoder_without_known_blocks_is_not_divided(monkeypatch):
    """The other encoder is not divided then either: the model is left as it was."""
    monkeypatch.setattr("unicl_fast.models.sharding.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("unicl_fast.models.sharding.fully_shard", divide := Mock())
    model = build_model(tiny_config(image_encoder="test_nfnet"))
    with pytest.raises(ValueError, match="NormFreeNet has none.*set efficiency.shard=optimizer"):
        shard_encoders(model, Ranks(world_size=2))
    model = build_model(tiny_config())
    model.text_encoder = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has none.*set efficiency.shard=optimizer"):
        shard_encoders(model, Ranks(world_size=2))
    divide.assert_not_called()


@pytest.mark.parametrize(("shard", "keeps"), [("off", True), ("optimizer", True), ("full", False)])
def test_weights_of_divided_blocks_are_not_kept_in_16_bits(shard, keeps):
    config = tiny_config(shard=shard, precision="bf16")
    with encoder_autocast(config.efficiency, Ranks(world_size=2), "cpu"):
        assert torch.is_autocast_cache_enabled() == keeps
    assert torch.is_autocast_cache_enabled()
