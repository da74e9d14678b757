"""Time and memory of the loss, forward and backward, compared with open_clip's ClipLoss.

All classes are distinct: ClipLoss handles nothing else. The floor is four matrix products of the
loss's size at the rate measured in the same round. Memory is above the inputs, in a fresh process.
"""

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.objectives.operands import LossForm
from unicl_fast.tools.diagnose.measuring import Turn

from ..harness import Figures, peak_bytes, peak_megabytes, printed, ratio_of, seconds_of, take_turns

_FEW_TEXTS = 1000
_SCALE = 1 / 0.07
_EMBED_DIM = 512
_LARGEST_STORED = 16384
"""Above it, losses that hold the logits are left out: at 32,768 they need 17 GB and more."""
# Products of tiles as large as the loss's own, and enough of them for a steady rate.
_RATE_PRODUCTS, _RATE_SIZE = 64, 1024


class Contestant(NamedTuple):
    """A loss in one precision; the form is None for open_clip's ClipLoss."""

    form: LossForm | None
    dtype: torch.dtype
    num_texts: int = 0
    """Distinct texts, which images share; 0: each image has a text of its own."""

    @property
    def stores_logits(self) -> bool:
        return self.form in (None, "dense")


BASELINE = "ClipLoss fp32"
CONTESTANTS = {
    BASELINE: Contestant(None, torch.float32),
    "ClipLoss bf16": Contestant(None, torch.bfloat16),
    "dense fp32": Contestant("dense", torch.float32),
    "tiled fp32": Contestant("tiled", torch.float32),
    "tiled bf16": Contestant("tiled", torch.bfloat16),
    "tiled fp32, 1,000 texts": Contestant("tiled", torch.float32, _FEW_TEXTS),
    "tiled bf16, 1,000 texts": Contestant("tiled", torch.bfloat16, _FEW_TEXTS),
}


def contestants_on(device: torch.device) -> dict[str, Contestant]:
    """All losses; with our Triton kernels where they run."""
    if device.type != "cuda" or find_spec("triton") is None:
        return CONTESTANTS
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return CONTESTANTS | {
        f"triton {name}": Contestant("triton", dtype) for name, dtype in types.items()
    }


class Inputs(NamedTuple):
    """Unit features of images [n d] and of texts [u d], which resemble each other in pairs."""

    images: Tensor
    texts: Tensor
    scale: Tensor
    class_ids: Tensor
    """int64 [n]: the text of each image."""


def measure_losses(
    sizes: Sequence[int], *, device: torch.device, rounds: int, threads: int, memory: bool
) -> Figures:
    """Times each loss at each batch size; RuntimeError if one of them is another loss."""
    compare(device)
    figures: Figures = {}
    for n in sizes:
        figures |= printed(_measure_time(n, device, rounds))
        for name, contestant in _contestants_of(n, device).items() if memory else ():
            peak = peak_megabytes(_peak, contestant, n, device, threads)
            figures |= printed({f"{n}: {name}, MB above the inputs": peak})
    return figures


def make_inputs(n: int, contestant: Contestant, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    num_texts = contestant.num_texts or n
    shape = max(n, num_texts), _EMBED_DIM
    images, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    texts = F.normalize(images + noise, dim=1)[:num_texts]
    return Inputs(
        F.normalize(images, dim=1)[:n].to(device, contestant.dtype).requires_grad_(),
        texts.to(device, contestant.dtype).requires_grad_(),
        torch.tensor(_SCALE, device=device, requires_grad=True),
        torch.arange(n, device=device) % num_texts,
    )


def loss_work(contestant: Contestant, inputs: Inputs) -> Callable[[], Tensor]:
    """A function that returns the loss and leaves the gradients with the inputs."""
    images, texts, scale, class_ids = inputs
    if contestant.form is None:
        from open_clip.loss import ClipLoss

        value: Callable[[], Tensor] = functools.partial(ClipLoss(), images, texts, scale)
    else:
        counts = class_ids.bincount(minlength=len(texts))
        shared: dict[str, Any] = {
            "text_class_ids": torch.arange(len(texts), device=texts.device),
            **({"text_counts": counts} if len(texts) < len(images) else {}),
        }
        value = functools.partial(
            unified_contrastive_loss, images, texts, class_ids, scale,
            form=contestant.form, **(shared if contestant.num_texts else {}),
        )  # fmt: skip

    def work() -> Tensor:
        images.grad = texts.grad = scale.grad = None
        loss = value()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        return loss.detach()

    return work


def compare(device: torch.device) -> None:
    """Raises RuntimeError if a loss differs from the dense form in fp64 on the same features."""
    for name, contestant in contestants_on(device).items():
        gap, gradient_gap = gaps_of(contestant, 3000, device)
        print(f"{name:46} loss off by {gap:.1e}, gradients by {gradient_gap:.1e} of their norm")
        is_fp32 = contestant.dtype == torch.float32
        # ClipLoss sums up in bf16, too
        allowed = 1e-5 if is_fp32 else 5e-2 if contestant.form is None else 1e-3
        if not (gap < allowed and gradient_gap < (1e-4 if is_fp32 else 5e-2)):
            raise RuntimeError(f"{name} is another loss; nothing was timed")


def gaps_of(contestant: Contestant, n: int, device: torch.device) -> tuple[float, float]:
    """Relative errors of the value and of the gradients, compared with the dense form in fp64."""
    inputs = make_inputs(n, contestant, device)
    loss = loss_work(contestant, inputs)().double()
    gradients = [x.grad.double() for x in inputs[:2] if x.grad is not None]
    images, texts = (x.detach().double().requires_grad_() for x in inputs[:2])
    of_all = inputs.class_ids  # the text of each image
    reference = unified_contrastive_loss(images, texts[of_all], of_all, _SCALE, form="dense")
    exact = torch.cat(torch.autograd.grad(reference, (images, texts)))
    gap = (loss - reference.detach()).abs() / reference.detach()
    return float(gap), float((torch.cat(gradients) - exact).norm() / exact.norm())


def _contestants_of(n: int, device: torch.device) -> dict[str, Contestant]:
    """The losses that can be measured at this size."""
    return {
        name: contestant
        for name, contestant in contestants_on(device).items()
        if (n <= _LARGEST_STORED or not contestant.stores_logits)
        and (n > 2 * _FEW_TEXTS or not contestant.num_texts)
    }


def _measure_time(n: int, device: torch.device, rounds: int) -> Figures:
    """Seconds of each loss, and their ratio to the baseline's (else the floor's)."""
    works: dict[str, Callable[[], object]] = {
        name: loss_work(contestant, make_inputs(n, contestant, device))
        for name, contestant in _contestants_of(n, device).items()
    }
    works |= {"rate fp32": _rate_products(torch.float32, device)}
    works |= {"rate bf16": _rate_products(torch.bfloat16, device)}
    warm_up = 1 if n <= 4096 else 0
    turns = take_turns(works, rounds=rounds, warm_up=warm_up, device_type=device.type)
    # 4 products of 2 n^2 d operations each, at the rate of those just timed
    work = n * n / (_RATE_PRODUCTS * _RATE_SIZE**2)
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
    left, right = (torch.randn(_RATE_SIZE, _EMBED_DIM).to(device, dtype) for _ in range(2))
    product = torch.empty(_RATE_SIZE, _RATE_SIZE, device=device, dtype=dtype)

    def work() -> Tensor:
        for _ in range(_RATE_PRODUCTS):
            torch.mm(left, right.T, out=product)
        return product

    return work


def _peak(contestant: Contestant, n: int, device: torch.device, threads: int) -> float:
    torch.set_num_threads(threads)
    loss_work(contestant, make_inputs(256, contestant, device))()  # loads the libraries
    work = loss_work(contestant, make_inputs(n, contestant, device))
    return peak_bytes(work, device_type=device.type)
