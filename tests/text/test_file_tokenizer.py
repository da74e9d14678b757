"""Tokenizers of other models: ids as their libraries give them, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import transformers
from file_tokenizers import END, PAD, write_tokenizer
from open_clip.tokenizer import HFTokenizer

from unicl_fast.text.file_tokenizer import CANONICAL, FileTokenizer, make_tokenizer
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import Tokenizer

TEXTS = [
    "A Photo of a dog!", "", "two_people &amp; a horse,  in the snow", "caf\u00e9 \u201cred\u201d",
    "an airplane, an automobile, a bird, a cat, a deer, a frog, a ship and a truck " * 3,
]  # fmt: skip


def test_ids_are_those_of_transformers_and_of_open_clip(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs(
        TEXTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    assert FileTokenizer(str(folder), 16)(TEXTS).equal(expected.input_ids)
    theirs = HFTokenizer(str(folder), context_length=16, clean="canonicalize")
    assert FileTokenizer(f"{folder}{CANONICAL}", 16)(TEXTS).equal(theirs(TEXTS))


@pytest.mark.parametrize("pad", [END, PAD])
def test_padding_is_part_of_a_row_only_where_it_is_not_0(pad: str, tmp_path: Path) -> None:
    tokenizer = FileTokenizer(str(write_tokenizer(tmp_path, pad=pad)), 16)
    lengths = [len(row) for row in tokenizer.encode(TEXTS)]
    assert (set(lengths) == {16}) == (pad == END)
    assert lengths[-1] == 16
    assert tokenizer.encode(TEXTS)[-1][-1] == 1  # what is cut keeps its end
    assert tokenizer.decode(tokenizer.encode(["a photo of a dog"])[0]) == "a photo of a dog"


def test_the_hash_tells_all_that_decides_ids(tmp_path: Path) -> None:
    one = write_tokenizer(tmp_path / "one")
    places = [str(one), f"{one}{CANONICAL}", str(write_tokenizer(tmp_path / "two", pad=PAD)),
              str(write_tokenizer(tmp_path / "three", size=100))]  # fmt: skip
    hashes = {FileTokenizer(place, 16).vocabulary_hash for place in places}
    assert len(hashes) == 4
    tokenizer = pickle.loads(pickle.dumps(FileTokenizer(places[1], 16)))  # for other processes
    assert tokenizer.vocabulary_hash == FileTokenizer(places[1], 9).vocabulary_hash
    assert isinstance(make_tokenizer("", 30), Tokenizer)


def test_equal_prompts_of_another_tokenizer_are_one_class(tmp_path: Path) -> None:
    """As for ours: texts that the model cannot tell apart."""
    tokenizer = FileTokenizer(f"{write_tokenizer(tmp_path)}{CANONICAL}", 16)
    names = (["dog", "Dog!", "cat"], ["a photo of a {}"])
    prompts = ClassPrompts([names], tokenizer)
    assert prompts.class_ids.tolist() == [0, 0, 2]
    rows = np.stack(tokenizer.encode(["A PHOTO OF A CAT.", "a photo of a frog"]))
    assert prompts.lookup(rows).tolist() == [2, -1]


def test_what_is_no_tokenizer_of_token_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the tokenizer of this model is needed for its t"):
        FileTokenizer(str(tmp_path), 16)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        FileTokenizer(str(tmp_path), 16)
    large = {f"{number}": number for number in range(70_000)}
    model = {"type": "WordLevel", "vocab": large, "unk_token": "0"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(ValueError, match="70,000 tokens, and token rows hold 65,536"):
        FileTokenizer(str(tmp_path), 16)
