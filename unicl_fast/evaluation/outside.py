"""Features that another model made, as a base of a comparison: `features:FOLDER`.

    train.npy, held-out.npy    floats [n w], a row for each image in the data's order
    texts.npy                  floats [t w], a row for each text in the order of `texts_to_encode`
    NAME.parquet               instead of NAME.npy, rows in any order: `feature` beside `name`, and
                               `source` if names repeat (as `unicl-eval embed` writes them), or
                               beside `text`

A folder has images, texts or both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.data import all_descriptions
from unicl_fast.system.wording import encodable

SCHEME = "features:"
_MOST_WIDTH = 1 << 16
_Key = tuple[str, ...]  # source and name of an image, or a text


def find_files(base: str) -> dict[str, Path]:
    """The files of `features:FOLDER` by part; raises FileNotFoundError."""
    folder = Path(base.removeprefix(SCHEME))
    paths = [folder / f"{part}.{kind}" for part in ("train", "held-out", "texts")
             for kind in ("npy", "parquet")]  # fmt: skip
    there = [path for path in paths if path.is_file()]
    found = {path.stem: path for path in there}
    if len(found.keys() & {"train", "held-out"}) == 1 or not 0 < len(found) == len(there):
        raise FileNotFoundError(
            f"{base}: expected are train and held-out, texts, or all three, each as .npy or "
            f".parquet; {folder} has {', '.join(path.name for path in there) or 'none of them'}"
        )
    return found


def read_outside(
    base: str, train: PackedDataset, held_out: PackedDataset, texts: Sequence[str]
) -> tuple[list[Float[np.ndarray, "n w"]], Float[np.ndarray, "t v"] | None]:
    """Features of both parts' images, none if the folder has no images, and of the texts.

    Raises:
        FileNotFoundError: there is no such folder, or a part has no file.
        ValueError: rows of another number, width, type or name, or that are not finite.
    """
    files, images = find_files(base), []
    for part, dataset in {"train": train, "held-out": held_out}.items():
        if part in files:
            keys = [(one.source, one.name) for one in all_descriptions(dataset)]
            images.append(_rows(files[part], keys, total=dataset.manifest.num_samples))
    if len(widths := {one.shape[1]: None for one in images}) > 1:
        raise ValueError(f"{base}: rows of train and held-out have {list(widths)} numbers")
    if "texts" not in files:
        return images, None
    return images, _rows(files["texts"], [(one,) for one in texts], total=len(texts))


def _rows(path: Path, keys: Sequence[_Key], *, total: int) -> NDArray[np.float32]:
    """The rows of `keys`, the first of `total` of the data, in fp32."""
    rows: NDArray[Any]
    if path.suffix == ".parquet":
        rows = _table_rows(path, keys)
    else:
        try:
            rows = np.lib.format.open_memmap(path, mode="r")  # refuses objects, which can run code
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no array as numpy.save writes: {error}") from error
        if rows.ndim != 2 or len(rows) not in (len(keys), total):
            raise ValueError(f"{path}: {list(rows.shape)} came for {total:,} rows")
    if rows.dtype.kind != "f" or not 0 < rows.shape[1] <= _MOST_WIDTH:
        raise ValueError(
            f"{path}: expected are 1 to {_MOST_WIDTH:,} floats a row; {rows.shape[1]:,} of "
            f"{rows.dtype} came"
        )
    with np.errstate(over="ignore"):  # beyond fp32 is not finite
        found = np.array(rows[: len(keys)], np.float32)
    if len(bad := np.flatnonzero(~np.isfinite(found).all(axis=1))):
        raise ValueError(f"{path}: {len(bad):,} rows are not finite, such as number {bad[0]}")
    return found


def _table_rows(path: Path, keys: Sequence[_Key]) -> NDArray[Any]:
    """The rows of `keys`: of (source, name), or as many of their last as the file has."""
    import pyarrow
    from pyarrow import compute, parquet

    last = "text" if path.stem == "texts" else "name"
    try:
        table = parquet.ParquetFile(path).read(["source", last, "feature"])
        own = [*(["source"] if last == "name" and "source" in table.column_names else []), last]
        found = list(zip(*(table[name].to_pylist() for name in own), strict=True))
        lists = table["feature"].combine_chunks()
        values, widths = compute.list_flatten(lists), compute.list_value_length(lists).unique()
        if len(widths) != 1 or values.null_count:
            raise ValueError(f"features of {widths.to_pylist()[:5]} numbers, or nulls")
        rows: NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(len(lists), -1)
    except (pyarrow.ArrowException, LookupError, ValueError) as error:
        raise ValueError(
            f"{path}: expected is Parquet with the column {last} and equally long lists of floats "
            f"in the column feature: {error}"
        ) from error
    wanted = [tuple(map(encodable, key[-len(own) :])) for key in keys]
    if found[: len(keys)] == wanted:  # in the data's order names can repeat
        return rows
    place_of = {key: place for place, key in enumerate(found)}
    if missing := [key for key in wanted if key not in place_of]:
        raise ValueError(f"{path} lacks {len(missing):,} of {len(keys):,}, such as {missing[0]}")
    if len(place_of) < len(found) or len(set(wanted)) < len(keys):
        raise ValueError(
            f"{path}: a {last} repeats, in the file or in the data: add the column source, or "
            "give .npy in the data's order"
        )
    return rows[[place_of[key] for key in wanted]]
