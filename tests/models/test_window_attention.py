"""Swin's window attention in Triton against timm's: interpreted, compiled, and within a model."""

import copy
import logging
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted_kernels import attention_and_gradients, check_operators
from property_tests import examples
from small_runs import tiny_config
from swin_blocks import build_block, check_against_timm
from timm.models.swin_transformer import SwinTransformerBlock
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from unicl_fast.checkpoints.load import build_model
from unicl_fast.distributed import ranks
from unicl_fast.distributed.launch import SharedRefusal
from unicl_fast.models import compilation
from unicl_fast.models.adapters import add_adapters
from unicl_fast.models.blocks import find_blocks
from unicl_fast.models.compilation import fuse_window_attention, settle_window_attention
from unicl_fast.models.image_encoder import DropPathKey, build_image_encoder, set_image_size
from unicl_fast.models.sharding import WholeCopy

pytest.importorskip("triton")


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("form", "size", "window", "shift"),
    [
        ("fp32", (6, 8), (3, 4), 1),
        ("fp32", (7, 10), (3, 4), 1),  # padded on both sides
        ("fp32", (3, 4), (3, 4), 1),  # one window, which timm does not shift
        *(
            pytest.param("fp32", size, 7, shift, marks=slow)
            for size in [(14, 14), (10, 15)]
            for shift in (0, 3)
        ),
        *((form, (6, 4), (3, 4), 1) for form in ("autocast", "bf16", "fp16")),
        *(pytest.param(form, (14, 14), 7, 3, marks=slow) for form in ("autocast", "bf16", "fp16")),
    ],
    ids=str,
)
def test_kernels_round_no_more_than_timms(compute, form, size, window, shift):
    block = build_block(size, window=window, shift=shift)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(form, torch.float32)
    check_against_timm(compute, block, size, dtype=dtype, autocast=form == "autocast")


def test_adapters_are_seen_by_the_kernels(compute):
    block = build_block((6, 4), window=(3, 4), shift=1)
    add_adapters(block, [block], rank=4)
    for name, weight in block.named_parameters():
        torch.nn.init.normal_(weight, std=0.2) if "lora_B" in name else None
    check_against_timm(compute, block, (6, 4))


@pytest.mark.parametrize("largest", [3, pytest.param(8, marks=pytest.mark.long)])
@given(data=st.data())
@examples(25)
def test_any_window(compute, largest, data):
    side = st.integers(1, largest)
    window = data.draw(side, "height"), data.draw(side, "width")
    size = tuple(data.draw(st.integers(w, 2 * w + 3), "map") for w in window)
    block = build_block(
        size,
        window=window,
        shift=data.draw(st.integers(0, min(window) - 1), "shift"),
        heads=data.draw(st.integers(1, 3), "heads"),
        head_width=data.draw(st.sampled_from([4, 16, 24, 32]), "head width"),
    )
    check_against_timm(compute, block, size, images=data.draw(st.integers(1, 2), "images"))


@pytest.mark.parametrize("shift", [pytest.param(0, marks=slow), 1])
def test_torch_may_trace_and_compile_the_operators(compute, shift):
    compute(check_operators, shift=shift)


@slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_fused_blocks_are_few_graphs_without_breaks():
    """On tensors without content, forward and backward; six blocks are of three kinds."""
    efficiency = {"precision": "fp32", "activation_checkpointing": True}
    model = build_model(tiny_config(image_encoder="unicl_swin6_small", **efficiency)).to("meta")
    fuse_window_attention(model.image_encoder)
    model.set_drop_path_key(step=0, global_index=torch.arange(2, device="meta"))
    for block in find_blocks(model.image_encoder):
        block.compile(backend="aot_eager")
    model.encode_image(torch.empty(2, 3, 32, 32, device="meta")).sum().backward()
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def test_weights_keep_their_names_and_copies_compute_with_their_own():
    model = build_model(tiny_config(image_encoder="unicl_swin6_small"))
    names = list(model.state_dict())
    assert fuse_window_attention(model.image_encoder) == 6
    assert list(model.state_dict()) == names
    with WholeCopy(model).filled(model) as whole:
        copies = (model, copy.deepcopy(model), whole)
    for one in copies:
        blocks = [m for m in one.modules() if isinstance(m, SwinTransformerBlock)]
        assert all(block._attn.__self__ is block for block in blocks)


def test_kernels_that_are_not_interpreted_refuse_the_cpu():
    block = build_block((7, 7))
    x = torch.zeros(1, 7, 7, block.dim)
    with pytest.raises(ValueError, match="on a CUDA device, not on cpu.*auto or timm"):
        attention_and_gradients(block, x, x, fused=True)


def test_operations_are_counted_as_those_of_timm():
    """Backward has a product more: it computes the scores anew."""
    counts = []
    for fused in (False, True):
        block = build_block((14, 14), shift=3)
        if fused:
            assert fuse_window_attention(block) == 1
        with (
            FakeTensorMode(allow_non_fake_inputs=True) as mode,
            FlopCounterMode(display=False) as counter,
        ):
            x = mode.from_tensor(torch.zeros(2, 14, 14, block.dim))
            block._attn(x.requires_grad_()).sum().backward()
        counts.append(counter.get_total_flops())
    product = 2 * 2 * 4 * 49 * block.dim * 49
    assert counts[1] - counts[0] == product


def settled(chosen: str, *, device: str = "cuda:0", **settings: Any) -> str:
    config = tiny_config(**{"image_encoder": "unicl_swin6_small", "precision": "bf16"} | settings)
    model = build_model(config)
    config = config.changed(efficiency={"window_attention": chosen})
    return settle_window_attention(config.efficiency, model, torch.device(device))


def test_auto_takes_the_kernels_on_a_gpu_where_all_ranks_can(monkeypatch, caplog):
    obstacle, fault, tried = "", "", []
    monkeypatch.setattr(compilation, "obstacle_to_triton", lambda index, oldest: obstacle)
    monkeypatch.setattr(compilation, "fault_in_trial", lambda *what: tried.append(what) or fault)
    caplog.set_level(logging.INFO, logger=compilation.logger.name)
    assert settled("auto") == "triton"
    assert "window_attention: triton (efficiency.window_attention=auto)" in caplog.text
    name = "unicl_fast.models.window_trial"
    assert tried == [(name, torch.device("cuda:0"), "bfloat16")]
    assert settled("auto", device="cpu") == "timm"
    assert settled("auto", precision="fp64") == "timm"
    assert "timm (efficiency.window_attention=auto): the kernels do not compute in" in caplog.text
    assert settled("timm") == "timm"
    obstacle = "Triton is not installed"
    assert settled("auto") == "timm"
    with pytest.raises(ValueError, match=r"=triton cannot work here, since Triton is not inst"):
        settled("triton")
    obstacle = ""
    another = "efficiency.window_attention=triton cannot work here, since Triton is not installed"
    with monkeypatch.context() as ranks_differ:
        ranks_differ.setattr(ranks, "gather_objects", lambda value, ranks: [value, another])
        with pytest.raises(SharedRefusal, match="rank 1: .* since Triton is not installed"):
            settled("triton")
    assert settled("triton") == "triton"
    assert len(tried) == 1  # as nobody else would have taken them
    fault = "the attention is off"
    assert settled("auto") == "timm"
    assert caplog.records[-1].levelno == logging.WARNING
    assert "timm (efficiency.window_attention=auto): the attention is off" in caplog.text
    fault, another = "", ["", "the kernel crashed"]
    monkeypatch.setattr(compilation, "gather_integers", lambda value, ranks: [value, 1])
    monkeypatch.setattr(compilation, "gather_objects", lambda value, ranks: [value, another])
    assert settled("auto") == "timm"
    assert "=auto): rank 1: the kernel crashed" in caplog.text
    caplog.clear()
    assert settled("auto", image_encoder="test_vit") == "timm"
    assert not caplog.text  # nothing to say where there are no windows
    with pytest.raises(ValueError, match="no block of timm's Swin with windows of at most 64"):
        settled("triton", image_encoder="test_vit")


def test_windows_that_are_too_large_stay_timms():
    with torch.device("meta"):
        large = timm.create_model("swin_base_patch4_window12_384", num_classes=0)
        usual = timm.create_model("swin_base_patch4_window7_224", num_classes=0)
    assert fuse_window_attention(large) == 0
    assert fuse_window_attention(usual) == 24


def test_smaller_windows_take_the_middle_of_the_table(monkeypatch):
    from unicl_fast.models import window_attention  # it imports triton

    encoder = build_image_encoder(
        "unicl_swin6_small", image_size=32, drop_path=0.0, key=DropPathKey(0), other_sizes=[8]
    )
    tables = []
    monkeypatch.setattr(
        window_attention,
        "window_attention",
        lambda qkv, table, *_: tables.append(table) or qkv[..., : qkv.shape[-1] // 3],
    )
    set_image_size(encoder, 8)
    for block in (block for layer in encoder.layers for block in layer.blocks):
        side = block.input_resolution[0]
        window_attention._attend(block, torch.zeros(1, side, side, block.dim))
        index = block.attn.relative_position_index
        assert torch.equal(tables[-1], block.attn.relative_position_bias_table[index.unique()])
    assert [len(table) for table in tables] == 2 * [9] + 4 * [1]
