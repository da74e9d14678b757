"""Triton kernels, compiled ahead of time for GPUs that are not there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

# Shared memory that one program may have, by compute capability (CUDA C++ programming guide,
# "technical specifications per compute capability"): A100, H100, B200.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def compile_ahead(
    kernel: Any,
    capability: int,
    *,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, int],
    folder: Path,
    multiples_of_16: tuple[str, ...] = (),
) -> Any:
    """What a launch with arguments of these types would compile; pointers are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
    }
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in multiples_of_16
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        return triton.compile(
            ASTSource(kernel, signature, dict(constants), attributes),
            target=GPUTarget("cuda", capability, 32),
            options=dict(options),
        )


def check_fit(compiled: Any, folder: Path) -> None:
    """That a program fits into shared memory, and keeps all that it computes with in registers."""
    import triton

    assert compiled.metadata.shared <= SHARED_BYTES[compiled.metadata.target.arch]
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    assert re.search(r"REG:\d+ STACK:0 .*LOCAL:0", usage), usage
