"""An inspection as one HTML page that needs nothing else: no script, no font, no other file.

Names, captions and paths come from anywhere: each goes through `_text`, and the page's own policy
(Content-Security-Policy) forbids scripts and addresses outside it should one slip through. Numbers
come from `inspect_dataset`, images from `thumbnails`.
"""

from __future__ import annotations

import html
import math
import statistics
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unicl_fast.packing.inspect.inspect import Copies, Group, Inspection, Spread
from unicl_fast.packing.inspect.thumbnails import ShownImage
from unicl_fast.system.wording import count_of

_MOST_CLASSES = 40
_SKEWED = 30
"""A largest class so many times the median one leaves nothing to see of the others."""
_ENDS_OF_CLASSES = 15
"""Of more classes than that, so many of the largest and of the smallest are shown."""

_STYLE = """
:root { --ink: #1d2733; --soft: #566372; --line: #dfe3e8; --accent: #22629e; --tint: #e8eff7;
  --paper: #fcfcfa; --warn: #a33b20 }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px }
h1, h2 { font-family: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif;
  line-height: 1.2; overflow-wrap: anywhere }
h1 { font-size: 34px; margin: 0 0 8px }
h2 { font-size: 23px; margin: 52px 0 6px; padding-top: 14px; border-top: 1px solid var(--line) }
h3 { font-size: 16px; margin: 24px 0 6px }
p { margin: 6px 0 12px; max-width: 68ch; overflow-wrap: anywhere }
.soft, small, figcaption span, .where { color: var(--soft) }
.where { font-size: 14px; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin: 24px 0 0; padding: 0; list-style: none }
.tiles li { background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: 10px 14px }
.tiles b { display: block; font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums }
.tiles span { color: var(--soft); font-size: 14px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 14px }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere }
.stack td:first-child { white-space: nowrap }
td.n, th.n { text-align: right; white-space: nowrap; overflow-wrap: normal }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr));
  gap: 18px 14px; margin-top: 14px }
.card { margin: 0; min-width: 0; font-size: 13px; line-height: 1.35 }
.card img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px;
  outline: 1px solid var(--line); outline-offset: -1px;
  background: #eceff2 }
.card img.tiny { image-rendering: pixelated }
.card figcaption { margin-top: 5px; overflow-wrap: anywhere }
.card .text { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3;
  overflow: hidden }
.card .more { display: block; color: var(--soft); font-size: 12px }
.card .tag + .more { display: inline }
.tag { display: inline-block; max-width: 100%; background: var(--tint); color: #174a78;
  border-radius: 3px; padding: 0 6px; margin: 0 4px 3px 0 }
.bars { display: grid; grid-template-columns: minmax(0, max-content) minmax(60px, 1fr) max-content;
  gap: 3px 12px; align-items: center; font-size: 14px; font-variant-numeric: tabular-nums;
  margin-top: 10px }
.bars .name { overflow-wrap: anywhere; max-width: 34vw }
.bars i { display: block; height: 13px; min-width: 1px; background: var(--accent);
  border-radius: 2px }
.bars .n { text-align: right }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr));
  gap: 20px 40px }
.plot { margin: 14px 0 0; min-width: 0 }
.plot figcaption { font-size: 14px; font-weight: 600 }
.plot figcaption span { font-weight: 400; display: block }
.plot svg { display: block; width: 100%; height: 120px; margin-top: 8px;
  border-bottom: 1px solid var(--soft) }
.plot rect, .plot path { fill: var(--accent) }
.axis { display: flex; justify-content: space-between; font-size: 13px; color: var(--soft);
  font-variant-numeric: tabular-nums }
.group { margin-top: 16px; padding: 12px; border: 1px solid var(--line); border-radius: 6px;
  background: #fff }
.group .sheet { margin-top: 8px; grid-template-columns: repeat(auto-fill, minmax(108px, 1fr)) }
.warn { color: var(--warn); font-weight: 600 }
footer { margin-top: 56px; color: var(--soft); font-size: 14px }
@media (max-width: 520px) {
  main { padding: 20px 16px 48px }
  h1 { font-size: 27px } h2 { font-size: 21px; margin-top: 40px }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px }
  .tiles b { font-size: 21px } .tiles li { padding: 8px 11px }
  .sheet, .group .sheet { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 14px 9px }
  .card { font-size: 12px }
  .stack thead { display: none }
  .stack tr { display: block; border-bottom: 1px solid var(--line); padding: 8px 0 }
  .stack td { display: flex; justify-content: space-between; gap: 14px; border: 0;
    padding: 2px 0; text-align: right; white-space: normal }
  .stack td:last-child { display: block; text-align: left }
  .stack td:first-child { font-weight: 600 }
  .stack td::before { content: attr(data-label); color: var(--soft); text-align: left;
    flex: none; font-weight: 400 }
  .stack td:last-child::before { display: block }
}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownGroup:
    """A group of copies, and images of the first few."""

    group: Group
    images: Sequence[ShownImage]


def make_page(
    inspection: Inspection,
    sheet: Sequence[ShownImage],
    exact: Sequence[ShownGroup],
    near: Sequence[ShownGroup],
) -> str:
    """The page as text, to be written in UTF-8.

    Args:
        inspection: the numbers.
        sheet: images of the contact sheet.
        exact: groups of exact copies to show.
        near: groups of near copies to show.
    """
    name = _text(Path(inspection.folder).resolve().name)  # of a URL, its last part as well
    sections = [
        _head(inspection, name),
        _concepts(inspection),
        _contact_sheet(inspection, sheet),
        _classes(inspection),
        _captions(inspection),
        _images(inspection),
        _copies(inspection, exact, near),
        _coincidences(inspection),
        _left_out(inspection),
    ]
    body = "\n".join(section for section in sections if section)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>{name}: {count_of(inspection.num_samples, "image")}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
<footer>Made by unicl-pack inspect in {inspection.seconds:,.1f} s. What it says is what the data
set holds; whether the data set is sound, unicl-pack verify says.</footer>
</main>
</body>
</html>
"""


def _text(value: str) -> str:
    """Any text as harmless HTML: escaped, and what cannot be seen written out."""
    shown = "".join(
        character
        if character == "\n" or unicodedata.category(character) not in ("Cc", "Cs")
        else character.encode("unicode_escape").decode("ascii")
        for character in value
    )
    return html.escape(shown, quote=True)


def _number(value: float) -> str:
    """Whole numbers whole, others with two digits behind the point at most, small ones with two."""
    if 0 < value < 0.1:
        return f"{value:.2g}"
    return f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:,.2f}"


def _head(inspection: Inspection, name: str) -> str:
    tiles = [
        (inspection.num_samples, "images"),
        (inspection.num_captions, "captions"),
        (inspection.num_labels, f"labels of {count_of(len(inspection.class_counts), 'class')}"),
        (inspection.exact_copies.num_surplus, "exact copies"),
    ]
    if inspection.near_copies is not None:
        tiles.append((inspection.near_copies.num_surplus, "look like another"))
    tiles.append((inspection.num_quarantined, "left out when packed"))
    items = "".join(f"<li><b>{number:,}</b><span>{what}</span></li>" for number, what in tiles)
    sources = ", ".join(_text(source) for source in inspection.source[:8])
    sources += f" and {len(inspection.source) - 8} more" if len(inspection.source) > 8 else ""
    shards = "shard" if inspection.num_shards == 1 else "shards"
    pixels = "pixels.npy and " if inspection.is_raw else ""
    return f"""<header>
<h1 dir="auto">{name}</h1>
<div class="where">{_text(str(inspection.folder))}: {inspection.num_bytes / 1e6:,.1f} MB in
{pixels}{inspection.num_shards:,} {shards}, packed by unicl_fast
{_text(inspection.tool_version)}, seed {inspection.seed}, from {sources}</div>
<ul class="tiles">{items}</ul>
</header>"""


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: frozenset[int] = frozenset(),
    stack: bool = False,
) -> str:
    """A table of cells that are HTML already; `stack`: on a phone each row becomes a small list."""

    def cell(tag: str, place: int, content: str) -> str:
        kind = ' class="n"' if place in numbers else ""
        label = f' data-label="{head[place]}"' if tag == "td" and stack else ""
        return f"<{tag}{kind}{label}>{content}</{tag}>"

    top = "".join(cell("th", place, title) for place, title in enumerate(head))
    lines = "".join(
        "<tr>" + "".join(cell("td", place, content) for place, content in enumerate(row)) + "</tr>"
        for row in rows
    )
    kind = ' class="stack"' if stack else ""
    return f"<table{kind}><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def _concepts(inspection: Inspection) -> str:
    rows = [
        (
            row.data,
            f"{row.num_images:,}",
            f"{row.num_concepts:,}",
            _number(row.images_per_concept) if row.num_concepts else "-",
            _text(row.kind),
        )
        for row in inspection.concepts
    ]
    head = ("data", "images", "concepts", "images/concept", "a concept is one of the")
    table = _table(head, rows, numbers=frozenset({1, 2, 3}), stack=True)
    both = (
        f"<p>{inspection.num_with_both:,} images have both labels and captions.</p>"
        if inspection.num_with_both
        else ""
    )
    return f"""<section id="concepts"><h2>Images and concepts</h2>
<p class="soft">As in Table 1 of the UniCL paper: how many images there are, how many concepts they
show, and how many images there are for each.</p>
{table}{both}</section>"""


def _contact_sheet(inspection: Inspection, sheet: Sequence[ShownImage]) -> str:
    cards = "".join(_card(image) for image in sheet)
    return f"""<section id="contact-sheet"><h2>Contact sheet</h2>
<p class="soft">The first {len(sheet):,} of {inspection.num_samples:,} samples. Packing has shuffled
them, so this is a random choice.</p>
<div class="sheet">{cards}</div></section>"""


def _card(image: ShownImage, note: str = "") -> str:
    tiny = ' class="tiny"' if max(image.height, image.width) <= 100 else ""
    tags = "".join(f'<bdi class="tag">{_text(name)}</bdi>' for name in image.class_names[:4])
    more = len(image.class_names) - 4
    tags += f'<span class="more">+{more}</span>' if more > 0 else ""
    caption = ""
    if image.captions:
        caption = f'<span class="text" dir="auto">{_text(image.captions[0][:400])}</span>'
        others = len(image.captions) - 1
        words = "caption" if others == 1 else "captions"
        caption += f'<span class="more">+{others} {words}</span>' if others else ""
    hover = _text(f"{image.key}: {image.name} of {image.source}, {image.width} x {image.height}")
    note = f'<span class="more">{note}</span>' if note else ""
    return (
        f'<figure class="card" title="{hover}"><img{tiny} src="{image.uri}" '
        f'alt="sample {image.key}"><figcaption>{tags}{caption}{note}</figcaption></figure>'
    )


def _bar(part: float) -> str:
    return f'<i style="width:{100 * part:.2f}%"></i>' if part else ""


def _bars(rows: Sequence[tuple[str, int]], largest: int) -> str:
    lines = "".join(
        f'<bdi class="name">{_text(name)}</bdi>'
        f"<span>{_bar(count / max(1, largest))}</span>"
        f'<span class="n">{count:,}</span>'
        for name, count in rows
    )
    return f'<div class="bars">{lines}</div>'


def _classes(inspection: Inspection) -> str:
    if not inspection.class_counts:
        return ""
    ordered = sorted(inspection.class_counts, key=lambda entry: (-entry[1], entry[0]))
    largest, smallest = ordered[0][1], ordered[-1][1]
    empty = sum(count == 0 for _, count in ordered)
    words = (
        f"{count_of(len(ordered), 'class')} with {smallest:,} to {largest:,} images each"
        if smallest < largest
        else f"{count_of(len(ordered), 'class')} with {count_of(largest, 'image')} each"
    )
    if empty:
        words += f'; <span class="warn">without any: {empty:,}</span>'
    several = {count: number for count, number in inspection.labels_per_image.items() if count > 1}
    if several:
        words += f". {sum(several.values()):,} images have several labels, up to {max(several):,}"
    present = [entry for entry in ordered if entry[1]]
    if len(ordered) <= _MOST_CLASSES or not present:
        shown = _bars(ordered[:_MOST_CLASSES], largest)
    else:
        counts = [count for _, count in present]
        is_skewed = largest > _SKEWED * statistics.median(counts)
        shown = _plot(
            f"Images of each class, largest class first{', logarithmic' if is_skewed else ''}",
            [math.log1p(count) for count in counts] if is_skewed else counts,
            ("1", f"{len(present):,}"),
            "",
        )
        shown += (
            '<div class="columns"><div><h3>Largest</h3>'
            f"{_bars(present[:_ENDS_OF_CLASSES], largest)}</div><div><h3>Smallest</h3>"
            f"{_bars(present[-_ENDS_OF_CLASSES:], largest)}</div></div>"
        )
    return f'<section id="classes"><h2>Classes</h2><p>{words}.</p>{shown}</section>'


def _plot(
    title: str,
    counts: Sequence[float],
    ends: tuple[str, str],
    words: str,
    hovers: Sequence[str] = (),
) -> str:
    """Columns that fill the width; many become one outline, since thinner ones would vanish."""
    top, width = max(counts) or 1, len(counts)
    if width > 200:
        steps = "".join(
            f"V{100 - 100 * count / top:.2f}H{place + 1}" for place, count in enumerate(counts)
        )
        shapes = f'<path d="M0 100{steps}V100Z"/>'
    else:
        gap = 0.12 if width > 1 else 0.35
        shapes = "".join(
            f'<rect x="{place + gap / 2:.3f}" y="{100 - 100 * count / top:.2f}" '
            f'width="{1 - gap:.3f}" height="{100 * count / top:.2f}">'
            + (f"<title>{hovers[place]}</title>" if hovers else "")
            + "</rect>"
            for place, count in enumerate(counts)
        )
    words = f"<span>{words}</span>" if words else ""
    return f"""<figure class="plot"><figcaption>{title}{words}</figcaption>
<svg viewBox="0 0 {width} 100" preserveAspectRatio="none" role="img"
aria-label="{title}">{shapes}</svg>
<div class="axis"><span>{ends[0]}</span><span>{ends[1]}</span></div></figure>"""


def _spread_plot(title: str, spread: Spread, unit: str = "") -> str:
    if spread.smallest == spread.largest:
        words = f"all {_number(spread.smallest)}{unit}"
        return f'<figure class="plot"><figcaption>{title}<span>{words}</span></figcaption></figure>'
    words = (
        f"{_number(spread.smallest)} to {_number(spread.largest)}{unit}, median "
        f"{_number(spread.median)}, 95 % up to {_number(spread.percentile_95)}"
    )
    hovers = [
        f"{_number(low)} to {_number(high)}: {count:,}"
        for low, high, count in zip(spread.edges[:-1], spread.edges[1:], spread.counts, strict=True)
    ]
    first, second, *_, before_last, last = (*spread.edges[:2], *spread.edges)
    if last - before_last > second - first + 1e-6:
        end = f"{_number(before_last)} and more"
    else:
        end = _number(last - 1 if second - first == 1 else last)
    ends = (_number(first), end)
    return _plot(title, spread.counts, ends, words, hovers)


def _captions(inspection: Inspection) -> str:
    if inspection.caption_tokens is None or inspection.captions_per_image is None:
        return ""
    distinct = inspection.num_distinct_captions
    words = f"{count_of(inspection.num_captions, 'caption')}, {distinct:,} of them distinct"
    if inspection.num_cut_captions:
        words += f'; <span class="warn">{inspection.num_cut_captions:,} fill the context</span>'
        words += " and have most likely been cut"
    plots = _spread_plot("Tokens of a caption", inspection.caption_tokens)
    plots += _spread_plot("Captions of an image", inspection.captions_per_image)
    parts = [f'<div class="columns">{plots}</div>']
    if inspection.repeated_captions:
        rows = [(f"<bdi>{_text(text)}</bdi>", f"{count:,}")
                for text, count in inspection.repeated_captions]  # fmt: skip
        table = _table(("caption, as its tokens read", "times"), rows, numbers=frozenset({1}))
        parts.append(f"<h3>Captions that occur most often</h3>{table}")
    if inspection.frequent_concepts:
        top = inspection.frequent_concepts[0][1]
        halves = (inspection.frequent_concepts[:15], inspection.frequent_concepts[15:30])
        columns = "".join(f"<div>{_bars(half, top)}</div>" for half in halves if half)
        parts.append(f'<h3>Most frequent concepts</h3><div class="columns">{columns}</div>')
    return f'<section id="captions"><h2>Captions</h2><p>{words}.</p>{"".join(parts)}</section>'


def _images(inspection: Inspection) -> str:
    size_of = "Size of the pixels" if inspection.is_raw else "Size of the file"
    plots = "".join(
        [
            _spread_plot("Width", inspection.widths, " pixels"),
            _spread_plot("Height", inspection.heights, " pixels"),
            _spread_plot("Width / height", inspection.aspects),
            _spread_plot(size_of, inspection.image_bytes, " bytes"),
        ]
    )
    return f"""<section id="images"><h2>Images</h2>
<div class="columns">{plots}</div></section>"""


def _copies(inspection: Inspection, exact: Sequence[ShownGroup], near: Sequence[ShownGroup]) -> str:
    parts = [
        "<h3>Byte for byte</h3>",
        _groups(inspection.exact_copies, exact, "the same bytes as another"),
        "<h3>To the eye</h3>",
    ]
    if inspection.near_copies is None:
        parts.append("<p>Nobody looked for them (--no-near, or no ImageHash).</p>")
    else:
        parts.append(
            '<p class="soft">Images whose perceptual hash differs from an earlier one\'s in at '
            f"most {inspection.near_distance} of 64 bits. Unrelated photographs differ in about "
            "32; images of little detail, such as digits, come near each other without being "
            "copies.</p>"
        )
        parts.append(_groups(inspection.near_copies, near, "near an earlier one"))
    return f'<section id="copies"><h2>Copies</h2>{"".join(parts)}</section>'


def _groups(copies: Copies, shown: Sequence[ShownGroup], what: str) -> str:
    if not copies.num_groups:
        return "<p>None.</p>"
    images = "image is" if copies.num_surplus == 1 else "images are"
    words = f"{copies.num_surplus:,} {images} {what}"
    words += f", in {copies.num_groups:,} groups" if copies.num_groups > 1 else ""
    if copies.num_labels_differ:
        words += f'; <span class="warn">in {copies.num_labels_differ:,} the labels differ</span>'
    parts = [f"<p>{words}.</p>"]
    for one in shown:
        distances = one.group.distances or (0,) * len(one.group.samples)
        cards = "".join(
            _card(image, f"{distance} bits" if place and one.group.distances else "")
            for place, (image, distance) in enumerate(zip(one.images, distances, strict=False))
        )
        head = f"{len(one.group.samples):,} images"
        if one.group.labels_differ:
            head += ', <span class="warn">labels differ</span>'
        parts.append(f'<div class="group">{head}<div class="sheet">{cards}</div></div>')
    if copies.num_groups > len(shown):
        parts.append(
            f'<p class="soft">Not shown: {copies.num_groups - len(shown):,} more; '
            "--duplicates-list has all.</p>"
        )
    return "".join(parts)


def _coincidences(inspection: Inspection) -> str:
    if not inspection.class_counts:
        return ""
    parts = []
    if inspection.equal_classes:
        items = "".join(
            "<li>" + ", ".join(f"<bdi>{_text(name)}</bdi>" for name in group) + "</li>"
            for group in inspection.equal_classes[:20]
        )
        parts.append(
            "<p>These classes have a prompt in common, and are one class in training:</p>"
            f"<ul>{items}</ul>"
        )
    else:
        parts.append("<p>All classes have names of their own.</p>")
    count = inspection.num_captions_equal_to_prompts
    if count:
        rows = [
            (f"<bdi>{_text(text)}</bdi>", f"<bdi>{_text(name)}</bdi>", f"{number:,}")
            for text, name, number in inspection.captions_equal_to_prompts
        ]
        table = _table(("caption", "class", "times"), rows, numbers=frozenset({2}))
        parts.append(
            f"<p>{count:,} captions equal a prompt of a class, and belong to it in training.</p>"
            f"{table}"
        )
    elif inspection.num_captions:
        parts.append("<p>No caption equals a prompt of a class.</p>")
    return f'<section id="texts"><h2>Texts that coincide</h2>{"".join(parts)}</section>'


def _left_out(inspection: Inspection) -> str:
    if not inspection.num_quarantined:
        return ""
    largest = max(inspection.quarantined.values())
    bars = _bars(list(inspection.quarantined.items()), largest)
    return f"""<section id="left-out"><h2>Left out when packed</h2>
<p class="soft">quarantine.csv has the reason for each.</p>{bars}</section>"""
