"""Who may import whom, what an install contains, and what works without DALI."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
ROOMS = ("pipelines", "tools", "benchmarks")
# Lower rooms know nothing of higher ones; modules not named are free to know any library module.
LIBRARY_LEVELS = [
    {"augmentation", "batch", "config", "devices", "keyed_random", "manifest", "images"}
    | {"jpeg_header", "nvidia_apex"}
    | {"shard_reader", "differences", "whole_files", "stages", "ending_at_once", "exit_codes"}
    | {"pillow_decoding", "checksums", "array_files", "sealed_json", "_normalise_numba"}
    | {"pixel_file", "_pixels_numba", "file_check", "preprocessing", "export_folder"}
    | {"image_encoding", "webp_header", "dataset_files", "remote", "host_buffers"}
    | {"processor_cores", "kernels"},
    {"shards", "shard_files", "shard_journal", "shard_writer", "tokenizer", "class_lists", "dist"}
    | {"interruption", "checkpoint_files", "heartbeats", "watchdog", "rendezvous"}
    | {
        "ledger_format",
        "ledger_reading",
        "ledger_passes",
        "ledger_proof",
        "ledger",
    },
    {"_targets_numba", "targets", "prompts", "models", "precision", "optim", "metrics"}
    | {"positives", "loss_tiled", "loss", "best", "ema", "checkpoint_writer"},
    {
        "collate",
        "presets",
        "checkpoint",
        "compilation",
        "replaced_samples",
        "bad_steps",
        "source_meter",
    }
    | {"mixing"},
    {"step", "cached_gradients", "evaluation", "training_state", "conversion"},
    {"trainer", "memory_check"},
]


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports by its full name, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent.name in ROOMS, f"{path}: relative import"
            prefix = "." * node.level + (node.module or "")
            found |= {prefix} | {f"{prefix}.{alias.name}" for alias in node.names}
    return found


def forbidden(folder: str, *prefixes: str) -> list[str]:
    return [
        f"{path.relative_to(CHECKOUT)} imports {name}"
        for path in sorted((CHECKOUT / folder).rglob("*.py"))
        for name in sorted(imports_of(path))
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
    ]


def test_the_library_knows_no_dali_no_command_line_and_no_other_room() -> None:
    rooms = [f"unicl_fast.{room}" for room in ROOMS]
    assert not forbidden("unicl_fast", "nvidia", "tyro", "argparse", "mlxtend", *rooms)


def test_apex_is_imported_in_one_place_and_only_when_asked() -> None:
    found = [name for room in ("unicl_fast", *ROOMS) for name in forbidden(room, "apex", "amp_C")]
    assert {line.split(" imports ")[0] for line in found} == {"unicl_fast/training/nvidia_apex.py"}
    code = (
        "import sys; sys.modules['apex'] = sys.modules['amp_C'] = None;"
        "import unicl_fast, unicl_fast.training.optim, unicl_fast.training.nvidia_apex"
    )
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True, timeout=60)


def test_no_extra_names_a_package_twice() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    lists = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    for extra, requirements in lists.items():
        names = [re.split(r"[^\w-]", one)[0] for one in requirements]
        assert len(set(names)) == len(names), extra


def test_every_optional_tool_that_a_test_asks_for_is_named() -> None:
    """What neither `make test` nor a line of CONTRIBUTING brings would be skipped for ever."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    brought = "\n".join(project["dependencies"] + project["optional-dependencies"]["dev"])
    named = (CHECKOUT / "CONTRIBUTING.md").read_text().lower()
    asked = {
        found.replace("_", "-")
        for path in (CHECKOUT / "tests").rglob("*.py")
        for found in re.findall(
            r'importorskip\("(\w+)|has_\w+ = .*find_spec\("(\w+)', path.read_text()
        )
        for found in found
        if found
    }
    assert {"ray", "s3fs"} <= asked
    assert not {name for name in asked if name not in brought and name not in named}


def test_pipelines_know_no_model_no_loss_and_no_program() -> None:
    modules = ("models", "loss", "step", "trainer", "optim", "checkpoint", "tools", "benchmarks")
    assert not forbidden("pipelines", "tyro", *(f"unicl_fast.{name}" for name in modules))


def test_tools_and_benchmarks_do_not_know_each_other() -> None:
    assert not forbidden("tools", "unicl_fast.benchmarks")
    assert not forbidden("benchmarks", "unicl_fast.tools")


def test_in_the_library_knowledge_points_down() -> None:
    level_of = {name: level for level, names in enumerate(LIBRARY_LEVELS) for name in names}
    wrong = []
    for path in sorted((CHECKOUT / "unicl_fast").rglob("*.py")):
        module = path.relative_to(CHECKOUT / "unicl_fast").parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        assert module in level_of, f"{path}: put {module} on a level in this test"
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "unicl_fast" and len(parts) > 1 and parts[1] in level_of:
                allowed = level_of[parts[1]] <= level_of[module]
                # build_model(preset name) is part of the contract
                allowed |= (module, parts[1]) == ("models", "presets")
                if not allowed:
                    wrong.append(f"{module} imports {name}")
    assert not wrong


def test_every_module_says_what_it_is() -> None:
    folders = [CHECKOUT / room for room in ("unicl_fast", *ROOMS)]
    silent = [
        str(path.relative_to(CHECKOUT))
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_a_wheel_has_one_top_level_name_and_all_rooms(tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--wheel-dir", str(tmp_path), str(CHECKOUT)),
        ],
        check=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"unicl_fast"}
    for room in ROOMS:
        assert f"unicl_fast/{room}/__init__.py" in names
    in_checkout = {
        path.relative_to(CHECKOUT).as_posix()
        for room in ("unicl_fast", *ROOMS)
        for path in (CHECKOUT / room).rglob("*.py")
    }
    packed = {name.removeprefix("unicl_fast/") for name in names if name.endswith(".py")}
    missing = {name for name in in_checkout if name.removeprefix("unicl_fast/") not in packed}
    assert not missing


def test_a_bare_checkout_resolves_the_rooms(tmp_path: Path) -> None:
    code = (
        "import unicl_fast, unicl_fast.pipelines, unicl_fast.tools, unicl_fast.benchmarks;"
        "print(unicl_fast.pipelines.__file__)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert "pipelines" in printed.stdout


WITHOUT_DALI = """
import sys
sys.modules["nvidia"] = None       # any import of DALI now fails
sys.modules["nvidia.dali"] = None
import torch
from unicl_fast import Batch, Tokenizer, Trainer, UniCL, build_model, load_model
from unicl_fast import unified_contrastive_loss
from unicl_fast.batch import ListLoader
from unicl_fast.objectives.collate import collate
from small_runs import tiny_config
from pathlib import Path

texts = Tokenizer()(["a red square", "a blue square", "a dog"] * 4)
images = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8)
batches = [collate(images, texts, torch.full((12,), -1))]
config = tiny_config(precision="fp32", steps=3)
Trainer(config, ListLoader(batches), run_folder=Path(sys.argv[1]), progress=False).fit()
assert isinstance(load_model(sys.argv[1]), UniCL)
import unicl_fast.evaluation.zero_shot, unicl_fast.evaluation.retrieval
assert not any(name.startswith("nvidia.dali.") for name in sys.modules)
"""


def test_the_library_trains_from_a_list_of_batches_without_dali(tmp_path: Path) -> None:
    path = f"{CHECKOUT}:{CHECKOUT / 'tests' / 'helpers'}"
    subprocess.run(
        [sys.executable, "-c", WITHOUT_DALI, str(tmp_path)],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        check=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "module",
    [
        "unicl_fast.images.check",
        "unicl_fast.text.tokenizer",
        "unicl_fast.dataset.writer",
        "unicl_fast.tools.pack.__main__",
    ],
)
def test_packing_does_not_pay_for_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True, timeout=60)
