"""Tries each distinct block as Inductor compiles it before `efficiency.compile=auto` takes it.

`gpu_kernels.fault_in_trial` runs it, with a model of the run's settings and fresh weights, since
Inductor has been silently wrong under bf16 autocast (pytorch 191433). Blocks get the inputs that
they have in the model, of fewer images than in training.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unicl_fast.config import TrainConfig
from unicl_fast.config_json import config_from_dict
from unicl_fast.models.blocks import checkpoint_blocks, find_blocks
from unicl_fast.models.compilation import compile_encoders, fuse_window_attention, round_up_count
from unicl_fast.models.freezing import freeze
from unicl_fast.models.precision import Precision, place_module, set_device_arithmetic
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.gpu_kernels import check_close

_SAMPLES = {"cuda": 64, "cpu": 2}
_NOISE = 0.02  # added to weights, so that none is zero and hides another's gradient
_SLACK = {"fp32": 1e-4, "fp64": 1e-9}
"""Relative error allowed beyond three times the uncompiled block's; 1e-2 in other precisions."""


Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A block and its arguments."""


def try_out(device: torch.device, precision: str, settings: str, *_: str) -> None:
    """Raises ArithmeticError if a compiled block is wrong, by value or gradient.

    `settings` is the JSON of `compilation.fault_of_blocks`; what follows only names versions.
    """
    config = config_from_dict(json.loads(settings))
    model = _build(config, device)
    calls = _calls_of_distinct_blocks(model, config, device)
    compile_encoders(model, "blocks")
    rounding = functools.partial(Precision(config.efficiency.precision).autocast, device.type)
    for block, given, named in calls:
        x, *others = given
        eager = functools.partial(block.forward, **named)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        exact = _value_and_gradients(block, eager, wide, others)
        set_device_arithmetic(config.efficiency, device)
        with rounding():
            rounded = _value_and_gradients(block, eager, x, others)
        with rounding():
            found = _value_and_gradients(block, functools.partial(block, **named), x, others)
        for name, right in exact.items():
            usual = float((rounded[name].double() - right.double()).norm() / right.norm())
            what = f"{name} of {type(block).__name__} {list(x.shape)}, compiled,"
            tolerance = _SLACK.get(precision, 1e-2) + 3 * usual
            check_close(found[name], right.double(), what=what, tolerance=tolerance)


def _build(config: TrainConfig, device: torch.device) -> UniCL:
    """The model as a run places it, with weights that are all of some size."""
    torch.manual_seed(0)
    model = UniCL(config.model, config.objective, image_size=config.data.image_size)
    model.config = config
    if config.efficiency.activation_checkpointing:
        for encoder in model.encoders:
            checkpoint_blocks(encoder)
    model.set_stage(config.data, config.model)
    freeze(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=_NOISE)
    place_module(model, device=device, precision=Precision(config.efficiency.precision))
    model.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.efficiency.window_attention == "triton":
        fuse_window_attention(model.image_encoder)
    return model.train()


def _calls_of_distinct_blocks(
    model: UniCL, config: TrainConfig, device: torch.device
) -> list[Call]:
    """Each block that is unlike those before it, and its arguments in a forward pass."""
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

    hooks = [
        block.register_forward_pre_hook(note, with_kwargs=True) for block in find_blocks(model)
    ]
    images = torch.randn(count, 3, size, size, device=device).contiguous(
        memory_format=torch.channels_last
    )
    tokens = torch.randint(1, config.model.vocab_size - 1, (count, config.model.context_length))
    lengths = torch.randint(2, config.model.context_length + 1, (count,))
    place = torch.arange(config.model.context_length)
    ends = torch.where(place == lengths[:, None] - 1, config.model.vocab_size - 1, 0)
    tokens = torch.where(place < lengths[:, None] - 1, tokens, ends).to(device)
    rounded = Precision(config.efficiency.precision)
    model.set_drop_path_key(step=0, global_index=torch.arange(count, device=device))
    with torch.no_grad(), rounded.autocast(device.type):
        model.encode_image(images.to(rounded.compute_type))
        if model.text_encoder is not None:
            spent = round_up_count(int(lengths.sum()))
            model.encode_text(tokens, min(spent, tokens.numel()))
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
