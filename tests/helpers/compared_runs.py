"""Runs are compared by their losses and by the tensors of their models and checkpoints."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.training.metrics import read_metrics

IN_FP64 = {"rtol": 1e-9, "atol": 1e-12}


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def last_of(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1]


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {
        f"{file.stem}: {name}": tensor
        for file in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def copy_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(model: torch.nn.Module, before: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the tensors whose bits have changed."""
    return {name for name, one in model.state_dict().items() if not torch.equal(one, before[name])}


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compares bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def assert_close_states(
    found: Path, expected: Path, *, rtol: float, atol: float, of_in_proj_bias: float | None = None
) -> None:
    """Compares the last checkpoints of two runs.

    A key's bias changes no attention, so its gradient is all rounding, which AdamW enlarges.
    """
    states, expected_states = state_of(last_of(found)), state_of(last_of(expected))
    assert states.keys() == expected_states.keys()
    for name, tensor in states.items():
        allowed = (of_in_proj_bias or 10 * atol) if name.endswith("in_proj_bias") else atol
        torch.testing.assert_close(tensor, expected_states[name], rtol=rtol, atol=allowed, msg=name)


def assert_same_gradients(
    found: tuple[float, dict], expected: tuple[float, dict], *,
    of_loss: float = 1e-13, rtol: float = 1e-9, atol: float = 1e-13, where: str = "",
) -> None:  # fmt: skip
    """Compares losses and parameters' gradients, as `rank_workers.first_gradients` gives them."""
    assert found[0] == pytest.approx(expected[0], rel=of_loss), where
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        ours, name = found[1][name], f"{where} {name}"
        if gradient is None:
            assert ours is None, name
            continue
        assert gradient.abs().max() > 0, f"{name} has no gradient to compare"
        torch.testing.assert_close(ours, gradient, rtol=rtol, atol=atol, msg=name)
