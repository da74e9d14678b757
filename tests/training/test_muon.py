"""Muon is timm's in exact arithmetic, and AdamW where it is asked for that."""

from typing import Any

import pytest
import torch

from unicl_fast.training.muon import Muon, orthogonalize
from unicl_fast.training.optim import update


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 6), (4, 36), (36, 4), (1, 7)])
def test_a_matrix_becomes_what_timm_makes_of_it(shape):
    from timm.optim.muon import _COEFFICIENTS, zeropower_via_newtonschulz

    matrix = drawn(*shape)
    theirs = zeropower_via_newtonschulz(
        matrix, 5, _COEFFICIENTS["quintic"], eps=1e-7, dtype=torch.float64
    )
    torch.testing.assert_close(orthogonalize(matrix), theirs, rtol=1e-9, atol=1e-9)
    rounded = orthogonalize(matrix.float())
    torch.testing.assert_close(rounded.double(), theirs, rtol=0, atol=1e-3)


def test_a_matrix_of_few_directions_gets_no_others_by_rounding():
    """In bf16 noise takes the place of the directions that a gradient lacks."""
    left, right = drawn(64, 2), drawn(2, 200, seed=1)
    exact = orthogonalize(left @ right)
    torch.testing.assert_close(
        orthogonalize((left @ right).float()).double(), exact, rtol=0, atol=1e-4
    )
    assert torch.linalg.matrix_rank(exact, atol=1e-3) == 2
    assert not orthogonalize(torch.zeros(3, 5)).any()


def test_steps_are_those_of_timm_and_of_adamw(monkeypatch):
    import timm.optim
    import timm.optim.muon

    def in_fp64(matrix: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        return exact(matrix, *args, **settings | {"dtype": torch.float64})

    exact = timm.optim.muon.zeropower_via_newtonschulz
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", in_fp64)
    shapes = [(8, 4, 3, 3), (36, 4), (6, 6), (7,)]
    ours = [torch.nn.Parameter(drawn(*shape, seed=1)) for shape in shapes]
    theirs = [torch.nn.Parameter(one.detach().clone()) for one in ours]
    settings = {"weight_decay": 0.1, "lr": 0.01}
    groups = [
        {"params": ours[:-1], "use_muon": True, **settings},
        {"params": ours[-1:], "use_muon": False, **settings},
    ]
    mine = Muon(groups, lr=1.0, betas=(0.9, 0.99), eps=1e-6)
    others = [
        timm.optim.Muon(theirs[:-1], nesterov=True, eps=1e-7, **settings),
        torch.optim.AdamW(theirs[-1:], betas=(0.9, 0.99), eps=1e-6, **settings),
    ]
    for step in range(4):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            one.grad = drawn(*one.shape, seed=10 * step + index)
            other.grad = one.grad.clone()
        mine.step()
        for optimizer in others:
            optimizer.step()
    mine.load_state_dict(mine.state_dict())  # AdamW's own takes each parameter for one of its own
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_a_parameter_without_a_gradient_stays():
    one = torch.nn.Parameter(drawn(3, 3))
    before = one.detach().clone()
    Muon([{"params": [one], "use_muon": True}], lr=1.0).step()
    assert torch.equal(one, before)


@pytest.mark.parametrize("leave_out", [True, False])
def test_matrices_too_are_clipped_and_a_step_that_is_left_out_leaves_them(leave_out):
    ones = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    optimizer = Muon(
        [{"params": ones[:1], "use_muon": True}, {"params": ones[1:], "use_muon": False}],
        lr=1.0,
        fused=True,
    )
    for one in ones:
        one.grad = drawn(3, 3).float()
    norm = torch.stack([one.grad for one in ones]).norm()
    update(optimizer, norm, clip_norm=1.0, leave_out=torch.tensor(leave_out))
    clipped = torch.stack([one.grad for one in ones]).norm()
    torch.testing.assert_close(clipped, norm if leave_out else torch.ones(()))
    assert all(torch.equal(one, torch.ones(3, 3)) == leave_out for one in ones)
