"""Limits: steps that are not finite do no harm up to one, nor do replaced samples."""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from compared_runs import assert_equal
from rank_workers import (
    needs_full,
    recorded,
    run_on_ranks,
    train_with_a_poisoned_rank,
    train_with_replaced_samples,
    with_replaced,
)
from small_runs import StepLoader, global_batch, poison_step, tiny_config, trainer_of

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.config import TrainConfig
from unicl_fast.dataset.reader import TooManyBadSamplesError
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.training.limits import _REMEMBERED_STEPS, NonfiniteSteps, ReplacedSamples
from unicl_fast.training.metrics import METRICS_NAME, read_metrics
from unicl_fast.training.trainer import Trainer


def config_of(
    *, max_bad_steps: int = 0, log_every_steps: int = 1, **settings: object
) -> TrainConfig:
    config = tiny_config(**settings)
    return config.changed(
        run={"max_bad_steps": max_bad_steps, "log_every_steps": log_every_steps},
        checkpoint={"every_steps": 0},
    )


def trained(
    images: torch.Tensor,
    config: TrainConfig,
    change: Callable[[Trainer], None],
    run_folder: Path | None = None,
) -> Trainer:
    trainer = trainer_of(images, config, run_folder, change=recorded)
    change(trainer)
    trainer.fit()
    return trainer


def leave_out(trainer: Trainer, *, step: int) -> None:
    """The step counts in the schedule, and nothing else happens."""
    plain_step = trainer.train_step

    def train_step(batch):
        if batch.step != step:
            return plain_step(batch)
        trainer.step += 1
        return torch.tensor(1.0), torch.tensor(1.0)

    trainer.train_step = train_step


@pytest.mark.parametrize(
    ("log_every_steps", "settings"),
    [
        (1, {}),
        (4, {"micro_batch_size": 5, "precision": "bf16"}),
        (4, {"optimizer": "lamb"}),
        (4, {"optimizer": "muon", "precision": "fp32"}),
        # its BatchNorm takes in all that it sees
        (4, {"image_encoder": "unicl_convnet7_small", "precision": "fp32"}),
    ],
    ids=str,
)
def test_a_nonfinite_step_is_left_out_and_nothing_else(images, settings, log_every_steps):
    config = config_of(max_bad_steps=1, log_every_steps=log_every_steps, steps=7, **settings)
    poisoned = trained(images, config, lambda trainer: poison_step(trainer, step=3))
    without = trained(images, config, lambda trainer: leave_out(trainer, step=3))
    assert_equal(without.model.state_dict(), poisoned.model.state_dict())
    others = dict(poisoned.model.named_parameters())
    for name, one in without.model.named_parameters():
        states = without.optimizer.state[one], poisoned.optimizer.state[others[name]]
        for key in states[0]:
            assert torch.equal(*(torch.as_tensor(state[key]) for state in states)), (name, key)
    assert without.optimizer.param_groups[0]["lr"] == poisoned.optimizer.param_groups[0]["lr"]


def test_the_scaler_of_fp16_leaves_a_nonfinite_step_out(images):
    trainer = trainer_of(images, tiny_config(precision="fp16"))
    poison_step(trainer, step=2)
    states = []
    for batch, _ in zip(trainer.loader.batches(0), range(3), strict=False):
        loss, _ = trainer.train_step(batch)
        states.append({name: one.clone() for name, one in trainer.model.state_dict().items()})
    assert not loss.isfinite()
    assert_equal(states[1], states[2])


@pytest.mark.slow
def test_a_nonfinite_step_is_logged_counted_and_written_down(images, tmp_path, caplog):
    config = config_of(max_bad_steps=1, log_every_steps=2, steps=6)
    with caplog.at_level(logging.ERROR):
        trained(images, config, lambda trainer: poison_step(trainer, step=3), tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("NON-FINITE STEP 1 of at most 1: the loss of step 3 is nan")
    path = tmp_path / "non-finite-step-00000003.json"
    assert str(path) in line
    values = json.loads(path.read_text())
    assert (values["step"], values["loss"], values["seed"]) == (3, "nan", 0)
    assert values["last_metrics"]["step"] == 2
    assert values["ranks"] == [{"rank": 0, **expected_samples(3, range(12))}]
    lines = read_metrics(tmp_path)
    assert [line["nonfinite_steps"] for line in lines] == [0, 1, 1]
    # a line is of its good steps
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert list_checkpoints(tmp_path / "checkpoints")


def expected_samples(step: int, global_index: range) -> dict[str, list[int]]:
    """The records of `recorded` for some of a global batch."""
    sample_ids = [100 * step + index for index in global_index]
    return {
        "source_ids": [index % 2 for index in global_index],
        "sample_ids": sample_ids,
        "scheduled_ids": [sample_id + 50 for sample_id in sample_ids],
    }


def test_one_more_than_allowed_stops_the_run(images, tmp_path):
    def poison_two(trainer: Trainer) -> None:
        poison_step(trainer, step=2)
        poison_step(trainer, step=4)

    config = config_of(max_bad_steps=1, steps=6, log_every_steps=5)
    config = config.changed(checkpoint={"every_steps": 3})  # judges step 2 before the line does
    said = r"step 4 is nan.*non-finite step 2, .*=1\)"
    with pytest.raises(FloatingPointError, match=said) as stopped:
        trained(images, config, poison_two, tmp_path)
    assert str(tmp_path / "non-finite-step-00000004.json") in str(stopped.value)
    found = sorted(path.name for path in tmp_path.glob("non-finite-*"))
    assert found == ["non-finite-step-00000002.json", "non-finite-step-00000004.json"]
    assert [one.name for one in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]


def test_a_gradient_norm_that_is_not_finite_counts_too(images, tmp_path):
    def poison_gradient(trainer: Trainer) -> None:
        back_propagate = trainer.back_propagate

        def poisoned(batch):
            loss = back_propagate(batch)
            if batch.step == 1:
                trainer.model.image_projection.grad[0, 0] = math.inf
            return loss

        trainer.back_propagate = poisoned

    with pytest.raises(FloatingPointError, match="the gradient norm of step 1 is inf"):
        trained(images, config_of(steps=4), poison_gradient, tmp_path)
    values = json.loads((tmp_path / "non-finite-step-00000001.json").read_text())
    assert math.isfinite(values["loss"])
    assert values["grad_norm"] == "inf"
    trainer = trained(images, config_of(max_bad_steps=1, steps=4), poison_gradient)
    assert trainer.step == 4


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["off", "optimizer", pytest.param("full", marks=needs_full)])
def test_the_samples_of_all_ranks_are_written_down(images, tmp_path, shard):
    """Rank 1 alone sees the poison; both leave the step out, and stay alike."""
    weights = run_on_ranks(train_with_a_poisoned_rank, 2, images, tmp_path, shard)
    values = json.loads((tmp_path / "non-finite-step-00000002.json").read_text())
    assert values["ranks"] == [
        {"rank": 0, **expected_samples(2, range(6))},
        {"rank": 1, **expected_samples(2, range(6, 12))},
    ]
    assert_equal(*weights)
    assert all(value.isfinite().all() for value in weights[0].values())


def test_what_is_remembered_is_bounded(images):
    scaler, one = torch.amp.GradScaler("cpu", enabled=False), torch.tensor(1.0)
    steps = NonfiniteSteps(tiny_config().run, sources=(), ranks=Ranks(), run_folder=None)
    batch = next(StepLoader(images, change=recorded).batches(0))
    for step in range(_REMEMBERED_STEPS + 100):
        steps.on_step(Mock(), dataclasses.replace(batch, step=step), loss=one, grad_norm=one)
    assert len(steps._remembered) == _REMEMBERED_STEPS
    steps.check(Mock(scaler=scaler), [(1.0, 1.0)], done=_REMEMBERED_STEPS + 100)
    assert not steps._remembered


def test_a_record_that_cannot_be_written_does_not_hide_the_fault(images, tmp_path, caplog):
    (tmp_path / "non-finite-step-00000001.json").mkdir()
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        trained(images, config_of(), lambda trainer: poison_step(trainer, step=1), tmp_path)
    assert "cannot be written down" in caplog.text


def test_metrics_hold_the_count_since_the_start_of_this_process(images, tmp_path):
    options = {"change": lambda batch: with_replaced(batch, count=batch.step % 3)}
    trainer_of(images, folder=tmp_path, **options).fit()
    assert [line["replaced_samples"] for line in read_metrics(tmp_path)] == [0, 1, 3, 3, 4, 6]
    resumed = trainer_of(images, folder=tmp_path, **options)
    resumed.resume(tmp_path / "checkpoints" / "step-00000004")
    resumed.fit()
    assert [line["replaced_samples"] for line in read_metrics(tmp_path)] == [0, 1, 3, 3, 1, 3]


def test_the_first_ten_thousand_draws_have_one_allowance(images):
    config = tiny_config()
    assert (config.run.global_batch_size, config.data.max_bad_fraction) == (12, 0.01)
    draws = ReplacedSamples(config.data.max_bad_fraction, config.run.spans, run_folder=None)
    batch, one = global_batch(images), torch.tensor(1.0)

    def add(count: int, *, steps: int = 1) -> None:
        for _ in range(steps):
            draws.on_step(Mock(), with_replaced(batch, count=count), loss=one, grad_norm=one)

    def check(total: int) -> None:
        draws.on_log(Mock(), batch, {"replaced_samples": total})

    add(12)
    check(100)
    with pytest.raises(TooManyBadSamplesError, match="101 of the 12 samples .*the log"):
        check(101)
    add(0, steps=2_000)
    check(240)
    with pytest.raises(TooManyBadSamplesError, match="241 of the 24012"):
        check(241)
    assert draws.replaced == 12


@pytest.mark.slow
def test_ranks_add_up_their_counts_and_stop_at_too_many(images, tmp_path):
    messages = run_on_ranks(train_with_replaced_samples, 2, images, tmp_path)
    # rank r replaces r + 1 samples a step
    assert [line["replaced_samples"] for line in read_metrics(tmp_path)] == [3, 6, 9]
    assert messages[0] == messages[1]
    said = rf"9 of the 36 samples .*max_bad_fraction = 0.2 .*{tmp_path}/quarantine.csv"
    assert re.match(said, messages[0])
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 1


@pytest.mark.parametrize("stop_at", [0, 3, 5])
def test_a_run_ends_when_evaluations_have_not_risen_also_after_a_resume(
    images, tmp_path, stop_at, caplog
):
    config = config_of(steps=9).changed(
        run={"patience": 2, "evaluate_every_steps": 1},
        checkpoint={"every_steps": 1, "best": "some/top1"},
    )
    values = {1: 0.1, 2: 0.4, 3: 0.3, 4: 0.5, 5: 0.5, 6: 0.2, 7: 0.9}

    def trainer(steps: int) -> Trainer:
        def evaluation(model: object) -> dict[str, float]:
            return {"top1": values[made.step], "extra": 1.0}

        evaluations = {"other": lambda model: {"top1": 0.0}, "some": evaluation}
        made = trainer_of(images, config, tmp_path, change=recorded, evaluations=evaluations)
        made.total_steps = steps
        return made

    if stop_at:
        trainer(stop_at).fit()
        path = tmp_path / METRICS_NAME  # killed before the mean was written: the last is repeated
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "evaluated/mean" not in line))
        resumed = trainer(9)
        resumed.resume(list_checkpoints(tmp_path / "checkpoints")[-1])
    else:
        resumed = trainer(9)
    resumed.fit()
    assert resumed.step == 6
    assert [one.name for one in list_checkpoints(tmp_path / "checkpoints")][-1] == "step-00000006"
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["step"] == 4
    again = trainer(9)
    again.resume(tmp_path / "checkpoints" / "step-00000006")
    again.fit()
    assert again.step == 6
    assert "run.patience" not in caplog.text.replace(
        "not risen in 2 evaluations (run.patience)", ""
    )
    blind = config.changed(checkpoint={"best": "none"})
    endless = trainer_of(images, blind, tmp_path / "other", change=recorded)
    endless.total_steps = 1
    endless.fit()
    assert "run.patience=2 never ends the run" in caplog.text


def test_a_run_from_a_whole_model_is_measured_first_and_its_best_is_not_worse(images, tmp_path):
    config = config_of(steps=2).changed(model={"init": "elsewhere"})
    seen: list[float] = []

    def evaluation(model: object) -> dict[str, float]:
        seen.append(0.9 - len(seen) / 10)
        return {"top1": seen[-1]}

    evaluations = {"some": evaluation, "other": lambda model: {"top1": 0.5}}
    trainer_of(images, config, tmp_path, change=recorded, evaluations=evaluations).fit()
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {
        "step": 0, "metric": "evaluated/mean", "value": pytest.approx(0.7)
    }  # fmt: skip
    assert (tmp_path / "checkpoints" / "step-00000000").is_dir()
    values = [line["evaluated/mean"] for line in read_metrics(tmp_path) if "evaluated/mean" in line]
    assert values == pytest.approx([0.7, 0.65])
