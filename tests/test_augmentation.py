"""The text form of augmentations, and which data set gets which."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_tests import examples

from unicl_fast.augmentation import (
    AUGMENTATIONS,
    Augmentation,
    augmentations_of,
    parse_augmentation,
)
from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.config_json import config_from_dict, config_to_dict
from unicl_fast.presets import build_preset

chances = st.floats(0, 1)
numbers = st.floats(0, 5)
ranges = st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1.0))
FIELDS = {
    "crop_scale": st.none() | ranges,
    "flip": st.none() | chances,
    "policy": st.sampled_from(["none", "rand"]),
    "policy_ops": st.integers(1, 4),
    "policy_probability": chances,
    "magnitude": st.floats(0, 10),
    "magnitude_std": numbers,
    "brightness": numbers,
    "contrast": numbers,
    "saturation": numbers,
    "hue": st.floats(0, 0.5),
    "jitter_probability": chances,
    "grayscale": chances,
    "erase": chances,
    "erase_area": ranges,
    "erase_ratio": ranges,
}


def written(value: object) -> str:
    return f"{value[0]!r}..{value[1]!r}" if isinstance(value, tuple) else str(value)


def test_the_strategies_know_all_fields():
    assert set(FIELDS) == {field.name for field in dataclasses.fields(Augmentation)}


@given(
    name=st.sampled_from(sorted(AUGMENTATIONS)), values=st.fixed_dictionaries({}, optional=FIELDS)
)
def test_what_is_written_is_what_is_read(name, values):
    values = {field: value for field, value in values.items() if value is not None}
    text = ",".join([name, *(f"{field}={written(value)}" for field, value in values.items())])
    assert parse_augmentation(text) == dataclasses.replace(AUGMENTATIONS[name], **values)


@given(st.text(alphabet="unicl,=.:0123blrx\n\u00e9", max_size=20))
@examples(50)
def test_any_other_text_is_refused_in_a_sentence(text):
    if text not in AUGMENTATIONS:
        with pytest.raises(ValueError, match="^augmentation "):
            parse_augmentation(text)


def test_jitter_is_three_numbers_at_once():
    augmentation = parse_augmentation("none,jitter=0.3,contrast=0.1")
    assert (augmentation.brightness, augmentation.contrast, augmentation.saturation) == (
        0.3, 0.1, 0.3
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strong", "no 'strong' to start from; known are none, clip, unicl$"),
        ("unicl,eraze=1", "no field 'eraze'; fields are .*erase_area"),
        ("unicl,erase", "expected FIELD=VALUE, not 'erase'"),
        ("unicl,erase=much", "erase must be a number, not 'much'"),
        ("unicl,erase=1.5", "erase must be a number in 0 to 1, not 1.5"),
        ("unicl,erase=nan", "erase must be a number in 0 to 1, not nan"),
        ("unicl,erase_area=2", "erase_area must be a range LOW..HIGH, not '2'"),
        ("unicl,crop_scale=0.5..1.5", r"crop_scale must be .* in \(0, 1\], not \(0.5, 1.5\)"),
        ("unicl,flip=2", "flip must be a number in 0 to 1, not 2"),
        ("unicl,erase_ratio=2..1", "erase_ratio must not fall, as 2..1 does"),
        ("unicl,policy=trivial", "policy must be one of none, rand, not 'trivial'"),
        ("unicl,policy_ops=1.0", "policy_ops must be a whole number"),
        ("unicl,policy_ops=9", "policy_ops must be a whole number in 1 to 8, not 9"),
        ("supcon", "supcon has left: without .* it is none,crop_scale=0.2..1,jitter=0.4,hue=0.1,"),
        ("unicl,views=2", "views=2 has left: leave it out"),
        ("unicl,blur=0.5", "blur=0.5 has left: leave it out"),
        ("unicl,blur_sigma=0.1..1", "blur_sigma=0.1..1 has left: leave it out"),
        ("unicl,magnitude=11", "magnitude must be a number in 0 to 10.0, not 11"),
        ("unicl,brightness=-1", r"brightness must be a number in \[0, inf\), not -1"),
        ("unicl,hue=0.6", "hue must be a number in 0 to 0.5, not 0.6"),
    ],
)
def test_what_is_wrong_is_said_when_the_config_is_made(text, message):
    with pytest.raises(ValueError, match=message):
        parse_augmentation(text)
    with pytest.raises(ValueError, match=f"data.augment: .*{message}"):
        DataConfig(augment=(text,))


def test_an_entry_for_one_data_set_counts_before_the_one_for_all():
    folders = ["packed/a/train", "packed/b/train", "packed/captions", "packed/odd:name"]
    found = augmentations_of(
        ["unicl", "captions:clip", "b/train:none", "odd:name:none,erase=1"], folders
    )
    unicl, clip, none = (AUGMENTATIONS[name] for name in ("unicl", "clip", "none"))
    assert found == [unicl, none, clip, Augmentation(erase=1.0)]
    assert augmentations_of(["train:clip", "b/train:unicl"], folders) == [clip, unicl, none, none]
    assert augmentations_of([], folders) == [none] * 4


def test_an_entry_names_a_url_by_its_end_and_a_link_by_either_name(tmp_path):
    unicl, clip, none = (AUGMENTATIONS[name] for name in ("unicl", "clip", "none"))
    urls = ["s3://a/train", "s3://b/train"]
    assert augmentations_of(["none", "b/train:clip"], urls) == [none, clip]
    assert augmentations_of(["none", "s3://b/train:clip"], urls) == [none, clip]
    assert augmentations_of(["train:clip", "a/train:unicl"], urls) == [unicl, clip]
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("real", "link"):
        assert augmentations_of([f"{name}:clip"], [tmp_path / "link"]) == [clip]
    with pytest.raises(ValueError, match="real and link both name link; give it one"):
        augmentations_of(["real:clip", "link:unicl"], [tmp_path / "link"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["c:unicl"], "no data set is called 'c'; there are a, b"),
        (["unicl", "clip"], "two entries for all data sets: unicl clip"),
        (["a:unicl", "a:clip"], "two entries for a"),
        ([":unicl"], "expected NAME:SPEC"),
    ],
)
def test_entries_that_fit_no_data_set_or_not_together(entries, message):
    with pytest.raises(ValueError, match=message):
        augmentations_of(entries, ["x/a", "x/b"])


def test_the_released_recipe_is_that_of_the_large_presets():
    assert build_preset("swin-base").data.augment == ("unicl",)
    assert build_preset("cifar10-small").data.augment == ()
    config = TrainConfig(data=DataConfig(augment=("unicl,erase=0.5", "a:clip")))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
