"""Blocks as `efficiency.compile=blocks` has Inductor compile them for an H100, without one.

tests/golden/compiled_blocks.json has their kernels and the traffic of memory, forward and backward;
UNICL_WRITE_BUDGETS=1 writes it anew. One block is executed: its kernels' PTX by `helpers/ptx.py`.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools

import pytest
import timm
import torch
from budgets import compare
from fake_gpu import GPU, Kernels, fake_gpu
from timm.layers import Mlp
from torch import Tensor, nn

pytest.importorskip("triton")

from compiled_blocks import Lowered, execute, inductor_for_h100
from torch._dynamo.utils import counters

from unicl_fast.checkpoints.load import build_model
from unicl_fast.models.compilation import compile_encoders, fuse_window_attention
from unicl_fast.models.unicl import UniCL
from unicl_fast.presets import build_preset

VERSIONS = {"torch": torch.__version__.split("+")[0], "timm": timm.__version__}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),
]


@dataclasses.dataclass
class Step:
    """A block forward and backward, on fake tensors."""

    lowered: list[Lowered]
    eager: Kernels
    tensors: dict[str, Tensor]
    """x, its gradient of the result as "grad", parameters and buffers by name."""

    def figures(self) -> dict[str, float]:
        num_bytes = sum(one.num_bytes for one in self.lowered)
        kernels = [
            sum(one.num_kernels for one in self.lowered if one.is_backward == is_backward)
            for is_backward in (False, True)
        ]
        return {
            "graph breaks": counters["graph_break"].total(),
            "kernels, forward": kernels[0],
            "kernels, backward": kernels[1],
            "bytes": num_bytes,
            "bytes, of eager": round(num_bytes / self.eager.num_bytes, 3),
            "launches, eager": self.eager.launches.total(),
        }


def step_of(
    stand_in: ctypes.CDLL,
    model: UniCL,
    block: nn.Module,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Back-propagates [batch ...] through a block under autocast to bf16: eager, then compiled."""
    with fake_gpu(stand_in), inductor_for_h100() as lowered, torch.autocast("cuda", torch.bfloat16):
        model._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU))
        index = torch.empty(shape[0], dtype=torch.int64, device=GPU)
        model.set_drop_path_key(step=0, global_index=index)
        x = torch.empty(shape, device=GPU, dtype=dtype, requires_grad=True)
        grad = torch.empty_like(x)
        with Kernels(may_wait=True) as eager:
            block(x).backward(grad)
        compile_encoders(model, "blocks")
        block(x).backward(grad)
        tensors = dict(block.named_parameters()) | dict(block.named_buffers())
        return Step(lowered, eager, {"x": x, "grad": grad, **tensors})


FLOAT, HALF = torch.float32, torch.bfloat16
BLOCKS = {
    "swin-tiny, first stage": ("layers.0.blocks.1", (256, 56, 56, 96), FLOAT),
    "swin-tiny, second stage": ("layers.1.blocks.1", (256, 28, 28, 192), HALF),
    "vit-base": ("blocks.1", (256, 197, 768), FLOAT),
    "vit-base, if x were bf16": ("blocks.1", (256, 197, 768), HALF),
}
"""Blocks by preset: shifted windows attended to by Triton, 256 images, and the type that x has."""


def figures_of(stand_in: ctypes.CDLL, name: str) -> dict[str, float]:
    place, shape, dtype = BLOCKS[name]
    with torch.device("meta"):
        model = build_model(build_preset(name.split(",")[0]))
    fuse_window_attention(model)
    block = model.image_encoder.get_submodule(place)
    return step_of(stand_in, model, block, shape, dtype=dtype).figures()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if dtype == HALF else ())
        for name, (_, _, dtype) in BLOCKS.items()
    ],
)
def test_a_block_is_compiled_as_the_table_says(stand_in, name):
    figures = functools.partial(figures_of, stand_in, name)
    compare("compiled_blocks.json", name, figures, versions=VERSIONS)


FAULTS = {
    "bytes": lambda x: x.cumsum(-1),  # nothing can be fused with it
    "graph breaks": lambda x: (torch._dynamo.graph_break(), x)[1],
}


@pytest.mark.parametrize("figure", FAULTS)
def test_more_traffic_and_breaks_are_seen(stand_in, monkeypatch, figure):
    monkeypatch.delenv("UNICL_WRITE_BUDGETS", raising=False)
    forward, fault, name = Mlp.forward, FAULTS[figure], "swin-tiny, first stage"
    monkeypatch.setattr(Mlp, "forward", lambda mlp, x: forward(mlp, fault(x)))
    found = figures_of(stand_in, name)
    with pytest.raises(AssertionError, match=f"{name}, {figure} rose from"):
        compare("compiled_blocks.json", name, found, versions=VERSIONS)


def test_a_compiled_block_computes_what_fp64_does(stand_in, tmp_path):
    """Result and gradients of a shifted block with timm's attention, which Inductor fuses too."""
    torch.manual_seed(0)
    config = build_preset("swin-tiny").changed(
        model={"image_encoder": "unicl_swin6_small", "drop_path": 0.0}, data={"image_size": 32}
    )
    model = build_model(config)
    block = model.image_encoder.layers[0].blocks[1]
    with torch.no_grad():
        for parameter in block.parameters():  # norms and biases begin with ones and zeros
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    shape = 2, 8, 8, 96
    values = {"x": torch.randn(shape), "grad": torch.randn(shape), **block.state_dict()}
    values |= dict(block.named_buffers())  # also those that are not saved
    exact = copy.deepcopy(block).double()
    x = values["x"].double().requires_grad_()
    result = exact(x)
    result.backward(values["grad"].double())
    wanted = {"x": x.grad, **{name: one.grad for name, one in exact.named_parameters()}}

    step = step_of(stand_in, model, block, shape)
    forward, backward = step.lowered
    names = {id(fake): name for name, fake in step.tensors.items()}
    inputs = [names[id(fake)] for fake in forward.inputs]
    outputs = execute(forward.code, [values[name] for name in inputs], folder=tmp_path)
    kept = {id(fake): real for fake, real in zip(forward.outputs, outputs, strict=True)}
    kept[id(step.tensors["grad"])] = values["grad"]
    given = [kept[id(fake)] for fake in backward.inputs]
    gradients = dict(zip(inputs, execute(backward.code, given, folder=tmp_path), strict=True))

    assert_close(outputs[0], result)
    for name, gradient in wanted.items():
        assert_close(gradients[name], gradient)


def assert_close(found: Tensor, exact: Tensor) -> None:
    assert (found.double() - exact).norm() <= 1e-2 * exact.norm()
