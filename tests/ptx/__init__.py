"""A simulated GPU: it runs PTX on the CPU, that of csrc/ by way of a flashcl._C, and any other (Triton's) by launch().

csrc/ is compiled as setup.py does, but for PTX in place of machine code, and linked with a runtime of our own (runtime.cpp)
that reads this PTX (program.cpp) and runs it (machine.cpp, scalar.cpp, collective.cpp). What csrc/emulate.cpp and the
interpreter of Triton cannot show is in it: layouts, TMA, wgmma, barriers, shared memory. What is not: ptxas, the driver, time.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _as_setup_does():
    """The nvcc that setup.py finds and what it compiles the kernels with, from the root. SystemExit where it could not."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, FLASHCL_CUDA="1", FLASHCL_ARCHS="90a"))
        stack.enter_context(mock.patch("setuptools.setup"))
        stack.callback(os.chdir, os.getcwd())
        os.chdir(ROOT)
        setup = runpy.run_path("setup.py")
        flags = setup["nvcc_flags"](setup["extensions"]()[0])
        return setup["find_nvcc"](), flags


def _run(*command):
    command = list(map(str, command))
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _compile(nvcc, files, flags, read):
    """Objects of these files, those of the last time if nothing that they `read` has changed since."""
    content = [path.read_bytes() for path in sorted(read)] + [repr(flags).encode(), _run(nvcc, "--version").encode()]
    folder = ROOT / "build" / f"ptx-{hashlib.sha256(b''.join(content)).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)

    def compile_file(path):
        out = folder / f"{path.name}.o"
        if not out.exists():
            _run(nvcc, "-c", path, *flags, "-o", out.with_suffix(".new"))
            out.with_suffix(".new").rename(out)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_file, files))


@cache
def machine():
    """The machine, built once for what is in csrc/ and here; or a string that says why there is none."""
    try:
        nvcc, flags = _as_setup_does()
    except SystemExit as reason:
        return str(reason)
    # A domain of its own: nanobind shares types by name, and the real flashcl._C may be loaded, too.
    flags += ["-gencode=arch=compute_90a,code=compute_90a", "--no-compress", "-DNB_DOMAIN=flashcl_on_a_machine"]
    launched = HERE / "launched.cpp"
    csrc = [path for path in (ROOT / "csrc").iterdir() if path.is_file()]
    kernels = sorted(ROOT.glob("csrc/*.cu"), key=lambda path: "_sm90" not in path.name)  # those take longest: first
    mine = [path for path in HERE.iterdir() if path.suffix in (".h", ".cpp") and path != launched]
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build/ptx.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be at it
        objects = _compile(nvcc, [*kernels, ROOT / "csrc/module.cpp", launched], flags, [*csrc, launched])
        name = objects[0].parent.name
        files = [path for path in mine if path.suffix == ".cpp"]
        objects += _compile(nvcc, files, ["-std=c++20", "-O3", "-Xcompiler=-fPIC"], mine)
        target = objects[-1].parent / f"{name}.so"
        if not target.exists():
            _run(nvcc, "-shared", "-cudart=none", "-Xlinker=-Bsymbolic", *objects, "-o", target.with_suffix(".new"))
            target.with_suffix(".new").rename(target)
    return Machine(target)


class Machine:
    """`module` is a flashcl._C to which tensors of the CPU are tensors of a GPU."""

    def __init__(self, path):
        spec = importlib.util.spec_from_file_location("flashcl._C", path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(path))

    def set(self, seed=0, clusters=1):
        """The seed of every order that a GPU is free to choose (the next launch has the next one), and how many clusters it
        holds at a time."""
        self._library.machine_set(ctypes.c_uint(seed), ctypes.c_int(clusters))

    @contextlib.contextmanager
    def edited(self, old, new):
        """Kernels with `new` in the place of `old` in their PTX: what a fault does."""
        assert self._library.machine_edit(old.encode(), new.encode()) > 0, f"{old} is not in the PTX"
        try:
            yield
        finally:
            self._library.machine_restore()

    def launch(self, text, name, grid, threads, shared, params):
        """Runs a kernel of a PTX text; `params` are ctypes values, of its first parameters."""
        addresses = (ctypes.c_void_p * len(params))(*map(ctypes.addressof, params))
        grid = (ctypes.c_int * 3)(*grid, *[1] * (3 - len(grid)))
        sizes = (ctypes.c_size_t * len(params))(*map(ctypes.sizeof, params))
        threads, shared, given = ctypes.c_int(threads), ctypes.c_size_t(shared), ctypes.c_size_t(len(params))
        self._check(self._library.machine_launch(text.encode(), name.encode(), grid, threads, shared, addresses, sizes, given))

    def tensor_map(self, address, element_bytes, period, box, shape, strides):
        """A tensor map as a kernel takes it. Sizes and strides in elements, the contiguous dimension last; `period` in bytes."""
        dims, out = len(shape), (ctypes.c_char * 128)()
        error = self._library.machine_tensor_map(
            out, ctypes.c_void_p(address), ctypes.c_int(dims), ctypes.c_int(element_bytes), ctypes.c_int(period),
            (ctypes.c_uint32 * dims)(*reversed(box)), (ctypes.c_uint64 * dims)(*reversed(shape)),
            (ctypes.c_int64 * dims)(*(stride * element_bytes for stride in reversed(strides[:-1]))),
        )  # fmt: skip
        self._check(error)
        return out

    def _check(self, error):
        if error:
            self._library.machine_message.restype = ctypes.c_char_p
            raise RuntimeError(self._library.machine_message().decode())
