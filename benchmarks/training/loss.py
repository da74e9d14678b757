"""Time and memory of the loss, forward and backward, beside open_clip's ClipLoss.

    unicl-bench loss [--sizes 1024 4096] [--json FILE]

All classes are distinct, which is all that ClipLoss handles; then both losses are the same number.
The floor is the cost of four matrix products of the loss's size at the rate measured in the same
round: one for the logits, one to recompute them, two for the gradients. Memory is above the inputs,
in a fresh process; the gradients are included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.config import DeviceName
from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.system.machine import choose_device

from ..harness import (
    Figures,
    Stage,
    Turn,
    peak_bytes,
    peak_megabytes,
    printed,
    ratio_of,
    seconds_of,
    take_turns,
)

_FEW_TEXTS = 1000
_SCALE = 1 / 0.07
# Products of tiles as large as the loss's own, enough of them for a steady rate.
_RATE_PRODUCTS = 64
_RATE_SIZE, _RATE_DIM = 1024, 512

BASELINE = "ClipLoss fp32"
CONTESTANTS = {
    BASELINE: ("clip", torch.float32),
    "ClipLoss bf16": ("clip", torch.bfloat16),
    "dense fp32": ("dense", torch.float32),
    "tiled fp32": ("tiled", torch.float32),
    "tiled bf16": ("tiled", torch.bfloat16),
    "tiled fp32, 1,000 texts": ("few", torch.float32),
    "tiled bf16, 1,000 texts": ("few", torch.bfloat16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(Stage):
    """Time and memory of the loss, beside open_clip's and the dense form."""

    sizes: tuple[int, ...] = (1024, 4096, 16384, 32768)
    """Images, and texts, of a batch."""
    embed_dim: int = 512
    """Dimension of the features."""
    rounds_of_largest: int = 3
    """Rounds at sizes above largest_stored."""
    largest_stored: int = 16384
    """Above it, losses that hold the logits are left out: at 32,768 they need 17 GB and more."""
    threads: int = torch.get_num_threads()
    """Torch's threads. With 1, CPU time hardly depends on other jobs on the machine."""
    memory: bool = True
    """Measure memory, too."""
    device: DeviceName = "auto"
    """Device that computes the loss."""

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        compare(self.embed_dim, choose_device(self.device))
        figures: Figures = {}
        for n in self.sizes:
            figures |= printed(measure_time(n, self))
            for name in contestants_of(n, self) if self.memory else ():
                peak = peak_megabytes(_peak, name, n, self)
                figures |= printed({f"{n}: {name}, MB above the inputs": peak})
        self.write_result(figures, "open_clip_torch")


class Contestant:
    """A loss with its inputs; calling it goes forward and backward."""

    def __init__(self, name: str, n: int, embed_dim: int, device: torch.device) -> None:
        """Makes the inputs: images and texts that resemble each other in pairs, and the scale."""
        self.kind, dtype = CONTESTANTS[name]
        generator = torch.Generator().manual_seed(0)
        images, noise = (torch.randn(n, embed_dim, generator=generator) for _ in range(2))
        texts = F.normalize(images + noise, dim=1)
        class_ids = torch.arange(n)
        self._arguments: dict[str, Any] = {}
        if self.kind == "few":
            texts, class_ids = texts[:_FEW_TEXTS], class_ids % _FEW_TEXTS
            self._arguments["text_class_ids"] = class_ids[:_FEW_TEXTS].to(device)
            self._arguments["text_counts"] = class_ids.bincount().to(device)
        self.images = F.normalize(images, dim=1).to(device, dtype).requires_grad_()
        self.texts = texts.to(device, dtype).requires_grad_()
        self.scale = torch.tensor(_SCALE, device=device, requires_grad=True)
        self.class_ids = class_ids.to(device)
        self._clip_loss = ClipLoss()

    def __call__(self) -> Tensor:
        """Returns the loss; the gradients stay with the inputs."""
        self.images.grad = self.texts.grad = self.scale.grad = None
        if self.kind == "clip":
            loss: Tensor = self._clip_loss(self.images, self.texts, self.scale)
        else:
            loss = unified_contrastive_loss(
                self.images,
                self.texts,
                self.class_ids,
                self.scale,
                form="dense" if self.kind == "dense" else "tiled",
                **self._arguments,
            )
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        return loss.detach()


def contestants_of(n: int, settings: Loss) -> list[str]:
    """Names of the losses that can be measured at this size."""
    return [
        name
        for name, (kind, _) in CONTESTANTS.items()
        if (kind != "few" or n > 2 * _FEW_TEXTS)
        and (kind in ("tiled", "few") or n <= settings.largest_stored)
    ]


def compare(embed_dim: int, device: torch.device) -> None:
    """Raises RuntimeError if a loss differs from the dense form in fp64 on the same features."""
    n = 3000
    for name, (kind, dtype) in CONTESTANTS.items():
        contestant = Contestant(name, n, embed_dim, device)
        loss = contestant().double()
        features = contestant.images, contestant.texts
        gradients = torch.cat([x.grad.double() for x in features if x.grad is not None])
        images, texts = (x.detach().double().requires_grad_() for x in features)
        of_all = torch.arange(n, device=device) % len(texts)  # every image has a text of its own
        reference = unified_contrastive_loss(images, texts[of_all], of_all, _SCALE, form="dense")
        exact = torch.cat(torch.autograd.grad(reference, (images, texts)))
        gap = float((loss - reference.detach()).abs() / reference.detach())
        gradient_gap = float((gradients - exact).norm() / exact.norm())
        print(f"{name:46} loss off by {gap:.1e}, gradients by {gradient_gap:.1e} of their norm")
        # ClipLoss sums up in bf16, too
        allowed = 1e-5 if dtype == torch.float32 else 5e-2 if kind == "clip" else 1e-3
        if not (gap < allowed and gradient_gap < (1e-4 if dtype == torch.float32 else 5e-2)):
            raise RuntimeError(f"{name} is another loss; nothing was timed")


def measure_time(n: int, settings: Loss) -> Figures:
    """Seconds of each loss, and their ratio to the baseline's (else the floor's)."""
    device = choose_device(settings.device)
    works: dict[str, Callable[[], object]] = {
        name: Contestant(name, n, settings.embed_dim, device)
        for name in contestants_of(n, settings)
    }
    works |= {"rate fp32": _rate_products(torch.float32, device)}
    works |= {"rate bf16": _rate_products(torch.bfloat16, device)}
    rounds = settings.rounds if n <= settings.largest_stored else settings.rounds_of_largest
    turns = take_turns(works, rounds=rounds, warm_up=1 if n <= 4096 else 0)
    # 4 products of 2 n^2 d operations each, at the rate of those just timed
    work = n * n * settings.embed_dim / (_RATE_PRODUCTS * _RATE_SIZE**2 * _RATE_DIM)
    for dtype in ("fp32", "bf16"):
        turns[f"4 products {dtype}"] = [
            Turn(4 * work * turn.wall_seconds, 4 * work * turn.cpu_seconds)
            for turn in turns.pop(f"rate {dtype}")
        ]
    figures: Figures = {}
    base = BASELINE if BASELINE in turns else "4 products fp32"
    for name in turns:
        figures[f"{n}: {name}, s"] = seconds_of(turns[name])
        figures[f"{n}: {name}, CPU s"] = seconds_of(turns[name], unit="cpu_seconds")
        if name != base:
            by_cpu_time = ratio_of(turns, name, base, unit="cpu_seconds")
            figures[f"{n}: {name} / {base}"] = ratio_of(turns, name, base)
            figures[f"{n}: {name} / {base}, by CPU time"] = by_cpu_time
    return figures


def _rate_products(dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = (torch.randn(_RATE_SIZE, _RATE_DIM).to(device, dtype) for _ in range(2))
    product = torch.empty(_RATE_SIZE, _RATE_SIZE, device=device, dtype=dtype)

    def work() -> None:
        for _ in range(_RATE_PRODUCTS):
            torch.mm(left, right.T, out=product)

    return work


def _peak(name: str, n: int, settings: Loss) -> float:
    torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    Contestant(name, 256, settings.embed_dim, device)()  # loads the libraries
    contestant = Contestant(name, n, settings.embed_dim, device)
    return peak_bytes(contestant, device_type=device.type)
