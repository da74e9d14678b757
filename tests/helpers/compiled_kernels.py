"""Triton kernels, compiled ahead of time for GPUs that are not there."""

import contextlib
import dataclasses
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
    *,
    capability: int,
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


@dataclasses.dataclass
class Launch:
    """A kernel as it was compiled, and what it was launched with."""

    compiled: Any
    arguments: dict[str, Any]
    """Tensors and numbers by name."""
    grid: tuple[int, int]

    @functools.cached_property
    def kernel(self) -> ptx.Kernel:
        return ptx.parse(self.compiled.asm["ptx"])

    def run(self, kernel: ptx.Kernel | None = None) -> Counter[str]:
        """Executes this kernel, or another one, and returns the faults."""
        shared_bytes = self.compiled.metadata.shared
        return execute(kernel or self.kernel, self.arguments, self.grid, shared_bytes=shared_bytes)

    def run_aside(self, kernel: ptx.Kernel | None = None) -> tuple[dict[str, Tensor], Counter[str]]:
        """Does so with copies of the tensors, which are returned by name."""
        tensors = {name: x.clone() for name, x in self.arguments.items() if isinstance(x, Tensor)}
        again = dataclasses.replace(self, arguments=self.arguments | tensors)
        return tensors, again.run(kernel or self.kernel)


class _PtxKernel:
    """Stands in for a Triton kernel: a launch compiles it for a GPU and executes its PTX."""

    def __init__(self, kernel: Any, compile_kernel: Any, launches: list[Launch] | None) -> None:
        self._kernel, self._compile, self._launches = kernel, compile_kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self._launch, (*grid, 1)[:2])

    def _launch(self, grid: tuple[int, int], *values: Any, **named: Any) -> None:
        arguments = dict(zip(self._kernel.arg_names, values, strict=False))
        arguments |= {name: named.pop(name) for name in self._kernel.arg_names if name in named}
        constants = {
            one.name: arguments.pop(one.name)
            for one in self._kernel.params
            if one.is_constexpr or repr(arguments[one.name]) in ("1", "None")  # specialised for
        }
        compiled = self._compile(
            self._kernel,
            types={name: _type_of(value) for name, value in arguments.items()},
            constants=constants,
            multiples_of_16=tuple(
                name
                for name, one in arguments.items()
                if isinstance(one, int) and not one % 16
                if name not in self._kernel.do_not_specialize
            ),
            options=named,
        )
        launch = Launch(compiled, arguments, grid)
        if self._launches is not None:
            self._launches.append(launch)
            return
        assert not launch.run(), self._kernel.__name__


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32" if isinstance(value, int) else "fp32"


@contextlib.contextmanager
def as_ptx(
    folder: Path, *, capability: int = 90, launches: list[Launch] | None = None
) -> Iterator[None]:
    """Inside, our kernels are compiled for a GPU, and their PTX is executed on the CPU.

    With a list, launches are appended to it and not executed: their results are arbitrary.
    """
    from unicl_fast.models import window_attention
    from unicl_fast.objectives import loss_triton

    options, blocks = window_attention.launch_options, loss_triton.blocks_for
    compile_kernel = functools.partial(compile_ahead, capability=capability, folder=folder)

    def options_there(dtype: torch.dtype, *, backward: bool, **_: int) -> dict[str, int]:
        return options(dtype, capability=capability, backward=backward)

    def blocks_there(dtype: torch.dtype, **_: int) -> loss_triton.Blocks:
        return blocks(dtype, capability=capability)

    with (
        mock.patch.object(window_attention, "launch_options", options_there),
        mock.patch.object(loss_triton, "blocks_for", blocks_there),
        contextlib.ExitStack() as stack,
    ):
        for module, names in (
            (window_attention, ("_forward", "_backward", "_sum_table")),
            (loss_triton, ("_sum_exps", "_logit_gradients")),
        ):
            for name in names:
                kernel = _PtxKernel(getattr(module, name), compile_kernel, launches)
                stack.enter_context(mock.patch.object(module, name, kernel))
        yield


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
