"""Files that others have made: no link is written through, no pipe waited for, no bomb unpacked."""

import ast
import logging
import os
import time
from pathlib import Path

import pytest
from trunk_table import CHECKOUT, files_of, tree_of

from unicl_fast.checkpoints.export import read_export
from unicl_fast.checkpoints.files import read_best
from unicl_fast.checkpoints.load import read_state
from unicl_fast.config_json import load_config
from unicl_fast.dataset.manifest import Manifest
from unicl_fast.distributed.launch import keeping_log
from unicl_fast.system import untrusted_files
from unicl_fast.system.atomic_files import sole_writer
from unicl_fast.system.checksums import read_checksums
from unicl_fast.system.untrusted_files import (
    NotRegularError,
    open_file,
    parse_json,
    parse_yaml,
    read_file,
    reading_table,
)
from unicl_fast.text.hierarchies import read_parents
from unicl_fast.training.figures import new_figure, save_figure
from unicl_fast.training.metrics import MetricsWriter


@pytest.mark.parametrize("mode", ["rb", "wb", "ab", "r+b"])
def test_only_regular_files_are_opened_and_links_only_for_reading(tmp_path, mode):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"precious")
    link.symlink_to(file)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(NotRegularError, match="is not a regular file"):
            open_file(path, mode)
    if mode == "rb":
        assert read_file(link) == b"precious"
    else:
        for target in (file, tmp_path / "nowhere"):
            link.unlink()
            link.symlink_to(target)
            with pytest.raises(NotRegularError, match="is a link, through which nothing is wri"):
                open_file(link, mode)
        assert not (tmp_path / "nowhere").exists()
    assert file.read_bytes() == b"precious"
    with open_file(file, mode) as opened:
        assert opened.fileno() > 0


def test_a_link_in_a_run_folder_leads_nowhere(tmp_path, caplog):
    """A run folder can come from a stranger; a run must write only inside it."""
    caplog.set_level(logging.INFO)
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_text("precious")
    run.mkdir()
    for name in (".in-use", "log.txt", "curves.png", "metrics.jsonl"):
        (run / name).symlink_to(precious if name != "metrics.jsonl" else tmp_path / "new")
    with pytest.raises(ValueError, match=r"\.in-use is a link"), sole_writer(run):
        pass
    with keeping_log() as write_to:
        write_to(run / "log.txt")
    assert "log.txt is a link, through which no log is written" in caplog.text
    save_figure(new_figure(1, 1), run / "curves.png")
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(NotRegularError, match=r"metrics\.jsonl is a link"):
        MetricsWriter(run)
    assert precious.read_text() == "precious"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["large", "pipe"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", load_config),
        ("config.json", lambda path: read_export(path.parent)),
        ("best.json", lambda path: read_best(path.parent)),
        ("state.json", lambda path: read_state(path.parent)),
        ("manifest.json", lambda path: Manifest.load(path.parent)),
        ("checksums.txt", lambda path: read_checksums(path.parent)),
        ("parents.csv", read_parents),
    ],
)
def test_a_file_larger_than_memory_and_a_pipe_are_refused_by_name(tmp_path, kind, name, read):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    try:
        found = read(path)
    except (ValueError, OSError) as error:
        assert str(path) in str(error) or f"{tmp_path} is not a" in str(error)  # noqa: PT017
    else:
        assert (found, kind) == (None, "pipe")  # a pipe is no list of checksums


def test_settings_may_come_out_of_a_pipe_that_the_user_names(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b"run: {}")
    os.close(writing)
    assert read_file(f"/dev/fd/{reading}", piped=True) == b"run: {}"
    os.close(reading)


def test_nesting_has_a_limit_that_all_readers_of_it_can_bear():
    def yaml(text: str, where: str) -> object:
        return parse_yaml(text.encode(), where=where)

    for parse, depths in ((parse_json, (101, 900, 100_000)), (yaml, (101, 900))):
        assert parse("[" * 100 + "]" * 100, where="it")
        for depth in depths:
            with pytest.raises(ValueError, match="^it is (nested more than 100|not JSON|not YAML)"):
                parse("[" * depth + "]" * depth, where="it")


NINE = ",".join(["*a{}"] * 9)
BOMB = "[&a0 [x,x,x,x,x,x,x,x,x]" + "".join(
    f", &a{n + 1} [{NINE.format(*[n] * 9)}]" for n in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{BOMB}]", "its aliases mean more than 100,000 values"),
        ("&a [*a]", "its aliases mean more than 100,000 values"),
        ("&a {b: *a}", "its aliases mean more than 100,000 values"),
        ("[&a0 []" + "".join(f", &a{n + 1} [*a{n}]" for n in range(300)) + "]", "nested more"),
        ("!!int ''", r"a value is not what its tag says \(IndexError"),
        ("!!bool x", r"a value is not what its tag says \(KeyError"),
        ("!!timestamp x", r"a value is not what its tag says \(AttributeError"),
        ("!!float ''", r"a value is not what its tag says \(IndexError"),
        ("a: 1\na: 2", "a name stands twice among"),
        ("x" * 300_000, "too large"),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_yaml_is_refused_at_once(text, message):
    started = time.process_time()
    with pytest.raises(ValueError, match=f"^it is .*{message}"):
        parse_yaml(text.encode(), where="it")
    assert time.process_time() - started < 5


def test_aliases_are_taken():
    found = parse_yaml(b"a: &x [1, 2]\nb: *x\nc: [*x, *x]", where="it")
    assert found == {"a": [1, 2], "b": [1, 2], "c": [[1, 2], [1, 2]]}


def test_a_fault_of_a_table_names_its_line(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n" + "x" * 200_000 + ",3\n")
    with (
        pytest.raises(ValueError, match=r"table\.csv, line 2, is not CSV: field larger"),
        reading_table(path) as rows,
    ):
        list(rows)


ALLOWED = {
    "the kernel's": """
        tools/diagnose/measuring.py tools/diagnose/turns.py
        unicl_fast/system/child.py unicl_fast/system/machine.py unicl_fast/system/program.py
    """,
    "an installed package's": """
        unicl_fast/evaluation/serving.py unicl_fast/packing/croissant.py
        unicl_fast/system/gpu_kernels.py
        unicl_fast/system/kernels.py unicl_fast/text/class_lists.py
        unicl_fast/text/tokenizer.py unicl_fast/training/agreement.py
    """,
    "named by the user for a result": """
        tools/diagnose/run.py tools/evaluate/command.py tools/evaluate/embed.py
        tools/ledger.py
    """,
    "made by this process or a peer": """
        tools/run_settings.py unicl_fast/checkpoints/files.py
        unicl_fast/conversion/export.py unicl_fast/conversion/hugging_face.py
        unicl_fast/conversion/output.py
        unicl_fast/dataset/files.py unicl_fast/dataset/other_tokens.py
        unicl_fast/distributed/ranks.py unicl_fast/training/kept_rows.py
        unicl_fast/ledger/writer.py
        unicl_fast/packing/sources/parquet_rows.py unicl_fast/packing/sources/spool.py
        unicl_fast/packing/sources/tables.py
        unicl_fast/system/atomic_files.py
        unicl_fast/system/checksums.py unicl_fast/text/file_tokenizer.py
        unicl_fast/text/prompts.py unicl_fast/training/block_trial.py
    """,
    "of one row or sample, whose size others limit": """
        unicl_fast/dataset/growing_files.py unicl_fast/dataset/quarantine.py
        unicl_fast/dataset/stored_samples.py unicl_fast/packing/quarantine.py
        unicl_fast/packing/sources/cells.py
        unicl_fast/packing/sources/lists.py
        unicl_fast/packing/sources/tars.py unicl_fast/training/metrics.py
    """,
}
"""Files of the product that open or parse files directly, by whose files those are."""
DIRECT = {
    *("read_text", "read_bytes", "write_text", "write_bytes", "open", "fdopen", "FileIO"),
    *("load", "loads", "safe_load", "reader", "DictReader"),
}
OF_MODULES = {"json", "yaml", "csv", "os", "io"}
NOT_OF_FILES = {"Image", "tarfile", "zipfile", "gzip", "np", "torch"}


def opens_or_parses(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name):
        return node.func.id == "open"
    if not isinstance(node.func, ast.Attribute) or node.func.attr not in DIRECT:
        return False
    owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
    is_method = node.func.attr.startswith(("read_", "write_")) or node.func.attr == "open"
    return owner in OF_MODULES or (is_method and owner not in NOT_OF_FILES)


def test_no_other_file_of_the_product_opens_or_parses_files_by_itself():
    """New ones use `untrusted_files`; benchmarks only read their own files."""
    found = {
        path.relative_to(CHECKOUT).as_posix()
        for path in files_of("unicl_fast", "pipelines", "tools")
        if any(map(opens_or_parses, ast.walk(tree_of(path))))
    }
    own = Path(str(untrusted_files.__file__)).relative_to(CHECKOUT).as_posix()
    assert found - {own} == set(" ".join(ALLOWED.values()).split())
