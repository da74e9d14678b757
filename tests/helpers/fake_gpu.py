"""Steps on a GPU that is not there: tensors have shapes and the device `cuda:0`, and no memory.

Torch's FakeTensorMode knows the results of all GPU operators. On a machine without a GPU it cannot
back-propagate, since the autograd engine asks the device for its streams: a few lines of C++
answer for it. `Kernels` counts what a step does, and refuses operations for which the host waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import include_paths, library_paths
from torch.utils.flop_counter import flop_registry

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig
from unicl_fast.models import precision
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.trainer import Trainer

GPU = torch.device("cuda:0")
# NVIDIA's data sheet of the H100 SXM: memory, and products of 16 bits without sparsity.
H100_BYTES, H100_OPERATIONS = 3.35e12, 989e12

_STAND_IN = """
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <cstring>
#define final  // Guard is a class of it
#include <c10/core/impl/FakeGuardImpl.h>
#undef final

namespace {
struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const { return true; }  // overrides nothing in torch 2.6
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
};
struct Guard : c10::impl::FakeGuardImpl<c10::DeviceType::CUDA> {
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
};
const Hooks hooks;
const Guard guard;
const c10::impl::DeviceGuardImplInterface* real_guard;
auto& entry = c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
void* real_table;
}

// The hooks have no fields, and torch asks for them once: their table of functions is exchanged.
extern "C" void begin() {
  void* found = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  std::memcpy(&real_table, found, sizeof(void*));
  std::memcpy(found, &hooks, sizeof(void*));
  real_guard = entry.exchange(&guard);
}

extern "C" void end() {
  void* found = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  std::memcpy(found, &real_table, sizeof(void*));
  entry.store(real_guard);
}
"""


def build_stand_in(folder: Path) -> ctypes.CDLL:
    """Compiles the stand-in for the device, in about three seconds."""
    source, library = folder / "stand_in.cpp", folder / "stand_in.so"
    source.write_text(_STAND_IN)
    paths = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    compiler = os.environ.get("CXX", "g++")
    how = ["-std=c++20", "-O0", "-shared", "-fPIC", *paths]
    how += [f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}"]  # 0 in torch 2.6
    subprocess.run(
        [compiler, "-o", library, source, *how, "-ltorch_cpu", "-lc10"], check=True, timeout=120
    )
    return ctypes.CDLL(str(library))


@contextlib.contextmanager
def fake_gpu(stand_in: ctypes.CDLL) -> Iterator[FakeTensorMode]:
    """Inside, tensors are fake and may lie on `cuda:0`: an H100, as far as torch is asked."""
    patches = [
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.version.cuda", "12.8"),
        mock.patch("torch.backends.cudnn.version", return_value=None),  # texts: FlashAttention
        mock.patch("torch.cuda.Event", FakeEvent),
        mock.patch("torch.cuda.current_stream", torch.device),
        # lists of tensors go to one kernel by their exact type
        mock.patch("torch.utils._foreach_utils._foreach_supported_types", [Tensor, FakeTensor]),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _fused_attention),
        mock.patch("torch.nn.Module._apply", _apply),
        # copies of a model are of the same mode
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        precision._lines.cache_clear()
        stack.callback(precision._lines.cache_clear)
        if not torch.cuda.is_available():
            # The first backward pass starts a thread for each device that there is: none, now. So
            # this thread does all the work.
            torch.ones(1, requires_grad=True).backward()
            stand_in.begin()
            stack.callback(stand_in.end)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield stack.enter_context(FakeTensorMode())


class FakeEvent:
    """A CUDA event of a device whose work is done as soon as it is asked for.

    Its times are seconds of `FakeEvent.now`, which a test sets.
    """

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.num_waits = 0

    def record(self, stream: object) -> None:
        assert stream == GPU  # see `fake_gpu`
        self.seconds = FakeEvent.now

    def synchronize(self) -> None:
        self.num_waits += 1

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3 * (other.seconds - self.seconds)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, **options: object
) -> Tensor:
    """The kernel that CUDA uses; without it, torch would trace its steps one by one."""
    assert not any(options.values()), options
    if query.dtype in (torch.float16, torch.bfloat16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, is_causal)[0]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, None, True, 0.0, is_causal)[0]


def _apply(module: torch.nn.Module, function, recurse: bool = True) -> torch.nn.Module:
    """Makes new parameters; torch would exchange fake ones in place, which it then cannot."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                with torch.no_grad():
                    made = function(value)
                part._parameters[name] = torch.nn.Parameter(made, value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = function(value)
    return module


def fake_trainer(
    mode: FakeTensorMode, config: TrainConfig, batch: Batch, **options: Any
) -> tuple[Trainer, Batch]:
    """A trainer on the GPU, and the batch on a host of fake tensors; call it inside `fake_gpu`."""
    # nobody reads the weights: meta tensors cost no time
    with unset_fake_temporarily(), torch.device("meta"):
        model = build_model(config)
    model._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU))
    batch = _faked(mode, batch)
    options |= {"model": model, "device": GPU, "progress": False}
    return make_trainer(config, ListLoader([batch]), **options), batch


def _faked(mode: FakeTensorMode, value: Any) -> Any:
    """A tensor, or a dataclass of tensors and of others like it, without memory."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if not is_dataclass(value):
        return value
    return replace(
        value, **{one.name: _faked(mode, getattr(value, one.name)) for one in fields(value)}
    )


class HostWaitsError(AssertionError):
    """The host would wait for the device here; the traceback names the line."""


_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_OVERWRITING = {"copy_", "zero_", "fill_"}
_READS_ROWS = {"embedding", "index", "index_select", "gather"}
"""Operators that read as many rows of their first tensor as they give."""


class Kernels(TorchDispatchMode):
    """Counts operators that launch kernels and their bytes, and copies; raises `HostWaitsError`.

    An operator counts as one launch, though some make several and the fused optimizer one for each
    few dozen weights. All tensors that it reads or writes count, each once.
    """

    def __init__(self, *, may_wait: bool = False) -> None:
        super().__init__()
        self._may_wait = may_wait
        self.launches: Counter[str] = Counter()
        self.num_bytes = 0
        self.seconds = 0.0
        """A roofline: each operator lasts as long as its bytes or its products on an H100."""
        self.shapes: set[tuple[int, ...]] = set()
        """Of all tensors that were made."""
        self.copies_to_device: Counter[str] = Counter()
        self._pinned: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "prim":  # a question about a tensor
            return function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        if name == "_pin_memory":  # fake tensors have no such memory
            copy = args[0].clone()
            self._pinned.add(copy.untyped_storage()._cdata)
            return copy
        inputs = tensors_in((args, kwargs))
        from_device = any(tensor.device.type == "cuda" for tensor in inputs)
        if name == "_local_scalar_dense" and from_device:
            raise HostWaitsError(f"{name} reads a value from the device")
        try:
            result = function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostWaitsError(f"{name}: the host needs values to go on") from error
        outputs = tensors_in(result)
        if name in ("copy_", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type != outputs[0].device.type:
                self._check_crossing(source, non_blocking=kwargs.get("non_blocking", args[2:3]))
                return result
        num_bytes = self._count(
            name, inputs, outputs, written=written_by(function._schema, args, kwargs)
        )
        count = flop_registry.get(function._overloadpacket)
        products = count(*args, **kwargs, out_val=result) if count and num_bytes else 0
        self.seconds += max(num_bytes / H100_BYTES, products / H100_OPERATIONS)
        return result

    def _check_crossing(self, source: Tensor, *, non_blocking: object) -> None:
        shape = list(source.shape)
        if source.device.type == "cuda":
            if non_blocking:  # into pinned memory; who reads it waits for an event
                return
            raise HostWaitsError(f"{shape} is copied from the device to the host")
        if not non_blocking and not self._may_wait:
            raise HostWaitsError(
                f"{shape} is copied to the device, and the host waits until it is there: make it "
                "on the device, or copy pinned memory with non_blocking=True"
            )
        is_pinned = source.untyped_storage()._cdata in self._pinned
        self.copies_to_device["pinned" if is_pinned else "pageable"] += 1

    def _count(
        self, name: str, inputs: list[Tensor], outputs: list[Tensor], *, written: list[Tensor]
    ) -> int:
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        made = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
        on_device = any(tensor.device.type == "cuda" for tensor in [*inputs, *outputs])
        if not on_device or not (made or written) or name in _ALLOCATIONS:
            return 0
        self.launches[name] += 1
        self.shapes |= {tuple(tensor.shape) for tensor in made}
        read = inputs[1:] if name in _OVERWRITING else inputs
        if name in _READS_ROWS:
            read = [*outputs, *inputs[1:]]
        num_bytes = sum(map(_bytes_of, [*read, *written, *made]))
        self.num_bytes += num_bytes
        return num_bytes


def tensors_in(values: object) -> list[Tensor]:
    """The tensors in nested values, each once."""
    return list(
        {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}.values()
    )


def written_by(schema: torch._C.FunctionSchema, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that an operator changes."""
    names = [argument.name for argument in schema.arguments]
    values = dict(zip(names, args, strict=False)) | kwargs
    changed = [one.name for one in schema.arguments if one.alias_info and one.alias_info.is_write]
    return tensors_in([values.get(name) for name in changed])


def _bytes_of(tensor: Tensor) -> int:
    """Bytes on the device; broadcast elements count once."""
    if tensor.device.type != "cuda":
        return 0
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size()
