"""Runs the PTX of our Triton kernels on the CPU, and looks for what a GPU may forgive.

The threads of a block run in lock step as lanes of NumPy arrays; blocks run one after another. What
is asynchronous (`cp.async`, `wgmma`) happens as late as PTX allows: at its wait. Besides the values
in memory a run finds

- accesses outside of tensors and of shared memory, misaligned ones, and reads of unwritten bytes;
- bytes of shared memory that two warps touch without a barrier between them;
- shared memory that tensor cores read by their own proxy before a fence, or while it is written;
- registers of a `wgmma` that are touched before its wait, or not fenced before it.

It knows the instructions that our kernels and Inductor's have, and raises NotImplementedError for
others.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
KINDS: dict[str, Any] = {
    **{f"{sign}{bits}": np.dtype(f"u{bits // 8}") for sign in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype("u2"),
}
WARP, GROUP = 32, 128
TF32 = np.uint32(0xFFFFE000)
BASE = 1 << 40  # the address of global memory
_ROUNDINGS = {"rm": "fma", "sat": "cvt", **dict.fromkeys(("rz", "rp", "rni", "rmi", "rpi"), "")}
"""Those that change a result, and the only instruction that may have them here."""
_OP = re.compile(r"(?:@(!?)(\S+)\s+)?([\w.:]+)\s*(.*)", re.S)


@dataclasses.dataclass(frozen=True)
class Instruction:
    op: str
    parts: list[str]
    args: list[str]
    guard: str
    negated: bool
    text: str

    @property
    def kind(self) -> str:
        return self.parts[-1]

    @property
    def waits(self) -> bool:
        """Whether a kernel without it might work now and then: a barrier, a fence or a wait."""
        starts = ("bar.sync", "fence.", "cp.async.wait", "wgmma.wait", "wgmma.fence")
        return self.op.startswith(starts)


@dataclasses.dataclass(frozen=True)
class Kernel:
    params: list[str]
    code: list[Instruction]
    labels: dict[str, int]
    num_threads: int

    def without(self, number: int) -> Kernel:
        """The same without one instruction."""
        nothing = Instruction("nothing", ["nothing"], [], "", False, "")
        code = [*self.code[:number], nothing, *self.code[number + 1 :]]
        return dataclasses.replace(self, code=code)


def parse(text: str) -> Kernel:
    """Reads the only kernel of a module."""
    text = re.sub(r"//.*", "", text)
    head = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)(.*?)\{(.*)", text, re.S)
    assert head is not None
    params, directives, body = head.groups()
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
    assert threads is not None
    body = re.sub(r"^\s*\.(loc|file|section)\b.*$", "", body, flags=re.M)
    body = re.sub(r"^\s*(\$[\w$]+):", r"label \1;", body, flags=re.M)
    code: list[Instruction] = []
    labels = {}
    for statement in body.split(";"):
        statement = " ".join(statement.lstrip("{} \t\n").split())
        if statement.startswith("label "):
            labels[statement.removeprefix("label ")] = len(code)
        elif statement and not statement.startswith("."):
            found = _OP.fullmatch(statement)
            assert found is not None, statement
            negated, guard, op, rest = found.groups()
            args = [one.strip() for one in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,{\[]+", rest)]
            args = [one for one in args if one]
            parts = op.split(".")
            if any(_ROUNDINGS.get(part, parts[0]) != parts[0] for part in parts):
                raise NotImplementedError(statement)
            code.append(Instruction(op, parts, args, guard or "", bool(negated), statement))
        if statement.startswith(".section"):
            break
    names = re.findall(r"(\w+)\s*(?:,|$)", " ".join(params.split()))
    return Kernel(names, code, labels, int(threads[1]))


class Memory:
    """Global memory with gaps between tensors."""

    def __init__(self, size: int = 1 << 28) -> None:
        self.data, self.valid = np.zeros(size, np.uint8), np.zeros(size, bool)
        self._end = 4096

    def put(self, array: Array) -> int:
        """Copies an array to memory and returns its address."""
        start, self._end = self._end, -(-(self._end + array.nbytes + 512) // 256) * 256
        self.data[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
        self.valid[start : start + array.nbytes] = True
        return BASE + start

    def get(self, address: int, like: Array) -> Array:
        start = address - BASE
        found = self.data[start : start + like.nbytes]
        return found.view(like.dtype).reshape(like.shape).copy()


def run(
    kernel: Kernel,
    memory: Memory,
    arguments: Sequence[float],
    *,
    grid: tuple[int, int],
    shared_bytes: int,
) -> Counter[str]:
    """Runs all blocks of a launch and returns the faults: how often each was seen."""
    faults: Counter[str] = Counter()
    for y in range(grid[1]):
        for x in range(grid[0]):
            block = Block(kernel, memory, arguments, shared_bytes, faults)
            ids = {"%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": 0}
            ids |= {"%nctaid.x": grid[0], "%nctaid.y": grid[1], "%nctaid.z": 1}
            block.registers |= {name: np.array([value], np.uint32) for name, value in ids.items()}
            block.run()
    return faults


@dataclasses.dataclass
class Product:
    """A `wgmma` in flight."""

    kind: str
    results: list[str]
    left: list[str]
    """Registers, or none where the left matrix is in shared memory."""
    shared: list[Array]
    """Addresses of the left matrix, if it is there, and of the right one: [group rows k]."""
    adds: Array
    signs: tuple[int, int]


def _bits(value: Array) -> Array:
    return value if value.dtype == bool else value.view(np.dtype(f"u{value.dtype.itemsize}"))


def _from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bf16(value: Array) -> Array:
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def _halves(bits: Array) -> tuple[Array, Array]:
    """The lower and the upper number of two of bf16 in a word, in fp32."""
    return _from_bf16(bits & np.uint32(0xFFFF)), _from_bf16(bits >> np.uint32(16))


def _names(operand: str) -> list[str]:
    return re.findall(r"[^{},\s]+", operand)


@functools.cache
def _literal(text: str) -> Array:
    if text in ("true", "false"):
        return np.array([text == "true"])
    if re.match(r"0[fdFD][0-9a-fA-F]", text):
        return np.array([int(text[2:], 16)], np.uint64)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return np.array([int(text.rstrip("U"), 0) & (2**64 - 1)], np.uint64)
    return np.zeros(1, np.uint64)  # shared memory's name, or a register that was never written


class Block:
    """The threads of one block."""

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        arguments: Sequence[float],
        shared_bytes: int,
        faults: Counter[str],
    ) -> None:
        self.kernel, self.memory, self.faults = kernel, memory, faults
        self.lanes = np.arange(kernel.num_threads)
        self.warps, self.in_warp = self.lanes // WARP, self.lanes % WARP
        self.registers: dict[str, Array] = {
            "%tid.x": self.lanes.astype(np.uint32),
            "%laneid": self.in_warp.astype(np.uint32),
        }
        self.arguments = dict(zip(kernel.params, arguments, strict=False))
        self.shared = np.zeros(shared_bytes, np.uint8)
        self.written = np.zeros(shared_bytes, bool)
        self.writers = np.full(shared_bytes, -1, np.int8)  # warps since the last barrier
        self.readers = np.zeros(shared_bytes, np.uint32)  # warps since then, a bit for each
        self.unfenced = np.zeros(shared_bytes, bool)
        self.copies: list[list[tuple[Array, Array, int, Array, Array]]] = [[]]
        self.products: list[list[Product]] = [[]]
        self.results: Counter[str] = Counter()  # registers of products in flight
        self.operands: Counter[str] = Counter()
        self.touched = {""}  # registers that were read or written since the last fence of products
        self.active = np.ones(kernel.num_threads, bool)
        self.asleep: dict[int, Array] = {}  # threads that wait for the others at an instruction
        self.guard: Array | None = None
        self.now = ""

    def run(self) -> None:
        position, code = 0, self.kernel.code
        with np.errstate(all="ignore"):
            while position < len(code):
                one = code[position]
                if position in self.asleep:
                    self.active = self.active | self.asleep.pop(position)
                self.now, self.guard = one.text, None if self.active.all() else self.active
                if one.guard:
                    guard = self.lanewise(one.guard, "pred") ^ one.negated
                    self.guard = guard & self.active
                position += 1
                if one.parts[0] == "bra":
                    position = self.branch(position, self.kernel.labels[one.args[0]])
                    continue
                if one.parts[0] == "ret":
                    if self.mask.any() and not self.mask.all():
                        raise NotImplementedError(f"some threads end: {one.text}")
                    position = len(code) if self.mask.all() else position
                    continue
                simple = _SIMPLE.get(one.parts[0])
                if simple is not None and one.kind != "bf16":
                    values = [self.value(name, one.kind) for name in one.args[1:]]
                    self.set(one.args[0], simple(*values))
                else:
                    method = getattr(self, f"_{one.parts[0]}", None)
                    if method is None:
                        raise NotImplementedError(one.text)
                    method(one)
        if any(self.products) or any(self.copies):
            self.fault("ends before what is asynchronous")

    def branch(self, position: int, target: int) -> int:
        """Where the block continues: of threads that part, those that are furthest behind."""
        taken = self.mask
        if taken.all():
            return target
        for place, threads in ((target, taken), (position, self.active & ~taken)):
            if threads.any():
                self.asleep[place] = self.asleep.get(place, False) | threads
        self.active = self.asleep.pop(first := min(self.asleep))
        return first

    @property
    def mask(self) -> Array:
        return np.ones(len(self.lanes), bool) if self.guard is None else self.guard

    def fault(self, what: str) -> None:
        self.faults[f"{what}: {self.now[:100]}"] += 1

    # Registers.

    def raw(self, name: str) -> Array:
        if self.results[name]:
            self.fault("reads a register that a product in flight writes")
        found = self.registers.get(name)
        if found is None:
            return _literal(name)
        self.touched.add(name)
        return found

    def value(self, name: str, kind: str) -> Array:
        """An operand of a kind: one value, or one for each lane."""
        if kind == "pred":
            if name.startswith("!"):
                return ~self.value(name[1:], kind)
            return self.raw(name).astype(bool)
        dtype = KINDS[kind]
        return self.raw(name).astype(f"u{dtype.itemsize}", copy=False).view(dtype)

    def lanewise(self, name: str, kind: str) -> Array:
        return np.broadcast_to(self.value(name, kind), len(self.lanes))

    def set(self, name: str, value: Array) -> None:
        if name == "_":
            return
        if self.results[name] or self.operands[name]:
            self.fault("writes a register that a product in flight uses")
        self.touched.add(name)
        bits = np.broadcast_to(_bits(np.atleast_1d(value)), len(self.lanes))
        if self.guard is not None and not self.guard.all():
            old = self.registers.get(name)
            bits = np.where(self.guard, bits, np.zeros(1, bits.dtype) if old is None else old)
        self.registers[name] = bits

    # Memory.

    def address(self, operand: str) -> Array:
        base, sign, offset = re.fullmatch(
            r"\[\s*([^\s+-]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]", operand
        ).groups()  # type: ignore[union-attr]
        start = np.broadcast_to(self.raw(base), len(self.lanes)).astype(np.int64)
        return start + (int(f"{sign}1") * int(offset, 0) if sign else 0)

    def bytes_at(self, start: Array, count: int, mask: Array, *, shared: bool) -> Array:
        """Indices [lanes count] of bytes in memory, after checks; those of a fault become 0."""
        index = (start[mask] - (0 if shared else BASE))[:, None] + np.arange(count)
        size = len(self.shared) if shared else len(self.memory.data)
        inside = (index >= 0) & (index < size)
        if not shared:
            inside &= self.memory.valid[np.where(inside, index, 0)]
        if not inside.all():
            self.fault(f"outside of {'shared memory' if shared else 'tensors'}")
        if (start[mask] % count).any():
            self.fault("misaligned")
        return np.where(inside, index, 0)

    def load_global(self, start: Array, count: int, mask: Array) -> Array:
        data = np.zeros((len(self.lanes), count), np.uint8)
        data[mask] = self.memory.data[self.bytes_at(start, count, mask, shared=False)]
        return data

    def load_shared(self, start: Array, count: int, mask: Array) -> Array:
        data = np.zeros((len(self.lanes), count), np.uint8)
        index, warps = self.bytes_at(start, count, mask, shared=True), self.warps[mask][:, None]
        data[mask] = self.shared[index]
        if not self.written[index].all():
            self.fault("reads shared memory that was never written")
        if ((self.writers[index] >= 0) & (self.writers[index] != warps)).any():
            self.fault("reads what another warp wrote since the last barrier")
        bits = np.broadcast_to(np.uint32(1) << warps.astype(np.uint32), index.shape)
        np.bitwise_or.at(self.readers, index, bits)
        return data

    def store_shared(self, start: Array, data: Array, mask: Array) -> None:
        index, warps = self.bytes_at(start, data.shape[1], mask, shared=True), self.warps[mask]
        self.check_overwriting(index, warps[:, None])
        self.writers[index] = np.broadcast_to(warps[:, None], index.shape)
        self.unfenced[index] = self.written[index] = True
        self.shared[index] = data[mask]

    def check_overwriting(self, index: Array, warps: Array) -> None:
        if ((self.writers[index] >= 0) & (self.writers[index] != warps)).any():
            self.fault("overwrites what another warp wrote since the last barrier")
        others = ~(np.uint32(1) << warps.astype(np.uint32))
        if (self.readers[index] & others).any():
            self.fault("overwrites what another warp read since the last barrier")
        for product in (one for group in self.products for one in group):
            if any(np.isin(index, matrix).any() for matrix in product.shared):
                self.fault("overwrites what a product in flight reads")

    def _ld(self, one: Instruction) -> None:
        kind, names = one.kind, _names(one.args[0])
        size = KINDS[kind].itemsize
        if "param" in one.parts:
            value = self.arguments.get(one.args[1].strip("[] "), 0)
            wide = np.array([value], np.float32 if isinstance(value, float) else np.int64)
            self.set(names[0], wide if isinstance(value, float) else wide.astype(f"u{size}"))
            return
        load = self.load_shared if "shared" in one.op else self.load_global
        data = load(self.address(one.args[1]), size * len(names), self.mask)
        columns = np.ascontiguousarray(data).view(KINDS[kind])
        for number, name in enumerate(names):
            self.set(name, columns[:, number])

    def _st(self, one: Instruction) -> None:
        names, size = _names(one.args[1]), KINDS[one.kind].itemsize
        columns = [self.lanewise(name, f"b{8 * size}") for name in names]
        data = np.stack(columns, axis=1).view(np.uint8)
        start, mask = self.address(one.args[0]), self.mask
        if "shared" in one.op:
            self.store_shared(start, data, mask)
        else:
            index = self.bytes_at(start, data.shape[1], mask, shared=False)
            self.memory.data[index] = data[mask]

    def _atom(self, one: Instruction) -> None:
        """Adds to global memory, one lane after another; `red` does not want what was there."""
        if "add" not in one.parts or "global" not in one.parts:
            raise NotImplementedError(one.text)
        place, added = one.args[-2:]
        values, mask = self.lanewise(added, one.kind), self.mask
        index = self.bytes_at(self.address(place), values.itemsize, mask, shared=False)[:, 0]
        numbers, old = self.memory.data.view(values.dtype), np.zeros_like(values)
        for lane, at in zip(np.flatnonzero(mask), index // values.itemsize, strict=True):
            old[lane] = numbers[at]
            numbers[at] += values[lane]
        if one.parts[0] == "atom":
            self.set(one.args[0], old)

    _red = _atom

    def _cp(self, one: Instruction) -> None:
        """Copies land at their wait; `copies` ends with the group that is not committed yet."""
        if "commit_group" in one.parts:
            self.copies.append([])
        elif "wait_group" in one.parts or "wait_all" in one.parts:
            keep = int(one.args[0], 0) if one.args else 0
            while len(self.copies) > keep + 1:
                for start, source, count, sizes, mask in self.copies.pop(0):
                    data = np.zeros((len(self.lanes), count), np.uint8)
                    for size in {*sizes[mask].tolist()} - {0}:
                        now = mask & (sizes == size)
                        data[now, :size] = self.load_global(source, size, now)[now]
                    self.store_shared(start, data, mask)
        elif "async" in one.parts and "bulk" not in one.parts:
            start, source, mask = *map(self.address, one.args[:2]), self.mask
            count = int(one.args[2], 0)
            sizes = self.lanewise(one.args[3] if len(one.args) > 3 else str(count), "u32")
            index = self.bytes_at(start, count, mask, shared=True)
            self.check_overwriting(index, self.warps[mask][:, None])
            self.copies[-1].append((start, source, count, sizes, mask))
        else:
            raise NotImplementedError(one.text)

    # Warps and blocks.

    def _bar(self, one: Instruction) -> None:
        if "warp" not in one.parts:
            if not self.mask.all():
                self.fault("a barrier without some threads")
            self.writers[:], self.readers[:] = -1, 0

    def _fence(self, one: Instruction) -> None:
        if "proxy" in one.parts:
            self.unfenced[:] = False

    def _nothing(self, one: Instruction) -> None:
        pass

    _createpolicy = _nothing  # of caches

    def _shfl(self, one: Instruction) -> None:
        value, by = (self.lanewise(name, "b32") for name in one.args[1:3])
        source = {"bfly": self.in_warp ^ by, "idx": by}[one.parts[2]]
        self.set(one.args[0], value[self.lanes - self.in_warp + source])

    def _ldmatrix(self, one: Instruction) -> None:
        """Loads 8 x 8 numbers of 16 bits for each register; lane i of 8 names their row i."""
        names = _names(one.args[0])
        used = self.mask & (self.in_warp < 8 * len(names))
        rows = self.load_shared(self.address(one.args[1]), 16, used).view(np.uint16)
        row, column = self.in_warp // 4, self.in_warp % 4 * 2
        for number, name in enumerate(names):
            first = self.lanes - self.in_warp + 8 * number
            if "trans" in one.parts:
                pair = rows[first + column, row], rows[first + column + 1, row]
            else:
                pair = rows[first + row, column], rows[first + row, column + 1]
            self.set(name, pair[0].astype(np.uint32) | pair[1].astype(np.uint32) << np.uint32(16))

    def _stmatrix(self, one: Instruction) -> None:
        names = _names(one.args[1])
        rows = np.zeros((len(self.lanes), 8), np.uint16)
        row, column = self.in_warp // 4, self.in_warp % 4 * 2
        for number, name in enumerate(names):
            value = np.ascontiguousarray(self.lanewise(name, "b32")).view(np.uint16)
            first = self.lanes - self.in_warp + 8 * number
            for half in range(2):
                rows[first + row, column + half] = value[half::2]
        used = self.mask & (self.in_warp < 8 * len(names))
        self.store_shared(self.address(one.args[0]), rows.view(np.uint8), used)

    # Tensor cores.

    def _wgmma(self, one: Instruction) -> None:
        """Computes at the wait; `products` ends with the group that is not committed yet."""
        if "fence" in one.parts:
            self.touched.clear()
        elif "commit_group" in one.parts:
            self.products.append([])
        elif "wait_group" in one.parts:
            while len(self.products) > int(one.args[0], 0) + 1:
                for product in self.products.pop(0):
                    self.results.subtract(product.results)
                    self.operands.subtract(product.left)
                    self.finish(product)
        else:
            self.begin(one)

    def begin(self, one: Instruction) -> None:
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", one.parts[4])
        assert shape is not None
        width, depth = map(int, shape.groups())
        if (depth, one.kind) not in ((16, "bf16"), (8, "tf32")):
            raise NotImplementedError(one.text)
        left = _names(one.args[1]) if one.args[1].startswith("{") else []
        signs = int(one.args[4]), int(one.args[5])
        transposed = [flag == "1" for flag in (["0"] * len(left))[:1] + one.args[6:]] + [False] * 2
        shared = [] if left else [self.matrix(one.args[1], 64, depth, transposed[0])]
        shared.append(self.matrix(one.args[2], width, depth, transposed[1]))
        flag = re.fullmatch(r"(\S+?)(\s*!=\s*0)?", one.args[3])
        assert flag is not None
        adds = np.broadcast_to(self.raw(flag[1]).astype(bool), len(self.lanes))
        product = Product(one.kind, _names(one.args[0]), left, shared, adds, signs)
        used = np.concatenate([matrix.ravel() for matrix in shared])
        used = (used[:, None] + np.arange(4 if one.kind == "tf32" else 2)).ravel()
        if not self.written[used].all():
            self.fault("tensor cores read shared memory that was never written")
        if self.unfenced[used].any():
            self.fault("tensor cores read what was written without a fence between the proxies")
        if (self.writers[used] >= 0).any():
            self.fault("tensor cores read what was written since the last barrier")
        if self.touched & {"", *product.results, *left}:  # "" until the first fence
            self.fault("a product's registers were touched since the last fence of products")
        if any(self.operands[name] for name in product.results):
            self.fault("a product writes registers that another one in flight reads")
        if any(self.results[name] for name in left):
            self.fault("a product reads registers that another one in flight writes")
        self.results.update(product.results)
        self.operands.update(left)
        self.products[-1].append(product)

    def _mma(self, one: Instruction) -> None:
        """Computes at once: 16 x 8 of each warp, from 16 x 16 and 16 x 8 numbers of 16 bits."""
        if "m16n8k16" not in one.parts or one.parts[-2] != "bf16":
            raise NotImplementedError(one.text)
        results, left_names, right_names, added = map(_names, one.args)
        row, pair = self.in_warp // 4, self.in_warp % 4 * 2
        left = np.zeros((len(self.lanes) // WARP, 16, 16), np.float32)
        right = np.zeros((len(self.lanes) // WARP, 16, 8), np.float32)
        for number, name in enumerate(left_names):
            lower, upper = _halves(self.lanewise(name, "b32"))
            rows, column = row + number % 2 * 8, pair + number // 2 * 8
            left[self.warps, rows, column], left[self.warps, rows, column + 1] = lower, upper
        for number, name in enumerate(right_names):
            lower, upper = _halves(self.lanewise(name, "b32"))
            k = pair + 8 * number
            right[self.warps, k, row], right[self.warps, k + 1, row] = lower, upper
        product = left @ right
        for number, (name, old) in enumerate(zip(results, added, strict=True)):
            new = product[self.warps, row + number // 2 * 8, pair + number % 2]
            self.set(name, (new + self.value(old, "f32")).astype(np.float32))

    def matrix(self, operand: str, rows: int, depth: int, transposed: bool) -> Array:
        """Addresses [group rows depth] of a matrix's numbers, from descriptors of shared memory."""
        words = self.lanewise(operand, "u64").reshape(-1, GROUP)
        if (words != words[:, :1]).any():
            self.fault("a descriptor differs within a group of warps")
        descriptor = words[:, :1, None].astype(np.int64)
        start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        swizzle = int(words[0, 0]) >> 62
        width = (16, 128, 64, 32)[swizzle]
        size = 32 // depth
        i, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
        if transposed:
            span = width // size
            at = i // span * leading + i % span * size + k // 8 * stride + k % 8 * width
        elif swizzle:
            at = i // 8 * stride + i % 8 * width + k * size
        else:
            at = i // 8 * stride + i % 8 * 16 + k * size // 16 * leading + k * size % 16
        at = at + start
        at = at ^ (at >> 3 & (0, 0x70, 0x30, 0x10)[swizzle])
        if at.max() + size > len(self.shared):
            self.fault("tensor cores read outside of shared memory")
            at = np.minimum(at, len(self.shared) - size)
        return at

    def finish(self, product: Product) -> None:
        right = self.numbers(product.shared[-1], product.kind)
        if product.left:
            left = self.fragments(product)
        else:
            left = self.numbers(product.shared[0], product.kind)
        result = (left * np.float32(product.signs[0])) @ (
            right * np.float32(product.signs[1])
        ).transpose(0, 2, 1)
        for number, addresses in enumerate(product.shared[-1]):  # each warp has read them all
            self.readers[addresses] |= np.uint32(15 << 4 * number)
        group, row = self.lanes // GROUP, self.warps % 4 * 16 + self.in_warp // 4
        for number, name in enumerate(product.results):
            tile, part = divmod(number, 4)
            column = 8 * tile + self.in_warp % 4 * 2 + part % 2
            new = result[group, row + part // 2 * 8, column]
            old = self.registers.get(name, np.zeros(1, np.uint32)).view(np.float32)
            new = (new + np.where(product.adds, old, np.float32(0))).astype(np.float32)
            self.registers[name] = _bits(new)

    def numbers(self, addresses: Array, kind: str) -> Array:
        if kind == "tf32":
            words = self.shared[addresses[..., None] + np.arange(4)].view(np.uint32)[..., 0]
            return (words & TF32).view(np.float32)
        return _from_bf16(self.shared[addresses[..., None] + np.arange(2)].view(np.uint16)[..., 0])

    def fragments(self, product: Product) -> Array:
        """The left matrix [group 64 depth] from registers."""
        is_tf32 = product.kind == "tf32"
        matrix = np.zeros((len(self.lanes) // GROUP, 64, 8 if is_tf32 else 16), np.float32)
        group, row = self.lanes // GROUP, self.warps % 4 * 16 + self.in_warp // 4
        for number, name in enumerate(product.left):
            bits = self.lanewise(name, "u32")
            rows, column = row + number % 2 * 8, self.in_warp % 4
            if is_tf32:
                matrix[group, rows, column + number // 2 * 4] = (bits & TF32).view(np.float32)
            else:
                column = 2 * column + number // 2 * 8
                lower, upper = _halves(bits)
                matrix[group, rows, column], matrix[group, rows, column + 1] = lower, upper
        return matrix

    # Numbers.

    def _mov(self, one: Instruction) -> None:
        target, source = one.args
        if target.startswith("{"):
            names = _names(target)
            parts = np.ascontiguousarray(self.lanewise(source, one.kind))
            parts = parts.view(f"u{parts.dtype.itemsize // len(names)}").reshape(-1, len(names))
            for number, name in enumerate(names):
                self.set(name, parts[:, number])
        elif source.startswith("{"):
            names = _names(source)
            dtype = KINDS[one.kind]
            part = f"b{8 * dtype.itemsize // len(names)}"
            columns = np.stack([self.lanewise(name, part) for name in names], axis=1)
            self.set(target, columns.view(dtype)[:, 0])
        else:
            self.set(target, self.value(source, one.kind))

    def _add(self, one: Instruction) -> None:
        if one.kind in ("s16x2", "u16x2"):
            pairs = (np.ascontiguousarray(self.value(n, "b32")) for n in one.args[1:])
            self.set(one.args[0], np.add(*(pair.view(np.uint16) for pair in pairs)).view(np.uint32))
        else:
            self.set(one.args[0], np.add(*(self.value(n, one.kind) for n in one.args[1:])))

    def _mul(self, one: Instruction) -> None:
        self.set(one.args[0], self.product(one, *one.args[1:3]))

    def _mad(self, one: Instruction) -> None:
        product = self.product(one, *one.args[1:3])
        kind = f"{one.kind[0]}{8 * product.dtype.itemsize}"
        self.set(one.args[0], product + self.value(one.args[3], kind))

    def product(self, one: Instruction, *names: str) -> Array:
        left, right = (self.value(name, one.kind) for name in names)
        bits = 8 * left.dtype.itemsize
        if "wide" not in one.parts and "hi" not in one.parts:
            return left * right
        wide = np.dtype(f"{left.dtype.kind}{bits // 4}")
        product = left.astype(wide) * right.astype(wide)
        return product if "wide" in one.parts else (product >> bits).astype(left.dtype)

    def _fma(self, one: Instruction) -> None:
        left, right, added = (self.value(name, one.kind) for name in one.args[1:])
        exact = left.astype(np.float64) * right + added
        rounded = exact.astype(left.dtype)
        if "rm" in one.parts:  # towards minus infinity
            below = np.nextafter(rounded, left.dtype.type(-np.inf))
            rounded = np.where(rounded > exact, below, rounded)
        self.set(one.args[0], rounded)

    def _div(self, one: Instruction) -> None:
        left, right = (self.value(name, one.kind) for name in one.args[1:])
        if one.kind.startswith("f"):
            self.set(one.args[0], left / right)
        else:  # towards 0
            right = np.where(right == 0, 1, right).astype(right.dtype)
            self.set(one.args[0], (left - np.fmod(left, right)) // right)

    def _rem(self, one: Instruction) -> None:
        left, right = (self.value(name, one.kind) for name in one.args[1:])
        self.set(one.args[0], np.fmod(left, np.where(right == 0, 1, right).astype(right.dtype)))

    def _max(self, one: Instruction) -> None:
        choose = (np.fmax, np.fmin, np.maximum, np.minimum)[
            (one.parts[0] == "min") + 2 * ("NaN" in one.parts or one.kind[0] != "f")
        ]
        values = [self.value(name, one.kind) for name in one.args[1:]]
        self.set(one.args[0], functools.reduce(choose, values))

    _min = _max

    def _shl(self, one: Instruction) -> None:
        value, by = self.value(one.args[1], one.kind), self.value(one.args[2], "u32")
        bits = 8 * value.dtype.itemsize
        shift = np.left_shift if one.parts[0] == "shl" else np.right_shift
        found = shift(value, np.minimum(by, bits - 1).astype(value.dtype))
        if one.parts[0] == "shl" or one.kind[0] != "s":
            found = np.where(by < bits, found, 0).astype(value.dtype)
        self.set(one.args[0], found)

    _shr = _shl

    def _bfe(self, one: Instruction) -> None:
        value = self.value(one.args[1], one.kind).astype(np.int64)
        at, length = (self.value(name, "u32").astype(np.int64) for name in one.args[2:])
        found = (value >> at) & ((1 << length) - 1)
        if one.kind[0] == "s":
            found -= (found >> np.maximum(length - 1, 0) & 1) << length
        self.set(one.args[0], found.astype(KINDS[one.kind]))

    def _prmt(self, one: Instruction) -> None:
        low, high, choice = (self.value(name, "u32").astype(np.uint64) for name in one.args[1:])
        both, found = high << np.uint64(32) | low, np.zeros(1, np.uint64)
        for number in range(4):
            which = choice >> np.uint64(4 * number) & np.uint64(15)
            byte = both >> (which & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(which & np.uint64(8), sign, byte)
            found = found | byte << np.uint64(8 * number)
        self.set(one.args[0], found.astype(np.uint32))

    def _selp(self, one: Instruction) -> None:
        yes, no = (self.value(name, one.kind) for name in one.args[1:3])
        self.set(one.args[0], np.where(self.value(one.args[3], "pred"), yes, no))

    def _setp(self, one: Instruction) -> None:
        left, right = (self.value(name, one.kind) for name in one.args[1:])
        ordered = ~(np.isnan(left) | np.isnan(right)) if one.kind[0] == "f" else np.True_
        name = one.parts[1]
        if name in ("num", "nan"):
            found = ordered == (name == "num")
        elif name in _COMPARE:
            found = _COMPARE[name](left, right) & ordered
        else:  # ltu, neu and so on: also if one is not a number
            found = _COMPARE[name.removesuffix("u")](left, right) | ~ordered
        self.set(one.args[0], found)

    def _cvt(self, one: Instruction) -> None:
        if "tf32" in one.parts:
            bits = self.value(one.args[1], "u32")
            self.set(one.args[0], (bits + np.uint32(0x1000)) & TF32)  # rna
            return
        target, source = [part for part in one.parts[1:] if part in (*KINDS, "bf16x2")]
        if target == "bf16x2":
            upper, lower = (
                _to_bf16(self.value(name, "f32")).astype(np.uint32) for name in one.args[1:]
            )
            self.set(one.args[0], upper << np.uint32(16) | lower)
            return
        value = self.value(one.args[1], source)
        value = _from_bf16(value) if source == "bf16" else value
        value = np.fmin(np.fmax(value, 0), 1).astype(value.dtype) if "sat" in one.parts else value
        if target == "bf16":
            self.set(one.args[0], _to_bf16(value))
            return
        self.set(one.args[0], value.astype(KINDS[target]))


_SIMPLE: dict[str, Callable[..., Array]] = {
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "popc": lambda value: np.bitwise_count(value).astype(np.uint32),
    "ex2": np.exp2,
    "rsqrt": lambda value: 1 / np.sqrt(value),
}
_COMPARE: dict[str, Callable[..., Array]] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
}
