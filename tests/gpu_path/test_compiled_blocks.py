"""Blocks as `efficiency.compile=blocks` has Inductor compile them for an H100, without one.

tests/golden/compiled_blocks.json has their kernels and the traffic of memory, forward and backward;
UNICL_WRITE_BUDGETS=1 writes it anew. Some blocks are executed: their PTX by `helpers/ptx.py`.
"""

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
from torch.utils._pytree import tree_map_only

from unicl_fast.checkpoints.load import build_model
from unicl_fast.models.compilation import compile_blocks, fuse_window_attention
from unicl_fast.models.image_encoder import KeyedDropPath
from unicl_fast.models.precision import Precision, place_module
from unicl_fast.models.text_encoder import TokenRow
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
    *rows: TokenRow,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Back-propagates [batch ...] through a block under autocast to bf16: eager, then compiled."""
    with fake_gpu(stand_in), inductor_for_h100() as lowered, torch.autocast("cuda", torch.bfloat16):
        model._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU))
        index = torch.empty(shape[0], dtype=torch.int64, device=GPU)
        model.set_drop_path_key(step=0, global_index=index)
        place_module(block, device=GPU, precision=Precision("bf16"))
        x = torch.empty(shape, device=GPU, dtype=dtype, requires_grad=True)
        grad = torch.empty_like(x)
        rows = tree_map_only(
            Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=GPU), rows
        )
        with Kernels(may_wait=True) as eager:
            block(x, *rows).backward(grad)
        compile_blocks(model)
        block(x, *rows).backward(grad)
        return Step(lowered, eager, {"x": x, "grad": grad, **tensors_of(block, *rows)})


def tensors_of(block: nn.Module, *rows: TokenRow) -> dict[str, Tensor]:
    """What a block computes with besides x, by name; also buffers that are not saved."""
    paths = [one for one in block.named_modules() if isinstance(one[1], KeyedDropPath)]
    return {
        **dict(block.named_parameters()),
        **dict(block.named_buffers()),
        **{f"{name}.factors": part.factors for name, part in paths if part.factors is not None},
        **{name: one for row in rows for name, one in zip(row._fields, row[:3], strict=False)},
    }


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


def test_a_break_is_seen_and_so_is_its_traffic(stand_in, monkeypatch):
    monkeypatch.delenv("UNICL_WRITE_BUDGETS", raising=False)
    forward, name = Mlp.forward, "swin-tiny, first stage"

    def with_break(mlp: Mlp, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()  # nothing is fused across it
        return forward(mlp, x)

    monkeypatch.setattr(Mlp, "forward", with_break)
    found = figures_of(stand_in, name)
    with pytest.raises(AssertionError, match=f"{name}, bytes rose from.*graph breaks rose from"):
        compare("compiled_blocks.json", name, found, versions=VERSIONS)


def text_row() -> TokenRow:
    """Texts of 1 to 16 tokens, and padding that is computed with them."""
    last = torch.tensor([15, 0, 6, 11, 2])
    return TokenRow.build(last, num_tokens=48, shape=(len(last), 16))


EXECUTED = {
    "swin, with timm's attention": ("image_encoder.layers.0.blocks.1", (1, 8, 8, 96)),
    "swin-tiny, 96 wide": ("image_encoder.layers.0.blocks.1", (2, 14, 14, 96)),
    "swin-tiny, 192 wide": ("image_encoder.layers.1.blocks.1", (1, 14, 14, 192)),
    "swin-tiny, 384 wide": ("image_encoder.layers.2.blocks.1", (1, 14, 14, 384)),
    "swin-tiny, 768 wide": ("image_encoder.layers.3.blocks.1", (2, 7, 7, 768)),
    "vit-base": ("image_encoder.blocks.1", (1, 197, 768)),
    "text": ("text_encoder.resblocks.1", (48, 256)),
}
"""Blocks of the presets' widths, of few rows; of texts half the width."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if "-" in name else ()) for name in EXECUTED]
)
def test_a_compiled_block_computes_what_fp64_does(stand_in, tmp_path, name):
    """Result and gradients; Inductor's kernels and those of windows are executed as PTX."""
    torch.manual_seed(0)
    place, shape = EXECUTED[name]
    config = build_preset("vit-base" if name == "vit-base" else "swin-tiny")
    if "swin" in name:
        side = shape[1] * 4 * shape[-1] // 96
        config = config.changed(data={"image_size": side, "evaluation_resize": side})
    if "timm" in name:
        small = {"image_encoder": "unicl_swin6_small", "drop_path": 0.0}
        config = config.changed(model=small, data={"image_size": 32})
    if name == "text":
        config = config.changed(model={"text_width": 256, "text_heads": 4})
    model = build_model(config)
    block, rows = model.get_submodule(place), [text_row()] if name == "text" else []
    with torch.no_grad():
        for parameter in block.parameters():  # norms and biases begin with ones and zeros
            parameter.add_(torch.randn_like(parameter), alpha=0.5 * shape[-1] ** -0.5)
    for part in block.modules():
        if isinstance(part, KeyedDropPath):
            part.factors = torch.linspace(0.5, 1.5, shape[0], dtype=torch.float64)
    values = {"x": torch.randn(shape), "grad": torch.randn(shape), **tensors_of(block, *rows)}
    read = rows[0].ends[-1] + 1 if rows else len(values["x"])  # nobody reads texts' padding
    values["grad"][read:] = 0
    exact = copy.deepcopy(block).double()
    x = values["x"].double().requires_grad_()
    result = exact(x, *rows)
    result.backward(values["grad"].double())
    wanted = {"x": x.grad, **{name: one.grad for name, one in exact.named_parameters()}}

    if "timm" not in name:
        fuse_window_attention(model)
    step = step_of(stand_in, model, block, shape, *rows)
    forward, backward = step.lowered
    names = {id(fake): name for name, fake in step.tensors.items()}
    inputs = [names[id(fake)] for fake in forward.inputs]
    outputs = execute(forward.code, [values[name] for name in inputs], folder=tmp_path)
    kept = {id(fake): real for fake, real in zip(forward.outputs, outputs, strict=True)}
    kept[id(step.tensors["grad"])] = values["grad"]
    given = [kept[id(fake)] for fake in backward.inputs]
    gradients = dict(zip(inputs, execute(backward.code, given, folder=tmp_path), strict=True))

    assert_close(outputs[0][:read], result[:read])
    for name, gradient in wanted.items():
        assert_close(gradients[name], gradient)


def assert_close(found: Tensor, exact: Tensor) -> None:
    assert (found.double() - exact).norm() <= 1e-2 * exact.norm()
