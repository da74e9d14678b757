"""The target map written as its rules are spoken: dictionaries and sets, one sample at a time."""

from collections.abc import Sequence

Row = tuple[int, ...]


def trim(row: Sequence[int]) -> Row:
    """A row of tokens without the zeros at its end."""
    row = tuple(int(token) for token in row)
    while row and row[-1] == 0:
        row = row[:-1]
    return row


def caption_key(row: Sequence[int]) -> int:
    """The class of a text that has no other: a hash of its tokens, in [2**62, 2**63)."""
    total = sum(
        (token << 16 * (position % 2)) * (_mix64((position // 2 + 1) * 0x9E3779B97F4A7C15) | 1)
        for position, token in enumerate(row)
    )
    return (_mix64(total) >> 2) | 2**62


def _mix64(value: int) -> int:
    """The finaliser of SplitMix64."""
    value %= 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def map_targets(
    rows: Sequence[Sequence[int]], labels: Sequence[int], prompt_classes: dict[Row, int]
) -> tuple[list[Row], list[int], list[int], list[int]]:
    """What `unicl_fast.objectives.targets.map_targets` must give.

    Args:
        rows: token rows, padded or not.
        labels: a class for each row, -1 for none.
        prompt_classes: trimmed prompt -> class.

    Returns:
        Distinct trimmed rows in order of first occurrence, the index of each sample's row, the
        class of each row, the number of samples of each row.
    """
    trimmed = [trim(row) for row in rows]
    texts = list(dict.fromkeys(trimmed))
    claims: dict[Row, set[int]] = {text: set() for text in texts}
    for text, label in zip(trimmed, labels, strict=True):
        if label >= 0:
            claims[text].add(int(label))
        elif text in prompt_classes:
            claims[text].add(prompt_classes[text])
    groups = _join([claim for claim in claims.values() if claim])
    classes = []
    for text in texts:
        if claims[text]:
            classes.append(next(min(group) for group in groups if claims[text] <= group))
        else:
            classes.append(caption_key(text))
    return (
        texts,
        [texts.index(text) for text in trimmed],
        classes,
        [trimmed.count(text) for text in texts],
    )


def classes_of_images(
    rows: Sequence[Sequence[int]],
    labels: Sequence[int],
    prompt_classes: dict[Row, int],
    image_labels: Sequence[Sequence[int]],
) -> list[set[int]]:
    """All classes of each image: its text's, and those of its labels as this batch joins them."""
    _, text_index, text_classes, _ = map_targets(rows, labels, prompt_classes)
    class_of = {
        claimed: text_classes[text]
        for text, row, label in zip(text_index, rows, labels, strict=True)
        for claimed in ([label] if label >= 0 else [prompt_classes.get(trim(row), -1)])
    }
    return [
        {text_classes[text]} | {class_of.get(label, label) for label in of_image}
        for text, of_image in zip(text_index, image_labels, strict=True)
    ]


def _join(sets: list[set[int]]) -> list[set[int]]:
    """Joins sets that share a member until none do."""
    groups: list[set[int]] = []
    for joined in map(set, sets):
        apart = []
        for group in groups:
            if group & joined:
                joined |= group
            else:
                apart.append(group)
        groups = [*apart, joined]
    return groups
