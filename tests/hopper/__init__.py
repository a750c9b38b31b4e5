"""A Hopper GPU that is a program: flashcl._C whose launches run the PTX of the kernels on the CPU.

csrc/ is compiled as setup.py does, but for PTX in place of machine code, and linked with a runtime of our own (runtime.cpp)
that reads this PTX (program.cpp) and runs it (machine.cpp, scalar.cpp, collective.cpp). What csrc/emulate.cpp cannot show is
in it: TMA, wgmma, the barriers, shared memory. What is not: ptxas, the driver, time.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _flags():
    """What setup.py compiles the kernels with, from the root of the repository. SystemExit where it could not."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, FLASHCL_CUDA="1", FLASHCL_ARCHS="90a"))
        stack.enter_context(mock.patch("setuptools.setup"))
        stack.callback(os.chdir, os.getcwd())
        os.chdir(ROOT)
        setup = runpy.run_path("setup.py")
        return setup["nvcc_flags"](setup["extensions"]()[0])


def _nvcc(*arguments):
    done = subprocess.run(["nvcc", *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _build(target, flags):
    """Compiles and links, two files at a time: three of them take 20 s each."""
    folder = target.parent
    resources = folder / "resources.cpp"
    resources.write_text('namespace flashcl { extern const char* const resources; const char* const resources = ""; }')
    kernels = sorted((ROOT / "csrc").glob("*.cu"), key=lambda path: "_sm90" not in path.name)
    kernels += [ROOT / "csrc/module.cpp", HERE / "launched.cpp", resources]
    machine = [path for path in sorted(HERE.glob("*.cpp")) if path.name != "launched.cpp"]

    def compile_file(path):
        out = folder / f"{path.name}.o"
        if path in machine:
            _nvcc("-c", path, "-std=c++20", "-O3", "-Xcompiler=-fPIC", "-o", out)
        else:
            # A domain of its own: nanobind shares types by name, and the real flashcl._C may be loaded, too.
            ptx = "-gencode=arch=compute_90a,code=compute_90a", "--no-compress"
            _nvcc("-c", path, *flags, *ptx, "-DNB_DOMAIN=flashcl_on_a_machine", "-o", out)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_file, [*kernels, *machine]))
    _nvcc("-shared", "-cudart=none", *objects, "-o", target)


@cache
def machine():
    """The machine, built once for what is in csrc/ and here; or a string that says why there is none."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    try:
        flags = _flags()
    except SystemExit as reason:
        return str(reason)
    sources = [*sorted((ROOT / "csrc").iterdir()), *sorted(HERE.glob("*.[ch]*"))]
    content = [path.read_bytes() for path in sources] + [repr(flags).encode(), _nvcc("--version").encode()]
    folder = ROOT / "build" / f"hopper-{hashlib.sha256(b''.join(content)).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "_C.abi3.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be building it
        if not target.exists():
            _build(target.with_suffix(".new"), flags)
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
        """The seed of every order that a GPU is free to choose, and how many clusters it holds at a time."""
        self._library.machine_set(ctypes.c_uint(seed), ctypes.c_int(clusters))

    @contextlib.contextmanager
    def edited(self, old, new):
        """Kernels with `new` in the place of `old` in their PTX: what a fault does."""
        assert self._library.machine_edit(old.encode(), new.encode()) > 0, f"{old} is not in the PTX"
        try:
            yield
        finally:
            self._library.machine_restore()
