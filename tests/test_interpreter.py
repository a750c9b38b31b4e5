"""Every repair of tests/interpreter.py, proved: each test fails when the repair of its name is left out."""

import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("only the interpreter is hardened", allow_module_level=True)

import interpreter
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def elementwise(a_ptr, b_ptr, out_ptr, op: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    if op == "add":
        out = a + b
    elif op == "mul":
        out = a * b
    elif op == "sub":
        out = a - b
    elif op == "div":
        out = a / b
    elif op == "neg":
        out = -a
    elif op == "literal":
        out = a * 2.5
    elif op == "where":
        out = tl.where(a > b, a, b)
    elif op == "fma":
        out = tl.fma(a, b, a)
    elif op == "maximum":
        out = tl.maximum(a, b)
    elif op == "minimum":
        out = tl.minimum(a, b)
    elif op == "clamp":
        out = tl.clamp(a, b * 0 - 1, b * 0 + 1)
    elif op == "abs":
        out = tl.abs(a)
    elif op == "cast":
        out = (a.to(tl.float32) / 3).to(tl.bfloat16)
    elif op == "from_int":
        out = (i * 257).to(tl.bfloat16)
    elif op == "max":
        out = a + tl.max(b, 0)
    elif op == "sum":
        out = a + tl.sum(b, 0)
    elif op == "if_block":
        out = a
        if a > b:
            out = b
    tl.store(out_ptr + i, out)


EAGER = {
    "add": torch.add,
    "mul": torch.mul,
    "sub": torch.sub,
    "div": torch.div,
    "neg": lambda a, b: -a,
    "literal": lambda a, b: a * 2.5,
    "where": torch.maximum,
    "fma": lambda a, b: (a.double() * b.double() + a.double()).bfloat16(),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "clamp": lambda a, b: a.clamp(-1, 1),
    "abs": lambda a, b: a.abs(),
    "cast": lambda a, b: (a.float() / 3).bfloat16(),
    "from_int": lambda a, b: (torch.arange(len(a)) * 257).bfloat16(),
    "max": lambda a, b: a + b.max(),
}


def run(op, a, b):
    out = torch.full_like(a, 7)
    elementwise[(1,)](a, b, out, op, a.numel())
    return out


@pytest.mark.parametrize("op", EAGER)
def test_bfloat16_arithmetic_is_that_of_torch(op, generator):
    a, b = torch.randn(2, 64, generator=generator).bfloat16()
    assert torch.equal(run(op, a, b), EAGER[op](a, b))


def test_bfloat16_sum_is_refused():
    ones = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="cast to float32 first"):
        run("sum", ones, ones)


@triton.jit
def matmul(a_ptr, b_ptr, out_ptr, precision: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    acc = tl.dot(a, b, tl.zeros((M, N), tl.float32), input_precision=precision)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc)


def multiply(a, b, precision="ieee"):
    out = torch.empty(a.shape[0], b.shape[1])
    matmul[(1,)](a, b, out, precision, *out.shape, a.shape[1])
    return out


def test_bfloat16_dot(generator):
    a, b = torch.randn(32, 16, generator=generator).bfloat16(), torch.randn(16, 32, generator=generator).bfloat16()
    torch.testing.assert_close(multiply(a, b), a.float() @ b.float(), atol=1e-5, rtol=1e-5)


def test_tf32_loses_the_digits_that_a_gpu_loses(generator):
    a, b = torch.randn(32, 16, generator=generator), torch.randn(16, 32, generator=generator)
    exact = a.double() @ b.double()
    error = {p: (multiply(a, b, p).double() - exact).abs().max() for p in ("tf32", "tf32x3", "bf16x6", "ieee")}
    assert error["ieee"] < error["tf32x3"] < 1e-5 and error["bf16x6"] < error["tf32x3"]
    assert 1e-4 < error["tf32"] < 1e-2
    a[0, 0], b[0, 1] = np.inf, -np.inf  # and infinity stays infinity, without NaN from inf - inf on the way
    for precision in ("tf32x3", "bf16x6"):
        assert torch.equal(multiply(a, b, precision).isnan(), (a.double() @ b.double()).isnan())


def test_bf16x6_adds_six_products(generator):
    """One of a part with each of b: parts of 8 bits, of which the two smallest products are left out."""
    a, b = torch.zeros(16, 16), torch.zeros(16, 16)
    a[0, 0] = 1 + 2**-9 + 2**-18  # three parts
    b[0, 0] = 1 + 2**-9 + 2**-18
    kept = 1 + 2 * 2**-9 + 2**-18 + 2 * 2**-18  # without 2 * 2^-27 + 2^-36
    assert multiply(a, b, "bf16x6")[0, 0] == torch.tensor(kept)


def test_dot_size_smaller_than_a_tensor_core_is_refused():
    with pytest.raises(InterpreterError, match="K >= 16"):
        multiply(torch.ones(16, 8), torch.ones(8, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ptx_nan_rule(dtype):
    nan = torch.tensor([np.nan] * 8 + [1.0] * 8, dtype=dtype)
    two = torch.tensor([2.0] * 16, dtype=dtype)
    assert run("maximum", nan, two).tolist() == [2.0] * 16
    assert run("maximum", two, nan).tolist() == [2.0] * 16
    assert run("minimum", nan, two).tolist() == [2.0] * 8 + [1.0] * 8
    assert run("clamp", nan, two).tolist() == [-1.0] * 8 + [1.0] * 8
    assert run("max", two, nan).tolist() == [3.0] * 16


def test_quiet_about_nan_and_infinity(recwarn):
    nan = torch.full((16,), np.nan)
    inf = torch.full((16,), np.inf)
    assert run("max", nan, nan).isnan().all()
    assert run("sub", inf, inf).isnan().all()
    assert run("div", nan * 0, nan * 0).isnan().all()
    assert not recwarn.list


# ---- memory


@triton.jit
def copy(x_ptr, out_ptr, n, how: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    if how == "unmasked":
        tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0))
    elif how == "overread":
        tl.store(out_ptr + i, tl.load(x_ptr + i), mask=i < n)
    elif how == "off_by_one":
        tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i <= n, other=0), mask=i < n)
    elif how == "before":
        tl.store(out_ptr + i, tl.load(x_ptr + i - 1, mask=i < n, other=0), mask=i < n)
    elif how == "no_other":
        tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n - 1), mask=i < n)
    elif how == "masked":
        tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0), mask=i < n)
    elif how == "atomic":
        tl.atomic_add(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0))
    elif how == "cas":
        tl.atomic_cas(out_ptr + n, 0, 1)
    elif how == "block_pointer":
        block = tl.make_block_ptr(x_ptr, (B,), (1,), (0,), (B,), (0,))  # promises B elements where there are n
        tl.store(out_ptr + i, tl.load(block), mask=i < n)


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
@pytest.mark.parametrize(
    "how, what",
    [
        ("unmasked", "store"),
        ("overread", "load"),
        ("off_by_one", "load"),
        ("before", "load"),
        ("atomic", "atomic"),
        ("cas", "atomic"),
        ("block_pointer", "load"),
    ],
)
def test_bounds(how, what):
    around = torch.arange(100, 164, dtype=torch.int32)  # the neighbours are this process's own memory
    x, out = around[16:36], torch.zeros(64, dtype=torch.int32)[16:36]
    with pytest.raises(InterpreterError, match=f"out-of-bounds {what}"):
        copy[(1,)](x, out, 20, how, 32)


def test_bounds_let_correct_code_pass():
    x, out = torch.arange(20), torch.zeros(20, dtype=torch.int64)
    copy[(1,)](x, out, 20, "masked", 32)
    assert torch.equal(x, out)


@triton.jit
def copy_by_descriptor(x_desc, out_desc):
    out_desc.store([0, 0], x_desc.load([0, 0]))


@pytest.mark.parametrize("wrong", ["load", "store"])
def test_bounds_of_descriptors(wrong):
    def describe(tensor, rows):
        return TensorDescriptor(tensor, [rows, 16], [16, 1], [8, 16])

    x, out = torch.randn(5, 16), torch.zeros(5, 16)
    copy_by_descriptor[(1,)](describe(x, 5), describe(out, 5))
    assert torch.equal(x, out)
    with pytest.raises(InterpreterError, match=f"out-of-bounds {wrong}"):  # promises rows that are not there
        copy_by_descriptor[(1,)](describe(x, 8 if wrong == "load" else 5), describe(out, 8 if wrong == "store" else 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_poison_of_masked_lanes_without_other(dtype):
    out = torch.zeros(20, dtype=dtype)
    copy[(1,)](torch.ones(20, dtype=dtype), out, 20, "no_other", 32)
    assert out[:19].eq(1).all()
    assert out[19].isnan() if dtype.is_floating_point else out[19] == torch.iinfo(dtype).max


@triton.jit
def read_row(x_ptr, out_ptr, row, stride, wide: tl.constexpr):
    base = row.to(tl.int64) * stride if wide else row * stride
    tl.store(out_ptr, tl.load(x_ptr + base))


def test_bounds_show_int32_overflow_in_an_address():
    x = torch.from_numpy(np.empty((3, 2**30), dtype=np.int8))  # 3 GiB of address space; one page is ever touched
    x[2, 0] = 5
    out = torch.zeros(1, dtype=torch.int8)
    read_row[(1,)](x, out, 2, x.stride(0), True)
    assert out.item() == 5
    with pytest.raises(InterpreterError, match="out-of-bounds load"):
        read_row[(1,)](x, out, 2, x.stride(0), False)


def test_poison_of_outputs_that_nobody_writes(poison):
    assert torch.empty(5).isnan().all()
    assert torch.empty_like(torch.ones(5, dtype=torch.bfloat16)).isnan().all()
    assert torch.ones(1).new_empty(5, dtype=torch.int32).eq(torch.iinfo(torch.int32).max).all()


# ---- launches


def test_unknown_arguments_are_refused():
    x = torch.zeros(16)
    elementwise[(1,)](x, x, x, "add", 16, num_warps=4, num_stages=2)
    with pytest.raises(TypeError, match="num_wraps"):
        elementwise[(1,)](x, x, x, "add", 16, num_wraps=4)


def test_block_condition_is_refused():
    x = torch.zeros(16)
    with pytest.raises(InterpreterError, match="used as a condition"):
        run("if_block", x, x)


@triton.jit
def last_one_wins(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def add_without_atomic(out_ptr):
    pid = tl.program_id(0)
    tl.store(out_ptr, tl.load(out_ptr) * 0.5 + pid)


@triton.jit
def each_its_own(out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.program_id(0))


@pytest.mark.parametrize("kernel, races", [(last_one_wins, True), (add_without_atomic, True), (each_its_own, False)])
def test_reversible_program_order_shows_a_race(kernel, races):
    forward, backward = torch.zeros(8), torch.zeros(8)
    kernel[(8,)](forward)
    with interpreter.reversed_programs():
        kernel[(8,)](backward)
    assert torch.equal(forward, backward) != races


@triton.jit
def twice(x):
    return x + x


@triton.jit
def many_calls(x_ptr, n: tl.constexpr):
    x = tl.load(x_ptr)
    for _ in range(n):
        x = twice(x) - x
    tl.store(x_ptr, x)


def test_one_patch_serves_all_device_calls_of_a_launch(monkeypatch):
    scans = []  # each patch of triton.language looks through all of its members
    getmembers = inspect.getmembers
    monkeypatch.setattr(inspect, "getmembers", lambda *args: scans.append(args) or getmembers(*args))
    counts = []
    for calls in (1, 50):
        scans.clear()
        x = torch.ones(1)
        many_calls[(1,)](x, calls)
        assert x.item() == 1
        counts.append(len(scans))
    assert counts[0] == counts[1] > 0
    assert tl.load.__module__.startswith("triton.language")  # and the language is as it was, after the launch


def test_one_patch_ends_also_when_a_kernel_fails():
    with pytest.raises(InterpreterError):
        run("if_block", torch.zeros(16), torch.zeros(16))
    assert tl.load.__module__.startswith("triton.language")


def test_a_triton_without_a_patched_attribute_is_an_error():
    with pytest.raises(RuntimeError, match="has no InterpreterBuilder.create_nonsense"):
        interpreter.around(interpreter.Builder, "create_nonsense")(print)


def test_without_repairs_bfloat16_is_refused():
    """A user's TRITON_INTERPRET=1, where nobody has repaired anything: no loss of 1e11 without a word."""
    code = """
import torch, flashcl
x = torch.nn.functional.normalize(torch.randn(9, 24), dim=1)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    try:
        print(flashcl.info_nce(x.to(dtype), x.to(dtype), temperature=0.1, backend="triton").isfinite().item())
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | dict(TRITON_INTERPRET="1"))
    single, half, brain = done.stdout.splitlines()
    assert single == half == "True" and "bit patterns of bfloat16" in brain, done.stdout + done.stderr
