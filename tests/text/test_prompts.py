"""The prompt table: which row a label and template have, and which class a row has."""

import logging
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_tests import examples
from waiting import wait_until

from unicl_fast.system.atomic_files import locked
from unicl_fast.text.class_lists import (
    SIMPLE_TEMPLATES,
    fill_template,
    imagenet_class_names,
    imagenet_templates,
    imagenet_wnids,
    read_class_names,
    read_templates,
    templates_for,
)
from unicl_fast.text.prompts import ClassPrompts, _read_or_make
from unicl_fast.text.tokenizer import Tokenizer, pad_rows

Sources = Sequence[tuple[Sequence[str], Sequence[str]]]
TEMPLATES = ("a photo of a {}.", "art of the {}.")
NO_NAMES: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def imagenet(tokenizer: Tokenizer) -> ClassPrompts:
    return ClassPrompts([(imagenet_class_names(), imagenet_templates())], tokenizer)


def pad(rows: list[np.ndarray], length: int = 77) -> np.ndarray:
    return pad_rows(rows, length, np.uint16)


def test_the_built_in_lists_are_those_of_open_clip_and_timm():
    import open_clip

    assert imagenet_class_names() == tuple(open_clip.IMAGENET_CLASSNAMES)
    fills = open_clip.OPENAI_IMAGENET_TEMPLATES
    assert len(imagenet_templates()) == 80
    assert [fill_template(template, "dog") for template in imagenet_templates()] == [
        fill("dog") for fill in fills
    ]
    wnids = imagenet_wnids()
    assert len(wnids) == len(imagenet_class_names()) == 1000
    assert list(wnids) == sorted(wnids)
    assert (wnids[0], imagenet_class_names()[0]) == ("n01440764", "tench")


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (("Tench", "great white-shark", "cock"), 80),
        (("tench", "shirts"), 80),
        (("tench", "shirts", "trousers"), 1),
        (("Golden Delicious", "Bravo Orange Juice"), 1),
    ],
)
def test_templates_of_imagenet_are_for_its_classes(names, count):
    assert len(templates_for(names)) == count


def test_every_imagenet_prompt_has_its_row_and_its_class(imagenet, tokenizer):
    names, templates = imagenet_class_names(), imagenet_templates()
    assert imagenet.tokens.shape[0] == 80_000
    assert imagenet.tokens[:, -1].any(), "the table must be no wider than the longest prompt"
    for label, template in [(0, 0), (0, 79), (1, 0), (512, 33), (999, 79)]:
        row = imagenet.rows_of(0, label, template)
        text = templates[template].replace("{}", names[label])
        expected = pad(tokenizer.encode([text]), imagenet.tokens.shape[1])[0]
        assert imagenet.tokens[row].tolist() == expected.tolist()
        assert imagenet.class_ids[row] == label
    assert (imagenet.lookup(imagenet.tokens) == imagenet.class_ids).all()


def test_imagenet_classes_of_equal_name_are_one_class(imagenet):
    assert imagenet.merged_classes == (((0, 657), (0, 744)), ((0, 836), (0, 837)))
    assert imagenet_class_names()[744] == imagenet_class_names()[657] == "missile"
    assert imagenet.classes_of(0, 744) == imagenet.classes_of(0, 657) == 657
    assert len(np.unique(imagenet.classes_of(0, np.arange(1000)))) == 998


def test_labels_or_templates_that_a_source_lacks_are_refused(tokenizer):
    prompts = ClassPrompts([(("cat", "dog"), TEMPLATES), NO_NAMES], tokenizer)
    with pytest.raises(ValueError, match=r"labels of source 0 must lie in 0 to 1 .* not 0 to 2"):
        prompts.rows_of(0, [0, 2], 0)
    with pytest.raises(ValueError, match="not -1 to -1"):
        prompts.rows_of(0, -1, 0)
    with pytest.raises(ValueError, match="templates of source 0"):
        prompts.rows_of(0, 0, 2)
    with pytest.raises(ValueError, match="0 class names"):
        prompts.rows_of(1, 0, 0)
    with pytest.raises(ValueError, match="labels must lie in"):
        prompts.classes_of(0, [2**31])


def test_separate_labels_are_different_classes_and_meet_in_equal_names(tokenizer, caplog):
    sources = [(("cat", "dog"), TEMPLATES), (("car", "Cat"), SIMPLE_TEMPLATES)]
    with caplog.at_level(logging.INFO, logger="unicl_fast.text.prompts"):
        prompts = ClassPrompts(sources, tokenizer)
    assert prompts.classes_of(0, 0) == prompts.classes_of(1, 1) == 0
    assert len({*prompts.classes_of(0, [0, 1]).tolist(), int(prompts.classes_of(1, 0))}) == 3
    assert prompts.merged_classes == (((0, 0), (1, 1)),)
    assert "'cat' (source 0, label 0) = 'Cat' (source 1, label 1)" in caplog.text
    assert prompts.classes_of(1, [-1, 1]).tolist() == [-1, 0]
    # The other prompt of "cat" follows, though the second source does not have it.
    art_of_cat = pad(tokenizer.encode(["art of the cat."]))
    assert prompts.lookup(art_of_cat).tolist() == [0]


def test_many_classes_that_meet_are_one_line_of_the_log(tokenizer, caplog):
    """Two data sets of one label space have all their classes in common."""
    names = tuple(f"thing {number}" for number in range(155))
    with caplog.at_level(logging.INFO, logger="unicl_fast.text.prompts"):
        prompts = ClassPrompts([(names, SIMPLE_TEMPLATES)] * 2, tokenizer)
    assert len(prompts.merged_classes) == 155
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("classes that have a prompt in common are one class in training, ")
    assert "155 groups of them: 'thing 0' (source 0, label 0) = 'thing 0' (source 1" in message
    assert message.count("thing") == 6
    assert message.endswith("; and 152 more, all of which are in ClassPrompts.merged_classes")


def test_classes_are_merged_along_chains_of_common_prompts(tokenizer):
    sources = [(("a b", "b", "c"), ("{}", "a {}")), (("a a b", "a c"), ("{}",))]
    prompts = ClassPrompts(sources, tokenizer)
    # "a b" is a name and a prompt of "b"; "a a b" a prompt of "a b"; "a c" one of "c".
    assert prompts.merged_classes == (((0, 0), (0, 1), (1, 0)), ((0, 2), (1, 1)))


def test_a_source_without_names_can_have_labels(tokenizer):
    prompts = ClassPrompts([(("cat",), TEMPLATES), NO_NAMES, NO_NAMES], tokenizer)
    labels = [0, 1, 2**31 - 1]
    classes = np.concatenate([prompts.classes_of(source, labels) for source in (0, 1, 2)]).tolist()
    assert len(set(classes)) == 9
    assert 0 <= min(classes) <= max(classes) < 2**62


def test_captions_only_have_an_empty_table(tokenizer):
    prompts = ClassPrompts([NO_NAMES], tokenizer)
    assert prompts.tokens.shape == (0, 0)
    assert prompts.lookup(pad(tokenizer.encode(["a cat", ""]))).tolist() == [-1, -1]
    assert prompts.classes_of(0, 5) == 5
    assert ClassPrompts([], tokenizer).class_ids.tolist() == []


def test_names_without_a_usable_template_are_refused(tokenizer):
    with pytest.raises(ValueError, match="source 0: class names need at least one template"):
        ClassPrompts([(("cat",), ())], tokenizer)
    for template in ("a photo", "{} and {}"):
        with pytest.raises(ValueError, match="exactly one"):
            ClassPrompts([(("cat",), (template,))], tokenizer)


def test_lookup_finds_prompts_of_any_padding_and_nothing_else(imagenet, tokenizer):
    encoded = tokenizer.encode(
        [
            "A photo of the goldfish .",
            "a photo of the goldfishes.",
            "",
            "a photo of the tench. " * 9,
        ]
    )
    expected = [1, -1, -1, -1]
    assert imagenet.lookup(pad(encoded)).tolist() == expected
    assert imagenet.lookup(pad(encoded, 100)).tolist() == expected
    assert imagenet.lookup(pad(encoded[:1], 8)).tolist() == [1]
    assert imagenet.lookup(pad([])).tolist() == []
    rows = np.zeros((len(imagenet.tokens), 77), dtype=np.uint16)
    rows[:, : imagenet.tokens.shape[1]] = imagenet.tokens
    assert (imagenet.lookup(rows) == imagenet.class_ids).all()
    rows[:, 76] = 7  # beyond the width of the table
    assert (imagenet.lookup(rows) == -1).all()
    with pytest.raises(ValueError, match="uint16"):
        imagenet.lookup(rows.astype(np.int64))


names_lists = st.lists(st.sampled_from(["a", "b", "A", "a a", "b a", "c"]), max_size=4)
template_lists = st.lists(st.sampled_from(["{}", "a {}", "{} a", "b {}"]), min_size=1, max_size=3)


@examples(100)
@given(st.lists(st.tuples(names_lists, template_lists), max_size=3))
def test_equal_rows_always_have_equal_classes(tokenizer, sources):
    prompts = ClassPrompts(sources, tokenizer)
    claimed: dict[bytes, int] = {}
    row = 0
    for source, (names, templates) in enumerate(sources):
        for label in range(len(names)):
            for template in range(len(templates)):
                assert prompts.rows_of(source, label, template) == row
                class_id = int(prompts.classes_of(source, label))
                assert prompts.class_ids[row] == class_id
                assert claimed.setdefault(prompts.tokens[row].tobytes(), class_id) == class_id
                row += 1
    assert row == len(prompts.tokens)
    # Merging joins nothing that no chain of common prompts joins.
    for group in prompts.merged_classes:
        for member in group:
            others = [other for other in group if other != member]
            assert any(_share_a_prompt(prompts, member, other) for other in others)


def _share_a_prompt(prompts: ClassPrompts, first: tuple[int, int], second: tuple[int, int]) -> bool:
    texts = []
    for source, label in (first, second):
        rows = prompts.rows_of(source, label, np.arange(prompts.num_templates[source]))
        texts.append({prompts.tokens[row].tobytes() for row in rows})
    return bool(texts[0] & texts[1])


def test_lists_are_read_from_files(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfcat\r\n fire truck \r\nse\xc3\xb1or\r\n\r\n")
    assert read_class_names(path) == ("cat", "fire truck", "se\u00f1or")
    path.write_text("a {}\nthe {} here", encoding="utf-8")
    assert read_templates(str(path)) == ("a {}", "the {} here")
    assert read_class_names("imagenet") == imagenet_class_names()
    assert read_templates("imagenet") == imagenet_templates()
    assert read_templates("simple") == SIMPLE_TEMPLATES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no templates"),
        (b"\n \n", "holds no templates"),
        (b"a {}\n\nthe {}\n", "line 2 is empty"),
        (b"a {}\na photo\n", "exactly one"),
        (b"{} {}\n", "has 2"),
        (b"\xff\xfe{}", "UTF-8"),
    ],
)
def test_a_wrong_list_is_refused_in_a_sentence(tmp_path, content, message):
    path = tmp_path / "templates.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_templates(path)


def test_a_missing_list_is_refused_with_the_names_of_the_built_in_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file of class names at .*imagenet"):
        read_class_names(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match="imagenet, simple"):
        read_templates("imagnet")


MANY_NAMES = tuple(f"thing {number}" for number in range(100))


class CountingTokenizer(Tokenizer):
    """Counts its calls."""

    calls = 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        self.calls += 1
        return super().encode(texts)


def test_token_rows_of_many_prompts_are_kept(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("unicl_fast.text.prompts._FEWEST_CACHED", 200)
    tokenizer = CountingTokenizer()

    def build(names: Sequence[str] = MANY_NAMES) -> ClassPrompts:
        return ClassPrompts([(names, TEMPLATES)], tokenizer, cache_folder=tmp_path / "prompts")

    first, second = build(), build()
    assert tokenizer.calls == 1
    plain = ClassPrompts([(MANY_NAMES, TEMPLATES)], Tokenizer())
    for one in (first, second):
        assert one.tokens.dtype == np.uint16
        np.testing.assert_array_equal(one.tokens, plain.tokens)
        np.testing.assert_array_equal(one.class_ids, plain.class_ids)

    (kept,) = (tmp_path / "prompts").glob("prompts-*")
    content = bytearray(kept.read_bytes())
    for damaged in (content[:-1], content[:3], content[:-9] + b"x" + content[-8:], b""):
        kept.write_bytes(damaged)
        caplog.clear()
        np.testing.assert_array_equal(build().tokens, plain.tokens)
        assert f"{kept} is damaged" in caplog.text
        assert kept.read_bytes() == content
    assert tokenizer.calls == 5

    build(("another thing", *MANY_NAMES[1:]))  # other names, other rows
    assert tokenizer.calls == 6
    build(MANY_NAMES[:99])  # few are not worth a file
    assert len(list((tmp_path / "prompts").glob("prompts-*"))) == 2


def test_a_process_killed_while_it_writes_token_rows_leaves_nothing_for_long(tmp_path):
    rows = np.ones((3, 4), dtype=np.uint16)
    child = os.fork()
    if not child:
        try:
            patch = pytest.MonkeyPatch()
            patch.setattr(Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            _read_or_make(tmp_path / "prompts-1", lambda: rows)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert list(tmp_path.glob(".prompts-1.*")), "it was to be killed with the file half written"
    _read_or_make(tmp_path / "prompts-2", lambda: rows)
    assert sorted(os.listdir(tmp_path)) == ["prompts-2", "prompts.lock"]


def test_prompts_are_made_where_none_can_be_kept(tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("unicl_fast.text.prompts._FEWEST_CACHED", 200)
    (tmp_path / "file").touch()
    sources = [(MANY_NAMES, TEMPLATES)]
    prompts = ClassPrompts(sources, tokenizer, cache_folder=tmp_path / "file" / "prompts")
    assert len(prompts.tokens) == 200
    assert "cannot be kept" in caplog.text


def test_one_process_makes_the_rows_and_the_others_wait(tmp_path):
    """Locks of one process keep its threads apart, too."""
    path, make = tmp_path / "prompts.lock", Mock(return_value=np.ones((3, 4), dtype=np.uint16))

    def num_open() -> int:
        return sum(one.resolve() == path for one in Path("/proc/self/fd").iterdir())

    with ThreadPoolExecutor(2) as pool:
        with locked(path) as is_unused:
            assert is_unused
            made = [pool.submit(_read_or_make, tmp_path / "prompts-1", make) for _ in range(2)]
            wait_until(lambda: num_open() == 3)
            assert not any(one.done() for one in made)
        assert all(np.array_equal(one.result(), make.return_value) for one in made)
    assert make.call_count == 1
