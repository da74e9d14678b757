"""Files of features while they are written: runs that write at once, and runs that were killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unicl_fast.dataset.feature_files import (
    RowsWriter,
    make_rows,
    partial_path,
    read_features,
    seal_features,
)


def test_what_killed_runs_leave_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    left, living, foreign, own = (
        partial_path(tmp_path, key, token)
        for key, token in (("key", "1"), ("key", "2"), ("other", "3"), ("key", "4"))
    )
    for path in (left, living, foreign):
        make_rows(path, num_samples=3, width=2, kind="<f4")
        writer = RowsWriter(path)
        if path != living:  # as the kernel does for a process that is killed
            writer.close()
        else:
            held = writer
    make_rows(own, num_samples=3, width=2, kind="<f4")
    assert sorted(tmp_path.iterdir()) == sorted([living, foreign, own])
    rows = np.arange(6, dtype="<f4").reshape(3, 2)
    held.write(np.arange(3), rows)
    held.close()
    seal_features(living, tmp_path, "key", dtype="float32", unreadable=[1])
    found = read_features(tmp_path, "key", num_samples=3)
    assert np.array_equal(found.rows, rows)
    assert found.row(1) is None
