"""Model FLOP/s utilisation: the FLOPs counted, the peak, and the run's lines of metrics."""

import logging
from unittest.mock import Mock

import pytest
import torch
from small_runs import labelled_batch, objective_config, tiny_config, trainer_of
from torch.utils.flop_counter import FlopCounterMode

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import TrainConfig
from unicl_fast.training import mfu, observers
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.metrics import read_metrics
from unicl_fast.training.mfu import flops_of_step, peak_of_gpu, seconds_at_peak


def check_flops(config: TrainConfig, batch: Batch) -> None:
    """Compares with the FLOPs of a real step."""
    real = make_trainer(config, ListLoader([batch]), progress=False)
    for module in real.model.modules():
        if hasattr(module, "fused_attn"):  # whose kernel torch's counter does not know
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        real.train_step(batch)
    assert counter.get_total_flops() == pytest.approx(flops_of_step(config, batch), rel=0.01)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("unicl", {}),
        ("ce", {}),
        pytest.param(*("ce", {"image_encoder": "unicl_convnet7_small"}), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_products_are_those_of_a_real_step(images, objective, settings):
    config = objective_config(objective, **settings)
    check_flops(config, labelled_batch(images, objective=objective))


@pytest.mark.parametrize(
    "optim",
    [
        pytest.param({"freeze": ("text", "image_projection")}, marks=pytest.mark.slow),
        pytest.param({"freeze": ("image:3", "text:1")}, marks=pytest.mark.slow),
        pytest.param({"lora": "image:2@last4,text:2"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_frozen_has_no_backward_pass(images, optim):
    batch = labelled_batch(images, objective="unicl")
    config = tiny_config().changed(model={"text_width": 128})
    frozen = config.changed(optim=optim)
    check_flops(frozen, batch)
    assert flops_of_step(frozen, batch) < 0.95 * flops_of_step(config, batch)


def test_what_is_computed_once_more_does_not_count(images):
    plain, batch = tiny_config(), labelled_batch(images, objective="unicl")
    again = tiny_config(activation_checkpointing=True, micro_batch_size=5)
    assert flops_of_step(again, batch) == flops_of_step(plain, batch)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> torch.device:
    """A device that is called an H100, so far as `seconds_at_peak` looks at it."""
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork(devices=[]))
    caplog.set_level(logging.INFO)
    return torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "narrow", "tf32", "wide"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 494.5e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12, 19.5e12),
        ("NVIDIA L40S", 362e12, 181e12, 91.6e12),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12, 15.7e12),
        ("NVIDIA H100 NVL", None, None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None, None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name_and_has_a_peak_for_each_type(
    name, narrow, tf32, wide, gpu,
    monkeypatch, caplog,
):  # fmt: skip
    assert peak_of_gpu(name, torch.bfloat16) == peak_of_gpu(name, torch.float16) == narrow
    assert peak_of_gpu(name, torch.float32) == wide
    assert peak_of_gpu(name, torch.float64) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(mfu, "flops_of_step", lambda config, batch: 1e12)
    found = {
        precision: seconds_at_peak(tiny_config(precision=precision), Mock(), gpu)
        for precision in ("tf32", "fp32")
    }
    assert found["tf32"] == (tf32 and pytest.approx(1e12 / tf32))
    assert found["fp32"] == (wide and pytest.approx(1e12 / wide))
    assert (f"the peak of {name} is not known" in caplog.text) == (tf32 is None)
    assert peak_of_gpu(name, torch.bfloat16, tf32=True) == peak_of_gpu(name, torch.bfloat16)


def test_a_run_on_a_gpu_counts_once_and_is_not_disturbed(images, gpu, tmp_path, monkeypatch):
    counted = []

    def count(config: TrainConfig, batch: Batch, device: torch.device) -> float | None:
        assert seconds_at_peak(config, batch, device) is None  # a CPU
        counted.append(seconds_at_peak(config, batch, gpu))
        return counted[-1]

    config = tiny_config(image_encoder="unicl_convnet7_small", precision="fp32", steps=5)
    config = config.changed(checkpoint={"every_steps": 0})
    weights, numbers = [], []
    monkeypatch.setattr(observers, "COMPILING_STEPS", 2)
    for folder, utilisation in (("gpu", count), ("cpu", seconds_at_peak)):
        monkeypatch.setattr(observers, "seconds_at_peak", utilisation)
        torch.manual_seed(7)
        run = trainer_of(images, config, tmp_path / folder)
        run.fit()
        weights.append(run.model.state_dict())
        numbers.append(torch.rand(3))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(*numbers)
    lines = read_metrics(tmp_path / "gpu")
    assert ["mfu" in line for line in lines] == [False, False, True, True, True]
    assert not any("mfu" in line for line in read_metrics(tmp_path / "cpu"))
    assert len(counted) == 1
    assert lines[-1]["mfu"] == pytest.approx(counted[0] / lines[-1]["step_seconds"])


def test_an_encoder_that_cannot_be_counted_costs_the_number_alone(gpu, monkeypatch, caplog):
    fail = Mock(side_effect=NotImplementedError("no fake tensors"))
    monkeypatch.setattr(mfu, "flops_of_step", fail)
    assert seconds_at_peak(tiny_config(precision="fp32"), Mock(), gpu) is None
    assert "no mfu in the metrics: NotImplementedError: no fake tensors" in caplog.text
