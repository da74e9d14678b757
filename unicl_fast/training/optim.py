"""Parameter groups of the released recipe, an optimizer over them, and its schedule.

AdamW is torch's, LAMB (You et al., arXiv 1904.00962) timm's, Muon is in `muon.py`. The fused twins
of the first two are NVIDIA apex's, imported only here and on demand. Warm-up and cosine are timm's.
"""

import logging
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from timm.optim import Lamb, param_groups_layer_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from unicl_fast.config import OptimConfig, TrainConfig
from unicl_fast.distributed.ranks import Ranks, sum_over_ranks
from unicl_fast.models.sharding import split_divided
from unicl_fast.models.unicl import UniCL
from unicl_fast.stages import span_at
from unicl_fast.training.muon import Muon

logger = logging.getLogger(__name__)

_ALONE = Ranks()
_EPS = 1e-8
_SUMMED_AT_ONCE = 2**18  # squares in one dot product: more lose precision in fp32, fewer cost calls

_HOW_TO_BUILD_APEX = (
    "build it from its source, with a CUDA compiler of the version that torch was built with: "
    "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "python -m pip install -v --no-build-isolation .  The package that PyPI has under this name is "
    "another project"
)
_UNDECAYED_NAMES = (
    *("logit_scale", "positional_embedding", "pos_embed", "absolute_pos_embed", "cls_token"),
    "relative_position_bias_table",
)
_UNDECAYED_TABLES = ("position_embeddings", "relative_attention_bias")
"""Names of transformers' modules whose `weight` is a table of positions."""


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with and without weight decay, as in the released recipe."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        *_, module, last_name = ("", *name.split("."))
        spared = parameter.ndim <= 1 or last_name == "bias" or last_name in _UNDECAYED_NAMES
        spared |= module in _UNDECAYED_TABLES
        (undecayed if spared else decayed).append(parameter)
    return decayed, undecayed


def check_optimizer(name: str, *, device: torch.device, precision: str) -> None:
    """Refuses (ValueError) apex's optimizers if they cannot work."""
    is_apex = name in ("fusedadamw", "fusedlamb")
    if is_apex and (device.type != "cuda" or precision == "fp64"):
        raise ValueError(
            f"optim.name={name} runs on CUDA devices with weights in fp32, not on {device.type} "
            f"with efficiency.precision={precision}; use adamw or lamb"
        )


def parameter_groups(model: UniCL, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters by weight decay and by `lr_scale`, the factor of their rate.

    The factor is 1 outside the encoders. Parameters that are divided over ranks have their own
    groups; under Muon so do the matrices that it updates, `use_muon`.
    """
    factors: dict[nn.Parameter, float] = {}
    if optim.layer_decay != 1:
        for encoder in model.encoders:
            # timm's layers; its factor is 1 for the last one, ours for what is above it
            for group in param_groups_layer_decay(encoder, 0.0, layer_decay=optim.layer_decay):
                factors |= dict.fromkeys(group["params"], group["lr_scale"] * optim.layer_decay)
    groups: list[dict[str, Any]] = []
    for kind, weight_decay in zip(split_parameters(model), (optim.weight_decay, 0.0), strict=True):
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in kind:
            by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
        groups += [
            {"params": parameters, "weight_decay": weight_decay, "lr_scale": factor}
            for factor, alike in by_factor.items()
            for parameters in split_divided(alike)
            if parameters
        ]
    return _split_for_muon(groups, model) if optim.name == "muon" else groups


def _split_for_muon(groups: list[dict[str, Any]], model: UniCL) -> list[dict[str, Any]]:
    """Divides groups into the matrices for Muon and the others, for AdamW.

    Embeddings are not for Muon: a step gives a gradient to few of their rows.
    """
    embeddings = {one.weight for one in model.modules() if isinstance(one, nn.Embedding)}
    names = {parameter: name for name, parameter in model.named_parameters()}

    def suits(parameter: nn.Parameter) -> bool:
        spared = names[parameter].rsplit(".", 1)[-1] in _UNDECAYED_NAMES
        # (1, tokens, width) is a table of positions, and (c, 1, h, w) a convolution of each channel
        is_matrix = parameter.ndim > 1 and min(parameter.shape[:2]) > 1
        return is_matrix and not spared and parameter not in embeddings

    return [
        {**group, "params": chosen, "use_muon": for_muon}
        for group in groups
        for for_muon in (True, False)
        if (chosen := [one for one in group["params"] if suits(one) == for_muon])
    ]


def build_optimizer(model: UniCL, config: TrainConfig) -> torch.optim.Optimizer:
    """`optim.name` over `parameter_groups`, at the rate for the global batch size.

    Raises ValueError: the optimizer is not installed, or cannot work with this device or precision.
    """
    optim, efficiency = config.optim, config.efficiency
    groups = parameter_groups(model, optim)
    check_optimizer(optim.name, device=model.device, precision=efficiency.precision)
    lr = scaled_lr(optim.lr, config)
    common: dict[str, Any] = {"lr": lr, "betas": optim.betas, "eps": _EPS}
    # the two LAMBs clip the gradient to norm 1 by themselves; here optim.clip_norm decides
    match optim.name:
        case "adamw":
            return torch.optim.AdamW(groups, fused=True, **common)
        case "lamb":
            return Lamb(groups, max_grad_norm=None, **common)  # type: ignore[no-any-return]
        case "muon":
            return Muon(groups, fused=True, **common)
        case "fusedadamw":
            return load_apex_optimizers().FusedAdam(groups, adam_w_mode=True, **common)  # type: ignore[no-any-return]
        case "fusedlamb":
            return load_apex_optimizers().FusedLAMB(groups, max_grad_norm=math.inf, **common)  # type: ignore[no-any-return]
    raise AssertionError(optim.name)


def load_apex_optimizers() -> ModuleType:
    """NVIDIA's `apex.optimizers`, with `FusedAdam` and `FusedLAMB`.

    PyPI's `apex` is a web toolkit, so apex is recognised by its contents. `amp_C`, the compiled
    extension of its optimizers, is tried first, so that another project is not even imported.

    Raises ValueError: it is not installed, another project is, or it lacks its CUDA extensions.
    """
    try:
        import amp_C  # noqa: F401  apex itself notices its absence only when an optimizer is made
        from apex import optimizers

        for name in ("FusedAdam", "FusedLAMB"):
            getattr(optimizers, name)
    except Exception as error:  # a stranger's package may fail in any way
        raise ValueError(
            f"expected NVIDIA's apex with its CUDA extensions, but: {error!r}. Use another "
            f"optim.name (adamw, lamb), or {_HOW_TO_BUILD_APEX}"
        ) from error
    assert isinstance(optimizers, ModuleType)
    return optimizers


@torch.no_grad()
def gradient_norm(model: nn.Module, ranks: Ranks = _ALONE) -> Tensor:
    """Norm of the gradient of all parameters together: float [], on their device.

    All ranks call it together if the gradients are divided over them (`efficiency.shard=full`).
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    divided, others = split_divided(gradients)
    if not divided:
        return _norm(others)
    of_parts = _norm([gradient.to_local() for gradient in divided])
    return (sum_over_ranks(of_parts.square(), ranks) + _norm(others).square()).sqrt()


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    if not gradients or gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients)
    # on the CPU this needs 0.4 of the time of torch's norm, and rounds less: one sum over the 25
    # million entries of the token table is off by 5e-4 in fp32
    pieces = [piece for one in gradients for piece in one.reshape(-1).split(_SUMMED_AT_ONCE)]
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum().sqrt()


@torch.no_grad()
def update(
    optimizer: torch.optim.Optimizer, grad_norm: Tensor, *, clip_norm: float, leave_out: Tensor
) -> None:
    """Updates the weights with the clipped gradient, or leaves them and the optimizer unchanged.

    Gradients longer than `clip_norm` (0: none) are clipped; `leave_out` is a bool [] on the device.
    """
    # torch's fused AdamW reads factor and flag on the device; for others gradients are divided and
    # the host reads the flag. Zeroed gradients would not do: weight decay and averages still move
    is_fused = getattr(optimizer, "_step_supports_amp_scaling", False)  # which GradScaler asks for
    is_fused = is_fused and isinstance(optimizer, torch.optim.AdamW)
    if not is_fused and leave_out.item():
        return
    # as torch's clip_grad_norm_
    divisor = ((grad_norm + 1e-6) / clip_norm).clamp(min=1.0) if clip_norm else None
    # the fused kernel's factor is fp32 and would round fp64 gradients
    if divisor is not None and not (is_fused and divisor.dtype == torch.float32):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for gradients in split_divided(p.grad for p in parameters if p.grad is not None):
            if gradients:
                torch._foreach_div_(tuple(gradients), divisor)
        divisor = None
    if not is_fused:
        optimizer.step()
        return
    fused: Any = optimizer
    # as torch.amp.GradScaler passes both on
    fused.grad_scale, fused.found_inf = divisor, leave_out.float()
    fused.step()
    del fused.grad_scale, fused.found_inf


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: float
) -> CosineLRScheduler:
    """Linear warm-up, then a cosine to lr_min; `step_update(step + 1)` sets a step's rate.

    If stages differ in batch size, use `steps_of_samples` for the steps, and `set_rates`.
    """
    warmup_steps = round(config.optim.warmup_fraction * total_steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, total_steps - warmup_steps),
        lr_min=scaled_lr(config.optim.lr_min, config),
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def set_rates(
    optimizer: torch.optim.Optimizer, schedule: CosineLRScheduler, config: TrainConfig, *, step: int
) -> None:
    """Sets the rates of a step, scaled to its stage's global batch as in `scaled_lr`."""
    schedule.step_update(steps_of_samples(config, step + 1))
    own, size = config.run.global_batch_size, span_at(config.run.spans, step).global_batch_size
    if config.optim.lr_batch_size and size != own:
        for group in optimizer.param_groups:
            group["lr"] *= size / own


def steps_of_samples(config: TrainConfig, step: int) -> float:
    """Steps at the run's own batch size that have as many samples as come before `step`."""
    return config.run.draws_before(step) / config.run.global_batch_size


def scaled_lr(lr: float, config: TrainConfig) -> float:
    """Linear scaling of a rate for `lr_batch_size` samples to the run's global batch."""
    reference = config.optim.lr_batch_size
    return lr * config.run.global_batch_size / reference if reference else lr
