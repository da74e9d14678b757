"""Figures of a run for people: its curves, and its first batch.

matplotlib is imported with the first one, since the library works without it. Errors while drawing
are only logged (`drawing`): no figure is worth a run. Users' texts are drawn literally: two dollar
signs in a caption are no formula.
"""

from __future__ import annotations

import contextlib
import logging
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unicl_fast.batch import Batch
from unicl_fast.objectives.targets import CAPTION_KEYS_START
from unicl_fast.system.atomic_files import replacing
from unicl_fast.system.wording import encodable
from unicl_fast.text.file_tokenizer import FileTokenizer
from unicl_fast.text.prompts import LABEL_BITS
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_COLUMNS, _MOST_ROWS, _LONGEST_NAME = 8, 4, 28  # of the contact sheet
INK, FAINT, _ACCENT = "#1f2933", "#9aa5b1", "#2563a8"
_EAST_ASIAN = ("Noto Sans CJK JP", "IPAGothic", "WenQuanYi Zen Hei", "Droid Sans Fallback")


@contextlib.contextmanager
def drawing(path: Path) -> Iterator[None]:
    """Around drawing the figure at `path`: logs any error instead of raising it."""
    try:
        with plain_texts():
            yield
    except Exception as error:  # of matplotlib, a font, an unforeseen text, the disk
        logger.error("NO FIGURE %s: %s: %s", path, type(error).__name__, error)


def plain_texts() -> contextlib.AbstractContextManager[None]:
    """Makes matplotlib draw texts literally, without looking for formulas in them.

    Raises ModuleNotFoundError: matplotlib is not installed; says how to install it.
    """
    try:
        from matplotlib import font_manager, rc_context
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figures are drawn by matplotlib, which is not installed: pip install matplotlib"
        ) from error
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["sans-serif", *(name for name in _EAST_ASIAN if name in installed)]
    return rc_context({"text.parse_math": False, "text.usetex": False, "font.family": fonts})


def new_figure(width: float, height: float, **settings: Any) -> Figure:
    """Returns an empty figure, `width` x `height` in inches; `settings` are matplotlib's."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **settings)


def draw_curves(run_folder: Path, path: Path) -> None:
    """Draws loss, learning rate and evaluations of a run against samples seen, as a PNG."""
    lines = read_metrics(run_folder)
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return
    steps, seen = ([line[key] for line in trained] for key in ("step", "samples_seen"))
    evaluations: dict[str, list[tuple[float, float]]] = {}
    chances = set()
    for line in lines:
        samples = float(np.interp(line["step"], [0, *steps], [0, *seen]))
        for key, value in line.items():
            if key.endswith(("/top1", "/recall_at_1")) or "/top1/" in key:
                evaluations.setdefault(key, []).append((samples, 100 * value))
            elif key.endswith("/chance"):
                chances.add(100 * value)
    figure = new_figure(10 if evaluations else 6, 4, layout="constrained")
    axes = figure.subplots(1, 2 if evaluations else 1, squeeze=False)[0]
    axes[0].plot(seen, [line["loss"] for line in trained], color=_ACCENT)
    _label(axes[0], title="Training loss", y="loss")
    rate = axes[0].twinx()
    rate.plot(seen, [line["lr"] for line in trained], color=FAINT, linewidth=1, linestyle="--")
    rate.set_ylabel("learning rate (dashed)", color=FAINT)
    rate.tick_params(colors=FAINT)
    for name, points in evaluations.items():
        axes[1].plot(*zip(*points, strict=True), marker="o", markersize=4, label=encodable(name))
    for chance in chances:
        axes[1].axhline(chance, color=FAINT, linewidth=1, linestyle=":")
    if evaluations:
        _label(axes[1], title="Evaluations (dotted: chance)" if chances else "Evaluations", y="%")
        best = max(value for points in evaluations.values() for _, value in points)
        axes[1].set_ylim(0, min(105, 1.3 * max(best, *chances, 1)))  # a weak run is seen to learn
        axes[1].legend(loc="best", frameon=False)
    save_figure(figure, path)


def draw_contact_sheet(
    batch: Batch,
    path: Path,
    class_names: Sequence[Sequence[str]] = (),
    *,
    tokenizer: Tokenizer | FileTokenizer | None = None,
) -> None:
    """Draws the first images of a batch over their classes and texts, as a PNG.

    Images and tokens are exactly the model's. The colour of a frame is the class: equal colours are
    positives of each other. `class_names` are those of each data set; no `tokenizer` is CLIP's.
    """
    from matplotlib import colormaps

    count = min(_COLUMNS * _MOST_ROWS, batch.batch_size)
    rows = math.ceil(count / _COLUMNS)
    tokenizer = tokenizer or Tokenizer()
    class_ids = batch.targets.class_ids[:count].tolist()
    order = {class_id: number for number, class_id in enumerate(dict.fromkeys(class_ids))}
    figure = new_figure(1.6 * _COLUMNS, 2.35 * rows, layout="constrained")
    for number, axis in enumerate(figure.subplots(rows, _COLUMNS, squeeze=False).flat):
        axis.set_xticks([])
        axis.set_yticks([])
        if number >= count:
            axis.set_axis_off()
            continue
        axis.imshow(batch.images[number].cpu().numpy())
        text = tokenizer.decode(batch.texts.tokens[batch.texts.index[number]].tolist())
        lines = textwrap.wrap(text, width=22, max_lines=3, placeholder=" ...")
        axis.set_xlabel("\n".join(lines), fontsize=7, color=INK)
        name = _class_name(class_ids[number], class_names)
        name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
        axis.set_title(name, fontsize=6, color=FAINT, pad=3)
        # the golden angle keeps the first colours far apart
        color = colormaps["turbo"](order[class_ids[number]] * 0.381966 % 1)
        for spine in axis.spines.values():
            spine.set(color=color, linewidth=3)
    figure.supxlabel(
        "Images with frames of one colour have one class: they and their texts are positives. "
        "A caption that is no class's prompt is a class of its own.",
        x=0.01, ha="left", fontsize=8, color=INK,
    )  # fmt: skip
    save_figure(figure, path)


def _class_name(class_id: int, class_names: Sequence[Sequence[str]]) -> str:
    """The name of a class, or its label if it has no name; "caption" for a caption's."""
    if class_id >= CAPTION_KEYS_START:
        return "caption"
    source, label = divmod(class_id, 1 << LABEL_BITS)
    if source < len(class_names) and label < len(class_names[source]):
        return class_names[source][label]
    return f"class {label}" + f" of data set {source + 1}" * (source > 0)


def _label(axis: Axes, *, title: str, y: str) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_title(title, loc="left", color=INK)
    axis.set_xlabel("samples seen")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, flush=False) as aside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn; one line for each
        figure.savefig(aside, format="png")
