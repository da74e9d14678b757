"""Inductor's code for a model's blocks, for an H100 that is not there.

Inside `inductor_for_h100` torch.compile lowers graphs as it does on that device, and hands over
the code, which `execute` runs on the CPU: products by torch, Triton's kernels as PTX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import ptx
import torch
from compiled_kernels import SHARED_BYTES, compile_ahead
from torch import Tensor
from torch._inductor import config as inductor
from triton import runtime
from triton.backends.compiler import GPUTarget

_H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=1 << 16,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=80 << 30,
    gcnArchName="",
)


@dataclasses.dataclass
class Lowered:
    """A forward or a backward graph, as Inductor's code for a GPU."""

    code: str
    num_bytes: int
    """That kernels and products read and write, each tensor once for each kernel."""
    is_backward: bool
    shapes: list[Tensor | None]
    """Of the outputs, by tensors of another mode."""
    inputs: list[Tensor] = dataclasses.field(default_factory=list)
    outputs: list[Tensor | None] = dataclasses.field(default_factory=list)
    """Fake ones, of the last call."""

    @property
    def num_kernels(self) -> int:
        """Kernels that Inductor writes; the products are torch's."""
        return self.code.count("async_compile.triton(")

    def call(self, inputs: list[Tensor]) -> list[Tensor | None]:
        """Stands in for the compiled code, which empties the list of its inputs."""
        self.inputs[:] = inputs
        inputs.clear()
        self.outputs[:] = [None if one is None else _alike(one) for one in self.shapes]
        return [*self.outputs]


@contextlib.contextmanager
def inductor_for_h100() -> Iterator[list[Lowered]]:
    """Collects lowered graphs; call it inside `fake_gpu`."""
    found: list[Lowered] = []

    def keep(graph: Any) -> Lowered:
        code, _ = graph.codegen()
        num_bytes, *_ = graph.count_bytes()
        (result,) = (node for node in graph.orig_gm.graph.nodes if node.op == "output")
        shapes = [node and node.meta["val"] for node in result.args[0]]
        found.append(Lowered(code.value, num_bytes, graph.is_backward, shapes))
        return found[-1]

    device = "torch._dynamo.device_interface.CudaInterface"
    answers = {
        f"{device}.is_available": True,
        f"{device}.is_bf16_supported": True,
        f"{device}.is_triton_capable": True,
        f"{device}.get_compute_capability": 90,
        f"{device}.get_device_properties": _H100,
        f"{device}.Worker.current_device": 0,
        f"{device}.Worker.get_device_properties": _H100,
        "torch.cuda.current_device": 0,
        "torch.cuda.get_device_properties": _H100,
        "torch._inductor.utils.get_gpu_shared_memory": SHARED_BYTES[90],
        "torch.utils._triton.has_triton": True,
        "torch._inductor.scheduler.has_triton": True,  # which may have its own name of it
    }
    with contextlib.ExitStack() as stack:
        for place, answer in answers.items():
            stack.enter_context(mock.patch(place, return_value=answer))
        made = "torch._inductor.graph.GraphLowering.compile_to_module"
        stack.enter_context(mock.patch(made, keep))
        # constants are folded by the device's own kernels
        folding = {"joint_graph_constant_folding": False}
        stack.enter_context(inductor.patch(force_disable_caches=True, compile_threads=1, **folding))
        stack.enter_context(_driver_of_h100())
        yield found


@contextlib.contextmanager
def _driver_of_h100() -> Iterator[None]:
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0
    )
    before = runtime.driver._active
    runtime.driver.set_active(driver)
    try:
        yield
    finally:
        runtime.driver._active = before


def execute(code: str, inputs: Sequence[Tensor], *, folder: Path) -> list[Tensor | None]:
    """Runs the code of a graph on tensors of the CPU, and checks the kernels' memory accesses."""

    def compile_kernel(name: str, source: str, **_: Any) -> _Kernel:
        return _Kernel(name, source, folder)

    compiler = SimpleNamespace(triton=compile_kernel, wait=lambda scope: None)
    scope: dict[str, Any] = {}
    with (
        mock.patch("torch._inductor.async_compile.AsyncCompile", return_value=compiler),
        mock.patch("torch._C._cuda_getCurrentRawStream", return_value=0, create=True),
        mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu"),
        mock.patch("torch.cuda._DeviceGuard", contextlib.nullcontext),
        mock.patch("torch.cuda.set_device"),
        _driver_of_h100(),
    ):
        exec(code, scope)
        scope["empty_strided_cuda"] = _empty
        return scope["call"]([*inputs])


def _alike(tensor: Tensor) -> Tensor:
    how = {"dtype": tensor.dtype, "device": tensor.device}
    return torch.empty_strided(tensor.shape, tensor.stride(), **how)


def _empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    made = torch.empty_strided(size, stride, dtype=dtype)
    return made.fill_(torch.nan) if dtype.is_floating_point else made


class _Kernel:
    """A kernel of Inductor's in the first of the forms that it would try."""

    def __init__(self, name: str, source: str, folder: Path) -> None:
        path = folder / f"{name}.py"  # Triton reads the source of its functions from files
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._kernel, self._folder = getattr(module, name), folder

    def run(self, *values: Tensor | int, stream: int) -> None:
        from torch._inductor.runtime.triton_heuristics import GridExpr

        meta, config = self._kernel.triton_meta, self._kernel.configs[0]
        constants = {**meta["constants"], **config.kwargs}
        names = [name for name in meta["signature"] if name not in constants]
        arguments = dict(zip(names, values, strict=True))
        compiled = compile_ahead(
            self._kernel.fn,
            90,
            types=meta["signature"],
            constants=constants,
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            folder=self._folder,
        )
        grid = GridExpr.from_meta(self._kernel.inductor_meta, config).eval_slow(arguments)
        assert grid[2] == 1
        memory, places = ptx.Memory(), {}
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                places[name] = memory.put(_bytes_of(value))
        faults = ptx.run(
            ptx.parse(compiled.asm["ptx"]),
            memory,
            [places.get(name, value) for name, value in arguments.items()],
            grid=grid[:2],
            shared_bytes=compiled.metadata.shared,
        )
        assert not faults, self._kernel.fn.__name__
        for name, place in places.items():
            data = _bytes_of(arguments[name])
            data[:] = memory.get(place, data)


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor from its first element on, with any strides."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    flat = tensor.as_strided((1 + sum((size - 1) * stride for size, stride in steps),), (1,))
    return flat.view(torch.uint8).numpy()
