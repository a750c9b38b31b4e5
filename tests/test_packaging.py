"""What is installed, under which names, and what becomes of the CUDA extension where it can and cannot be built.

Every build runs in a copy of the tree and every import in a fresh process, away from the repository.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
CUDA_VARIABLES = ("CUDA_HOME", "CUDA_PATH", "FLASHCL_CUDA", "FLASHCL_ARCHS")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def run(arguments, cwd, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in (*CUDA_VARIABLES, "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True
    )


def output_of(code, cwd, **environment):
    """What `code` prints in a fresh interpreter that must succeed."""
    process = run(["-c", code], cwd, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def copy_of_repo(folder):
    return Path(
        shutil.copytree(
            REPO, folder, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
        )
    )


def try_build(what, tree, out, **environment):
    """Runs the PEP 517 hook that pip would run; returns the process."""
    out.mkdir()
    hook = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
    return run(["-c", hook, out], tree, **environment)


def build(what, tree, out, **environment):
    process = try_build(what, tree, out, **environment)
    assert process.returncode == 0, process.stderr
    (artifact,) = out.iterdir()
    return artifact


def modules_of(wheel):
    """The wheel's files that are neither metadata nor the extension."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name and "_C." not in name}


def python_files(tree):
    """Every .py file of the library in `tree`, under the name it must have once installed, and the mark that it is typed."""
    kernels = {f"flashcl/{p.relative_to(tree)}" for p in (tree / "triton_kernels").rglob("*.py")}
    return kernels | {str(p.relative_to(tree)) for p in (tree / "flashcl").rglob("*.py")} | {"flashcl/py.typed"}


@pytest.fixture
def tree(tmp_path):
    return copy_of_repo(tmp_path / "tree")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def path_without_nvcc(tmp_path):
    (tmp_path / "empty").mkdir()
    return str(tmp_path / "empty")


@pytest.fixture
def path_with_broken_nvcc(tmp_path):
    nvcc = tmp_path / "broken" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: no host compiler' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    return f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"


# Importing


def test_foreign_triton_kernels_lives_beside_ours(tmp_path):
    foreign = tmp_path / "site" / "triton_kernels"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("WHO = 'foreign'\n")
    code = """
import triton_kernels
import flashcl.triton_kernels as ours
assert triton_kernels.WHO == 'foreign'
assert ours is not triton_kernels and not hasattr(ours, 'WHO')
print(ours.__name__)
"""
    assert output_of(code, tmp_path, PYTHONPATH=str(foreign.parent)) == "flashcl.triton_kernels"


# Types


def test_a_type_checker_knows_the_signatures(tmp_path):
    """A misspelled argument is found in every loss, also behind its decorator; what is right is not."""
    losses = ["info_nce(x, x, temperature=0.1)", "siglip(x, x, logit_scale=1.0, logit_bias=x)", "nt_xent(x, x)", "sup_con(x, x)"]
    losses += ["similarity_logsumexp(x, x)"]
    right = [f"{module}.{loss}" for module in ("flashcl", "flashcl.reference") for loss in losses]
    right += ["flashcl.similarity_logsumexp(x, x, axis='rows')"]
    right += [f"flashcl.{name}" for name in ("InfoNCELoss(0.1)", "SigLIPLoss(1.0)", "NTXentLoss(0.1)", "Group(x)", "explain(x)")]
    wrong = [call[:-1] + ", unknown=1)" for call in right]
    source = tmp_path / "user.py"
    source.write_text("\n".join(["import torch", "import flashcl", "import flashcl.reference", "x = torch.ones(2, 2)", *right, *wrong]))
    config = tmp_path / "mypy.ini"  # to read all of torch would take a minute
    config.write_text("[mypy]\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n")
    options = ["--config-file", config, "--cache-dir", os.devnull, "--python-executable", sys.executable, "--strict"]
    done = run(["-m", "mypy", *options, source], tmp_path, MYPYPATH=str(REPO))
    found = re.findall(r"^user\.py:(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    assert sorted({int(line) for line, _ in found}) == list(range(5 + len(right), 5 + 2 * len(right))), done.stdout
    of_the_argument = [text for _, text in found if 'Unexpected keyword argument "unknown"' in text]
    assert len(of_the_argument) == len(wrong), done.stdout


# The pure wheel and the source distribution


def test_pure_wheel(tree, out):
    wheel = build("wheel", tree, out, FLASHCL_CUDA="0")
    version = re.search(r'^__version__ = "(.+)"', (tree / "flashcl/__init__.py").read_text(), re.MULTILINE)[1]
    assert wheel.name == f"flashcl-{version}-py3-none-any.whl"
    assert modules_of(wheel) == python_files(tree)
    assert "flashcl/triton_kernels/__init__.py" in modules_of(wheel)


def test_wheel_metadata(tree, out):
    wheel = zipfile.ZipFile(build("wheel", tree, out, FLASHCL_CUDA="0"))
    files = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "flashcl = flashcl.cli:main" in files["entry_points.txt"]
    assert files["LICENSE"] == (REPO / "LICENSE").read_text()
    assert "License-Expression: Apache-2.0" in files["METADATA"]
    assert "Requires-Dist: torch>=2.7\n" in files["METADATA"]


def test_sdist_is_enough_to_build_from(tree, out, tmp_path):
    sdist = build("sdist", tree, out)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert {p.name for p in (unpacked / "csrc").rglob("*")} == {p.name for p in (tree / "csrc").rglob("*")}
    wheel = build("wheel", unpacked, tmp_path / "wheel", FLASHCL_CUDA="0")
    assert modules_of(wheel) == python_files(tree)


# Machines that cannot build the extension


def test_auto_without_nvcc_builds_a_pure_wheel(tree, out, path_without_nvcc):
    wheel = build("wheel", tree, out, PATH=path_without_nvcc)
    assert wheel.name.endswith("-py3-none-any.whl")


def test_demanded_cuda_without_nvcc_fails_and_says_so(tree, out, path_without_nvcc):
    process = try_build("wheel", tree, out, PATH=path_without_nvcc, FLASHCL_CUDA="1")
    assert process.returncode != 0
    assert "FLASHCL_CUDA=1" in process.stderr and "nvcc was not found" in process.stderr


def test_auto_with_broken_nvcc_warns_and_leaves_the_extension_out(tree, out, path_with_broken_nvcc):
    process = try_build("wheel", tree, out, PATH=path_with_broken_nvcc)
    assert process.returncode == 0, process.stderr
    printed = process.stdout + process.stderr
    assert "no host compiler" in printed and "could not be built" in printed
    (wheel,) = out.iterdir()
    assert set(zipfile.ZipFile(wheel).namelist()) >= python_files(tree)
    assert not any("_C." in name for name in zipfile.ZipFile(wheel).namelist())


def test_demanded_cuda_with_broken_nvcc_fails(tree, out, path_with_broken_nvcc):
    process = try_build("wheel", tree, out, PATH=path_with_broken_nvcc, FLASHCL_CUDA="1")
    assert process.returncode != 0
    assert "flashcl._C, the CUDA kernels, could not be built" in process.stderr


@pytest.mark.parametrize("name, value", [("FLASHCL_CUDA", "yes"), ("FLASHCL_ARCHS", "9.0a")])
def test_wrong_build_variable_is_named(tree, out, path_with_broken_nvcc, name, value):
    process = try_build("wheel", tree, out, PATH=path_with_broken_nvcc, **{name: value})
    assert process.returncode != 0
    assert name in process.stderr and repr(value) in process.stderr


# The extension


@needs_nvcc
def test_extension_reports_how_it_was_built_and_needs_no_gpu(tree, out, tmp_path):
    wheel = build("wheel", tree, out, FLASHCL_CUDA="1", FLASHCL_ARCHS="80;89")  # no kernels: minutes
    assert "-cp310-abi3-" in wheel.name
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)

    code = "from flashcl import _C; print([_C.__file__, _C.build_info(), _C.device_count(), _C.device_status()])"
    printed = output_of(code, tmp_path, PYTHONPATH=str(site), CUDA_VISIBLE_DEVICES="")
    file, info, count, status = ast.literal_eval(printed)
    assert Path(file).is_relative_to(site)
    assert info["architectures"] == ["80", "89"]
    assert info["abi"] == "cp310-abi3"
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"]) and re.fullmatch(r"\d+\.\d+\.\d+", info["nanobind"])
    assert count == 0 and status != "no error"


@pytest.mark.parametrize("what", ["wheel", "editable"])
def test_only_where_nvcc_is_the_build_asks_for_cutlass(what, tmp_path):
    """A machine without nvcc builds with setuptools alone: the CUTLASS package brings a lot that it has no use for."""
    tree, folder = copy_of_repo(tmp_path / "tree"), tmp_path / "bin"
    folder.mkdir()
    ask = f"from setuptools import build_meta; print('ASKED', build_meta.get_requires_for_build_{what}())"

    def asked(**environment):
        lines = output_of(ask, tree, PATH=str(folder), **environment).splitlines()
        return ast.literal_eval(next(line for line in lines if line.startswith("ASKED")).removeprefix("ASKED"))

    assert asked() == []
    (folder / "nvcc").touch(mode=0o755)
    for mode in ("auto", "1"):
        assert {re.split(r"\W*>=", name)[0] for name in asked(FLASHCL_CUDA=mode)} == {"nanobind", "nvidia-cutlass"}
    assert asked(FLASHCL_CUDA="0") == []
