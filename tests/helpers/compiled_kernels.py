"""Triton kernels, compiled ahead of time for GPUs that are not there."""

import contextlib
import functools
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ptx
import pytest
import torch
from interpreted_kernels import skip_with_old_triton
from torch import Tensor

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
    """Compiles as a launch with these types would; pointers are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    skip_with_old_triton()
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


def execute(
    kernel: ptx.Kernel, arguments: Mapping[str, Any], grid: tuple[int, int], *, shared_bytes: int
) -> Counter[str]:
    """Runs PTX on the CPU's tensors by name, which it may change, and returns the faults."""
    memory = ptx.Memory()
    storages: dict[int, tuple[int, np.ndarray]] = {}  # views of one may be several arguments
    values = []
    for value in arguments.values():
        if isinstance(value, Tensor):
            whole = value.untyped_storage()
            if whole.data_ptr() not in storages:
                data = torch.empty(0, dtype=torch.uint8).set_(whole).numpy()
                storages[whole.data_ptr()] = memory.put(data), data
            start, _ = storages[whole.data_ptr()]
            value = start + value.storage_offset() * value.itemsize
        values.append(value)
    faults = ptx.run(kernel, memory, values, grid=grid, shared_bytes=shared_bytes)
    for start, data in storages.values():
        data[:] = memory.get(start, data)
    return faults


class PtxKernel:
    """Stands in for a Triton kernel: a launch compiles it for an H100 and executes its PTX."""

    def __init__(self, kernel: Any, folder: Path) -> None:
        self._kernel, self._folder = kernel, folder

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, int], *values: Any, **named: Any) -> None:
        arguments = dict(zip(self._kernel.arg_names, values, strict=False))
        arguments |= {name: named.pop(name) for name in self._kernel.arg_names if name in named}
        constants = {
            one.name: arguments.pop(one.name)
            for one in self._kernel.params
            if one.is_constexpr or repr(arguments[one.name]) == "1"  # a launch specialises on it
        }
        compiled = compile_ahead(
            self._kernel,
            90,
            types={name: _type_of(value) for name, value in arguments.items()},
            constants=constants,
            multiples_of_16=tuple(
                name for name, one in arguments.items() if isinstance(one, int) and not one % 16
            ),
            options=named,
            folder=self._folder,
        )
        kernel, shared_bytes = ptx.parse(compiled.asm["ptx"]), compiled.metadata.shared
        faults = execute(kernel, arguments, grid, shared_bytes=shared_bytes)
        assert not faults, self._kernel.__name__


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32" if isinstance(value, int) else "fp32"


@contextlib.contextmanager
def windows_as_ptx(folder: Path) -> Iterator[None]:
    """Inside, window attention is computed by its kernels' PTX, on the CPU."""
    from unicl_fast.models import window_attention

    names = "_forward", "_backward", "_sum_table"
    kernels = {name: PtxKernel(getattr(window_attention, name), folder) for name in names}
    options = window_attention.launch_options

    def of_h100(dtype: torch.dtype, *, capability: int, backward: bool) -> dict[str, int]:
        return options(dtype, capability=90, backward=backward)

    with mock.patch.multiple(window_attention, **kernels, launch_options=of_h100):
        yield


def compile_loss(
    kernel: Any,
    capability: int,
    dtype: torch.dtype,
    *,
    folder: Path,
    counted: bool = True,
    with_columns: bool = True,
    precision: str | None = None,
) -> Any:
    """Compiles as a launch with such features would."""
    from unicl_fast.objectives.loss_triton import _precision, blocks_for

    blocks = blocks_for(dtype, capability=capability)._asdict()
    names = set(kernel.arg_names)
    constants = {
        "precision": precision or _precision(dtype),
        **{name: blocks[name] for name in ("height", "width", "depth")},
        **({} if counted else {"counts": None}),
        **({} if with_columns else dict.fromkeys({"by_columns", "of_columns"} & names)),
    }
    wide = TYPES[torch.promote_types(dtype, torch.float32)]
    features = dict.fromkeys(("images", "texts", "gradient"), f"*{TYPES[dtype]}")
    sizes = dict.fromkeys(("b", "u", "d"), "i32")
    types = dict.fromkeys(kernel.arg_names, f"*{wide}") | features | sizes
    return compile_ahead(
        kernel,
        capability,
        types=types,
        constants=constants,
        multiples_of_16=("d",),
        options={name: blocks[name] for name in ("num_warps", "num_stages")},
        folder=folder,
    )


def compile_window(
    kernel: Any, capability: int, dtype: torch.dtype, *, shift: int, folder: Path
) -> Any:
    """Compiles as a launch for the windows of the presets' models would."""
    from unicl_fast.models import window_attention

    sizes = {"window_height": 7, "window_width": 7, "head_width": 32, "block": 64, "depth": 32}
    sizes |= {"shift_down": shift, "shift_right": shift, "roll": 1}
    narrow = dict.fromkeys(("qkv", "mixed", "grad", "grad_qkv"), f"*{TYPES[dtype]}")
    wide = dict.fromkeys(("table", "bias_sums", "sums", "gradient"), "*fp32")
    numbers = dict.fromkeys(("num_windows", "num_parts", "height", "width"), "i32")
    return compile_ahead(
        kernel,
        capability,
        types=narrow | wide | numbers | {"scale": "fp32"},
        constants={name: size for name, size in sizes.items() if name in kernel.arg_names},
        options=window_attention.launch_options(
            dtype, capability=capability, backward=kernel is window_attention._backward
        ),
        folder=folder,
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


def check_window(compiled: Any, folder: Path) -> None:
    """That a kernel of windows fits, and divides once a row of a thread, not once a value."""
    check_fit(compiled, folder)
    assert len(re.findall(r"\bdiv\.(full|rn)", compiled.asm["ptx"])) <= 4
