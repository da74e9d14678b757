"""Model FLOP/s utilisation: what is counted, by what it is divided, what a run sees of it."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from small_runs import StepLoader, labelled_batch, objective_config, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from unicl_fast.batch import ListLoader
from unicl_fast.training import mfu, observers
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.metrics import read_metrics
from unicl_fast.training.mfu import Utilisation, flops_of_step, peak_of_gpu


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("unicl", {}),
        ("ce", {}),
        ("supcon", {}),
        ("unicl", {"image_encoder": "unicl_convnet7_small"}),
    ],
    ids=str,
)
def test_the_products_are_those_of_a_real_step(
    images: torch.Tensor, objective: str, settings: dict
) -> None:
    config, batch = (
        objective_config(objective, **settings),
        labelled_batch(images, objective=objective),
    )
    real = make_trainer(config, ListLoader([batch]), progress=False)
    for module in real.model.modules():
        if hasattr(module, "fused_attn"):  # whose kernel torch's counter does not know
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        real.train_step(batch)
    # a backward pass is less than twice its forward pass: nobody asks for the images' gradient
    assert 0.85 < counter.get_total_flops() / flops_of_step(config, batch) <= 1.0


@pytest.mark.parametrize(
    "optim",
    [
        pytest.param({"freeze": ("image",)}, marks=pytest.mark.slow),
        pytest.param({"freeze": ("text",)}, marks=pytest.mark.slow),
        pytest.param({"freeze": ("image", "image_projection")}, marks=pytest.mark.slow),
        {"freeze": ("image:3", "text:1")},
        {"lora": "image:2@last4,text:2"},
    ],
    ids=str,
)
def test_what_is_frozen_has_no_backward_pass(images: torch.Tensor, optim: dict[str, Any]) -> None:
    config, batch = tiny_config(), labelled_batch(images, objective="unicl")
    config = config.changed(model={"text_width": 128})
    frozen = config.changed(optim=optim)
    real = make_trainer(frozen, ListLoader([batch]), progress=False)
    for module in real.model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        real.train_step(batch)
    assert 0.85 < counter.get_total_flops() / flops_of_step(frozen, batch) <= 1.0
    assert flops_of_step(frozen, batch) < 0.95 * flops_of_step(config, batch)


def test_what_is_computed_once_more_does_not_count(images: torch.Tensor) -> None:
    plain, batch = tiny_config(), labelled_batch(images, objective="unicl")
    again = tiny_config(activation_checkpointing=True, micro_batch_size=5)
    assert flops_of_step(again, batch) == flops_of_step(plain, batch)


def test_products_of_windows_are_the_same_by_either_attention(images: torch.Tensor) -> None:
    pytest.importorskip("triton")
    batch = labelled_batch(images, objective="unicl")
    timms, ours = (
        flops_of_step(tiny_config(image_encoder="unicl_swin6_small", window_attention=way), batch)
        for way in ("timm", "triton")
    )
    assert timms == ours


@pytest.mark.parametrize(
    ("name", "narrow", "wide"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40", 181e12, 90.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
        ("NVIDIA H100 NVL", None, None),
        ("NVIDIA H200 NVL", None, None),
        ("NVIDIA A10G", None, None),
        ("NVIDIA RTX A4000", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(
    name: str, narrow: float | None, wide: float | None
) -> None:
    assert peak_of_gpu(name, torch.bfloat16) == peak_of_gpu(name, torch.float16) == narrow
    assert peak_of_gpu(name, torch.float32) == wide
    assert peak_of_gpu(name, torch.float64) is None


@pytest.mark.parametrize(
    ("name", "tf32"),
    [
        ("NVIDIA H100 80GB HBM3", 494.5e12),
        ("NVIDIA H100 PCIe", 378e12),
        ("NVIDIA A100-SXM4-80GB", 156e12),
        ("Tesla V100-SXM2-16GB", 15.7e12),
        ("Tesla T4", 8.1e12),
        ("NVIDIA H100 NVL", None),
    ],
)
def test_fp32_that_is_computed_in_tf32_has_its_peak(
    name: str,
    tf32: float | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setattr(mfu, "flops_of_step", lambda config, batch: 1e12)
    caplog.set_level(logging.INFO)
    found = {}
    for precision in ("tf32", "fp32"):
        utilisation = Utilisation(tiny_config(precision=precision), torch.device("cuda"))
        found[precision] = utilisation.values(Mock(), step_seconds=1.0).get("mfu")
    assert found["tf32"] == (tf32 and pytest.approx(1e12 / tf32))
    fp32 = peak_of_gpu(name, torch.float32)
    assert found["fp32"] == (fp32 and pytest.approx(1e12 / fp32))
    assert (f"the peak of {name} is not known" in caplog.text) == (tf32 is None)
    assert peak_of_gpu(name, torch.bfloat16, tf32=True) == peak_of_gpu(name, torch.bfloat16)


def test_a_run_counts_once_and_is_not_disturbed(
    images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observers, "COMPILING_STEPS", 2)
    monkeypatch.setattr(mfu, "_peak_of", lambda device, precision: 1e12)
    counted = []

    def count(config: object, batch: object) -> float:
        torch.rand(1), torch.manual_seed(3)
        counted.append(flops_of_step(config, batch))
        return counted[-1]

    monkeypatch.setattr(mfu, "flops_of_step", count)
    config = tiny_config(image_encoder="unicl_convnet7_small", precision="fp32", steps=5)
    config = config.changed(checkpoint={"every_steps": 0})
    weights, numbers = [], []
    for folder in (tmp_path / "counting", None):
        torch.manual_seed(7)
        run = make_trainer(config, StepLoader(images), run_folder=folder, progress=False)
        run.fit()
        weights.append(run.model.state_dict())
        numbers.append(torch.rand(3))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(*numbers)
    lines = read_metrics(tmp_path / "counting")
    assert ["mfu" in line for line in lines] == [False, False, True, True, True]
    assert len(counted) == 1
    assert lines[-1]["mfu"] == pytest.approx(counted[0] / 1e12 / lines[-1]["step_seconds"])


def test_an_encoder_that_cannot_be_counted_costs_the_number_alone(
    images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> float:
        raise NotImplementedError("no fake tensors")

    monkeypatch.setattr(mfu, "flops_of_step", fail)
    monkeypatch.setattr(mfu, "_peak_of", lambda device, precision: 1e12)
    batch = labelled_batch(images, objective="unicl")
    utilisation = Utilisation(tiny_config(), torch.device("cpu"))
    assert [utilisation.values(batch, step_seconds=1.0) for _ in range(2)] == [{}, {}]
    assert caplog.text.count("no mfu in the metrics: NotImplementedError: no fake tensors") == 1
