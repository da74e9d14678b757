"""Parts of a model that are not trained, as `optim.freeze` names them.

Their parameters take no gradient, so torch keeps no graph of what comes before the first layer that
is trained. Their modules stay in evaluation mode: no drop path, and BatchNorm's averages stay.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from unicl_fast.models.blocks import find_blocks
from unicl_fast.models.unicl import FrozenParts, UniCL
from unicl_fast.system.wording import count_of


def freeze(model: UniCL) -> None:
    """Freezes what `optim.freeze` in the model's config names, and nothing else.

    The model is neither compiled nor divided over ranks yet: both hide its blocks.

    Raises:
        ValueError: the model has no such part or fewer blocks, or nothing would be left to train.
    """
    found = _find(model)
    for name, parameter in model.named_parameters():
        if name in found.names:
            parameter.requires_grad_(False)
    model.frozen = found
    left = {name for name, one in model.named_parameters() if one.requires_grad}
    scalars = {name for name, one in model.learnt.items() if one.ndim == 0}
    if not left - scalars:
        raise ValueError(
            f"optim.freeze={' '.join(model.config.optim.freeze)} leaves nothing to train: leave "
            "something out"
        )


def is_trained(model: UniCL, tower: Literal["image", "text"]) -> bool:
    """Whether gradients of a tower's features are for something: its encoder or its projection."""
    own = (f"{tower}_encoder.", f"{tower}_projection")
    return any(one.requires_grad for name, one in model.named_parameters() if name.startswith(own))


def encoder_is_frozen(model: UniCL, tower: Literal["image", "text"]) -> bool:
    """Whether nothing of a tower's encoder is trained now, whatever its projection."""
    names = (name for name, _ in model.named_parameters())
    own = {name for name in names if name.startswith(f"{tower}_encoder.")}
    return own <= model.frozen.names


def _find(model: UniCL) -> FrozenParts:
    names: set[str] = set()
    modules: list[nn.Module] = []
    for entry in model.config.optim.freeze:
        kind, _, count = entry.partition(":")
        attribute = kind if kind.endswith("_projection") else f"{kind}_encoder"
        part = getattr(model, attribute)
        if part is None:
            cause = f"objective.name={model.config.objective.name}"
            if getattr(model.config.model, attribute, "") == "none":
                cause = f"model.{attribute}=none"
            raise ValueError(
                f"optim.freeze: with {cause} the model has no {attribute}: leave {entry} out"
            )
        if isinstance(part, nn.Parameter):
            names |= {attribute, f"{attribute}_bias"} & {n for n, _ in model.named_parameters()}
            continue
        begun, whole = list(part.modules()), [part]
        if count:
            begun, whole = _first_blocks(part, int(count), entry)
        own = {id(one) for module in begun for one in module.parameters(recurse=False)}
        names |= {f"{attribute}.{name}" for name, one in part.named_parameters() if id(one) in own}
        modules += whole
    return FrozenParts(frozenset(names), tuple(modules))


def _first_blocks(
    encoder: nn.Module, count: int, entry: str
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules up to block `count` and in it, in their order; and those that are frozen whole.

    An encoder or a stage, which holds later modules too, is among the first only: what it has of
    its own, such as a position table, comes before its blocks.
    """
    blocks = find_blocks(encoder)
    if count > len(blocks):
        raise ValueError(
            f"optim.freeze: {entry} names {count_of(count, 'block')}, and this "
            f"{type(encoder).__name__} has {len(blocks)} that are known: name no more, or "
            f"{entry.partition(':')[0]} for the whole encoder"
        )
    order, last = list(encoder.modules()), blocks[count - 1]
    begun = order[: order.index(last) + len(list(last.modules()))]
    later = set(order[len(begun) :])
    whole = [module for module in begun if later.isdisjoint(module.modules())]
    within = {child for module in whole for child in module.modules() if child is not module}
    return begun, [module for module in whole if module not in within]
