"""No file that this project loads can run code: the linter refuses what reads or writes pickles.

Checkpoints of others exist as pickles only. Their module reads tensors and nothing else.
"""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trunk_table import CHECKOUT, files_of, tree_of

from unicl_fast.conversion.initial import load_encoders
from unicl_fast.system.checksums import dump_checksummed_json, file_checksum

RULES = "TID251,S102,S307"


def offences(source: str, path: str = "unicl_fast/some.py") -> int:
    """How many rules against pickles and code in data the linter finds broken."""
    command = [sys.executable, "-m", "ruff", "check", "--select", RULES]
    done = subprocess.run(
        [*command, "--output-format", "concise", "--stdin-filename", str(CHECKOUT / path), "-"],
        input=source,
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
    )
    assert done.returncode in (0, 1), done.stderr
    return sum(line.startswith(path) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load('x', weights_only=True)",
        "from torch import load",
        "import torch; torch.save({}, 'x')",
        "import joblib",
        "eval('1')",
        "exec('1')",
        "import torch.distributed as dist; dist.broadcast_object_list([1], src=0)",
    ],
)
def test_the_linter_refuses_what_could_run_code(line):
    assert offences(line) > 0
    assert offences("import torch; torch.arange(3)") == 0


def may_run_code(call: ast.Call) -> bool:
    """Whether a call that the linter lets pass, or must let pass in some file, could run code."""
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    name = ast.unparse(call.func)
    return (
        given.get("allow_pickle", "False") != "False"
        or given.get("weights_only", "True" if name != "torch.load" else "") != "True"
        or name == "compile"
    )


@pytest.mark.parametrize(
    "line",
    ["torch.load('x')", "torch.load('x', weights_only=no)", "np.load('x', allow_pickle=flag)"],
)
def test_the_search_finds_what_no_linter_looks_for(line):
    assert may_run_code(ast.parse(line, mode="eval").body)


def test_no_argument_allows_pickles():
    assert not [
        f"{path.relative_to(CHECKOUT)}:{node.lineno}"
        for path in files_of("unicl_fast", "pipelines", "tools", "benchmarks")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and may_run_code(node)
    ]


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_in_the_place_of_weights_is_refused_and_not_run(tmp_path, kind):
    sprung = tmp_path / "sprung"
    checkpoint = tmp_path / "step-00000001"
    checkpoint.mkdir()
    file, optimizer = checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors"
    optimizer.write_bytes(b"")  # not looked into for a model
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Trap(sprung)))
    else:
        torch.save(Trap(sprung), file)
    state = {
        "step": 1,
        "config": {"model": {"image_encoder": "test_vit", "text_layers": 1}},
        "scaler": {},
        "data": {},
        "optimizer": "AdamW",
        "run_id": "a",
        "checksums": {path.name: file_checksum(path) for path in (file, optimizer)},
    }
    (checkpoint / "state.json").write_text(dump_checksummed_json(state))
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_encoders(checkpoint)
    assert not sprung.exists()
    if kind == "pickle":  # the trap works
        pickle.loads(file.read_bytes())
        assert sprung.exists()
