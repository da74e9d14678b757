"""No file that this project loads can run code: pickles are read in one place, with a whitelist.

Checkpoints of others exist as pickles only. Their module reads tensors and nothing else.
"""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest
import torch

from unicl_fast.checkpoints.load import load_model
from unicl_fast.system.checksums import dump_checksummed_json, file_checksum

CHECKOUT = Path(__file__).resolve().parents[1]
ROOMS = ("unicl_fast", "pipelines", "tools", "benchmarks")

# Files of others that exist as pickles only, read with weights_only=True: path -> which, and why.
READS_WEIGHTS_OF_OTHERS: dict[str, str] = {
    "unicl_fast/conversion/torch_files.py": "checkpoints of microsoft/UniCL, open_clip and timm",
}
# Files that others load with torch.load alone: path -> which, and why.
WRITES_WEIGHTS_FOR_OTHERS: dict[str, str] = {
    "unicl_fast/conversion/official.py": "tensors, for microsoft/UniCL's code",
}

FORBIDDEN_MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("jsonpickle", "pickletools"),
}
FORBIDDEN_CALLS = {
    *("torch.save", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("torch.hub.load_state_dict_from_url", "pandas.read_pickle", "pd.read_pickle"),
    "torch.serialization.load",
}
# of torch.distributed, whatever it is imported as: they unpickle what comes over the network
FORBIDDEN_METHODS = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile"}


def offences(source: str, path: str) -> list[str]:
    """Every place of a file where a pickle could be read or written, or a text be run."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            tops = {module.split(".")[0] for module in modules}
            found += [f"{path}:{node.lineno} imports {top}" for top in tops & FORBIDDEN_MODULES]
            if isinstance(node, ast.ImportFrom):
                called = {f"{node.module}.{name}" for name in names}
                called &= FORBIDDEN_CALLS | {"torch.load", "numpy.load"}
                found += [f"{path}:{node.lineno} hides {name} behind a name" for name in called]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            bad = name in FORBIDDEN_CALLS | FORBIDDEN_BUILTINS
            if name == "torch.load":
                allowed = path in READS_WEIGHTS_OF_OTHERS
                bad = not (allowed and keywords.get("weights_only") == "True")
            if name == "torch.save":
                bad = path not in WRITES_WEIGHTS_FOR_OTHERS
            bad |= name.split(".")[-1] in FORBIDDEN_METHODS
            bad |= keywords.get("allow_pickle", "False") != "False"
            bad |= keywords.get("weights_only", "True") != "True"
            if bad:
                found.append(f"{path}:{node.lineno} calls {ast.unparse(node)[:80]}")
    return found


def test_nothing_reads_or_writes_a_pickle() -> None:
    files = [path for room in ROOMS for path in sorted((CHECKOUT / room).rglob("*.py"))]
    assert len(files) > 50
    found = [
        offence
        for path in files
        for offence in offences(path.read_text("utf-8"), str(path.relative_to(CHECKOUT)))
    ]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load('x')",
        "import torch; torch.load('x', weights_only=True)",  # in a file that is not on the list
        "from torch import load",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "import numpy as np; np.load('x', allow_pickle=flag)",
        "import torch; torch.save({}, 'x')",
        "import joblib",
        "eval('1')",
        "import torch.distributed as dist; dist.broadcast_object_list([1], src=0)",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert len(offences(line, "unicl_fast/some.py")) == 1


def test_weights_of_others_may_be_read_without_running_what_is_in_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(READS_WEIGHTS_OF_OTHERS, "unicl_fast/some.py", "a test")
    assert not offences("import torch; torch.load('x', weights_only=True)", "unicl_fast/some.py")
    assert offences("import torch; torch.load('x')", "unicl_fast/some.py")


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_in_the_place_of_weights_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
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
        load_model(checkpoint)
    assert not sprung.exists()
    if kind == "pickle":  # the trap works
        pickle.loads(file.read_bytes())
        assert sprung.exists()
