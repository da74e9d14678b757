"""Encoders: causality, padding, drop path by key, presets that run."""

import itertools
import sys
import types
from typing import Any

import numpy as np
import pytest
import timm
import torch
from small_runs import TEXTS, tiny_config
from timm.layers import resample_abs_pos_embed
from torch.utils._python_dispatch import TorchDispatchMode

from unicl_fast import UniCL, build_model
from unicl_fast.config import ModelConfig
from unicl_fast.models import text_encoder
from unicl_fast.models.blocks import checkpoint_blocks
from unicl_fast.models.image_encoder import (
    DropPathKey,
    KeyedDropPath,
    build_image_encoder,
    feature_width,
    set_image_size,
)
from unicl_fast.models.precision import Precision, place_module
from unicl_fast.models.text_encoder import (
    TextAttention,
    TextEncoder,
    build_text_encoder,
    find_varlen_attention,
)
from unicl_fast.presets import build_preset
from unicl_fast.text.tokenizer import Tokenizer

TOKENS = Tokenizer()(TEXTS)
NUM_TOKENS = int((TOKENS.argmax(dim=1) + 1).sum())


@pytest.fixture(scope="module")
def model() -> UniCL:
    return build_model(tiny_config()).double().eval()


def test_padding_and_what_follows_the_end_change_nothing(model):
    features = model.encode_text(TOKENS)
    longest = int(TOKENS.argmax(dim=1).max()) + 1
    torch.testing.assert_close(
        model.encode_text(TOKENS[:, :longest]), features, rtol=1e-12, atol=1e-14
    )
    garbage = TOKENS.clone()
    garbage[0, int(TOKENS[0].argmax()) + 1 :] = 1234
    torch.testing.assert_close(model.encode_text(garbage), features, rtol=1e-12, atol=1e-14)


def test_packed_texts_equal_padded_ones_and_their_gradients(model):
    parameters = [*model.text_encoder.parameters(), model.text_projection]
    target = torch.randn(len(TEXTS), model.config.model.embed_dim, dtype=torch.float64)
    results = []
    for texts, known in ((TOKENS, None), (TOKENS[:, :20], NUM_TOKENS), (TOKENS, NUM_TOKENS)):
        features = model.encode_text(texts, known)
        results.append([features, *torch.autograd.grad((features * target).sum(), parameters)])
    for packed in results[1:]:
        torch.testing.assert_close(packed, results[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("causal", "pool"), [(False, "end"), (True, "last"), (False, "last")])
def test_padding_that_is_part_of_a_text_is_computed_in_every_layout(causal, pool):
    config = tiny_config().changed(model={"text_causal": causal, "text_pool": pool})
    model = build_model(config).double().eval()
    features = model.encode_text(TOKENS)
    changed = TOKENS.clone()
    changed[:, -1] = 5
    assert (model.encode_text(changed) - features).abs().max() > 1e-4
    for texts, known in ((TOKENS[:, :20], None), (TOKENS[:, :20], NUM_TOKENS)):
        torch.testing.assert_close(model.encode_text(texts, known), features, rtol=0, atol=1e-14)
    for part in model.modules():
        if isinstance(part, TextAttention):
            part.fused_attn = False
    torch.testing.assert_close(model.encode_text(TOKENS), features, rtol=1e-11, atol=1e-13)


class ReadValues(TorchDispatchMode):
    """Names the operators that would wait for a device to read a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("pool", ["bert:mean", "roberta:pooler", "distilbert:cls", "mpnet:mean"])
def test_text_encoders_of_transformers_read_nothing(pool):
    """By themselves they look whether a mask of padding has any; of a fake tensor they do not."""
    sizes = {"text_width": 32, "text_layers": 1, "text_heads": 4, "vocab_size": 100}
    encoder = build_text_encoder(ModelConfig(**sizes, text_activation="gelu", text_pool=pool))
    tokens = torch.randint(1, 100, (4, 12))
    tokens[0, 5:] = 0
    with ReadValues() as reads:
        encoder(tokens).sum().backward()
    assert reads.found == []


def test_a_projection_may_be_missing_or_have_a_bias():
    def with_projections(**settings: object) -> UniCL:
        return build_model(tiny_config().changed(model=settings)).double().eval()

    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    biased = with_projections(image_projection="biased", text_projection="biased")
    before = biased.encode_image(images), biased.encode_text(TOKENS)
    with torch.no_grad():
        biased.image_projection_bias += 3
        biased.text_projection_bias += 3
    after = biased.encode_image(images), biased.encode_text(TOKENS)
    for one, other in zip(before, after, strict=True):
        assert (one - other).abs().max() > 0.01
    assert "text_projection_bias" in biased.state_dict()
    plain = with_projections(
        image_projection="none", text_projection="none", embed_dim=64, text_width=64
    )
    expected = torch.nn.functional.normalize(plain.image_encoder(images), dim=1)
    torch.testing.assert_close(plain.encode_image(images), expected)
    expected = torch.nn.functional.normalize(plain.text_encoder(TOKENS), dim=1)
    torch.testing.assert_close(plain.encode_text(TOKENS), expected)
    assert not any("projection" in name for name in plain.state_dict())
    with pytest.raises(ValueError, match="must be the width of the image encoder's, 64"):
        with_projections(image_projection="none")
    with pytest.raises(ValueError, match=r"embed_dim \(8\) must be model.text_width \(16\)"):
        with_projections(text_projection="none")


def attend_each_text(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_bounds: torch.Tensor,
    key_bounds: torch.Tensor, longest_query: int, longest_key: int, *,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    """What torch documents of its kernel for rows of any length, one text after the other.

    As there, the result is not written outside the texts, nor is the gradient.
    """
    assert window_size == (-1, 0)
    assert query_bounds.dtype == torch.int32
    assert query_bounds is key_bounds
    bounds = query_bounds.tolist()
    assert bounds == sorted(bounds)
    lengths = np.diff(bounds)
    assert lengths.max() <= min(longest_query, longest_key)
    result = torch.full_like(query, float("nan"))
    for start, stop in itertools.pairwise(bounds):
        if start < stop:
            one = [part[start:stop].transpose(0, 1) for part in (query, key, value)]
            mixed = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True)
            result[start:stop] = mixed.transpose(0, 1)
    return result


def known_of_torch_2_10(query: object, key: object, *, is_causal: bool = False) -> None: ...


@pytest.mark.parametrize("more", [0, 1, 5, 60])
def test_attention_over_rows_of_any_length_equals_that_over_padded_rows(model, more, monkeypatch):
    """With more tokens than there are, some padding is computed, as torch.compile has it."""
    tokens = TOKENS[:, :20]
    parameters = [*model.text_encoder.parameters(), model.text_projection]
    target = torch.randn(len(TEXTS), model.config.model.embed_dim, dtype=torch.float64)
    results = []
    for attention, types_of_kernel in (
        (attend_each_text, {torch.float64}),
        (known_of_torch_2_10, text_encoder.VARLEN_TYPES),  # not called, as it takes 16 bits
        (None, text_encoder.VARLEN_TYPES),
    ):
        monkeypatch.setattr(text_encoder, "VARLEN_TYPES", types_of_kernel)
        for part in model.modules():
            if isinstance(part, TextAttention):
                part.varlen_attn = attention
        features = model.encode_text(tokens, min(NUM_TOKENS + more, tokens.numel()))
        results.append([features, *torch.autograd.grad((features * target).sum(), parameters)])
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, True),
        ({"device": torch.device("cpu")}, False),
        ({"compute_type": torch.float32}, False),
        ({"head_width": 60}, False),
        ({"head_width": 264}, False),
        ({"capability": (7, 5)}, False),
        ({"kernel": known_of_torch_2_10}, False),
        ({"kernel": None}, False),
        ({"cuda": None}, False),
    ],
    ids=["all", "cpu", "fp32", "uneven heads", "wide heads", "old gpu", "2.10", "2.9", "rocm"],
)
def test_rows_of_any_length_need_a_gpu_that_can_and_a_torch_that_has_it(change, found, monkeypatch):
    asked = {"device": torch.device("cuda"), "compute_type": torch.bfloat16, "head_width": 64}
    around = {"capability": (8, 0), "kernel": attend_each_text, "cuda": "12.8"} | change
    module = types.ModuleType("torch.nn.attention.varlen")
    if around["kernel"] is not None:
        module.varlen_attn = around["kernel"]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(torch.version, "cuda", around["cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: around["capability"])
    asked |= {name: value for name, value in change.items() if name in asked}
    assert (find_varlen_attention(**asked) is not None) == found


@pytest.mark.parametrize("num_tokens", [0, 5, 10_000])
def test_impossible_numbers_of_tokens_are_refused(model, num_tokens):
    tokens = Tokenizer()([*TEXTS] * 2)
    with pytest.raises(ValueError, match=f"num_tokens must be from .* to .*, not {num_tokens}"):
        model.encode_text(tokens, num_tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [0, 37])
def test_torchs_kernel_for_rows_of_any_length_equals_padded_rows(more):
    device = torch.device("cuda")
    encoder = TextEncoder(ModelConfig(text_width=256, text_layers=2, text_heads=4))
    place_module(encoder, device=device, precision=Precision("bf16"))
    blocks = [part for part in encoder.modules() if isinstance(part, TextAttention)]
    assert all(part.varlen_attn is not None for part in blocks)
    tokens = TOKENS.to(device)
    # not the features' squares: behind a LayerNorm their sum is always the same
    target = torch.randn(len(TEXTS), 256, device=device)
    results = []
    for known in (NUM_TOKENS + more, None):
        with torch.autocast("cuda", torch.bfloat16):
            features = encoder(tokens, known).float()
        gradients = torch.autograd.grad((features * target).sum(), list(encoder.parameters()))
        results.append([features, *gradients])
    for packed, padded in zip(*results, strict=True):
        gap = (packed - padded).norm() / padded.norm().clamp(min=1e-6)
        assert gap < 0.03, gap  # of bf16; nan fails too


def test_attention_is_plain_in_16_bits_on_a_cpu_and_equals_the_fused_one():
    model = build_model(tiny_config()).double().eval()
    tokens = TOKENS[:, :20]
    features = model.encode_text(tokens)
    place_module(model, device=torch.device("cpu"), precision=Precision("fp64"))
    assert all(part.fused_attn for part in model.modules() if hasattr(part, "fused_attn"))
    place_module(model, device=torch.device("cpu"), precision=Precision("bf16"))
    switches = [part for part in model.modules() if hasattr(part, "fused_attn")]
    assert {type(part).__name__ for part in switches} >= {"TextAttention", "Attention"}
    assert not any(part.fused_attn for part in switches)
    model.double()
    torch.testing.assert_close(model.encode_text(tokens), features, rtol=1e-12, atol=1e-14)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_model(tiny_config())
    torch.manual_seed(2)
    state_before = torch.random.get_rng_state()
    second = build_model(tiny_config())
    assert torch.equal(torch.random.get_rng_state(), state_before)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


def test_drop_path_follows_the_sample_to_another_place_in_the_batch():
    model = build_model(tiny_config()).double().train()
    layers = [module for module in model.modules() if isinstance(module, KeyedDropPath)]
    assert len(model.drop_path_key.layers) == len(layers) > 4
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    global_index = torch.tensor([40, 41, 42, 43, 44, 45])

    def features(rows: torch.Tensor, step: int) -> torch.Tensor:
        model.set_drop_path_key(step=step, global_index=global_index[rows])
        return model.encode_image(images[rows])

    everything = features(torch.arange(6), step=5)
    part = features(torch.tensor([4, 1]), step=5)
    torch.testing.assert_close(part, everything[[4, 1]], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(features(torch.arange(6), step=6), everything)
    model.eval()
    assert torch.equal(features(torch.arange(6), step=5), features(torch.arange(6), step=6))


def test_drop_path_keeps_the_fraction_and_the_mean_it_should():
    model = build_model(tiny_config())
    layer = KeyedDropPath(drop_prob=0.3).train()
    model.drop_path_key.layers.append(layer)
    model.set_drop_path_key(step=3, global_index=torch.arange(20_000))
    out = layer(torch.ones(20_000, 1, 1))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert out.mean().item() == pytest.approx(1, abs=0.02)


def test_training_without_a_key_says_what_is_missing():
    model = build_model(tiny_config()).double().train()
    with pytest.raises(RuntimeError, match="set_drop_path_key"):
        model.encode_image(torch.randn(2, 3, 32, 32, dtype=torch.float64))


def test_unknown_names_are_answered_with_known_ones():
    for name, answer in (
        ("cifar-10", r"no preset 'cifar-10' \(did you mean cifar10-small\?\); presets are swin"),
        ("Auto", r"did you mean auto\?.*, and auto for unicl-pretrain"),
        ("?", r"no preset '\?'; presets are"),
        ("auto", "only unicl-pretrain has the preset auto"),
    ):
        with pytest.raises(ValueError, match=answer):
            build_preset(name)
    config = tiny_config(image_encoder="swin_tinny_patch4_window7_224")
    with pytest.raises(ValueError, match="swin_tiny_patch4_window7_224"):
        build_model(config)


@pytest.mark.parametrize(
    ("name", "size", "width", "parameters", "blocks"),
    [
        ("unicl_convnet7_small", 28, 256, 1_158_712, 3),
        ("unicl_swin6_small", 28, 192, 2_132_502, 6),
        ("unicl_swin6_small", 32, 192, 2_132_502, 6),
        ("eva02_tiny_patch14_224", 56, 192, 5_456_064, 12),
        pytest.param("resnet50_clip", 64, 2048, 36_126_560, 16, marks=pytest.mark.slow),
    ],
)
def test_encoders_give_the_same_gradients_when_recomputed(name, size, width, parameters, blocks):
    """The small networks and those of open_clip, of the size that timm builds."""
    torch.manual_seed(0)
    encoder = build_image_encoder(name, image_size=size, drop_path=0.0, key=DropPathKey(seed=0))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
    images = torch.randn(3, 3, size, size)
    features = encoder.train()(images)
    assert features.shape == (3, width)
    trained = [one for one in encoder.parameters() if one.requires_grad]
    gradients = torch.autograd.grad(features.square().sum(), trained)
    assert checkpoint_blocks(encoder) == blocks
    again = torch.autograd.grad(encoder(images).square().sum(), trained)
    torch.testing.assert_close(again, gradients)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("test_vit", 100, "patches of 16 pixels do not divide 100; set data.image_size=96 or 112"),
        ("unicl_swin6_small", 30, "patches of 4 .* set data.image_size=28 or 32"),
        pytest.param(
            *("vit_small_patch14_dinov2", 225, "set data.image_size=224 or 238"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_image_size_that_a_model_cannot_take_is_refused_with_the_nearest(name, size, message):
    with pytest.raises(ValueError, match=f"{name} cannot be built for .*{message}"):
        build_image_encoder(name, image_size=size, drop_path=0.0, key=DropPathKey(seed=0))


@pytest.mark.parametrize("name", ["vgg11_bn", "repvit_m0_9"])
def test_networks_that_know_no_drop_path_are_built_without(name):
    with torch.device("meta"):
        encoder = build_image_encoder(name, image_size=64, drop_path=0.0, key=DropPathKey(seed=0))
        assert encoder.eval()(torch.empty(2, 3, 64, 64)).shape == (2, feature_width(encoder))
        with pytest.raises(ValueError, match=r"drop_path=0.1: .*argument 'drop_path_rate'"):
            build_image_encoder(name, image_size=64, drop_path=0.1, key=DropPathKey(seed=0))


def test_what_the_small_networks_refuse():
    """Timm would ask for weights when it opens a folder, and would otherwise get fresh ones."""
    for name in ("unicl_convnet7_small", "unicl_swin6_small"):
        with pytest.raises(ValueError, match="checkpoint_path="):
            timm.create_model(name, pretrained=True)
    with pytest.raises(ValueError, match="not 10 classes"):
        timm.create_model("unicl_convnet7_small").reset_classifier(10)
    options = {"image_size": 28, "drop_path": 0.5, "key": DropPathKey(seed=0)}
    with pytest.raises(ValueError, match="drop_path=0.5") as refused:
        build_image_encoder("unicl_convnet7_small", **options)
    assert "set data.image_size" not in str(refused.value)  # no matter of the size


def test_the_small_swin_gives_timm_its_maps_and_takes_drop_path():
    backbone = timm.create_model("unicl_swin6_small", features_only=True)
    assert [tuple(one.shape[1:]) for one in backbone(torch.randn(2, 3, 32, 32))] == [
        (8, 8, 96),
        (4, 4, 192),
    ]
    key = DropPathKey(seed=0)
    encoder = build_image_encoder("unicl_swin6_small", image_size=64, drop_path=0.2, key=key)
    key.set(step=0, global_index=torch.arange(2))
    assert encoder.train()(torch.randn(2, 3, 64, 64)).shape == (2, 192)


def test_checkpointing_refuses_an_encoder_whose_blocks_it_does_not_know():
    with pytest.raises(ValueError, match="add its block class"):
        checkpoint_blocks(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_gradients_are_the_same_bits_each_time_on_two_threads():
    """What threads add up must not depend on which comes first: a run is to be repeatable."""
    torch.manual_seed(0)
    sizes = {"text_width": 128, "text_layers": 1, "text_heads": 2}
    encoder = TextEncoder(ModelConfig(vocab_size=100, context_length=16, **sizes))
    lengths = torch.arange(600) % 12 + 4
    tokens = torch.randint(1, 98, (600, 16)) * (torch.arange(16) < lengths[:, None])
    tokens[torch.arange(600), lengths - 1] = 99
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first: dict[str, torch.Tensor] = {}
        for _ in range(20):
            encoder.zero_grad()
            encoder(tokens, int(lengths.sum())).square().sum().backward()
            for name, parameter in encoder.named_parameters():
                gradient = first.setdefault(name, parameter.grad.clone())
                assert torch.equal(parameter.grad, gradient), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "full", "small"),
    [
        ("vit_tiny_patch16_224", 64, 32),
        pytest.param("swin_tiny_patch4_window7_224", 112, 48, marks=pytest.mark.slow),
        ("unicl_swin6_small", 32, 16),
        ("unicl_convnet7_small", 32, 16),
    ],
)
def test_a_smaller_image_meets_the_encoder_that_timm_builds_for_it(name, full, small):
    """With a ViT's position table resampled, or the middle of a Swin's; then all is as it was."""
    options: dict[str, Any] = {"drop_path": 0.0, "key": DropPathKey(0)}
    encoder = build_image_encoder(name, image_size=full, other_sizes=[small], **options).eval()
    weights = {key: value.clone() for key, value in encoder.state_dict().items()}
    plain = build_image_encoder(name, image_size=full, **options).eval()
    native = build_image_encoder(name, image_size=small, **options).eval()
    plain.load_state_dict(weights)
    cut = dict(weights)
    for key, value in native.state_dict().items():
        if value.shape == weights[key].shape:
            continue
        if key == "pos_embed":
            prefix = encoder.num_prefix_tokens
            cut[key] = resample_abs_pos_embed(
                weights[key], [small // 16] * 2, num_prefix_tokens=prefix
            )
        else:
            side, whole = (round(len(one) ** 0.5) for one in (value, weights[key]))
            middle = slice((whole - side) // 2, (whole + side) // 2)
            table = weights[key].unflatten(0, (whole, whole))
            cut[key] = table[middle, middle].flatten(0, 1)
    native.load_state_dict(cut)
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(2, 3, full, full, generator=generator)
    few = torch.randn(2, 3, small, small, generator=generator)
    with torch.no_grad():
        set_image_size(encoder, small)
        assert torch.equal(encoder(few), native(few))
        set_image_size(encoder, full)
        assert torch.equal(encoder(large), plain(large))
    assert all(torch.equal(value, weights[key]) for key, value in encoder.state_dict().items())


def test_encoders_that_cannot_take_the_sizes_of_all_stages_are_refused():
    options: dict[str, Any] = {"drop_path": 0.0, "key": DropPathKey(0)}
    with pytest.raises(ValueError, match="of 28 pixels: of encoders built for one"):
        build_image_encoder("eva02_tiny_patch14_224", image_size=56, other_sizes=[28], **options)
    with pytest.raises(ValueError, match=r"of 30 pixels: .*; set data.image_size=16 or 32"):
        build_image_encoder("test_vit", image_size=64, other_sizes=[30], **options)


def test_texts_of_a_stage_are_as_long_as_it_says():
    """Also where padding is part of a text, as in SigLIP."""
    settings = {"vocab_size": 50, "text_width": 8, "text_layers": 1, "text_heads": 1}
    settings |= {"text_causal": False, "text_pool": "last"}
    encoder = TextEncoder(ModelConfig(context_length=9, **settings))
    shorter = TextEncoder(ModelConfig(context_length=5, **settings))
    weights = encoder.state_dict()
    shorter.load_state_dict(weights | {"positional_embedding": weights["positional_embedding"][:5]})
    tokens = torch.tensor([[1, 2, 49], [1, 3, 49]])
    encoder.longest = 5
    assert torch.equal(encoder(tokens), shorter(tokens))
    with pytest.raises(ValueError, match="texts have 6 tokens, the text encoder accepts 5"):
        encoder(torch.zeros(1, 6, dtype=torch.int64))
