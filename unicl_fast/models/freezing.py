"""Freezes parts of a model, as `optim.freeze` and `optim.lora` say.

Frozen parameters need no gradient, so torch keeps no graph before the first trained layer. Frozen
modules stay in evaluation mode: no drop path, and BatchNorm's averages stay.
"""

import dataclasses
from typing import Literal, NoReturn

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unicl_fast.models.blocks import find_blocks
from unicl_fast.models.unicl import FrozenParts, UniCL, weights_digest
from unicl_fast.system.wording import count_of


def freeze(model: UniCL) -> None:
    """Freezes the parts named in `optim.freeze`, and adds the adapters of `optim.lora`.

    Call it after loading the initial weights and before compiling or sharding, which hide the
    blocks. Raises ValueError for a missing part, too few blocks, nothing left to train, or an
    encoder that cannot be adapted.
    """
    found = _find(model)
    if model.config.optim.adapters is not None:
        found = _adapt(model, found)
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


def merge(model: UniCL) -> None:
    """Merges adapters into their base weights; nothing is frozen afterwards."""
    from unicl_fast.models.adapters import merge_adapters

    for encoder in model.encoders:
        merge_adapters(encoder)
    model.frozen = FrozenParts()
    model.config = model.config.changed(optim={"lora": ""})


def is_trained(model: UniCL, tower: Literal["image", "text"]) -> bool:
    """Whether a tower's encoder or projection is trained, so its features need gradients."""
    own = f"{tower}_"  # encoder, hidden layer, projection
    return any(one.requires_grad for name, one in model.named_parameters() if name.startswith(own))


def encoder_is_frozen(model: UniCL, tower: Literal["image", "text"]) -> bool:
    """Whether nothing of a tower's encoder is trained, regardless of its projection."""
    names = (name for name, _ in model.named_parameters())
    own = {name for name in names if name.startswith(f"{tower}_encoder.")}
    return own <= model.frozen.names


def _find(model: UniCL) -> FrozenParts:
    names: set[str] = set()
    modules: list[nn.Module] = []
    for entry in model.config.optim.freeze:
        kind, _, count = entry.partition(":")
        attribute = kind if kind.endswith("_projection") else f"{kind}_encoder"
        part = _part(model, attribute, f"optim.freeze: {entry}")
        if isinstance(part, nn.Parameter):
            tower = kind.removesuffix("projection")  # with its hidden layer
            head = [name for name, _ in model.named_parameters() if name.startswith(tower)]
            names |= {name for name in head if not name.startswith(f"{tower}encoder.")}
            continue
        begun, whole = list(part.modules()), [part]
        if count:
            begun, whole = _first_blocks(part, int(count), f"optim.freeze: {entry}")
        own = {id(one) for module in begun for one in module.parameters(recurse=False)}
        names |= {f"{attribute}.{name}" for name, one in part.named_parameters() if id(one) in own}
        modules += whole
    return FrozenParts(frozenset(names), tuple(modules))


def _part(model: UniCL, attribute: str, entry: str) -> nn.Module | nn.Parameter:
    """An encoder or projection of a model, by its attribute; `entry` names it in a setting."""
    part: nn.Module | nn.Parameter | None = getattr(model, attribute)
    if part is None:
        cause = f"objective.name={model.config.objective.name}"
        if getattr(model.config.model, attribute, "") == "none":
            cause = f"model.{attribute}=none"
        raise ValueError(f"{entry}: with {cause} the model has no {attribute}: leave it out")
    return part


def _adapt(model: UniCL, found: FrozenParts) -> FrozenParts:
    """Adds the adapters of `optim.lora`; returns all frozen parts, which include BatchNorm."""
    from unicl_fast.models.adapters import add_adapters, check_adapters  # no peft without them

    config = model.config
    adapters = config.optim.adapters
    assert adapters is not None
    names, modules = set(found.names), [*found.modules]
    for tower, rank in adapters.ranks.items():
        encoder = _part(model, f"{tower}_encoder", f"optim.lora: {tower}:{rank}")
        assert isinstance(encoder, nn.Module)
        blocks, whole = find_blocks(encoder), list[nn.Module]()
        last = adapters.last_blocks.get(tower, len(blocks))
        if last > len(blocks):
            _refuse_blocks(encoder, f"optim.lora: {tower}:{rank}@last{last}", last, len(blocks))
        if first := len(blocks) - last:
            whole = _first_blocks(encoder, first, "")[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            add_adapters(encoder, blocks[first:], rank=rank)
        within = {child for module in whole for child in module.modules()}
        modules += whole
        modules += [m for m in encoder.modules() if isinstance(m, _BatchNorm) and m not in within]
        names |= {
            f"{tower}_encoder.{name}"
            for name, one in encoder.named_parameters()
            if not one.requires_grad
        }
        if model.device.type != "meta":
            kind = next(one for one in encoder.parameters() if one.is_floating_point())
            size = config.data.image_size
            given = kind.new_zeros(1, 3, size, size)
            if tower == "text":
                given = torch.zeros(1, config.model.context_length, dtype=torch.int64)
            check_adapters(encoder, f"the {tower} encoder {type(encoder).__name__}", given)
    found = FrozenParts(frozenset(names), tuple(modules))
    in_base = _in_base(model, found)
    digest = weights_digest(model, *in_base) if in_base and model.device.type != "meta" else ""
    return dataclasses.replace(found, in_base=in_base, base_digest=digest)


def _in_base(model: UniCL, found: FrozenParts) -> frozenset[str]:
    """Names of the encoders' tensors that keep their values from `model.init` or `init_TOWER`."""
    own = {
        id(one) for part in found.modules for module in part.modules() for one in module.buffers()
    }
    constant = {name for name, buffer in model.named_buffers() if id(buffer) in own}
    given = model.config.model
    prefixes = tuple(
        f"{tower}_encoder."
        for tower in ("image", "text")
        if given.init or getattr(given, f"init_{tower}")
    )
    stored = model.state_dict().keys() & (constant | found.names)
    return frozenset(name for name in stored if name.startswith(prefixes))


def _first_blocks(
    encoder: nn.Module, count: int, entry: str
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules up to and including block `count`, in order; and the outermost fully frozen ones.

    An encoder or stage that also holds later modules appears in the first list only: its own
    parameters, such as a position table, come before its blocks.
    """
    blocks = find_blocks(encoder)
    if count > len(blocks):
        _refuse_blocks(encoder, entry, count, len(blocks))
    order, last = list(encoder.modules()), blocks[count - 1]
    begun = order[: order.index(last) + len(list(last.modules()))]
    later = set(order[len(begun) :])
    whole = [module for module in begun if later.isdisjoint(module.modules())]
    within = {child for module in whole for child in module.modules() if child is not module}
    return begun, [module for module in whole if module not in within]


def _refuse_blocks(encoder: nn.Module, entry: str, count: int, known: int) -> NoReturn:
    raise ValueError(
        f"{entry} names {count_of(count, 'block')}, and this {type(encoder).__name__} has {known} "
        "that are known: name no more, or the whole encoder"
    )
