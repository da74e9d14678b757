"""`--split`: divides samples into those for training and those held out.

Samples of one value of `--group-column`, equal images and near copies stay on one side: otherwise
an evaluation would reward memory. The same fraction of each class is held out.
"""

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from unicl_fast.packing.build_options import BuildOptions
from unicl_fast.packing.near_duplicates import find_copies, look_at_images
from unicl_fast.packing.samples import Samples, shuffled_order
from unicl_fast.packing.sources.items import Label
from unicl_fast.packing.workers import Task

SIDES = ("train", "held-out")
"""The folders in OUT."""
KEPT_TOGETHER = "images kept on one side with others, which are copies or of one key"
_SAME_BYTES = "images with the bytes of an earlier one"
_SAME_PIXELS = "images with the pixels of an earlier one, in other bytes"
_NEAR = "images that are near copies of an earlier one (saved again, or in another size)"
_MIRRORED = "images that are near copies of an earlier one, mirrored"
_NOT_COMPARED = "images not compared with each other, because too many look alike"
_SPELLINGS = "spellings of values of --group-column that mean an earlier one"
_WHOLE = re.compile(r"([+-]?[0-9]+)\.0*")

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def split_samples(
    samples: Samples, numbers: Mapping[Label, int], options: BuildOptions
) -> tuple[Samples, Samples, Counter[str]]:
    """Divides samples; `numbers` are the classes of their labels. Images are checked for it.

    A sample's class is its first label's; samples without labels form one more class. A class with
    a single group is for training, and so are samples that cannot be packed.

    Returns samples for training, samples held out, and counts of what is kept on one side, by kind;
    raises ValueError if nothing would be held out.
    """
    strata = np.full(len(samples), -1)
    leaders, of_key, spellings = np.arange(len(samples)), dict[str, int](), set[str]()
    keyed, notes = array("q"), Counter[str]()
    for number, (_, item) in enumerate(samples):
        if item.problem is None and item.entry is not None:
            strata[number] = numbers[item.labels[0]] if item.labels else len(numbers)
    for kind, pairs in _copies(samples, strata >= 0, options):
        before, leaders = np.unique(leaders).size, _join(leaders, pairs)
        notes[kind] = before - np.unique(leaders).size if kind != _NOT_COMPARED else len(pairs)
    for number, (_, item) in enumerate(samples):
        for key in item.groups if strata[number] >= 0 else ():
            if plain := plain_key(key):
                keyed.extend((number, of_key.setdefault(plain, number)))
                spellings.add(key)
    notes[_SPELLINGS] = len(spellings) - len(of_key)
    leaders = _join(leaders, np.array(keyed).reshape(-1, 2))
    fraction = options.split or 0.0
    held_out = _choose(strata, leaders, fraction=1 - fraction, seed=options.seed)
    if not held_out.any():
        raise ValueError(
            f"--split {fraction:g} holds none of {len(samples):,} images out: give a smaller "
            "number, or make two builds that select rows by --where"
        )
    notes[KEPT_TOGETHER] = int((np.bincount(leaders)[leaders] > 1).sum())
    train = samples.at(np.flatnonzero(~held_out))
    return train, samples.at(np.flatnonzero(held_out)), notes


def plain_key(key: str) -> str:
    """A key without what a person does not see: NFKC, no format characters, blanks, or `.0`."""
    key = unicodedata.normalize("NFKC", key)
    visible = "".join(one for one in key if unicodedata.category(one) != "Cf")
    key = " ".join(visible.split())
    return found[1] if (found := _WHOLE.fullmatch(key)) else key


def _join(leaders: Indices, pairs: Indices) -> Indices:
    """Joins the groups of each pair; `leaders`, int64 [n], are the smallest numbers of groups."""
    found = np.arange(len(leaders))
    one, other = leaders[pairs].T
    # in few rounds, since each halves the ways to the smallest; a kernel would load Numba for 0.4 s
    while True:
        before, least = found.copy(), np.minimum(found[one], found[other])
        for ends in (one, other, before[one], before[other]):
            np.minimum.at(found, ends, least)
        found = found[found]
        if np.array_equal(found, before):
            return found[leaders]


def _choose(strata: Indices, leaders: Indices, *, fraction: float, seed: int) -> Mask:
    """Masks the samples to hold out: a fraction of each stratum, whole groups in random order.

    The next stratum makes up for rounding errors.
    """
    count = len(strata)
    sizes = np.bincount(leaders, minlength=count)
    rank = np.argsort(shuffled_order(count, seed=seed))
    groups = np.flatnonzero((leaders == np.arange(count)) & (strata >= 0))
    groups = groups[np.lexsort([rank[groups], strata[groups]])]
    chosen = np.zeros(count, np.bool_)
    owed = 0.0
    for stratum in np.split(groups, np.flatnonzero(np.diff(strata[groups])) + 1):
        left, largest = int(sizes[stratum].sum()), int(sizes[stratum].max(initial=0))
        owed = min(max(owed, -largest), largest) + fraction * left
        for group in stratum.tolist():
            size = int(sizes[group])
            if size < left and size / 2 <= owed:
                chosen[group] = True
                owed -= size
                left -= size
    return chosen[leaders]


def _copies(
    samples: Samples, is_sound: Mask, options: BuildOptions
) -> Iterator[tuple[str, Indices]]:
    """Yields copies and what they are copies of, int64 [n 2], by kind; equal ones first."""
    asked = np.flatnonzero(is_sound)
    looks, problems = look_at_images(
        (Task(item.name, item.entry) for _, item in samples.at(asked) if item.entry is not None),
        len(asked),
        images=options.check(),
        workers=options.workers,
        doing="comparing",
        progress=options.progress,
    )
    sound = np.delete(np.arange(len(asked)), list(problems))  # the others will be left out
    asked, looks = asked[sound], looks[sound]
    for field, kind in (("file", _SAME_BYTES), ("pixels", _SAME_PIXELS)):
        _, firsts, which = np.unique(looks[field], return_index=True, return_inverse=True)
        yield kind, np.stack([asked, asked[firsts[which.reshape(-1)]]], axis=1)
    try:
        pairs, are_mirrored = find_copies(looks)
    except ValueError:  # such as digits, of which millions of pairs have near hashes
        yield _NOT_COMPARED, np.stack([asked, asked], axis=1)
        return
    yield _NEAR, asked[pairs[~are_mirrored]]
    yield _MIRRORED, asked[pairs[are_mirrored]]
