"""Triton's CPU interpreter, hardened: what a kernel test says on a CPU should be what a GPU would say.

Left as it is, the interpreter computes on the bit patterns of bfloat16, rounds towards zero, reads any address, fills
masked lanes with zeros, multiplies in full float32 whatever the kernel asked for, and runs programs in one fixed order:
faulty kernels pass. `install()` repairs this inside triton.runtime.interpreter, for tests only; kernels and the library
know nothing of it. Every repair below has a test in test_interpreter.py that fails without it
(FLASHCL_WITHOUT_REPAIR=<name> pytest tests/test_interpreter.py leaves one out).

TRITON_INTERPRET=1 must be in the environment before triton is imported; conftest.py sees to it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

REPAIRS = {}  # name -> function that installs it, in the order of installation


def repair(install_one):
    REPAIRS[install_one.__name__] = install_one
    return install_one


@functools.cache
def install() -> None:
    """Install every repair, once per process."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    left_out = os.environ.get("FLASHCL_WITHOUT_REPAIR", "").split()
    if unknown := set(left_out) - set(REPAIRS):
        raise ValueError(f"FLASHCL_WITHOUT_REPAIR: no repair is called {sorted(unknown)}; there are {list(REPAIRS)}")
    for name, install_one in REPAIRS.items():
        if name not in left_out:
            install_one()


def _original(owner, name):
    if not hasattr(owner, name):  # a patch that goes nowhere would make every test say "fine"
        raise RuntimeError(f"tests/interpreter.py: triton {triton.__version__} has no {owner.__name__}.{name} to patch")
    return getattr(owner, name)


def around(owner, *names):
    """Decorator: put f(original, *args, **kwargs) in the place of owner.name, for every name."""

    def decorate(f):
        for name in names:
            setattr(owner, name, functools.partialmethod(_bound(f), _original(owner, name)))

    return decorate


def _bound(f):
    return lambda self, original, *args, **kwargs: f(functools.partial(original, self), *args, **kwargs)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@repair
def ptx_nan():
    """max.f32 and min.f32 return the operand that is a number; numpy's maximum returns NaN."""

    @around(Builder, "create_maxnumf")
    def _(original, a, b):
        return Handle(np.fmax(a.data, b.data), a.dtype.scalar)

    @around(Builder, "create_minnumf")
    def _(original, a, b):
        return Handle(np.fmin(a.data, b.data), a.dtype.scalar)

    @around(Builder, "create_clampf")
    def _(original, x, low, high, propagate_nans):
        if propagate_nans == tl.PropagateNan.ALL:
            return original(x, low, high, propagate_nans)
        return Handle(np.fmin(np.fmax(x.data, low.data), high.data), x.dtype.scalar)

    @around(interpreter.ReduceOps, "min_max")  # nanmax is right but warns about rows that are all NaN
    def _(original, input, val_reduce_op=None, idx_reduce_op=None):
        quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}
        return original(input, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)


@repair
def precision_of_products():
    """tl.dot on float32 rounds its operands to 10 bits of mantissa unless the kernel asks for more.

    "tf32x3" and "bf16x6" split each operand into parts and add their products, small ones first, as triton's F32DotTC pass does.
    """
    allowed = (*interpreter.interpreter_builder.options.allowed_dot_input_precisions, "bf16x6")
    object.__setattr__(interpreter.interpreter_builder.options, "allowed_dot_input_precisions", allowed)
    precisions = interpreter._ir.INPUT_PRECISION
    split_products = {  # bits of float32 that a part lacks, and which parts of a and b are multiplied before the first of both
        precisions.TF32: (13, []),
        precisions.TF32x3: (13, [(1, 0), (0, 1)]),
        precisions.BF16x6: (16, [(1, 1), (2, 0), (0, 2), (1, 0), (0, 1)]),
    }

    def part(data, lost):
        """The rest of data, rounded to nearest even, without its last bits."""
        bits = np.ascontiguousarray(data).view(np.uint32)
        half, last = np.uint32((1 << (lost - 1)) - 1), np.uint32(lost)
        kept = (bits + half + ((bits >> last) & np.uint32(1))) >> last << last
        return np.where(np.isfinite(data), kept.view(np.float32), data)

    def parts(handle, lost, count):
        rest, out = handle.data, []
        for _ in range(count):
            out.append(part(rest, lost))
            rest = rest - out[-1]
        return [Handle(v, tl.float32) for v in out]

    @around(Builder, "create_dot")
    def _(original, a, b, acc, precision, *rest):
        if a.dtype.scalar != tl.float32 or precision not in split_products:
            return original(a, b, acc, precision, *rest)
        lost, pairs = split_products[precision]
        count = 1 + max((max(pair) for pair in pairs), default=0)
        a_parts, b_parts = parts(a, lost, count), parts(b, lost, count)
        if not pairs:
            return original(a_parts[0], b_parts[0], acc, precision, *rest)
        small = Handle(np.zeros_like(acc.data), tl.float32)
        with np.errstate(invalid="ignore"):  # inf - inf, which becomes 0 next
            for i, j in pairs:
                small = original(a_parts[i], b_parts[j], small, precision, *rest)
        small = Handle(np.nan_to_num(small.data, nan=0.0, posinf=np.inf, neginf=-np.inf), tl.float32)
        return Handle(original(a_parts[0], b_parts[0], small, precision, *rest).data + acc.data, tl.float32)


@repair
def dot_size():
    """Tensor cores need K >= 16; the interpreter takes any block."""
    rule = _original(nvidia, "min_dot_size")(GPUTarget("cuda", 90, 32))
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = rule


@repair
def bfloat16():
    """bfloat16 lives in uint16: compute in float32 and round to nearest even, as the hardware does."""
    numeric = "fadd fsub fmul fdiv frem minnumf maxnumf minimumf maximumf clampf fma fabs precise_divf"
    ordering = [name for name in dir(Builder) if name.startswith("create_fcmp")]

    @around(Builder, *[f"create_{name}" for name in numeric.split()])
    def _(original, *args):
        if not any(map(_is_bf16, args)):
            return original(*args)
        return Handle(_round_bf16(original(*map(_widen, args)).data), tl.bfloat16)

    @around(Builder, "create_dot", *ordering)
    def _(original, *args):
        return original(*map(_widen, args))

    @around(Builder, "cast_impl")
    def _(original, source, to):
        if _is_bf16(source):
            return source if to.scalar == tl.bfloat16 else original(_widen(source), to)
        if to.scalar == tl.bfloat16:
            return Handle(_round_bf16(source.data), tl.bfloat16)
        return original(source, to)

    @around(Builder, "create_fp_to_fp")
    def _(original, source, to, rounding):
        types = source.dtype.scalar, to.scalar
        eight_bits = any(t.primitive_bitwidth == 8 for t in types)
        if tl.bfloat16 not in types or eight_bits or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return original(source, to, rounding)
        return interpreter.interpreter_builder.cast_impl(source, to)

    @around(interpreter.ReduceOps, "sum")
    def _(original, input):
        if input.dtype.scalar == tl.bfloat16:
            raise TypeError("tl.sum over bfloat16: cast to float32 first, sums are kept in float32")
        return original(input)

    Builder.get_bf16 = lambda self, value: Handle(_round_bf16(np.array([value])), tl.bfloat16)


def _is_bf16(x):
    return isinstance(x, Handle) and x.dtype.scalar == tl.bfloat16


def _widen(x):
    return Handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if _is_bf16(x) else x


def _round_bf16(values):
    values = torch.from_numpy(np.array(values, dtype=np.float32))
    return values.bfloat16().view(torch.int16).numpy().view(np.uint16)


# ---- memory ----------------------------------------------------------------------------------------------------------

_regions: list[tuple[int, int]] = []  # [first byte, past the last byte) of each tensor of the running launch


@repair
def poison():
    """A lane that a mask switches off holds anything at all unless `other` says what: here NaN, or a huge integer."""

    @around(Builder, "create_masked_load")
    def _(original, pointers, mask, other, *rest, **kwargs):
        if other is None:
            element = pointers.get_element_ty()
            other = Handle(np.full(pointers.data.shape, _garbage(element)), element)
        return original(pointers, mask, other, *rest, **kwargs)


def _garbage(element):
    if element == tl.bfloat16:
        return _round_bf16(np.nan)
    dtype = interpreter._get_np_dtype(element)
    if dtype.kind == "f":
        return dtype.type(np.nan)
    return dtype.type(True) if dtype.kind == "b" else dtype.type(np.iinfo(dtype).max)


@repair
def bounds():
    """Every load, store and atomic must stay inside one of the tensors that the launch was given.

    Block pointers and tensor descriptors end in the same masked loads and stores, so they are held to it as well.
    """

    def check(what, pointers, mask=True):
        mask = np.broadcast_to(np.asarray(getattr(mask, "data", mask)), pointers.data.shape)
        addresses = pointers.data[mask]
        if addresses.size == 0:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        low, high = int(addresses.min()), int(addresses.max()) + size
        if not any(start <= low and high <= end for start, end in _regions):
            nearest = min(_regions, key=lambda region: abs(low - region[0]), default=(0, 0))
            raise IndexError(
                f"out-of-bounds {what} in program {interpreter.interpreter_builder.grid_idx}: bytes "
                f"[{low - nearest[0]}, {high - nearest[0]}) of a tensor that has [0, {nearest[1] - nearest[0]})"
            )

    @around(Builder, "create_masked_load")
    def _(original, pointers, mask, *rest, **kwargs):
        check("load", pointers, mask)
        return original(pointers, mask, *rest, **kwargs)

    @around(Builder, "create_masked_store")
    def _(original, pointers, value, mask, *rest, **kwargs):
        check("store", pointers, mask)
        return original(pointers, value, mask, *rest, **kwargs)

    @around(Builder, "create_atomic_rmw")
    def _(original, op, pointers, value, mask, *rest):
        check("atomic", pointers, mask)
        return original(op, pointers, value, mask, *rest)

    @around(Builder, "create_atomic_cas")
    def _(original, pointers, *rest):
        check("atomic", pointers)
        return original(pointers, *rest)

    @around(interpreter.GridExecutor, "__call__")
    def _(original, *args, **kwargs):
        _regions[:] = [_extent(t) for t in _tensors((*args, *kwargs.values()))]
        try:
            return original(*args, **kwargs)
        finally:
            _regions.clear()


def _tensors(arguments):
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif hasattr(argument, "data_ptr"):
            yield interpreter._unwrap_tensor(argument)
        elif hasattr(argument, "base"):  # a tensor descriptor
            yield from _tensors((argument.base,))


def _extent(tensor):
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    elements = last + 1 if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


# ---- launches --------------------------------------------------------------------------------------------------------


@repair
def unknown_arguments():
    """A misspelt launch option (num_wraps=4) is an error on a GPU; the interpreter drops it."""
    options = set(nvidia.CUDAOptions.__dataclass_fields__)

    @around(interpreter.InterpretedFunction, "run")
    def _(original, *args, grid, warmup, **kwargs):
        if unknown := set(kwargs) - set(original.args[0].arg_names) - options:
            raise TypeError(f"{original.args[0].__name__}: unknown kernel arguments {sorted(unknown)}")
        return original(*args, grid=grid, warmup=warmup, **kwargs)


@repair
def block_condition():
    """A block of values is no condition; the interpreter takes it for true."""

    def truth(self):
        if self.handle.data.size == 1:
            return bool(self.handle.data)
        if not sys._getframe(1).f_globals["__name__"].startswith("triton."):  # which asks `if mask` for `is not None`
            raise TypeError(f"a block of shape {self.handle.data.shape} used as a condition")
        return True

    old = _original(interpreter, "_patch_lang_tensor")

    def patch(tensor, scope):
        old(tensor, scope)
        scope.set_attr(tensor, "__bool__", truth)

    interpreter._patch_lang_tensor = patch


_reverse = False


@repair
def reversible():
    """The programs of a grid run in any order on a GPU: see `reversed_programs`."""

    @around(Builder, "set_grid_idx")
    def _(original, *index):
        if _reverse:
            index = [size - 1 - i for size, i in zip(original.args[0].grid_dim, index)]
        return original(*index)


@contextlib.contextmanager
def reversed_programs():
    """Run every grid from its last program to its first. Results that differ mean that programs race."""
    global _reverse
    _reverse = True
    try:
        yield
    finally:
        _reverse = False


@repair
def one_patch():
    """Patch triton.language once per launch: the interpreter does it again for every call of a device function."""
    old, launch = _original(interpreter, "_patch_lang"), _original(interpreter, "_LangPatchScope")
    running: list = []  # scopes of the running launch, the launch's own first
    patched: set = set()  # which of tl and tl.core they cover

    class Launch(launch):
        def restore(self):
            while running:
                running.pop().restore()
            patched.clear()

    class Inner(launch):
        def restore(self):
            pass

    def patch_lang(fn):
        languages = {id(v) for v in fn.__globals__.values() if v is tl or v is tl.core}
        outermost = not running
        if not languages or not languages <= patched:  # without any, the original says what is missing
            running.append(old(fn))
            patched.update(languages)
        return Launch() if outermost else Inner()

    interpreter._patch_lang = patch_lang


@repair
def quiet():
    """exp(-inf), inf - inf and 0 / 0 are everyday values on a GPU, no warnings."""

    @around(interpreter.GridExecutor, "__call__")
    def _(original, *args, **kwargs):
        with np.errstate(all="ignore"):
            return original(*args, **kwargs)
