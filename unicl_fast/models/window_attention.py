"""Swin's window attention as Triton kernels, for NVIDIA GPUs of compute capability 8.0 and up.

A program computes one head of several windows in turn: it reads their tokens directly from the map
[b height width], and a window's scores stay on the chip. Backward recomputes the probabilities, and
sums the table's gradient in a fixed order. docs/architecture.md says why not torch's FlexAttention.
Importing this module imports triton.
"""

import math
import types
from typing import Any, Sequence  # noqa: UP035  # torch 2.6 knows no other in operators

import torch
import triton
import triton.language as tl
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from unicl_fast.system.gpu_kernels import fenced_stages

LARGEST_WINDOW, LARGEST_HEAD = 64, 32
"""The most tokens of a window and values of a head whose backward pass fits into registers."""
PROGRAMS = 1024
"""About how many programs share the windows. Each looks up its bias once, and leaves a sum of the
table's gradient: 10 MB in all for windows of 49 tokens. An H100 runs a quarter of them at once."""
_MASKED = tl.constexpr(-100.0)  # not -inf: the released models were trained so
_PARTS = tl.constexpr(32)  # programs whose sums are read at once


def blocks_that_fit(encoder: nn.Module) -> list[SwinTransformerBlock]:
    """The timm Swin blocks that the kernels can compute: not too large, no attention dropout."""
    return [
        block
        for block in encoder.modules()
        if isinstance(block, SwinTransformerBlock)
        and block.window_area <= LARGEST_WINDOW
        and block.attn.qkv.out_features <= 3 * block.attn.num_heads * LARGEST_HEAD
        and not block.attn.attn_drop.p
    ]


def fuse(block: SwinTransformerBlock) -> None:
    """Makes a block use the kernels; weight names stay."""
    block._attn = types.MethodType(_attend, block)  # `copy.deepcopy` binds a method to the copy


def _attend(block: Any, x: Tensor) -> Tensor:
    """Replaces `SwinTransformerBlock._attn`: x and the result are [b height width c]."""
    attention, window, shift = block.attn, block.window_size, block.shift_size
    height, width = x.shape[1:3]
    padding = -height % window[0], -width % window[1]
    if any(padding):  # padding tokens are keys like any other, so they must exist
        x = torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))
        x = F.pad(x, (0, 0, 0, padding[1], 0, padding[0]))
    table = attention.relative_position_bias_table
    if (beyond := (math.isqrt(len(table)) + 1) // 2 - window[0]) and window[0] == window[1]:
        side = 2 * window[0] - 1  # the middle of a table of larger windows, see `set_image_size`
        table = table.unflatten(0, (side + 2 * beyond, -1))
        table = table[beyond : beyond + side, beyond : beyond + side].flatten(0, 1)
    mixed = window_attention(
        attention.qkv(x), table, [*window, *shift, not any(padding)], attention.scale
    )
    if any(padding):
        mixed = torch.roll(mixed[:, :height, :width], tuple(shift), dims=(1, 2))
    return attention.proj_drop(attention.proj(mixed))  # type: ignore[no-any-return]


@torch.library.custom_op("unicl_fast::window_attention", mutates_args=())
def window_attention(qkv: Tensor, table: Tensor, layout: Sequence[int], scale: float) -> Tensor:
    """Attention of each token to the tokens of its window.

    Args:
        qkv: bf16, fp16 or fp32 [b height width 3 heads d], the last three in one dimension; whole
            windows of at most `LARGEST_WINDOW` tokens, heads of at most `LARGEST_HEAD` values.
        table: bias [(2 window height - 1) (2 window width - 1), heads] by relative position.
        layout: a window's height and width, its shifts down and right, and 1 if the map must still
            be rolled by them, else 0. Tokens that the roll brings together from opposite sides of
            the map are masked.
        scale: of query-key products.

    Returns:
        [b height width, heads d] in the type of `qkv`; softmax and sums are computed in fp32.

    Raises ValueError: sizes that do not fit, or tensors that are not on a CUDA device.
    """
    mixed = _empty_mixed(qkv)
    _launch(_forward, qkv, table, layout, scale, mixed)
    return mixed


@torch.library.custom_op("unicl_fast::window_attention_backward", mutates_args=())
def _window_attention_backward(
    grad: Tensor, qkv: Tensor, table: Tensor, layout: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """The gradient of `qkv`, and sums of the bias gradients [programs heads n n] in fp32."""
    gradients = _empty_gradients(qkv, table, layout)
    _launch(_backward, qkv, table, layout, scale, grad.contiguous(), *gradients)
    return gradients


@torch.library.custom_op("unicl_fast::window_table_gradient", mutates_args=())
def _table_gradient(sums: Tensor, layout: Sequence[int]) -> Tensor:
    """The table's gradient in fp32, from `sums` over programs and pairs of tokens."""
    gradient = _empty_table(sums, layout)
    height, width = layout[:2]
    with torch.cuda.device_of(sums):
        _sum_table[gradient.shape](
            sums, gradient, len(sums), height, width, block=_block(height * width)
        )
    return gradient


def _empty_mixed(qkv: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)


def _empty_gradients(qkv: Tensor, table: Tensor, layout: Sequence[int]) -> tuple[Tensor, Tensor]:
    heads, n = table.shape[1], layout[0] * layout[1]
    shape = _num_programs(qkv, heads, n), heads, n, n
    return qkv.new_empty(qkv.shape), qkv.new_empty(shape, dtype=torch.float32)


def _empty_table(sums: Tensor, layout: Sequence[int]) -> Tensor:
    return sums.new_empty((2 * layout[0] - 1) * (2 * layout[1] - 1), sums.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.layout, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qkv, table = ctx.saved_tensors
    grad_qkv, sums = _window_attention_backward(grad, qkv, table, ctx.layout, ctx.scale)
    return grad_qkv, _table_gradient(sums, ctx.layout).to(table.dtype), None, None


window_attention.register_fake(lambda qkv, *_: _empty_mixed(qkv))
_window_attention_backward.register_fake(
    lambda grad, qkv, table, layout, scale: _empty_gradients(qkv, table, layout)
)
_table_gradient.register_fake(_empty_table)
window_attention.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.unicl_fast.window_attention)
def _count_forward(qkv: Any, table: Any, layout: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of two products, from shapes."""
    b, height, width, channels = qkv
    return 2 * 2 * int(b * height * width * layout[0] * layout[1] * channels // 3)


@register_flop_formula(torch.ops.unicl_fast.window_attention_backward)
def _count_backward(grad: Any, qkv: Any, *rest: Any, **_: Any) -> int:
    """Operations of five products."""
    forward: int = _count_forward(qkv, *rest)
    return 5 * forward // 2


def _num_programs(qkv: Tensor, heads: int, n: int) -> int:
    """Programs that share the windows of a head; from sizes alone, as it decides rounding."""
    return min(qkv[..., 0].numel() // n, -(-PROGRAMS // heads))


def launch_options(dtype: torch.dtype, *, capability: int, backward: bool) -> dict[str, int]:
    """Compile options that keep each kernel within a thread's registers.

    fp32 is multiplied outside tensor cores: its three TF32 products would need too many registers.
    Stages are windows being loaded while one is computed.
    """
    if dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 1 if backward else 2}
    stages = fenced_stages(3, capability=capability, version=triton.__version__)
    return {"num_warps": 4, "num_stages": 1 if backward and capability < 90 else stages}


def _block(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _launch(
    kernel: Any, qkv: Tensor, table: Tensor, layout: Sequence[int], scale: float, *results: Tensor
) -> None:
    if qkv.device.type != "cuda" and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"window attention in Triton computes on a CUDA device, not on {qkv.device.type}; "
            "use efficiency.window_attention auto or timm there"
        )
    (rows, heads), (*_, height, width, channels) = table.shape, qkv.shape
    n, head_width = layout[0] * layout[1], channels // (3 * heads)
    is_whole = not (height % layout[0] or width % layout[1] or channels % (3 * heads))
    fits = is_whole and n <= LARGEST_WINDOW and head_width <= LARGEST_HEAD
    if not fits or rows != (2 * layout[0] - 1) * (2 * layout[1] - 1):
        raise ValueError(
            f"expected whole windows of {layout[0]} x {layout[1]}, at most {LARGEST_WINDOW} "
            f"tokens in each and {LARGEST_HEAD} values in a head, and a bias for each relative "
            f"position; got qkv {list(qkv.shape)} and a table {list(table.shape)}"
        )
    programs = _num_programs(qkv, heads, n)
    major, minor = torch.cuda.get_device_capability(qkv.device) if qkv.is_cuda else (8, 0)
    capability = 10 * major + minor
    with torch.cuda.device_of(qkv):
        kernel[heads, programs](
            qkv.contiguous(),
            table.contiguous(),
            *results,
            scale,
            qkv[..., 0].numel() // n,
            height,
            width,
            *layout,
            head_width=head_width,
            block=_block(n),
            depth=_block(head_width),
            **launch_options(qkv.dtype, capability=capability, backward=kernel is _backward),
        )


@triton.jit
def _bias(
    table: tl.tensor,
    window_height: tl.constexpr,
    window_width: tl.constexpr,
    shift_down: tl.constexpr,
    shift_right: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """This head's bias [block block]; columns beyond the window get a weight of 0.

    The two lowest bits tell whether, in a window at the lower or right edge of the map, the roll
    has joined two tokens from opposite sides. A separate mask would need 32 registers.
    """
    rows, columns = tl.arange(0, block)[:, None], tl.arange(0, block)[None, :]
    down = rows // window_width - columns // window_width + window_height - 1
    right = rows % window_width - columns % window_width + window_width - 1
    where = (down * (2 * window_width - 1) + right) * tl.num_programs(0) + tl.program_id(0)
    n: tl.constexpr = window_height * window_width
    low: tl.constexpr = window_height - shift_down
    far: tl.constexpr = window_width - shift_right
    bias = tl.load(table + where, mask=(rows < n) & (columns < n), other=0).to(tl.float32)
    apart = 2 * ((rows // window_width >= low) != (columns // window_width >= low))
    apart += (rows % window_width >= far) != (columns % window_width >= far)
    bits = (bias.to(tl.int32, bitcast=True) & ~3) | apart
    return tl.where(columns < n, bits.to(tl.float32, bitcast=True), float("-inf"))


@triton.jit
def _places(
    window: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    window_height: tl.constexpr,
    window_width: tl.constexpr,
    shift_down: tl.constexpr,
    shift_right: tl.constexpr,
    roll: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """The offset of a window's image, its tokens' places there, and the edges that it touches."""
    rows, columns = height // window_height, width // window_width
    image, of_image = window // (rows * columns), window % (rows * columns)
    row, column = of_image // columns, of_image % columns
    token = tl.arange(0, block)
    y, x = token // window_width, token % window_width
    y, x = y + row * window_height, x + column * window_width
    if roll:
        y, x = (y + shift_down) % height, (x + shift_right) % width
    return (
        image.to(tl.int64) * height * width,
        y * width + x,
        2 * (row == rows - 1) + (column == columns - 1),
    )


@triton.jit
def _dot(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _exps(
    query: tl.tensor,
    key: tl.tensor,
    bias: tl.tensor,
    edges: tl.tensor,
    scale: tl.tensor,
    is_shifted: tl.constexpr,
) -> tl.tensor:
    """exp(score - row maximum) [block block], and the reciprocals of the row sums."""
    scores = _dot(query, tl.trans(key)) * scale + bias
    if is_shifted:
        scores += tl.where((bias.to(tl.int32, bitcast=True) & edges) == 0, 0.0, _MASKED)
    exps = tl.exp(scores - tl.max(scores, 1)[:, None])
    # dividing each value instead took 15 % of a program's time
    return exps, (1 / tl.sum(exps, 1))[:, None]


@triton.jit
def _forward(
    qkv: tl.tensor,
    table: tl.tensor,
    mixed: tl.tensor,
    scale: tl.tensor,
    num_windows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    window_height: tl.constexpr,
    window_width: tl.constexpr,
    shift_down: tl.constexpr,
    shift_right: tl.constexpr,
    roll: tl.constexpr,
    head_width: tl.constexpr,
    block: tl.constexpr,
    depth: tl.constexpr,
) -> None:
    """Stores the attention of a head in every `num_programs`th window."""
    channels = tl.num_programs(0) * head_width
    part = tl.program_id(0) * head_width + tl.arange(0, depth)[None, :]
    exists = (tl.arange(0, block) < window_height * window_width)[:, None]
    exists = exists & (tl.arange(0, depth) < head_width)[None, :]
    bias = _bias(table, window_height, window_width, shift_down, shift_right, block)
    for window in range(tl.program_id(1), num_windows, tl.num_programs(1)):
        image, token, edges = _places(
            window, height, width, window_height, window_width, shift_down, shift_right, roll, block
        )
        tokens, place = qkv + image * 3 * channels, token[:, None] * 3 * channels + part
        query = tl.load(tokens + place, mask=exists, other=0)
        key = tl.load(tokens + channels + place, mask=exists, other=0)
        value = tl.load(tokens + 2 * channels + place, mask=exists, other=0)
        exps, inverse = _exps(query, key, bias, edges, scale, shift_down + shift_right > 0)
        result = _dot(exps.to(value.dtype), value) * inverse
        where = mixed + image * channels + token[:, None] * channels + part
        tl.store(where, result.to(value.dtype), mask=exists)


@triton.jit
def _backward(
    qkv: tl.tensor,
    table: tl.tensor,
    grad: tl.tensor,
    grad_qkv: tl.tensor,
    bias_sums: tl.tensor,
    scale: tl.tensor,
    num_windows: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    window_height: tl.constexpr,
    window_width: tl.constexpr,
    shift_down: tl.constexpr,
    shift_right: tl.constexpr,
    roll: tl.constexpr,
    head_width: tl.constexpr,
    block: tl.constexpr,
    depth: tl.constexpr,
) -> None:
    """Stores the gradients of queries, keys and values, and the sum of score gradients."""
    channels = tl.num_programs(0) * head_width
    part = tl.program_id(0) * head_width + tl.arange(0, depth)[None, :]
    n: tl.constexpr = window_height * window_width
    exists = (tl.arange(0, block) < n)[:, None] & (tl.arange(0, depth) < head_width)[None, :]
    bias = _bias(table, window_height, window_width, shift_down, shift_right, block)
    bias_sum = tl.zeros((block, block), dtype=tl.float32)
    for window in range(tl.program_id(1), num_windows, tl.num_programs(1)):
        image, token, edges = _places(
            window, height, width, window_height, window_width, shift_down, shift_right, roll, block
        )
        place, given_place = token[:, None] * 3 * channels + part, token[:, None] * channels + part
        tokens, grad_tokens = qkv + image * 3 * channels, grad_qkv + image * 3 * channels
        query = tl.load(tokens + place, mask=exists, other=0)
        key = tl.load(tokens + channels + place, mask=exists, other=0)
        value = tl.load(tokens + 2 * channels + place, mask=exists, other=0)
        given = tl.load(grad + image * channels + given_place, mask=exists, other=0)
        exps, inverse = _exps(query, key, bias, edges, scale, shift_down + shift_right > 0)
        weights = exps * inverse
        by_value = _dot(tl.trans(weights.to(given.dtype)), given)
        tl.store(grad_tokens + 2 * channels + place, by_value.to(given.dtype), mask=exists)
        by_weight = _dot(given, tl.trans(value))
        by_score = weights * (by_weight - tl.sum(weights * by_weight, 1)[:, None])
        bias_sum += by_score
        by_score = by_score.to(given.dtype)
        by_query = _dot(by_score, key) * scale
        tl.store(grad_tokens + place, by_query.to(given.dtype), mask=exists)
        by_key = _dot(tl.trans(by_score), query) * scale
        tl.store(grad_tokens + channels + place, by_key.to(given.dtype), mask=exists)
    rows, columns = tl.arange(0, block)[:, None], tl.arange(0, block)[None, :]
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    where = bias_sums + program * n * n + rows * n + columns
    tl.store(where, bias_sum, mask=(rows < n) & (columns < n))


@triton.jit
def _sum_table(
    sums: tl.tensor,
    gradient: tl.tensor,
    num_parts: tl.tensor,
    window_height: tl.constexpr,
    window_width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Sums one relative position of one head over all token pairs and programs."""
    n: tl.constexpr = window_height * window_width
    position, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, block)
    y = column // window_width + position // (2 * window_width - 1) - (window_height - 1)
    x = column % window_width + position % (2 * window_width - 1) - (window_width - 1)
    exists = (column < n) & (y >= 0) & (y < window_height) & (x >= 0) & (x < window_width)
    pair = (y * window_width + x) * n + column
    total = tl.zeros((_PARTS, block), dtype=tl.float32)
    for start in range(0, num_parts, _PARTS):
        parts = start + tl.arange(0, _PARTS)[:, None]
        where = sums + (parts.to(tl.int64) * heads + head) * n * n + pair[None, :]
        total += tl.load(where, mask=(parts < num_parts) & exists[None, :], other=0)
    tl.store(gradient + position * heads + head, tl.sum(tl.sum(total, 1), 0))
