"""Counts, shortened values and differences of two configs, as messages show them."""

import time
from typing import Any

import pytest

from unicl_fast.system.wording import (
    config_diff,
    count_of,
    count_of_kind,
    refuse_differences,
    shorten,
    shorten_message,
    visible_text,
    without_secrets,
)

DATA: dict[str, Any] = {
    "shares": [0.5, 0.5],
    "sources": [
        {"num_samples": 50, "shards": ["aa", "bb"], "num_classes": 3},
        {"num_samples": 9, "shards": ["cc"], "num_classes": 0},
    ],
    "vocabulary_hash": ["1234", "1234"],
    "class_names": [["ant", "bee", "cat"], []],
    "templates": [["a photo of a {}", "a {}"], []],
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pw@host/set=0.5", "http://host/set=0.5"),
        ("see https://u:p@w:d@host:80/a and s3://KEY:SECRET@bucket/b.",
         "see https://host:80/a and s3://bucket/b."),
        ("https://token@host/a", "https://host/a"),
        ("abfs://container@account.net/set", "abfs://container@account.net/set"),
        ("sftp://user@host/set", "sftp://user@host/set"),
        ("'http://host/a?X-Amz-Signature=1&sig=2' came", "'http://host/a?...' came"),
        ("404, url='http://host/a?token=x', twice", "404, url='http://host/a?...', twice"),
        ("http://host/path@2x:3/a", "http://host/path@2x:3/a"),
        ("/folder/a:b@c?d=e", "/folder/a:b@c?d=e"),
    ],
)  # fmt: skip
def test_urls_are_shown_without_their_secrets(text, shown):
    assert without_secrets(text) == shown


def test_a_message_that_quotes_something_long_is_cut_in_its_middle_and_shown_at_once():
    long = "data.train: " + "x" * 3_000_000 + " is no folder"
    shown = shorten_message(long)
    assert len(shown) < 4_100
    assert shown.startswith("data.train: xx")
    assert shown.endswith("xx is no folder")
    assert shorten_message("short") == "short"
    begun = time.process_time()
    assert without_secrets(long) == long  # which took time quadratic in a word's length
    assert time.process_time() - begun < 5


def test_characters_that_cannot_be_seen_are_escaped():
    assert visible_text("a\x1b[2J\udcff\nb") == "a\\x1b[2J\\udcff\nb"


def test_one_thing_is_no_plural():
    assert count_of(1, "image") == "1 image"
    assert count_of(0, "class") == "0 classes"
    assert count_of(2000, "caption") == "2,000 captions"
    assert [count_of(n, "entry") for n in (1, 3)] == ["1 entry", "3 entries"]
    assert count_of_kind(1, "rows that --where left out") == "1 row that --where left out"
    assert count_of_kind(1, "folder _tmps") == "1 folder _tmps"
    assert count_of_kind(2000, ".txt files") == "2,000 .txt files"


def test_values_are_shown_up_to_a_limit_whatever_they_are():
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert shorten("a") == "'a'"
    assert shorten([0] * 100, limit=10) == "[0, 0, 0, ..."
    assert shorten(nested) == "a list"
    assert shorten(10**5000) == "a int"


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"class_names": [["ant", "bee", "dog"], []]},
         "class_names[0][2] was 'cat' and is now 'dog'"),
        ({"class_names": [["ant", "bat", "bee", "cat"], []]},
         "class_names[0] was a list of 3 and is now a list of 4, and class_names[0][1] was 'bee' "
         "and is now 'bat'"),
        ({"shares": [0.5]},
         "shares was a list of 2 and is now a list of 1, and shares[1] was 0.5 and is now not "
         "there"),
        ({"shares": None}, "shares was [0.5, 0.5] and is now None"),
        ({"shares": [0.75, 0.25]}, "shares[0] was 0.5 and is now 0.75 (1 more difference)"),
        ({"vocabulary_hash": ["1234", "5678"]}, "vocabulary_hash[1] was '1234' and is now '5678'"),
        ({"augmentation": 3}, "augmentation was not there and is now 3"),
    ],
)  # fmt: skip
def test_data_that_differ_are_refused_with_the_element_that_does(change, difference):
    with pytest.raises(ValueError) as refused:
        refuse_differences("data", DATA, DATA | change)
    message = str(refused.value)
    assert message.startswith(f"the checkpoint is of another data: {difference}")
    assert len(message) < 300


def test_what_is_equal_has_no_differences():
    assert not list(config_diff({"a": [1, (2.0, None)]}, {"a": (1, [2.0, None])}))
    assert list(config_diff({"a": True}, {"a": 1}))
