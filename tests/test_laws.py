"""The laws of the house, read from the source: who imports whom, and how long a file may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST, WIDEST = 600, 130  # lines of a file, characters of a line (pyproject.toml says so, too)

# Who may import what of flashcl, by longest matching prefix; `checks` is the common gate of all public functions.
MAY_IMPORT = {
    "flashcl.losses": {"flashcl.losses.common", "flashcl.engine", "flashcl.checks", "flashcl.dtypes"},
    "flashcl.engine": {"flashcl.engine", "flashcl.checks", "flashcl.dtypes"},
    "flashcl.engine.dispatch": {"flashcl.engine", "flashcl.backends", "flashcl.checks", "flashcl.dtypes"},
    "flashcl.backends": {"flashcl.backends.gemm", "flashcl.backends.tiled", "flashcl.engine.problem", "flashcl.triton_kernels", "flashcl._C"},
    "flashcl.backends.gemm": {"flashcl.backends.onednn"},
    "flashcl.backends.onednn": set(),
    "flashcl.reference": set(),
    "flashcl.exact_formulas": set(),
    "flashcl.checks": {"flashcl.dtypes"},
    "flashcl.dtypes": set(),
    "triton_kernels": {"triton_kernels"},  # installed as flashcl.triton_kernels, where it imports itself relatively
}
MAY_IMPORT_REFERENCE = ("flashcl.contract", "flashcl.cli", "flashcl.reference")  # and flashcl itself, when asked for it


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """The full names that a module imports, anywhere in it: `from a import b` gives a.b; import_module counts too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            name = node.args[0]
            if isinstance(name, ast.JoinedStr):  # f"flashcl.backends.{name}": what is fixed of it
                name = name.values[0]
            found |= {str(name.value)} if isinstance(name, ast.Constant) else {"<computed>"}
    return found


def under(name: str, prefixes) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def broken_laws(module: str, source: str, is_package: bool = False) -> list[str]:
    own = {name for name in imports(source, module, is_package) if name.split(".")[0] in ("flashcl", "triton_kernels")}
    broken = []
    law = max((prefix for prefix in MAY_IMPORT if under(module, [prefix])), key=len, default=None)
    if law:
        broken += [f"{module} imports {name}" for name in sorted(own) if not under(name.rstrip("."), MAY_IMPORT[law])]
    if module != "flashcl" and not under(module, MAY_IMPORT_REFERENCE):
        broken += [f"{module} imports {name}" for name in sorted(own) if under(name, ["flashcl.reference"])]
    return sorted(set(broken))


def library():
    """(module name, path) of every Python file that gets installed."""
    for folder in ("flashcl", "triton_kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_two_files_of_the_kernels_know_python():
    """module.cpp, which binds, and tensors.h, which takes tensors; none knows PyTorch."""
    headers = {path.name: re.findall(r"#include [<\"]([^>\"]+)", path.read_text()) for path in (ROOT / "csrc").iterdir()}
    knows = {name for name, found in headers.items() if any(h.startswith(("nanobind", "Python")) for h in found)}
    assert knows == {"module.cpp", "tensors.h"} and [n for n, h in headers.items() if "tensors.h" in h] == ["module.cpp"]
    assert not any(h.startswith(("torch", "ATen", "c10")) for found in headers.values() for h in found)


def test_there_is_a_library_to_look_at():
    names = {name for name, _ in library()}
    assert names >= {"flashcl", "flashcl.losses.info_nce", "flashcl.engine.ops", "flashcl.backends.torch"}
    assert "triton_kernels.sweep" in names


@pytest.mark.parametrize("module, path", list(library()), ids=[name for name, _ in library()])
def test_imports(module, path):
    assert broken_laws(module, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("flashcl.losses.new", "from flashcl.backends import torch"),
        ("flashcl.losses.new", "from flashcl.losses.info_nce import info_nce"),
        ("flashcl.losses.new", "from ..backends.triton import sweep"),
        ("flashcl.losses.new", "from flashcl import backends"),
        ("flashcl.losses.new", "import flashcl"),
        ("flashcl.engine.ops", "from flashcl import losses"),
        ("flashcl.engine.ops", "def f():\n    from ..losses.common import reduce"),
        ("flashcl.engine.ops", "from flashcl import reference"),
        ("flashcl.backends.cuda", "from flashcl.backends.torch import grad"),
        ("flashcl.backends.cuda", "from . import triton"),
        ("flashcl.backends.cuda", "from .triton import sweep"),
        ("flashcl.backends.cuda", "import importlib\nimportlib.import_module('flashcl.backends.torch')"),
        ("flashcl.backends.cuda", "from flashcl.engine.dispatch import choose"),
        ("flashcl.backends.gemm", "from flashcl.backends import torch"),
        ("flashcl.modules", "from flashcl.reference import info_nce"),
        ("flashcl.modules", "import flashcl.reference as dense"),
        ("flashcl.integrations.clip", "from flashcl import reference"),
        ("flashcl.reference", "from flashcl.losses.common import reduce"),
        ("triton_kernels.sweep", "from flashcl.engine.problem import CLASSES"),
        ("triton_kernels.sweep", "import flashcl"),
    ],
)
def test_a_broken_law_is_seen(module, source):
    assert len(broken_laws(module, source)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("flashcl.losses.new", "from flashcl import checks\nfrom flashcl.engine import dispatch\nimport torch"),
        ("flashcl.losses.new", "from flashcl.losses.common import reduce"),
        ("flashcl.engine.dispatch", "import importlib\nimportlib.import_module(f'flashcl.backends.{name}')"),
        ("flashcl.backends.triton", "from flashcl.backends.gemm import mm\nfrom flashcl.engine.problem import Problem"),
        ("flashcl.backends.triton", "from flashcl import triton_kernels\nfrom ..triton_kernels import sweep"),
        ("flashcl.contract", "from flashcl import reference\nimport flashcl"),
        ("flashcl.cli.check", "from flashcl import contract, reference"),
        ("triton_kernels.sweep", "from .tile import load\nfrom triton_kernels import tile\nimport triton, torch"),
    ],
)
def test_what_the_laws_allow(module, source):
    assert broken_laws(module, source) == []


def test_the_package_imports_reference_only_when_asked():
    tree = ast.parse((ROOT / "flashcl/__init__.py").read_text())
    tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    assert "flashcl.reference" not in imports(ast.unparse(tree), "flashcl", is_package=True)


# ---- csrc


def torch_headers(source: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]((?:torch|ATen|c10)[/.][^>"]*)[>"]', source, re.MULTILINE)


def sources():
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".hpp", ".cpp"))


def test_one_module_talks_to_torch_distributed():
    named = {m: {n for n in imports(p.read_text(), m) if under(n, ["torch.distributed"])} for m, p in library()}
    assert named.pop("flashcl.engine.ranks")
    assert set().union(*named.values()) == {"torch.distributed.ProcessGroup"}  # the type of an argument


def test_csrc_knows_no_torch():
    assert {path.name: torch_headers(path.read_text()) for path in sources()} == {path.name: [] for path in sources()}
    source = '#include <cuda.h>\n # include <torch/extension.h>\n#include "ATen/ATen.h"\n#include <c10/x.h>'
    assert torch_headers(source) == ["torch/extension.h", "ATen/ATen.h", "c10/x.h"]


# ---- what a file may be


def test_no_file_is_too_long():
    files = [*dict(library()).values(), *sources()]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_line_is_too_wide():
    files = [*dict(library()).values(), *sources(), *ROOT.glob("bench/*.py"), *ROOT.glob("examples/*.py")]
    lines = [(str(path.relative_to(ROOT)), line) for path in files for line in path.read_text().splitlines()]
    assert [(name, line) for name, line in lines if len(line) > WIDEST] == []


# ---- what importing does


def fresh(code: str) -> str:
    """Run code in a new process, away from the repository: what it sees is the installed package."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_flashcl_imports_no_backend():
    loaded = fresh("import sys, flashcl; print(*sys.modules)").split()
    assert "flashcl.losses.info_nce" in loaded
    unwanted = ["triton_kernels", "_C", "reference", "contract", "cli", "backends.triton", "backends.cuda"]
    assert [name for name in loaded if under(name, ["triton", *(f"flashcl.{end}" for end in unwanted)])] == []


def test_flashcl_works_without_triton():
    assert "ok" in fresh(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, flashcl\n"
        "x = torch.randn(5, 3, requires_grad=True)\n"
        "flashcl.info_nce(x, x, temperature=0.1).backward()\n"
        "try: flashcl.info_nce(x, x, temperature=0.1, backend='triton')\n"
        "except RuntimeError as error: print('ok', error)"
    )


def test_reference_is_an_attribute_that_loads_on_demand():
    code = "import sys, flashcl; before = 'flashcl.reference' in sys.modules; flashcl.reference.info_nce; print(before)"
    assert fresh(code).split() == ["False"]
