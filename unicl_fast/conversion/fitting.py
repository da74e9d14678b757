"""Compares tensors of other libraries with our models' tensors, by name, shape and content."""

from collections.abc import Mapping

from torch import Tensor


def misfits(needed: Mapping[str, Tensor], found: Mapping[str, Tensor], *, shown: int) -> list[str]:
    """Lists how tensors differ from the needed ones, with at most `shown` names of a kind."""
    fits = {name: found[name].shape == needed[name].shape for name in needed if name in found}
    kinds = {
        "missing": [name for name in needed if name not in found],
        "left over": [name for name in found if name not in needed],
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(needed[name].shape)}"
            for name, has_its_shape in fits.items()
            if not has_its_shape
        ],
        "not finite numbers": [
            name
            for name, has_its_shape in fits.items()
            if has_its_shape and not _has_finite_numbers(found[name], like=needed[name])
        ],
    }
    return [
        f"{kind}: {', '.join(names[:shown])}{', ...' * (len(names) > shown)} ({len(names)})"
        for kind, names in kinds.items()
        if names
    ]


def _has_finite_numbers(tensor: Tensor, *, like: Tensor) -> bool:
    if like.is_floating_point():
        if not tensor.is_floating_point():
            return False
        tensor = tensor.to(like.dtype)  # it can overflow; torch cannot check one-byte types
    return bool(tensor.isfinite().all())
