"""What is said of memory before a run starts."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from small_runs import tiny_config

from unicl_fast.config import TrainConfig
from unicl_fast.models.precision import normalise_images
from unicl_fast.models.unicl import UniCL
from unicl_fast.training import memory_check
from unicl_fast.training.memory_check import activation_bytes, check_memory

CPU = torch.device("cpu")


def fp32_config(**efficiency: object) -> TrainConfig:
    return tiny_config(precision="fp32", **efficiency)


def test_what_is_kept_for_backward_grows_as_foretold() -> None:
    """Against what the allocator really holds while the graph is alive."""
    config = fp32_config()
    model = UniCL(config).eval()
    foretold = activation_bytes(model, config, CPU)
    images = torch.zeros(64, 32, 32, 3, dtype=torch.uint8)
    normalised = normalise_images(images, mean=config.data.mean, std=config.data.std)
    with torch.profiler.profile(profile_memory=True) as profile:
        features = model.encode_image(normalised)
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert features.requires_grad
    assert 64 * foretold == pytest.approx(held, rel=0.15)


def test_weights_in_a_narrow_type_are_not_counted_for_each_image() -> None:
    config = tiny_config(precision="bf16")
    model = UniCL(config)
    two, four, eight = (memory_check._kept_bytes(model, config, CPU, n) for n in (2, 4, 8))
    of_one = activation_bytes(model, config, CPU)
    assert of_one == (four - two) // 2
    assert eight - four == pytest.approx(4 * of_one, rel=0.01)
    assert two > 2 * of_one


def test_recomputed_blocks_keep_less() -> None:
    plain, again = fp32_config(), fp32_config(activation_checkpointing=True)
    kept = [activation_bytes(UniCL(config), config, CPU) for config in (plain, again)]
    assert kept[1] < 0.7 * kept[0]


def test_measuring_leaves_the_model_alone() -> None:
    config = tiny_config(image_encoder="unicl_convnet7_small", precision="fp32")
    model = UniCL(config).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    activation_bytes(model, config, CPU)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("image_encoder", "advice"),
    [("test_vit", "micro_batch_size to"), ("unicl_convnet7_small", "global_batch_size to")],
)
def test_what_cannot_fit_is_refused_with_what_would(
    monkeypatch: pytest.MonkeyPatch, image_encoder: str, advice: str
) -> None:
    config = tiny_config(image_encoder=image_encoder, precision="fp32")
    model = UniCL(config)
    of_one = activation_bytes(model, config, CPU)
    monkeypatch.setattr(memory_check, "free_memory", lambda device: 100 * of_one)
    check_memory(model, config, images_per_step=100, device=CPU)
    with pytest.raises(ValueError, match=advice):
        check_memory(model, config, images_per_step=201, device=CPU)
    efficiency = dataclasses.replace(config.efficiency, micro_batch_size=32)
    check_memory(
        model,
        dataclasses.replace(config, efficiency=efficiency),
        images_per_step=10_000,
        device=CPU,
    )


def test_what_hardly_fits_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = fp32_config()
    model = UniCL(config)
    of_one = activation_bytes(model, config, CPU)
    monkeypatch.setattr(memory_check, "free_memory", lambda device: 100 * of_one)
    with caplog.at_level(logging.WARNING):
        check_memory(model, config, images_per_step=150, device=CPU)
    assert "150 images" in caplog.text
    assert "micro_batch_size to 32" in caplog.text


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = memory_check.free_memory(CPU)
    assert 1e8 < whole < 1e14
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_check.free_memory(CPU) == pytest.approx(whole / 4, rel=0.2)


def test_files_that_were_read_are_no_obstacle(tmp_path: Path) -> None:
    """A control group's limit, less what it uses, plus what it would give up."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 500\nactive_file 70\n")
    assert memory_check._free_in_group(tmp_path) == 670
