"""Builds flashcl: pure Python always, and csrc/ as the one optional extension flashcl._C where nvcc and CUTLASS are found.

FLASHCL_CUDA   auto (default): build _C if possible, else warn and go on | 1: fail if it cannot be built | 0: never
FLASHCL_ARCHS  GPU architectures as nvcc names them, "80;90a" (default "90a"); machine code only, no PTX
CUDA_HOME, CUDA_PATH, PATH are searched for nvcc in this order. The CUTLASS headers are those of the package nvidia-cutlass.

Where nvcc is, building needs nanobind and nvidia-cutlass as well (pip install asks for them); elsewhere setuptools alone.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError

# nvidia-cutlass for its headers alone; it brings scipy, networkx and more: only where they are of use.
NEEDED_BY_EXTENSION = ["nanobind>=3.1", "nvidia-cutlass>=4.2"]

# When pip asks for the requirements it runs this file, too, with this command, and none of them is there yet.
ASKED_FOR_REQUIREMENTS = "egg_info" in sys.argv

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


def find_cutlass():
    """The folder of the CUTLASS headers, or None."""
    package = importlib.util.find_spec("cutlass_library")  # finds it without running it
    include = Path(package.origin).parent / "source" / "include" if package and package.origin else None
    return include if include and (include / "cutlass" / "cutlass.h").exists() else None


def obstacle():
    """Why the extension cannot be built here, or None."""
    if find_nvcc() is None:
        return "nvcc was not found in CUDA_HOME, CUDA_PATH or PATH"
    if find_cutlass() is None:
        return "the CUTLASS headers were not found: pip install nvidia-cutlass"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded CPython has no stable ABI"
    return None


def requirements():
    """What pip is to install before it builds, beside what pyproject.toml says."""
    wanted = ASKED_FOR_REQUIREMENTS and cuda_mode() != "0" and find_nvcc() is not None
    return NEEDED_BY_EXTENSION if wanted else []


def sources():
    """Files of csrc/, without those of a GPU generation that is not asked for."""
    files = sorted(path for suffix in ("cpp", "cu") for path in Path("csrc").glob(f"*.{suffix}"))
    return [str(path) for path in files if "90a" in architectures() or not path.stem.endswith("_sm90")]


def extensions():
    mode = cuda_mode()
    if mode == "0" or ASKED_FOR_REQUIREMENTS:
        return []
    if reason := obstacle():
        if mode == "1":
            raise SystemExit(f"FLASHCL_CUDA=1, but flashcl._C cannot be built: {reason}")
        print(f"flashcl: building without CUDA kernels: {reason}", file=sys.stderr)
        return []
    return [
        Extension(
            "flashcl._C",
            sources=sources(),
            define_macros=[
                ("Py_LIMITED_API", "0x{:02X}{:02X}0000".format(*ABI_FLOOR)),
                # nanobind's split mode: its library stays out of _C and comes from a package at run time. This is
                # what makes the stable ABI possible below CPython 3.12.
                ("NB_BACKEND_MODULE", "nanobind_backend"),
                ("NB_BACKEND_PYPI", "nanobind-backend"),
                ("FLASHCL_ARCHS", "_".join(architectures())),  # nvcc splits -D at commas
                ("FLASHCL_SM90", int("90a" in architectures())),
            ],
            py_limited_api=True,
            optional=mode == "auto",  # setuptools then turns a CompileError into a warning
        )
    ]


class NvccBuild(build_ext):
    """Compiles csrc/ with nvcc, file by file in parallel, and links: nvcc knows its headers and the host compiler."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # FLASHCL_ARCHS or the CUDA version may have changed under an object that looks fresh

    def build_extension(self, ext):
        target, temp = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        self.mkpath(str(target.parent))
        self.mkpath(str(temp))
        try:
            flags = nvcc_flags(ext)
            sources = sorted(map(Path, ext.sources), key=lambda path: "_sm" not in path.name)  # those take longest
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects, reports = zip(*pool.map(lambda path: compile_file(path, flags, temp), sources))
            report = temp / "resources.cpp"
            report.write_text(resources_source("".join(reports)))
            objects = [*objects, compile_file(report, flags, temp)[0]]
            nvcc("-shared", "-cudart=static", "-std=c++17", *objects, "-o", target)
        except (ExecError, ImportError) as error:
            raise CompileError(
                f"{error}\n"
                "    flashcl._C, the CUDA kernels, could not be built (the cause is above).\n"
                "    Everything else in flashcl works without it. FLASHCL_CUDA=0 skips this step."
            ) from error


def nvcc(*arguments):
    """What nvcc printed: with -Xptxas=-v, the resources of every kernel."""
    command = [find_nvcc(), *map(str, arguments)]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode or "warning" in process.stdout:
        print(" ".join(command), process.stdout, sep="\n", file=sys.stderr)
    if process.returncode:
        raise ExecError(f"nvcc failed with exit code {process.returncode}")
    return process.stdout


def compile_file(path, flags, temp):
    """(object, what nvcc printed). A file of one GPU generation, like sweep_sm90.cu, is compiled for that one alone."""
    generation = re.search(r"_sm(\d+)$", path.stem)
    archs = [arch for arch in architectures() if not generation or arch.startswith(generation[1])]
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    out = temp / f"{path.name}.o"
    return out, nvcc("-c", path, *flags, *gencode, "-o", out)


def resources_source(report):
    """C++ with one line per kernel: its (mangled) name, and what ptxas gave it."""
    lines = []
    # A report in other words has no such line, which a test finds: it is no reason to go without the kernels.
    other = r"(?:(?!Compiling entry).)*?"  # anything up to the next kernel
    of_kernel = rf"Compiling entry function '(\S+)' for '(\S+)'{other}(\d+) bytes stack{other}(\d+) bytes spill st"
    of_kernel += rf"{other}(\d+) bytes spill l{other}Used (\d+) registers"
    for kernel, arch, stack, stores, loads, registers in re.findall(of_kernel, report, re.DOTALL):
        lines.append(
            f"{kernel} {arch} registers={registers} stack={stack} spill_stores={stores} spill_loads={loads}\\n"
        )
    # ptxas says so where it had to serialise wgmma: the kernel is right, and slow.
    lines += [f"{line}\\n" for line in re.findall(r".*Potential Performance Loss.*", report)]
    text = "\n".join(f'    "{line}"' for line in sorted(lines))
    declared = "extern const char* const resources;\nconst char* const resources =\n"
    return f"namespace flashcl {{\n{declared}{text or chr(34) * 2};\n}}\n"


def nvcc_flags(ext):
    import nanobind  # only a build of the extension needs it

    includes = ["csrc", find_cutlass(), sysconfig.get_path("include"), nanobind.include_dir()]
    return [
        *("-std=c++17", "-O3", "-DNDEBUG", "-lineinfo", "--expt-relaxed-constexpr", "-Xptxas=-v"),
        "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-strict-aliasing",
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
    setup_requires=requirements(),
    packages=packages(),
    package_dir={"flashcl.triton_kernels": "triton_kernels"},
    package_data={"flashcl": ["py.typed"]},  # type checkers look at the annotations of a package that has it
    ext_modules=extension_modules,
    cmdclass={"build_ext": NvccBuild},
    options={"bdist_wheel": {"py_limited_api": "cp{}{}".format(*ABI_FLOOR)}} if extension_modules else {},
)
