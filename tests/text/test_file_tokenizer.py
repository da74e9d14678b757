"""Tokenizers of other models: ids as their libraries give them, and what is refused."""

import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from file_tokenizers import END, PAD, write_tokenizer
from hub_server import ask_hub_at, serve_hub
from open_clip.tokenizer import HFTokenizer

from unicl_fast.objectives.targets import collate, map_steps, map_targets
from unicl_fast.text.file_tokenizer import CANONICAL, FileTokenizer, make_tokenizer
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.token_rows import hash_rows, position_factors
from unicl_fast.text.tokenizer import Tokenizer, pad_rows

TEXTS = [
    "A Photo of a dog!", "", "two_people &amp; a horse,  in the snow", "caf\u00e9 \u201cred\u201d",
    "an airplane, an automobile, a bird, a cat, a deer, a frog, a ship and a truck " * 3,
]  # fmt: skip


@pytest.mark.parametrize("like", ["T5", "Gemma", "none"])  # SigLIP's and SigLIP 2's normalizer
def test_ids_are_those_of_transformers_and_of_open_clip(like, tmp_path):
    folder = write_tokenizer(tmp_path)
    if like != "T5":
        space = {"pattern": {"String": " "}}
        split = {"type": "Split", "behavior": "MergedWithPrevious", "invert": False}
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        content["normalizer"] = {"type": "Sequence", "normalizers": []}
        if like == "Gemma":
            content["normalizer"] = {"type": "Replace", "content": "\u2581"} | space
            content["pre_tokenizer"] = split | space
        (folder / "tokenizer.json").write_text(json.dumps(content))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs(
        TEXTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    assert FileTokenizer(str(folder), 16)(TEXTS).equal(expected.input_ids)
    theirs = HFTokenizer(str(folder), context_length=16, clean="canonicalize")
    assert FileTokenizer(f"{folder}{CANONICAL}", 16)(TEXTS).equal(theirs(TEXTS))


@pytest.mark.parametrize("pad", [END, PAD])
def test_padding_is_part_of_a_row_only_where_it_is_not_0(pad, tmp_path):
    tokenizer = FileTokenizer(str(write_tokenizer(tmp_path, pad=pad)), 16)
    lengths = [len(row) for row in tokenizer.encode(TEXTS)]
    assert (set(lengths) == {16}) == (pad == END)
    assert lengths[-1] == 16
    assert tokenizer.encode(TEXTS)[-1][-1] == 1  # what is cut keeps its end
    assert tokenizer.decode(tokenizer.encode(["a photo of a dog"])[0]) == "a photo of a dog"


@pytest.mark.slow
def test_ids_beyond_16_bits_are_those_of_transformers(tmp_path):
    """SigLIP 2 has 256,000 tokens, XLM-R 250,002; ids that a file leaves out count."""
    folder = write_tokenizer(tmp_path, pad=PAD, unused=70_000)
    tokenizer = FileTokenizer(str(folder), 16)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    found = theirs(TEXTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    assert tokenizer(TEXTS).equal(found.input_ids)
    assert found.input_ids.max() > 70_000
    assert {row.dtype for row in tokenizer.encode(TEXTS)} == {np.dtype(np.uint32)}
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 80_000, "content": "<x>"})
    content["model"] = {"type": "WordLevel", "vocab": {"<x>": 80_000}, "unk_token": "<x>"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert FileTokenizer(str(folder), 16).vocab_size == 80_001


def test_equal_rows_and_prompts_are_found(tmp_path):
    tokenizer = FileTokenizer(str(write_tokenizer(tmp_path, pad=PAD)), 16)
    prompts = ClassPrompts([(["dog", "cat"], ["a photo of a {}"])], tokenizer)
    texts = ["a photo of a cat", "two people", "a photo of a dog", "two people"]
    rows = pad_rows(tokenizer.encode(texts), 16, tokenizer.token_type)
    found = map_targets(rows, np.full(4, -1), prompts)
    assert found.tokens.dtype == tokenizer.token_type == prompts.tokens.dtype
    assert np.array_equal(found.tokens, rows[:3])
    assert found.text_index.tolist() == [0, 1, 2, 1]
    assert found.class_ids[[0, 2]].tolist() == [1, 0]
    two = map_steps(rows, np.array([0, 1, 0, 2]), prompts, size=2)
    assert [one.tokens.tolist() for one in two] == [rows[:2].tolist(), rows[2:].tolist()]
    texts_of_batch, _ = found.tensors()
    assert texts_of_batch.tokens.tolist() == rows[:3].tolist()


def test_tokens_that_differ_in_their_upper_bits_only_are_others():
    """Their lower 16 bits, by which rows would be cut to uint16, are equal."""
    rows = np.array([[5, 6, 2], [5 + (1 << 16), 6, 2], [5, 6 + (1 << 16), 2]], np.uint32)
    found = map_targets(rows, np.full(3, -1))
    assert found.text_index.tolist() == [0, 1, 2]
    assert len(set(found.class_ids.tolist())) == 3
    random = np.random.default_rng(0).integers(1, 1 << 18, (1 << 16, 8), dtype=np.uint32)
    hashes = hash_rows(np.ascontiguousarray(random), position_factors(8))
    assert len(np.unique(hashes)) == len(np.unique(random, axis=0))
    assert len(np.unique(hashes >> np.uint64(32))) > 65_000  # the table compares upper halves
    batch = collate(
        torch.zeros(3, 4, 4, 3, dtype=torch.uint8),
        torch.from_numpy(rows.astype(np.int64)),
        torch.full((3,), -1),
    )
    assert batch.texts.tokens.tolist() == rows.tolist()


def test_the_hash_tells_all_that_decides_ids(tmp_path):
    one = write_tokenizer(tmp_path / "one")
    places = [str(one), f"{one}{CANONICAL}", str(write_tokenizer(tmp_path / "two", pad=PAD)),
              str(write_tokenizer(tmp_path / "three", size=100))]  # fmt: skip
    hashes = {FileTokenizer(place, 16).vocabulary_hash for place in places}
    assert len(hashes) == 4
    tokenizer = pickle.loads(pickle.dumps(FileTokenizer(places[1], 16)))  # for other processes
    assert tokenizer.vocabulary_hash == FileTokenizer(places[1], 9).vocabulary_hash
    assert isinstance(make_tokenizer("", 30), Tokenizer)


def test_equal_prompts_of_another_tokenizer_are_one_class(tmp_path):
    """As for ours: texts that the model cannot tell apart."""
    tokenizer = FileTokenizer(f"{write_tokenizer(tmp_path)}{CANONICAL}", 16)
    names = (["dog", "Dog!", "cat"], ["a photo of a {}"])
    prompts = ClassPrompts([names], tokenizer)
    assert prompts.class_ids.tolist() == [0, 0, 2]
    rows = np.stack(tokenizer.encode(["A PHOTO OF A CAT.", "a photo of a frog"]))
    assert prompts.lookup(rows).tolist() == [2, -1]


def test_padding_is_not_guessed_where_the_hub_cannot_be_asked(tmp_path, monkeypatch):
    folder = write_tokenizer(tmp_path / "hub" / "them" / "siglip")
    plain = write_tokenizer(tmp_path / "hub" / "them" / "plain")
    (plain / "tokenizer_config.json").unlink()
    expected = FileTokenizer(str(folder), 16)(TEXTS)
    cache = tmp_path / "cache"
    with serve_hub(tmp_path / "hub") as hub:
        ask_hub_at(hub.url, monkeypatch, cache=cache)
        assert FileTokenizer("hf-hub:them/siglip", 16)(TEXTS).equal(expected)
        zeros = FileTokenizer("hf-hub:them/plain", 16)(TEXTS)
    ask_hub_at("http://127.0.0.1:9", monkeypatch, cache=cache)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its six trials
    assert FileTokenizer("hf-hub:them/siglip", 16)(TEXTS).equal(expected)
    assert FileTokenizer("hf-hub:them/plain", 16)(TEXTS).equal(zeros)
    (lost,) = cache.glob("*siglip/snapshots/*/tokenizer_config.json")
    lost.unlink()
    with pytest.raises(FileNotFoundError, match="siglip: the hub .* none of tokenizer_config"):
        FileTokenizer("hf-hub:them/siglip", 16)


def test_what_is_no_tokenizer_of_token_rows_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="the tokenizer of this model is needed for its t"):
        FileTokenizer(str(tmp_path), 16)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        FileTokenizer(str(tmp_path), 16)
