"""Parameter groups, the optimizers by name, and whose apex is installed."""

import dataclasses
import itertools
import math
import sys
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from small_runs import tiny_config
from timm.optim import Lamb

from unicl_fast.checkpoints.load import build_model
from unicl_fast.objectives.registry import make_objective
from unicl_fast.training import optim
from unicl_fast.training.optim import load_apex_optimizers

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class RecordingOptimizer(torch.optim.AdamW):
    """Stands for an optimizer of apex."""

    def __init__(self, groups: list, **arguments: object) -> None:
        self.arguments = arguments
        super().__init__(groups, lr=arguments["lr"])


def install(monkeypatch: pytest.MonkeyPatch, **modules: ModuleType | None) -> None:
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.setitem(sys.modules, name, modules.get(name.replace(".", "_")))


def module_with(name: str, **contents: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def install_nvidia_apex(monkeypatch: pytest.MonkeyPatch, *, compiled: bool = True) -> ModuleType:
    names = ("FusedAdam", "FusedLAMB")
    kinds = {name: type(name, (RecordingOptimizer,), {}) for name in names}
    optimizers = module_with("apex.optimizers", **kinds)
    apex = module_with("apex", __path__=[], optimizers=optimizers)
    extension = module_with("amp_C") if compiled else None
    install(monkeypatch, apex=apex, apex_optimizers=optimizers, amp_C=extension)
    return optimizers


def test_nvidias_apex_is_known_by_its_contents_and_needs_its_extensions(monkeypatch):
    optimizers = install_nvidia_apex(monkeypatch)
    assert load_apex_optimizers() is optimizers
    install_nvidia_apex(monkeypatch, compiled=False)
    with pytest.raises(ValueError, match="amp_C"):
        load_apex_optimizers()


EMPTY = module_with("apex.optimizers")
OF_PYPI = {"apex": module_with("apex", MessageFactory=object)}
BESIDE = {"apex": module_with("apex", __path__=[], optimizers=EMPTY), "apex_optimizers": EMPTY}
NO_APEX: dict[str, tuple[dict[str, ModuleType], str]] = {
    "of pip install apex": (OF_PYPI, "git clone https://github.com/NVIDIA/apex"),
    "beside the extension": (BESIDE | {"amp_C": module_with("amp_C")}, "no attribute 'FusedAdam'"),
}


@pytest.mark.parametrize("kind", NO_APEX)
def test_another_project_of_that_name_is_not_it(monkeypatch, kind):
    modules, message = NO_APEX[kind]
    install(monkeypatch, **modules)
    with pytest.raises(ValueError, match=message) as caught:
        load_apex_optimizers()
    assert "pip install apex" not in str(caught.value)


@pytest.mark.parametrize("name", ["fusedadamw", "fusedlamb"])
def test_apex_is_refused_in_fp64_and_on_the_cpu(name, monkeypatch):
    optim.check_optimizer(name, device=CUDA, precision="bf16")
    with pytest.raises(ValueError, match="with efficiency.precision=fp64"):
        optim.check_optimizer(name, device=CUDA, precision="fp64")
    install_nvidia_apex(monkeypatch)
    config = tiny_config(optimizer=name, precision="fp32")
    with pytest.raises(ValueError, match=f"optim.name={name} runs on CUDA devices"):
        optim.build_optimizer(build_model(config), config)


@pytest.mark.parametrize(
    ("name", "kind", "extra"),
    [
        ("fusedadamw", "FusedAdam", {"adam_w_mode": True}),
        ("fusedlamb", "FusedLAMB", {"max_grad_norm": math.inf}),
    ],
)
def test_apex_gets_the_settings(name, kind, extra, monkeypatch):
    install_nvidia_apex(monkeypatch)
    monkeypatch.setattr(optim, "check_optimizer", Mock())  # as if on CUDA
    config = tiny_config(optimizer=name)
    optimizer = optim.build_optimizer(build_model(config), config)
    assert type(optimizer).__name__ == kind
    assert optimizer.arguments == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8} | extra


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("lamb", Lamb)])
def test_every_parameter_is_in_one_of_the_papers_groups(name, kind):
    config = tiny_config(optimizer=name, image_encoder="unicl_swin6_small")
    model = build_model(config)
    optimizer = optim.build_optimizer(model, config)
    assert type(optimizer) is kind
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[one] for one in group["params"]] for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert sorted(itertools.chain(*groups)) == sorted(names.values())
    assert all(parameter.ndim > 1 or name in groups[1] for parameter, name in names.items())
    assert {"logit_scale", "text_encoder.positional_embedding"} <= {*groups[1]}
    assert any("relative_position_bias_table" in name for name in groups[1])
    assert {"image_projection", "text_encoder.token_embedding.weight"} <= {*groups[0]}


def test_rates_fall_with_depth():
    config = tiny_config().changed(optim={"layer_decay": 0.5})
    model = build_model(config)
    optimizer = optim.build_optimizer(model, config)
    schedule = optim.build_schedule(optimizer, config, 10)
    schedule.step_update(2)  # the end of the warm-up
    found = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == set(model.parameters())
    lr = found[model.logit_scale][0]
    assert lr == found[model.image_projection][0] == found[model.text_projection][0] > 0
    blocks = model.image_encoder.blocks
    expected = {
        model.image_encoder.norm.weight: 0.5,
        blocks[-1].attn.qkv.weight: 0.5,
        blocks[-2].attn.qkv.weight: 0.5**2,
        model.image_encoder.pos_embed: 0.5 ** (len(blocks) + 1),
        model.text_encoder.ln_final.weight: 0.5,
        model.text_encoder.resblocks[1].attn.in_proj_weight: 0.5,
        model.text_encoder.resblocks[0].attn.in_proj_weight: 0.5**2,
        model.text_encoder.token_embedding.weight: 0.5**3,
    }
    for parameter, factor in expected.items():
        assert found[parameter][0] == pytest.approx(factor * lr, rel=1e-12)
    spared = set(optim.split_parameters(model)[1])
    for parameter, (_, weight_decay) in found.items():
        assert weight_decay == (0.0 if parameter in spared else 0.1)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "mpnet"])
def test_rates_fall_with_depth_and_positions_keep_their_size_in_encoders_of_transformers(kind):
    config = tiny_config().changed(
        model={"text_pool": f"{kind}:mean", "text_activation": "gelu"}, optim={"layer_decay": 0.5}
    )
    model = build_model(config)
    groups = optim.parameter_groups(model, config.optim)
    of = {parameter: group for group in groups for parameter in group["params"]}
    text = {name: of[one] for name, one in model.text_encoder.named_parameters()}
    scales = {name: group["lr_scale"] for name, group in text.items()}
    count = config.model.text_layers
    for layer in range(count):
        found = {scale for name, scale in scales.items() if f".layer.{layer}." in name}
        assert found == {0.5 ** (count - layer)}
    assert {scale for name, scale in scales.items() if "word_emb" in name} == {0.5 ** (count + 1)}
    positions = [name for name in text if "position" in name or "relative_attention_bias" in name]
    assert {text[name]["weight_decay"] for name in positions} == {0.0}


def test_lamb_leaves_clipping_to_the_config():
    """The first LAMB step of an undecayed parameter has Adam's size: the gradient's does not."""
    config = tiny_config(optimizer="lamb")
    model = build_model(config)
    optimizer = optim.build_optimizer(model, config)
    assert optimizer.defaults["max_grad_norm"] is None
    before = model.logit_scale.item()
    model.logit_scale.grad = torch.tensor(1000.0)
    optimizer.step()
    assert model.logit_scale.item() == pytest.approx(before - 1e-3, rel=1e-4)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_is_torchs_own(dtype, fused, clip_norm):
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).to(dtype)
        model.append(torch.nn.Linear(2, 2).to(dtype))  # gets no gradient
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)

    (ours, our_optimizer), (plain, plain_optimizer) = build(), build()
    for model in (ours, plain):
        model[:2](torch.ones(4, 7, dtype=dtype)).square().sum().backward()
    norm = optim.gradient_norm(ours)
    optim.update(our_optimizer, norm, clip_norm=clip_norm, leave_out=torch.tensor(False))
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_norm or math.inf)
    plain_optimizer.step()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(norm, expected, rtol=tolerance, atol=0)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_the_norm_of_a_large_gradient_is_exact_to_fp32():
    """A plain fp32 sum over 25 million squares is off by 5e-4."""
    layer = torch.nn.Embedding(49408, 512)
    layer.weight.grad = torch.randn(49408, 512, generator=torch.Generator().manual_seed(1))
    exact = layer.weight.grad.double().norm()
    torch.testing.assert_close(optim.gradient_norm(layer).double(), exact, rtol=1e-6, atol=0)


def test_muon_takes_matrices_alone():
    """The token table, tables of positions, scale and bias are AdamW's."""
    config = tiny_config(optimizer="muon")
    config = dataclasses.replace(config, objective=make_objective(name="sigmoid"))
    model = build_model(config)
    optimizer = optim.build_optimizer(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    chosen = {True: set[str](), False: set[str]()}
    for group in optimizer.param_groups:
        assert group["eps"] == 1e-8
        chosen[group["use_muon"]] |= {names[one] for one in group["params"]}
    assert chosen[True] | chosen[False] == set(names.values())
    assert {"image_projection", "text_projection"} <= chosen[True]
    spared = {"logit_scale", "logit_bias", "text_encoder.token_embedding.weight"}
    assert spared <= chosen[False]
    assert all(names[one] in chosen[False] for one in names if one.ndim < 2)
