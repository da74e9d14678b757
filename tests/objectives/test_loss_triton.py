"""The loss in Triton, beyond what it computes: compiled for three GPUs, and where it is taken."""

import logging
from typing import Any

import pytest
import torch
from interpreted_kernels import loss_and_gradients, loss_in_tf32
from loss_inputs import rows

from unicl_fast.config import EfficiencyConfig, TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models import compilation
from unicl_fast.objectives import loss as loss_module
from unicl_fast.objectives import loss_tiled
from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.objectives.registry import make_objective
from unicl_fast.training import settle

triton = pytest.importorskip("triton")


def test_loops_have_one_stage_where_triton_forgets_their_fences(monkeypatch):
    from unicl_fast.models.window_attention import launch_options
    from unicl_fast.objectives.loss_triton import blocks_for

    def stages(version: str, capability: int) -> list[int]:
        monkeypatch.setattr(triton, "__version__", version)
        options = [
            launch_options(torch.bfloat16, capability=capability, backward=backward)
            for backward in (False, True)
        ]
        blocks = blocks_for(torch.bfloat16, capability=capability)
        return [*(one["num_stages"] for one in options), blocks.num_stages]

    assert stages("3.7.1", 90) == stages("3.10.0+git1", 90) == [3, 3, 3]
    assert stages("3.7.0", 90) == stages("3.6.0+git2", 100) == [1, 1, 1]
    assert stages("3.6.0", 80) == [3, 1, 3]  # no tensor core reads by a proxy of its own


def test_rows_of_features_begin_at_16_bytes():
    from unicl_fast.objectives.loss_triton import _aligned

    features = torch.ones(3, 9, dtype=torch.bfloat16)
    assert _aligned(features).stride() == (16, 1)
    assert _aligned(features).sum() == features.sum()
    assert _aligned(whole := torch.ones(3, 32)) is whole


def test_kernels_that_are_not_interpreted_refuse_the_cpu():
    features = torch.ones(4, 4)
    with pytest.raises(ValueError, match="on a CUDA device, not on cpu; use form .* auto"):
        unified_contrastive_loss(features, features, torch.arange(4), 1.0, form="triton")


def test_fp32_is_not_tf32_unless_torch_may_use_it():
    from unicl_fast.objectives.loss_triton import _precision

    assert [_precision(t) for t in (torch.float32, torch.bfloat16)] == ["tf32x3", "ieee"]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert [_precision(t) for t in (torch.float32, torch.float64)] == ["tf32", "ieee"]
    finally:
        torch.set_float32_matmul_precision(before)


def test_auto_takes_triton_for_many_logits_on_a_gpu_that_has_it(monkeypatch):
    def form(num_logits: int, device: str, *, has_triton: bool) -> str:
        monkeypatch.setattr(loss_module, "_takes_triton", lambda device, dtype: has_triton)
        return loss_module._fastest_form(num_logits, torch.device(device), torch.float32)

    assert form(64 * 65_536, "cuda:0", has_triton=True) == "triton"
    assert form(64 * 65_536, "cuda:0", has_triton=False) == "tiled"
    assert form(512 * 512, "cuda:0", has_triton=True) == "dense"
    assert form(64 * 65_536, "cpu", has_triton=True) == "tiled"


def test_kernels_that_fail_in_their_trial_are_not_taken(monkeypatch, caplog):
    fault, tried = "", []
    monkeypatch.setattr(loss_module, "obstacle_to_triton", lambda index, oldest: "")
    monkeypatch.setattr(loss_module, "fault_in_trial", lambda *what: tried.append(what) or fault)
    call = 1 << 30, torch.device("cuda", 3), torch.bfloat16
    assert {loss_module._fastest_form(*call) for _ in range(3)} == {"triton"}
    loss_module._takes_triton.cache_clear()
    fault = "the loss is off"
    assert {loss_module._fastest_form(*call) for _ in range(3)} == {"tiled"}
    loss_module._takes_triton.cache_clear()
    assert tried == [("unicl_fast.objectives.loss_trial", call[1], "bfloat16")] * 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "the loss is off" in caplog.text


def test_all_ranks_take_tiles_where_kernels_fail_on_one_machine(monkeypatch, caplog):
    of_other, tried = "", []
    monkeypatch.setattr(settle, "adopt_answer", lambda *answer: None)
    monkeypatch.setattr(settle, "fault_of_triton", lambda device: tried.append(device) or "")
    monkeypatch.setattr(
        compilation, "gather_integers", lambda value, ranks: [value, bool(of_other)]
    )
    monkeypatch.setattr(compilation, "gather_objects", lambda value, ranks: [value, ["", of_other]])

    def settled(
        batch: int,
        *,
        form: Any = "auto",
        rank: int = 0,
        device: str = "cuda:0",
        name: str = "unicl",
    ) -> str:
        objective = make_objective(name)
        config = TrainConfig(efficiency=EfficiencyConfig(loss=form), objective=objective)
        config = config.changed(run={"global_batch_size": batch})
        ranks = Ranks(rank=rank, local_rank=rank, world_size=2)
        return settle.settle_loss(config, torch.device(device), ranks)

    assert settled(4096) == settled(4096, rank=1) == "auto"
    assert settled(1024) == settled(4096, device="cpu") == "auto"  # always dense; not on a GPU
    assert [settled(4096, form=form) for form in ("triton", "dense")] == ["triton", "dense"]
    assert settled(4096, name="sigmoid") == "auto"  # which has no such kernels
    assert tried == [torch.device("cuda:0")]
    of_other = "the loss is off"
    assert settled(4096) == settled(4096, rank=1) == "tiled"
    (line, _) = caplog.messages
    assert line == "loss: tiled (efficiency.loss=auto): rank 1: the loss is off"


def test_features_are_rounded_to_the_nearest_number_of_tf32():
    from unicl_fast.objectives.loss_tiled import round_to_tf32

    torch.manual_seed(0)
    features = torch.randn(10_000) * torch.randint(-20, 20, (10_000,)).exp2()
    bits = features.view(torch.int32)
    kept = [((bits & -8192) + more).view(torch.float32) for more in (0, 8192)]
    rounded = round_to_tf32(features)
    assert (rounded.view(torch.int32) & 8191 == 0).all()
    nearest = torch.stack([(one - features).abs() for one in kept]).amin(0)
    assert torch.equal((rounded - features).abs(), nearest)
    strange = torch.tensor([float("nan"), float("inf"), 0.0]), torch.tensor(0x7FFFFFFF).int()
    assert round_to_tf32(strange[0]).isfinite().tolist() == [False, False, True]
    assert round_to_tf32(strange[1].view(torch.float32)).isnan()  # CUDA's own


def test_well_fitted_pairs_have_no_negative_loss_in_tf32(interpreter):
    """With products that cut TF32's operands off, as an H100's do."""
    pairs = rows(48, 64, seed=1).float()
    call = pairs, pairs, torch.arange(48), 100.0
    exact, *_ = loss_and_gradients(pairs.double(), pairs.double(), *call[2:], form="dense")
    loss, *_ = interpreter.submit(loss_in_tf32, *call).result()
    assert abs(float(loss - exact)) < 1e-3
    not_rounded, *_ = interpreter.submit(loss_in_tf32, *call, rounds=False).result()
    assert not_rounded < -0.04  # so this is a test of the rounding


@pytest.mark.parametrize(("rounds", "least", "most"), [(True, -1e-3, 1e-3), (False, -0.1, -0.04)])
def test_tiles_of_torch_are_rounded_too(monkeypatch, rounds, least, most):
    def multiply(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        bits = (x.contiguous().view(torch.int32) & -8192 for x in (left, right))
        return plain(*(x.view(torch.float32) for x in bits), out=out)

    plain = torch.mm
    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(loss_tiled, "_multiplies_in_tf32", lambda features: rounds)
    pairs = rows(48, 64, seed=1).float()
    loss = unified_contrastive_loss(pairs, pairs, torch.arange(48), 100.0, form="tiled")
    assert least < loss < most
