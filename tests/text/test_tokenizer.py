"""The tokenizer gives open_clip's ids for every text, fast and without importing torch."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_clip import tokenizer as open_clip_tokenizer
from property_tests import examples

from unicl_fast.text.tokenizer import Tokenizer, text_groups

FRAGMENTS = [
    "'s", "'S", "'LL", "'re", "'\u017f", "<start_of_text>", "<END_OF_TEXT>", "<\u017ftart_of_text>",
    "&lt;", "&amp;amp;lt;", "&#39;s", "&lt;end_of_text&gt;", "&#x345;", "\u0345", "<", "!",
    " ", "\n", "\t", "\x1c", "\x1f", "\x00", "\x7f", "\x1b[31m", "\u00a0", "\u3000", "\u2028",
    "a", "A", "7", "123", "\u0663", "\u00bd", "\u2167", "\u00e9", "e\u0301", "sch\u00c3\u00b6n",
    "\u2019", "\u201cquoted\u201d", "\ufb01", "\ufb06", "\uff21", "\u0130", "\u0131", "\u212a",
    "\u03a3", "\u039f\u03a3", "\u6587\u5b57", "\u0e44\u0e17\u0e22", "\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea", "\U0001e5d0", "\U00031350", "\ue000", "\ufffd", "\U0010ffff", "word",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def assert_same_ids(tokenizer: Tokenizer, texts: list[str]) -> None:
    expected = open_clip_tokenizer.tokenize(texts, tokenizer.context_length)
    wrong = (tokenizer(texts) != expected).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, f"other ids than open_clip for {[texts[index] for index in wrong[:5]]!r}"


@pytest.mark.parametrize("context_length", [2, 77])
def test_real_captions_get_the_ids_of_open_clip(shared_data, context_length):
    texts = [
        caption
        for path in sorted(shared_data.glob("captions/*/captions.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
        for caption in json.loads(line)["captions"]
    ]
    assert len(texts) == 4000
    assert_same_ids(Tokenizer(context_length), texts)


def test_memory_is_that_of_few_texts_also_where_many_are_long():
    """A result takes 140 bytes a character; 4,096 of the longest captions would take 57 GB."""
    texts = ["a " * 50_000] * 45 + [""] * 5000
    groups = list(text_groups(texts))
    assert [text for group in groups for text in group] == texts
    assert [len(group) for group in groups] == [10, 10, 10, 10, 4096, 909]
    assert max(sum(map(len, group)) for group in groups) == 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "A Photo of a dog, it's THEIRS; they've I'd we're he'll I'm",
        "12 dogs, 3.5 cats \u0663\u00bd\u2167 1234567",
        "\U0001f600 family \U0001f469\u200d\U0001f469\u200d\U0001f467 flag \U0001f1e9\U0001f1ea",
        "fish &amp; chips &lt;b&gt; &amp;amp;lt; AT&T &notanentity; &#39;s",
        "<start_of_text>a dog<end_of_text> <END_OF_TEXT>",
        "!<end_of_text> not a marker: it is the word '!<' and more",
        "sch\u00c3\u00b6n, mojibake that ftfy repairs, \u201cquotes\u201d and \ufb01 ligatures",
        "\u039f\u0394\u039f\u03a3 ends in a final sigma; \u0130stanbul; 300 \u212a",
        "long s: it'\u017f <\u017ftart_of_text>; iota below: \u0391\u0345 \u0345",
        "a lone surrogate \ud800 is repaired",
        "separators\x1cthat\x1fPython\x85calls\u2028white\u00a0space",
        "word " * 100,
        "\u6587" * 100,
        "x" * 5000,
    ],
)
def test_difficult_texts_get_the_ids_of_open_clip(tokenizer, text):
    assert_same_ids(tokenizer, [text])


FRAGMENTED = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)


@examples(300)
@given(st.lists(st.text() | FRAGMENTED, min_size=1, max_size=5))
def test_any_texts_get_the_ids_of_open_clip(tokenizer, texts):
    assert_same_ids(tokenizer, texts)


@pytest.mark.slow
def test_every_character_falls_into_the_word_that_open_clip_puts_it_in(tokenizer):
    everything = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000)))).lower()
    expected = open_clip_tokenizer._tokenizer.pat.findall(everything)
    spans = [span for _, span in tokenizer._bpe.pre_tokenizer.pre_tokenize_str(everything)]
    assert [everything[start:stop] for start, stop in spans] == expected


def test_the_vocabulary_is_open_clips(tokenizer):
    assert tokenizer._bpe.get_vocab() == open_clip_tokenizer._tokenizer.encoder
    assert (tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id) == (49408, 49406, 49407)
    # Stored in packed data sets: if this changes, they cannot be used any more.
    assert tokenizer.vocabulary_hash == (
        "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
    )


def test_encode_gives_rows_without_padding_and_keeps_the_end_token(tokenizer):
    empty, short, long = tokenizer.encode(["", "a dog", "dog " * 200])
    assert empty.tolist() == [49406, 49407]
    assert short.tolist() == [49406, 320, 1929, 49407]
    assert len(long) == 77
    assert long[-1] == 49407
    assert {row.dtype for row in (empty, short, long)} == {np.dtype(np.uint16)}
    assert tokenizer.encode([]) == []


def test_one_text_and_a_list_of_one_are_the_same(tokenizer):
    assert tokenizer("a dog").equal(tokenizer(["a dog"]))
    with pytest.raises(TypeError, match="list of texts"):
        tokenizer.encode("a dog")


def test_decode_gives_readable_text_and_ignores_padding(tokenizer):
    text = "two dogs play ! \u00e9t\u00e9 \u6587\u5b57 \U0001f600"
    assert tokenizer.decode(tokenizer(text)[0].tolist()) == text
    assert tokenizer.decode(tokenizer.encode([""])[0]) == ""
    with pytest.raises(ValueError, match="49407, not 49408"):
        tokenizer.decode([49408])


def test_a_context_without_room_for_both_markers_is_refused():
    with pytest.raises(ValueError, match="not 1"):
        Tokenizer(context_length=1)


def test_a_pickled_tokenizer_works(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(["it's"])[0].tolist() == tokenizer.encode(["it's"])[0].tolist()
