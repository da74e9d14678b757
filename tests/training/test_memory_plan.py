"""The memory planner: against what steps really take, for every preset, and what it advises."""

import dataclasses
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from budgets import compare
from small_runs import objective_config, tiny_config

from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models import compilation
from unicl_fast.models.precision import normalise_images
from unicl_fast.presets import PRESETS, build_preset
from unicl_fast.training import build, memory_plan
from unicl_fast.training.memory_plan import (
    MemoryPlan,
    build_on_meta,
    check_memory,
    check_sizes,
    plan,
)
from unicl_fast.training.settle import Setup, with_kernels

TESTS = Path(__file__).parents[1]
VERSIONS = {"torch": torch.__version__.split("+")[0], "timm": timm.__version__}
CPU = torch.device("cpu")
CARDS = {"40 GB": 40 << 30, "80 GB": 80 << 30}
"""GPUs sold as of 40 and 80 GB hold so many bytes, or a percent less."""


def plan_on_cpu(config: TrainConfig, **efficiency: object) -> MemoryPlan:
    return plan(
        config.changed(efficiency=efficiency), world_size=1, device_bytes=0, device_type="cpu"
    )


def with_large_batch(image_encoder: str) -> TrainConfig:
    config = tiny_config(image_encoder=image_encoder, precision="fp32")
    return config.changed(run={"global_batch_size": 16_384})


def plans_of(preset: str) -> dict[str, object]:
    """In MB: every part on 1 and 8 GPUs, and whether it fits; what differs if 8 share the state."""
    found: dict[str, object] = {}
    for world_size in (1, 8):
        one = plan(build_preset(preset), world_size=world_size, device_bytes=0)
        for card, size in CARDS.items():
            on_card = dataclasses.replace(one, device_bytes=size)
            found[f"{world_size} x {card}"] = "fits" if on_card.fits else "does not fit"
        parts = {name: round(part / 1e6) for name, part in one.parts.items()}
        found[f"on {world_size}"] = parts | {"total": round(one.total / 1e6)}
    for shard in ("optimizer", "full"):
        config = build_preset(preset).changed(efficiency={"shard": shard})
        one = plan(config, world_size=8, device_bytes=0)
        divided = {name: round(part / 1e6) for name, part in one.parts.items()}
        divided = {name: part for name, part in divided.items() if part != parts.get(name)}
        found[f"on 8, shard={shard}"] = divided | {"total": round(one.total / 1e6)}
    return found


SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in PRESETS if one != "cifar10-small"]


@pytest.mark.parametrize("preset", ["cifar10-small", *SLOW])
def test_a_preset_has_the_committed_plan(preset):
    compare("memory_plan.json", preset, lambda: plans_of(preset), versions=VERSIONS)


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_run_takes_what_was_planned(recomputes):
    """By the peak memory of a process that trains, to 15 %; recomputing, to 30 %."""
    settings = json.dumps({"activation_checkpointing": recomputes})
    command = [sys.executable, str(TESTS / "helpers" / "memory_run.py"), settings]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    found = json.loads(finished.stdout.splitlines()[-1])
    apart = ("slack", "checkpoint", "batches in flight")  # no folder; the batch was there before
    planned = sum(size for name, size in found["parts"].items() if name not in apart)
    assert found["risen"] == pytest.approx(planned, rel=0.3 if recomputes else 0.15)
    assert found["risen"] < 1.1 * planned


def test_what_is_kept_for_backward_grows_as_foretold():
    """Against what the allocator really holds while the graph is alive."""
    config = tiny_config(precision="fp32")
    model = build_model(config).eval()
    foretold = plan_on_cpu(config).image_bytes
    images = torch.zeros(64, 32, 32, 3, dtype=torch.uint8)
    normalised = normalise_images(images, mean=config.data.mean, std=config.data.std)
    with torch.profiler.profile(profile_memory=True) as profile:
        features = model.encode_image(normalised)
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert features.requires_grad
    assert 64 * foretold == pytest.approx(held, rel=0.15)


def test_parts_follow_the_settings():
    config = tiny_config(precision="fp32")
    plain = plan_on_cpu(config)
    assert plan_on_cpu(config, activation_checkpointing=True).image_bytes < plain.image_bytes
    micro = plan_on_cpu(config, micro_batch_size=4)
    for name in ("images: activations", "texts: activations"):
        assert 3 * micro.parts[name] == plain.parts[name]
    narrow = plan_on_cpu(config, precision="bf16")
    assert 0 < narrow.parts["parameters in the narrow type"] <= plain.parts["parameters"] // 2
    assert narrow.image_bytes < plain.image_bytes
    assert plan_on_cpu(config, precision="fp64").parts["optimizer"] == 2 * plain.parts["optimizer"]
    on_cuda = plan(config, world_size=2, device_bytes=0, longest_text=20)
    assert on_cuda.parts["fixed"] == 3_000_000_000
    assert on_cuda.parts["gathered features"] == 2 * 12 * 8 * 4
    assert on_cuda.parts["texts: activations"] < plain.parts["texts: activations"] // 2


@pytest.mark.slow
def test_frozen_parts_take_their_weights_and_no_more():
    config = tiny_config(precision="fp32")

    def freezing(*entries: str) -> TrainConfig:
        return config.changed(optim={"freeze": entries})

    plain, locked = plan_on_cpu(config).parts, plan_on_cpu(freezing("image")).parts
    model = build_model(config)
    frozen = 4 * sum(one.numel() for one in model.image_encoder.parameters())
    weights = 4 * sum(one.numel() for one in model.parameters())
    assert locked["parameters"] == plain["parameters"]
    for name, copies in (("gradients", 1), ("optimizer", 2)):
        assert locked[name] == plain[name] - copies * frozen == copies * (weights - frozen)
    assert locked["checkpoint"] == plain["checkpoint"] - 2 * frozen
    assert locked["texts: activations"] == plain["texts: activations"]
    half = plan_on_cpu(freezing("image:3")).parts["images: activations"]
    # a block at a time is computed
    assert 0 < locked["images: activations"] < half < plain["images: activations"]
    full = {"shard": "full", "compile": "off"}
    divided, whole = (
        plan(one.changed(efficiency=full), world_size=2, device_bytes=0).parts
        for one in (freezing("image"), config)
    )
    assert divided["parameters"] == whole["parameters"]
    assert divided["gradients"] == pytest.approx(whole["gradients"] - frozen / 2, rel=0.01)


def test_windows_whose_scores_are_not_stored_keep_less():
    pytest.importorskip("triton")
    config = tiny_config(image_encoder="unicl_swin6_small", precision="fp32")
    timms, ours = (plan_on_cpu(config, window_attention=way) for way in ("timm", "triton"))
    windows, n, heads, blocks = (4, 1), 16, (3, 6), (2, 4)
    scores = sum(w * n * n * h * b * 4 for w, h, b in zip(windows, heads, blocks, strict=True))
    assert ours.image_bytes <= timms.image_bytes - scores
    assert plan_on_cpu(config, window_attention="auto").image_bytes == timms.image_bytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_window_attention_that_cannot_work_is_refused_before_it_is_built(monkeypatch, device):
    """Without the package triton."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "unicl_fast.models.window_attention", raising=False)
    without = "Triton is not installed"
    monkeypatch.setattr(compilation, "obstacle_to_triton", lambda *_, **__: without)
    windows = {"image_encoder": "unicl_swin6_small", "window_attention": "triton"}
    config = tiny_config(**windows, precision="fp32")
    setup = Setup(given=config, config=config, ranks=Ranks(), device=torch.device(device))
    plain = build_on_meta(config.changed(efficiency={"window_attention": "timm"}), device)
    reason = without if device == "cuda" else "the kernels run on CUDA devices only"
    with pytest.raises(ValueError, match=f"=triton cannot work here, since {reason}: set auto or"):
        with_kernels(setup, plain)
    check_sizes(config, device)  # imports no triton


def with_many_parameters(**efficiency: object) -> TrainConfig:
    """134 million of them, nearly all in one table; hardly any activations."""
    config = tiny_config(precision="fp32", compile="off", **efficiency)
    return config.changed(model={"vocab_size": 2**23})


def test_ranks_may_divide_the_state():
    """A table that one rank updates whole is no less for `optimizer`, and a quarter for `full`."""
    plans = {
        shard: plan(with_many_parameters(shard=shard), world_size=4, device_bytes=0).parts
        for shard in ("off", "optimizer", "full")
    }
    weights = plans["off"]["gradients"]
    state = ("parameters", "gradients", "optimizer")
    assert sum(plans["off"][name] for name in state) == pytest.approx(4 * weights, rel=0.01)
    assert plans["optimizer"] == plans["off"] | {
        name: plans["optimizer"][name] for name in ("optimizer", "slack")
    }
    assert 0.99 * 2 * weights < plans["optimizer"]["optimizer"] < plans["off"]["optimizer"]
    assert sum(plans["full"][name] for name in state) == pytest.approx(weights, rel=0.01)
    assert plans["full"]["collected parameters"] == pytest.approx(weights, rel=0.01)
    alone = plan(with_many_parameters(shard="full"), world_size=1, device_bytes=0).parts
    assert sum(alone[name] for name in state) == pytest.approx(4 * weights, rel=0.01)


def test_dividing_the_state_is_offered_where_it_fits():
    free = plan(with_many_parameters(shard="full"), world_size=4, device_bytes=0).total
    arguments = {"device": torch.device("cuda"), "free_bytes": free}
    with pytest.raises(ValueError, match=r"efficiency\.shard=full: 4\.\d GB") as refused:
        check_memory(with_many_parameters(), ranks=Ranks(world_size=4), **arguments)
    assert "shard=optimizer" not in str(refused.value)
    check_memory(with_many_parameters(shard="full"), ranks=Ranks(world_size=4), **arguments)
    with pytest.raises(ValueError, match="a step needs at least") as refused:
        check_memory(with_many_parameters(), ranks=Ranks(), **arguments)
    assert "shard" not in str(refused.value)


def test_an_objective_without_texts_is_planned_too():
    found = plan_on_cpu(objective_config("ce"))
    assert found.parts["texts: activations"] == 0
    assert found.images_at_once == 12


@pytest.mark.parametrize("image_encoder", ["test_vit", "unicl_convnet7_small"])
def test_what_cannot_fit_is_refused_with_what_would(monkeypatch, image_encoder):
    """BatchNorm sees the local batch, so micro-batches are not offered."""
    config = with_large_batch(image_encoder)
    needed = plan_on_cpu(config)
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: int(needed.certain * 0.6))
    with pytest.raises(ValueError, match="images: activations") as refused:
        check_memory(config, ranks=Ranks(), device=CPU)
    offered = re.findall(r"(\w+)=(\d+) \(the same result\): |(\d+) ranks: ", str(refused.value))
    names = {name or "ranks": int(size or ranks) for name, size, ranks in offered}
    assert ("micro_batch_size" in names) == (image_encoder == "test_vit")
    check_memory(config, ranks=Ranks(world_size=names.pop("ranks")), device=CPU)
    for name, size in names.items():
        check_memory(config.changed(efficiency={name: size}), ranks=Ranks(), device=CPU)
        assert plan_on_cpu(config, **{name: 2 * size}).total > int(needed.certain * 0.6)


@pytest.mark.parametrize("compile", [pytest.param("off", marks=pytest.mark.slow), "blocks"])
def test_compiled_blocks_are_refused_what_exceeds_the_memory_without_half_of_the_activations(
    compile,
):
    """It was twice the memory, for any part."""
    config = with_large_batch("test_vit").changed(efficiency={"compile": compile})
    needed = plan(config, world_size=1, device_bytes=0)
    spared = needed.parts["images: activations"] // 2 if compile == "blocks" else 0
    arguments = {"ranks": Ranks(), "device": torch.device("cuda")}
    check_memory(config, free_bytes=needed.certain - spared, **arguments)
    message = r"^a step needs at least \d+\.\d GB, and \d+\.\d are free .*; What fits: eff"
    with pytest.raises(ValueError, match=message):
        check_memory(config, free_bytes=needed.certain - spared - 1, **arguments)


def test_a_run_is_planned_with_the_kernels_that_passed_their_trials(monkeypatch):
    """Swin-T at 1,024 a GPU fits with Triton's windows only, and the trial can fail."""
    planned = []
    config = tiny_config(image_encoder="unicl_swin6_small", precision="fp32")
    setup = Setup(given=config, config=config, ranks=Ranks(), device=CPU)
    monkeypatch.setattr(build, "set_up", lambda *_, **__: setup)
    monkeypatch.setattr(build, "open_checked", lambda config: ([], None))
    monkeypatch.setattr(build, "_check_data", lambda *_: Mock())
    monkeypatch.setattr(build, "longest_text", lambda *_: 8)
    monkeypatch.setattr(build, "check_memory", lambda config, **_: planned.append(config) or 1 / 0)
    choose = Mock(return_value="triton")
    monkeypatch.setattr("unicl_fast.training.settle.settle_window_attention", choose)
    with pytest.raises(ZeroDivisionError):
        build.build_trainer(
            config, run_folder=Path(), build_loader=Mock(), evaluate=dict, ranks=Ranks(), device=CPU
        )
    assert [one.efficiency.window_attention for one in planned] == ["triton"]
    assert planned[0].efficiency.compile == "off"


def test_what_may_fit_is_warned_of(monkeypatch, caplog):
    config = with_large_batch("test_vit")
    needed = plan_on_cpu(config)
    assert needed.certain < needed.total
    for free, warns in [(needed.total, False), (needed.certain, True)]:
        monkeypatch.setattr(memory_plan, "free_memory", lambda device, free=free: free)
        with caplog.at_level(logging.WARNING):
            check_memory(config, ranks=Ranks(), device=CPU)
        assert ("What fits: " in caplog.text) == warns
