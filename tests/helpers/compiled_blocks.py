"""Inductor's code for a model's blocks, for an H100 that is not there.

Inside `inductor_for_h100` torch.compile lowers graphs as it does on that device, and hands over
the code, which `execute` runs on the CPU: products by torch, Triton's kernels as PTX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import compiled_kernels
import ptx
import torch
from compiled_kernels import SHARED_BYTES, as_ptx, compile_ahead
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
        # constants are folded by the device's own kernels, and padded products timed there
        off = {"joint_graph_constant_folding": False, "shape_padding": False}
        stack.enter_context(inductor.patch(force_disable_caches=True, compile_threads=1, **off))
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
        _attention_on_cpu(),
        as_ptx(folder),
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


@contextlib.contextmanager
def _attention_on_cpu() -> Iterator[None]:
    """Inside, torch's FlashAttention for GPUs computes on the CPU; texts in a row are causal."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def dense(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> Any:
        mixed, sums = attend(query, key, value, *rest[:2])
        empty, seed, offset = (query.new_empty(size) for size in ((0,), (2,), ()))
        return mixed, sums.contiguous(), empty, empty, 0, 0, seed, offset, empty

    def dense_backward(*inputs: Any, **_: Any) -> Any:
        return differentiate(*inputs[:6], *inputs[10:12])

    def texts(bounds: Tensor, rows: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
        for start, stop in itertools.pairwise(bounds.tolist()):
            if stop > start:
                part = slice(start, stop)  # to [1 heads tokens d]
                yield part, [row[part].transpose(0, 1)[None] for row in rows]

    def packed(*inputs: Any, window_size_right: int, **_: Any) -> Any:
        assert not window_size_right
        query, empty = inputs[0], inputs[0].new_empty(0)
        mixed, sums = torch.empty_like(query), query.new_empty(*query.shape[1::-1]).float()
        for part, rows in texts(inputs[3], inputs[:3]):
            found, sums[:, part] = (one[0] for one in attend(*rows, 0.0, True))
            mixed[part] = found.transpose(0, 1)
        return mixed, sums, empty, empty, empty

    def packed_backward(*inputs: Any, **_: Any) -> Any:
        gradients = [torch.full_like(one, torch.nan) for one in inputs[1:4]]
        for part, rows in texts(inputs[6], inputs[:5]):
            found = differentiate(*rows, inputs[5][None, :, part], 0.0, True)
            for gradient, one in zip(gradients, found, strict=True):
                gradient[part] = one[0].transpose(0, 1)
        return tuple(gradients)

    kernels = {
        "_scaled_dot_product_flash_attention": dense,
        "_scaled_dot_product_flash_attention_backward": dense_backward,
        "_flash_attention_forward": packed,
        "_flash_attention_backward": packed_backward,
    }
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, function in kernels.items():
            library.impl(name, function, "CPU")
        yield


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
            capability=90,
            types=meta["signature"],
            constants=constants,
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            folder=self._folder,
        )
        grid = GridExpr.from_meta(self._kernel.inductor_meta, config).eval_slow(arguments)
        assert grid[2] == 1
        kernel, shared_bytes = ptx.parse(compiled.asm["ptx"]), compiled.metadata.shared
        faults = compiled_kernels.execute(kernel, arguments, grid[:2], shared_bytes=shared_bytes)
        assert not faults, self._kernel.fn.__name__
