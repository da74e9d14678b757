"""Similarities of queries with many rows: exact, or by faiss with the most similar rows only.

Exact ones read all rows, block by block. If that takes more than 50 ms, faiss (the extra `search`)
looks into some of sqrt(n) cells instead, and its recall is measured.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from unicl_fast.system.atomic_files import replacing, write_text_atomically
from unicl_fast.system.checksums import dump_checksummed_json, parse_checksummed_json
from unicl_fast.system.installation import install_command
from unicl_fast.system.line import line
from unicl_fast.system.untrusted_files import read_file

logger = logging.getLogger("unicl_fast")

_BLOCK_BYTES = 64 << 20  # bytes of features compared at once
EXACT_BYTES = 128 << 20  # compared with a query in about 50 ms by two cores
_CANDIDATES = 2000  # rows that faiss finds for a query; all others count as the last of these
_GOAL = 0.95  # part of the 100 true nearest that faiss must find
_TRAINED_ON = 100_000  # rows that cells are learned from


def similarities(
    queries: Float[np.ndarray, "q d"], rows: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "q n"]:
    """The product of each query with each row; one block of rows is in memory at a time."""
    wanted = torch.from_numpy(queries).float()
    size = max(1, _BLOCK_BYTES // (4 * rows.shape[1]))
    found = torch.empty(len(wanted), len(rows))
    for start in range(0, len(rows), size):
        block = torch.from_numpy(np.array(rows[start : start + size], dtype=np.float32))
        torch.mm(wanted, block.T, out=found[:, start : start + size])
    return found.numpy()


def best(scores: Float[np.ndarray, " n"], top: int) -> NDArray[np.int64]:
    """The numbers of the `top` largest, best first; equal ones keep their order."""
    least = torch.from_numpy(scores).topk(min(top, len(scores))).values[-1].item()
    numbers = np.flatnonzero(scores >= least)
    return numbers[np.argsort(-scores[numbers], kind="stable")[:top]]


class Rows:
    """The rows of one data set, compared with queries."""

    recall = 1.0
    """The part of the 100 true nearest that is found, as measured."""

    def __init__(self, rows: Float[np.ndarray, "n d"]) -> None:
        self.rows = rows
        self._cells: Any = None

    def approximate(self, file: Path, queries: Float[np.ndarray, "q d"]) -> None:
        """Uses faiss from now on, if there are many rows and faiss is installed.

        `file` stores the cells, and FILE.json the recall for `queries`.
        """
        if self.rows.size * 4 <= EXACT_BYTES:
            return
        if importlib.util.find_spec("faiss") is None:
            size, command = self.rows.size / 2.5e8, install_command("search")
            logger.warning("each search reads %.1f GB; faiss reads a part: %s", size, command)
            return
        import faiss

        report = file.with_name(f"{file.name}.json")
        if not (file.is_file() and report.is_file()):
            with line(f"sorting {len(self.rows):,} vectors into cells"):
                cells, recall = _make_cells(self.rows, np.array(queries, np.float32))
            with replacing(file) as partial:
                faiss.write_index(cells, str(partial))
            write_text_atomically(report, dump_checksummed_json({"recall_at_100": recall}))
        self.recall = float(parse_checksummed_json(read_file(report))["recall_at_100"])
        self._cells = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)

    def similarities(self, queries: Float[np.ndarray, "q d"]) -> Float[np.ndarray, "q n"]:
        """The similarities with all rows; those that faiss did not find get the least found."""
        if self._cells is None:
            return similarities(queries, self.rows)
        values, numbers = self._cells.search(np.asarray(queries, np.float32), _CANDIDATES)
        found = np.empty((len(queries), len(self.rows)), np.float32)
        for own, value, places in zip(found, values, numbers, strict=True):
            value, places = value[places >= 0], places[places >= 0]
            own[:] = value.min(initial=1)
            own[places] = value
        return found


def _make_cells(rows: NDArray[Any], queries: NDArray[np.float32]) -> tuple[Any, float]:
    """Sorts rows into sqrt(n) cells, as numbers of 16 bits.

    A search looks into as few cells as find enough for the queries. Returns its recall, too.
    """
    import faiss

    count, width = rows.shape
    kind = f"IVF{int(count**0.5)},SQfp16"
    cells: Any = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:_TRAINED_ON])
    cells.train(np.array(rows[chosen], np.float32))
    for start in range(0, count, _TRAINED_ON):
        cells.add(np.array(rows[start : start + _TRAINED_ON], np.float32))
    exact = [set(best(one, 100).tolist()) for one in similarities(queries, rows)]
    cells.nprobe = 1
    while True:
        found = cells.search(queries, 100)[1].tolist()
        pairs = zip(exact, found, strict=True)
        recall = sum(len(one & set(other)) for one, other in pairs) / sum(map(len, exact))
        if recall >= _GOAL or cells.nprobe >= cells.nlist:
            return cells, recall
        cells.nprobe *= 2
