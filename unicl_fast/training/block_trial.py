"""Tries each distinct block as Inductor compiles it before `efficiency.compile=auto` takes it.

`gpu_kernels.fault_in_trial` runs it, with a model of the run's settings and fresh weights, since
Inductor has been silently wrong under bf16 autocast (pytorch 191433). Blocks get the inputs that
they have in the model, of fewer images than in training.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unicl_fast.checkpoints.load import build_model
from unicl_fast.config_json import config_from_dict
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.blocks import find_blocks
from unicl_fast.models.compilation import compile_blocks, round_up_count
from unicl_fast.models.freezing import freeze
from unicl_fast.models.precision import Precision, set_device_arithmetic
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.gpu_kernels import check_close
from unicl_fast.training.assembly import place

_SAMPLES = {"cuda": 64, "cpu": 2}
_NOISE = 0.02  # added to weights, so that none is zero and hides another's gradient
_SLACK = {"fp32": 1e-4, "fp64": 1e-9}
"""Relative error allowed beyond three times the uncompiled block's; 1e-2 in other precisions."""
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # a block and its arguments


def try_out(device: torch.device, precision: str, settings: str, *_: str) -> None:
    """Raises ArithmeticError if a compiled block is wrong, by value or gradient.

    `settings` is a part of a config as JSON; further arguments only name versions.
    """
    torch.manual_seed(0)
    model = build_model(config_from_dict(json.loads(settings)))
    config = model.config
    freeze(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=_NOISE)
    place(model.train(), config, device, Ranks())
    calls = _calls_of_distinct_blocks(model, device)
    compile_blocks(model)
    rounding = Precision(config.efficiency.precision).autocast
    for block, given, named in calls:
        x, *others = given
        eager = functools.partial(block.forward, **named)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        exact = _value_and_gradients(block, eager, wide, others)
        set_device_arithmetic(config.efficiency, device)
        with rounding(device.type):
            rounded = _value_and_gradients(block, eager, x, others)
        with rounding(device.type):
            found = _value_and_gradients(block, functools.partial(block, **named), x, others)
        for name, right in exact.items():
            usual = float((rounded[name].double() - right.double()).norm() / right.norm())
            what = f"{name} of {type(block).__name__} {list(x.shape)}, compiled,"
            tolerance = _SLACK.get(precision, 1e-2) + 3 * usual
            check_close(found[name], right.double(), what=what, tolerance=tolerance)


def _calls_of_distinct_blocks(model: UniCL, device: torch.device) -> list[Call]:
    """Each block that is unlike those before it, and its arguments in a forward pass."""
    config = model.config
    count, size = _SAMPLES[device.type], config.data.image_size
    calls: dict[str, Call] = {}

    def note(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        shapes = [one.shape for one in (*given, *block.parameters()) if isinstance(one, Tensor)]
        # numbers and names tell a shifted window from another; rates of drop path are alike
        own = [
            (name, value) for part in block.modules() for name, value in sorted(vars(part).items())
            if isinstance(value, (bool, int, str, tuple))
        ]  # fmt: skip
        calls.setdefault(repr((type(block), shapes, own)), (block, given, named))

    blocks = find_blocks(model)
    hooks = [one.register_forward_pre_hook(note, with_kwargs=True) for one in blocks]
    images = torch.randn(count, 3, size, size, device=device)
    end, longest = config.model.vocab_size - 1, config.model.context_length
    tokens, lengths = torch.randint(1, end, (count, longest)), torch.randint(1, longest, (count,))
    tokens.scatter_(1, lengths[:, None], end)
    tokens[torch.arange(longest) > lengths[:, None]] = 0
    rounded = Precision(config.efficiency.precision)
    model.set_drop_path_key(step=0, global_index=torch.arange(count, device=device))
    with torch.no_grad(), rounded.autocast(device.type):
        model.encode_image(images.to(rounded.compute_type, memory_format=torch.channels_last))
        if model.text_encoder is not None:
            num_tokens = min(round_up_count(int(lengths.sum()) + count), tokens.numel())
            model.encode_text(tokens.to(device), num_tokens)
    for hook in hooks:
        hook.remove()
    return list(calls.values())


def _value_and_gradients(
    block: nn.Module, call: Callable[..., Any], x: Tensor, others: list[Any]
) -> dict[str, Tensor]:
    """The result, and its gradients of x and of the block's trained parameters, by name."""
    x = x.detach().clone().requires_grad_()
    result = call(x, *others)
    result = result[0] if isinstance(result, tuple) else result
    generator = torch.Generator(x.device).manual_seed(0)
    grad = torch.randn(result.shape, generator=generator, device=x.device).to(result.dtype)
    learnt = {name: one for name, one in block.named_parameters() if one.requires_grad}
    leaves = {"its input": x, **learnt}
    gradients = torch.autograd.grad(result, list(leaves.values()), grad, allow_unused=True)
    pairs = zip(leaves, gradients, strict=True)
    found = {f"the gradient of {name}": one for name, one in pairs if one is not None}
    return {"the value": result.detach(), **found}
