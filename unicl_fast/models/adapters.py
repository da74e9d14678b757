"""LoRA: small trained matrices on the frozen layers of an encoder, by peft (`optim.lora`).

A layer W becomes W + (16 / rank) B A (Hu et al., arXiv 2106.09685); peft draws A, and B starts at
zero. Merging restores the original architecture, which needs no peft.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unicl_fast.models.blocks import KNOWN_BLOCKS
from unicl_fast.models.text_encoder import TextAttention
from unicl_fast.system.installation import install_command

ALPHA = 16  # fixed, so that a learning rate keeps its meaning when the rank changes


def add_adapters(encoder: nn.Module, blocks: Sequence[nn.Module], *, rank: int) -> None:
    """Freezes an encoder; adapts the linear layers and dense convolutions of `blocks`.

    Raises ValueError if there are none, or peft is not installed.
    """
    try:
        import peft  # takes seconds
    except ModuleNotFoundError as error:
        raise ValueError(
            f"optim.lora needs the package peft: pip install peft, or {install_command('lora')}"
        ) from error
    for attention in [one for block in blocks for one in block.modules()]:
        if isinstance(attention, TextAttention):
            _make_layer(attention)
    inside = {one for block in blocks for one in block.modules() if _takes_adapter(one)}
    names = [name for name, module in encoder.named_modules() if module in inside]
    if not names:
        raise ValueError(
            f"optim.lora adapts layers of the blocks {', '.join(sorted(KNOWN_BLOCKS))}, and "
            f"{type(encoder).__name__} has none: leave it out"
        )
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules="|".join(map(re.escape, names)),  # a list would match ends of names too
    )
    peft.inject_adapter_in_model(config, encoder)
    for module in filter(is_adapted, encoder.modules()):
        module.cast_input_dtype_enabled = False  # type: ignore[assignment]  # autocast decides


def check_adapters(encoder: nn.Module, name: str, *given: Tensor) -> None:
    """Refuses (ValueError) an encoder that reads weights without calling their layers.

    An adapter there would have no effect. `given` is an example input; `name` is for the message.
    """
    waiting = {module: path for path, module in encoder.named_modules() if is_adapted(module)}

    def is_called(module: nn.Module, *_: object) -> None:
        waiting.pop(module, None)

    handles = [module.register_forward_hook(is_called) for module in waiting]
    was_training = encoder.training
    with torch.no_grad():
        encoder.eval()(*given)
    encoder.train(was_training)
    for handle in handles:
        handle.remove()
    if waiting:
        raise ValueError(
            f"optim.lora cannot adapt {name}, which reads the weights of {len(waiting)} layers "
            f"past an adapter, such as {next(iter(waiting.values()))}: choose another encoder, or "
            "freeze its first blocks with optim.freeze and train the others"
        )


@torch.no_grad()
def merge_adapters(encoder: nn.Module) -> None:
    """Merges all adapters into their layers, which get their names and places back."""
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if is_adapted(child):
                child.merge()  # type: ignore[operator]
                setattr(parent, name, child.base_layer)
        if isinstance(parent, TextAttention) and parent.in_proj is not None:
            layer, parent.in_proj = parent.in_proj, None
            parent.in_proj_weight, parent.in_proj_bias = layer.weight, layer.bias  # type: ignore[assignment]
    if hasattr(encoder, "peft_config"):
        del encoder.peft_config
    encoder.requires_grad_(True)


def is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A")


def _takes_adapter(module: nn.Module) -> bool:
    is_dense = isinstance(module, nn.Conv2d) and module.groups == 1
    return is_dense or isinstance(module, nn.Linear)


def _make_layer(attention: TextAttention) -> None:
    """Turns the fused query, key and value weight, a bare parameter, into a layer."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = weight, bias
    del attention.in_proj_weight, attention.in_proj_bias
    attention.in_proj = layer
