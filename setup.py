"""Builds flashcl: pure Python always, and csrc/ as the one optional extension flashcl._C where nvcc is found.

FLASHCL_CUDA   auto (default): build _C if possible, else warn and go on | 1: fail if it cannot be built | 0: never
FLASHCL_ARCHS  GPU architectures as nvcc names them, "80;90a" (default "90a"); machine code only, no PTX
CUDA_HOME, CUDA_PATH, PATH are searched for nvcc in this order.
"""

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError

ABI_FLOOR = (3, 10)  # one binary serves this CPython and every later one


def cuda_mode():
    mode = os.environ.get("FLASHCL_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"FLASHCL_CUDA must be auto, 0 or 1, not {mode!r}")
    return mode


def architectures():
    archs = os.environ.get("FLASHCL_ARCHS", "90a").split(";")
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong:
        raise SystemExit(f'FLASHCL_ARCHS must look like "80;90a"; {wrong[0]!r} is not an architecture')
    return archs


def find_nvcc():
    homes = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join([*map(str, homes), os.environ.get("PATH", "")]))


def obstacle():
    """Why the extension cannot be built here, or None."""
    if find_nvcc() is None:
        return "nvcc was not found in CUDA_HOME, CUDA_PATH or PATH"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded CPython has no stable ABI"
    return None


def extensions():
    mode = cuda_mode()
    if mode == "0":
        return []
    if reason := obstacle():
        if mode == "1":
            raise SystemExit(f"FLASHCL_CUDA=1, but flashcl._C cannot be built: {reason}")
        print(f"flashcl: building without CUDA kernels: {reason}", file=sys.stderr)
        return []
    return [
        Extension(
            "flashcl._C",
            sources=sorted(str(p) for suffix in ("cpp", "cu") for p in Path("csrc").glob(f"*.{suffix}")),
            define_macros=[
                ("Py_LIMITED_API", "0x{:02X}{:02X}0000".format(*ABI_FLOOR)),
                # nanobind's split mode: its library stays out of _C and comes from a package at run time. This is
                # what makes the stable ABI possible below CPython 3.12.
                ("NB_BACKEND_MODULE", "nanobind_backend"),
                ("NB_BACKEND_PYPI", "nanobind-backend"),
                ("FLASHCL_ARCHS", "_".join(architectures())),  # nvcc splits -D at commas
            ],
            py_limited_api=True,
            optional=mode == "auto",  # setuptools then turns a CompileError into a warning
        )
    ]


class NvccBuild(build_ext):
    """Compiles and links csrc/ with one nvcc command: nvcc knows its headers, its libraries and the host compiler."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # FLASHCL_ARCHS or the CUDA version may have changed under an object that looks fresh

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        self.mkpath(str(target.parent))
        try:
            self.spawn([find_nvcc(), *nvcc_flags(ext), *ext.sources, "-o", str(target)])
        except (ExecError, ImportError) as error:
            raise CompileError(
                f"{error}\n"
                "    flashcl._C, the CUDA kernels, could not be built (the cause is above).\n"
                "    Everything else in flashcl works without it. FLASHCL_CUDA=0 skips this step."
            ) from error


def nvcc_flags(ext):
    import nanobind  # only a build of the extension needs it

    includes = ["csrc", sysconfig.get_path("include"), nanobind.include_dir()]
    return [
        *("-shared", "-cudart=static", "-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "--threads=0"),
        "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-strict-aliasing",
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures()),
        *(f"-D{name}={value}" for name, value in ext.define_macros),
        *(f"-I{path}" for path in includes),
    ]


def packages():
    library = find_packages(include=["flashcl", "flashcl.*"])
    kernels = find_packages(include=["triton_kernels", "triton_kernels.*"])
    # Never a top-level package triton_kernels: another project installs one of that name.
    return [*library, *(f"flashcl.{name}" for name in kernels)]


extension_modules = extensions()
setup(
    packages=packages(),
    package_dir={"flashcl.triton_kernels": "triton_kernels"},
    ext_modules=extension_modules,
    cmdclass={"build_ext": NvccBuild},
    options={"bdist_wheel": {"py_limited_api": "cp{}{}".format(*ABI_FLOOR)}} if extension_modules else {},
)
